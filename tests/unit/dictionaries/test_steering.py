"""Steering: with and without a cache alike, nothing moves that is not asked to, nothing is left behind."""

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture
from lineament.core.sites.families import site_of_hook
from lineament.dictionaries import BatchTopK, Neurons, TopK, as_bias, splice, steer
from lineament.dictionaries.steering import Steer


class Units:
    def __init__(self, typical_norm, maxima):
        self.typical_norm, self.maxima = typical_norm, torch.tensor(maxima)


def dictionary(d, width, k, site, seed=0):
    made = TopK(d, width, k=k, site=site)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.W_dec.div_(made.W_dec.norm(dim=1, keepdim=True))
    return made


@pytest.fixture(scope="module")
def models():
    from tests.contracts.language_models import tiny

    return {family: tiny(family) for family in ("gpt2", "llama", "gemma3")}


EDITS = {"add": {"add": 8.0, "unit": 3.0}, "clamp": {"clamp": 4.0, "unit": 5.0}, "scale": {"scale": 0.0}}
MASK = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "positions", ["generated", "all", "last", MASK], ids=["generated", "all", "last", "mask"]
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_with_and_without_cache_alike(models, family, positions):
    model = models[family]
    sae = dictionary(24, 64, 8, site_of_hook("blocks.0.hook_resid_post", model))
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    asked = {
        "attention_mask": mask,
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 2,
    }
    with unchanged(model):
        for edit in EDITS.values():
            for beams in (1, 2):
                found = []
                for cache in (True, False):
                    with steer(model, Steer(sae, 7, **edit), positions=positions):
                        found.append(model.generate(ids, use_cache=cache, num_beams=beams, **asked))
                assert torch.equal(*found)


def test_an_assistant_changes_nothing(models):
    from tests.contracts.language_models import build

    model, assistant = models["llama"], build(models["llama"].config, std=0.2)
    sae = dictionary(24, 64, 8, "model.layers.0")
    ids = torch.randint(3, 50, (1, 6), generator=torch.Generator().manual_seed(3))
    asked = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 2,
        "attention_mask": torch.ones_like(ids),
    }
    for edit in EDITS.values():
        with unchanged(model), steer(model, Steer(sae, 7, **edit)):
            assert torch.equal(
                model.generate(ids, **asked), model.generate(ids, assistant_model=assistant, **asked)
            )


def test_which_tokens_are_steered(models):
    model = models["gpt2"]
    site = "transformer.h.0"
    sae = dictionary(24, 64, 8, site)
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(3))
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for positions, want in {
        "all": torch.ones(2, 6),
        "last": torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1.0]]),
        "generated": torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1.0]]),
    }.items():
        with torch.no_grad(), capture(model, site) as acts:
            model(ids, attention_mask=padding)
            before = acts[site]
            with (
                steer(model, Steer(sae, 7, add=2.0, unit=3.0), positions=positions),
                capture(model, site) as inner,
            ):
                model(ids, attention_mask=padding)
            moved = inner[site] - before
        torch.testing.assert_close(moved.norm(dim=-1), 6.0 * want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("edit", [{"scale": 1.0}, {"clamp": 1.0, "unit": None}], ids=["scale", "clamp"])
def test_the_present_value_changes_no_bit(edit):
    sae = dictionary(6, 12, 3, "0")
    x = torch.cat([torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), -torch.zeros(1, 6)])
    net = nn.Sequential(nn.Identity())
    clamped = 0
    with torch.no_grad():
        values = sae.encode(x)
        for row in range(len(x)):
            latent = int(values[row].argmax())
            value = float(sae.encode(x[row : row + 1])[0, latent])
            chosen = {**edit, "unit": value} if "clamp" in edit else edit
            if value == 0:
                continue
            clamped += 1
            with steer(net, Steer(sae, latent, **chosen)):
                out = net(x[row : row + 1])
            assert out.numpy().tobytes() == x[row : row + 1].numpy().tobytes()
        with steer(net, Steer(sae, 0, scale=1.0)):
            assert net(x).numpy().tobytes() == x.numpy().tobytes()
    assert clamped > 30


def test_the_error_of_the_dictionary_stays():
    sae = dictionary(6, 12, 3, "0")
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    f = sae.encode(x)
    latent = int(f.sum(0).argmax())
    net = nn.Sequential(nn.Identity())
    with torch.no_grad(), steer(net, Steer(sae, latent, clamp=2.0), units=Units(1.0, [3.0] * 12)):
        out = net(x)
    torch.testing.assert_close(out, x + (6.0 - f[:, latent, None]) * sae.atoms[latent])


def test_units_are_the_typical_norm_and_the_maximum():
    sae, net = Neurons(3, site="0"), nn.Sequential(nn.Identity())
    units = Units(5.0, [2.0, 0.0, 1.0])
    x = torch.tensor([[1.0, 1.0, 1.0]])
    with steer(net, [Steer(sae, 0, clamp=3.0), Steer(sae, 1, add=2.0)], units=units):
        assert net(x).tolist() == [[6.0, 11.0, 1.0]]
    with pytest.raises(InputError, match="never on"), steer(net, Steer(sae, 1, clamp=1.0), units=units):
        pass
    for edit in ({"add": 1.0}, {"clamp": 1.0}):
        with pytest.raises(InputError, match="max_examples"), steer(net, Steer(sae, 1, **edit)):
            pass


def test_maps_vectors_and_heads(models):
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    sae = Neurons(4, site="0")
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        plain = conv[0](x)
        with steer(conv, Steer(sae, 2, add=1.5, unit=2.0)), capture(conv, "0") as acts:
            conv(x)
    moved = acts["0"] - plain
    torch.testing.assert_close(moved[:, 2], torch.full((2, 5, 5), 3.0))
    assert bool((moved[:, [0, 1, 3]] == 0).all())
    model = models["gpt2"]
    ids = torch.tensor([[3, 4, 5]])
    by_head, by_input = (
        Neurons(24, site="transformer.h.0.attn:z"),
        Neurons(24, site="transformer.h.0.attn.c_proj:in"),
    )
    found = []
    for each in (by_head, by_input):
        with torch.no_grad(), steer(model, Steer(each, 13, scale=5.0), positions="all"):
            found.append(model(ids).logits)
    assert torch.equal(*found)


def test_as_bias_is_the_constant_addition(models):
    model = models["gpt2"]
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(3))
    hooks = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
    for hook in hooks:
        sae = dictionary(24, 64, 8, site_of_hook(f"blocks.1.{hook}", model))
        edit = Steer(sae, 7, add=2.0, unit=1.5)
        with unchanged(model), torch.no_grad():
            copy = as_bias(model, edit)
            with steer(model, edit, positions="all"):
                want = model(ids).logits
            torch.testing.assert_close(copy(ids).logits, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="only add"):
        as_bias(model, Steer(sae, 7, scale=0.0))
    with pytest.raises(InputError, match="no bias"):
        as_bias(models["llama"], Steer(Neurons(24, site="model.layers.0"), 1, add=1.0, unit=1.0))


def test_gone_after_an_exception_and_there_in_training(models):
    model = models["gpt2"]
    sae = Neurons(24, site="transformer.h.0")
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match="stop"),
        steer(model, Steer(sae, 1, add=1.0, unit=1.0)),
    ):
        raise RuntimeError("stop")
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with steer(net, Steer(Neurons(2, site="0"), 0, scale=3.0)):
        net(torch.ones(1, 2)).sum().backward()
    assert net[0].weight.grad[0, 0] == 3.0 * net[1].weight[0, 0]


def test_what_cannot_be_steered_is_refused():
    sae, net = dictionary(6, 12, 3, "0"), nn.Sequential(nn.Identity())
    with pytest.raises(InputError, match=r"latent: got 12.*\[0, 11\]"):
        Steer(sae, 12, add=1.0)
    with pytest.raises(InputError, match="got add and scale"):
        Steer(sae, 1, add=1.0, scale=1.0)
    with (
        pytest.raises(InputError, match="twice"),
        steer(net, [Steer(sae, 1, scale=0.0), Steer(sae, 1, scale=2.0)]),
    ):
        pass
    with pytest.raises(InputError, match="expected 6 features"), steer(net, Steer(sae, 1, scale=0.0)):
        net(torch.ones(2, 5))
    with (
        pytest.raises(InputError, match="other rows"),
        steer(net, Steer(BatchTopK(6, 12, k=2, site="0"), 1, scale=0.0)),
    ):
        pass
    with pytest.raises(InputError, match="'00' is no site"), splice(net, TopK(6, 12, k=2, site="00")):
        pass
    with pytest.raises(InputError, match="does not say where"), splice(net, TopK(6, 12, k=2)):
        pass


def test_a_training_under_it_is_steered_at_every_step_and_ends_bare():
    """In a Hugging Face ``Trainer``: the weights are those of a model whose feature was turned off by hand, and no hook stays."""
    from transformers import Trainer, TrainingArguments

    class Net(nn.Module):
        def __init__(self, off):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.head, self.off = nn.Linear(4, 4), nn.Linear(4, 2), off

        def forward(self, x, labels):
            h = self.inner(x)
            if self.off:
                h = torch.cat([h[:, :1], torch.zeros_like(h[:, 1:2]), h[:, 2:]], 1)
            logits = self.head(h)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 2)} for i in range(32)]

    def trained(net, folder):
        plan = TrainingArguments(folder, max_steps=5, per_device_train_batch_size=8, learning_rate=0.05, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=3)  # fmt: skip
        Trainer(net, plan, train_dataset=data).train()  # pyright: ignore[reportArgumentType]

    import tempfile

    by_hand, ours, plain = Net(True), Net(False), Net(False)
    with tempfile.TemporaryDirectory() as folder:
        trained(by_hand, folder)
        with steer(ours, Steer(Neurons(4, site="inner"), 1, scale=0.0)):
            trained(ours, folder)
        trained(plain, folder)
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(value, ours.state_dict()[name], atol=1e-6), name
    assert not torch.allclose(plain.head.weight, ours.head.weight, atol=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.modules())
