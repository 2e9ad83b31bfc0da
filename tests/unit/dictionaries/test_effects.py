"""Effects of features against full forwards, and whether a dictionary fits: each likely fault by the smallest example of it."""

import pytest
import torch
from tests.contracts.unchanged import unchanged
from tests.unit.dictionaries.test_examples import dictionary
from torch import nn

from lineament.core.checks import InputError
from lineament.dictionaries import ReLU, Steer, TopK, ablation_effects, fit_of, steer, steering_effects


@pytest.fixture(scope="module")
def model():
    from tests.contracts.language_models import tiny

    return tiny("gpt2")


def kl(clean, other):
    p, q = clean.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_steering_effects_are_those_of_steered_forwards(model, positions):
    ids = torch.randint(2, 50, (20, 6), generator=torch.Generator().manual_seed(5))
    sae = dictionary("transformer.h.0")
    with unchanged(model):
        found = steering_effects(model, sae, ids, latents=[3, 11, 40], strength=2.0, positions=positions)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[1]
        norm = (hidden[:, -1] if positions == "last" else hidden).norm(dim=-1).mean()
        torch.testing.assert_close(torch.tensor(found.typical_norm), norm)
        clean = model(ids).logits[:, -1]
        on = sae.encode(hidden[:, -1]) != 0
        for k, latent in enumerate((3, 11, 40)):
            with steer(model, Steer(sae, latent, add=2.0, unit=float(norm)), positions=positions):
                logits = model(ids).logits[:, -1]
            values = kl(clean, logits)
            torch.testing.assert_close(found.kl[k].double(), values.mean(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                found.logit_change[k], (logits - clean).abs().mean(), atol=1e-5, rtol=1e-4
            )
            for got, mask in ((found.kl_active[k], on[:, latent]), (found.kl_silent[k], ~on[:, latent])):
                torch.testing.assert_close(
                    got.double(), values[mask].mean(), atol=1e-5, rtol=1e-4, equal_nan=True
                )
    assert found.random_kl.shape == (3,) and 0 <= found.above <= 1
    again = steering_effects(model, sae, ids, latents=[3, 11, 40], strength=2.0, positions=positions)
    assert torch.equal(again.random_kl, found.random_kl)


def test_the_entropy_of_the_effect_is_that_of_its_shares():
    net = nn.Sequential(nn.Identity(), nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]))
    sae = ReLU(2, 2, site="0")
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(2))
    found = steering_effects(net, sae, torch.randn(5, 2), latents=[0, 1], typical_norm=1.0)
    torch.testing.assert_close(
        found.entropy, torch.tensor([0.0, 4.0]).log().nan_to_num(neginf=0.0), atol=1e-6, rtol=1e-6
    )


def test_ablation_is_the_feature_at_zero(model):
    ids = torch.randint(2, 50, (6, 7), generator=torch.Generator().manual_seed(5))
    sae = dictionary("transformer.h.0")
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[1]
        f = sae.encode(hidden)
        latents = f.sum((0, 1)).topk(4).indices.tolist()
        clean = model(ids).logits
        found = ablation_effects(model, sae, ids, {latent: [1, 4] for latent in latents})
        for latent in latents:
            with steer(model, Steer(sae, latent, scale=0.0), positions="all"):
                values = kl(clean, model(ids).logits)[[1, 4]]
            on = f[[1, 4], :, latent] != 0
            if not on.any():
                assert latent not in found
                continue
            assert found[latent] == pytest.approx(float(values[on].mean()), rel=1e-3, abs=1e-6)


def test_padded_contexts_and_latents_that_are_not_there_are_refused(model):
    sae = dictionary("transformer.h.0")
    ids = torch.ones(2, 4).long()
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    with pytest.raises(InputError, match="contexts: some are padded"):
        steering_effects(model, sae, padded)
    with pytest.raises(InputError, match=r"latents: got \[60\]"):
        steering_effects(model, sae, ids, latents=[60])


def planted(rows=600, d=32, count=60, on=3, seed=0, mean=0.0):
    """Sums of a few of many directions, and the TopK dictionary that knows these."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(count, d, generator=generator)
    atoms -= atoms.mean(1, keepdim=True)
    atoms /= atoms.norm(dim=1, keepdim=True)
    places = torch.stack([torch.randperm(count, generator=generator)[:on] for _ in range(rows)])
    x = (atoms[places] * (1 + torch.rand(rows, on, 1, generator=generator))).sum(1)
    b_dec = mean * torch.randn(d, generator=generator)
    sae = TopK(d, count, k=on, site="0")
    with torch.no_grad():
        sae.W_enc.copy_(atoms), sae.W_dec.copy_(atoms), sae.b_dec.copy_(b_dec - b_dec.mean())
    return x + sae.b_dec.detach(), sae.requires_grad_(False)


def likely(sae, x, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.Linear(x.shape[-1], 5))
    return fit_of(sae, net, x, **options)


def test_a_dictionary_that_fits_is_not_suspected():
    x, sae = planted(mean=0.5)
    found = likely(sae, x)
    assert found.fits and not found.likely
    assert found.fvu < 0.3 < found.chance_fvu
    assert found.kl < found.kl_ablated < 2 * found.kl_permuted
    assert found.l0 == 3.0


def test_each_fault_is_named():
    x, sae = planted(mean=0.5)
    wrong = ReLU(32, 60, site="0")
    wrong.load_state_dict(sae.state_dict())
    assert [each.split(":")[0] for each in likely(wrong, x).likely] == ["activation"]
    assert likely(sae, 10 * x).likely[0].startswith("scale: of activations times 0.1")
    outliers = x.clone()
    outliers[::20] = 80 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    assert any(
        each.startswith("special tokens: without the 30 of 600") for each in likely(sae, outliers).likely
    )
    shifted = x + 5 * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(1))
    assert any("center_writing_weights" in each for each in likely(sae, shifted).likely)


def test_another_layer_is_named(model):
    ids = torch.randint(2, 50, (30, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[1][:, 1:].flatten(0, 1)
        basis = torch.linalg.eigh(torch.cov(x.T)).eigenvectors.flip(1).T
        # The directions of one layer, half of them: of others they leave much.
        both = torch.cat([basis[:12], -basis[:12]])
        sae = ReLU(24, 24, site="transformer.h.1")
        sae.W_enc.copy_(both), sae.W_dec.copy_(both), sae.b_dec.copy_(x.mean(0))
    found = fit_of(sae.requires_grad_(False), model, ids)
    assert any(each.startswith("layer: at 'transformer.h") for each in found.likely), found
    sae.site = "transformer.h.0"
    assert not any(each.startswith("layer") for each in fit_of(sae, model, ids).likely)
    sae.info["model"], model.config._name_or_path = "pythia-70m", "gpt2"
    try:
        assert "model: it was made for 'pythia-70m'" in fit_of(sae, model, ids).likely[0]
    finally:
        model.config._name_or_path = ""


def test_another_width_is_another_model(model):
    with pytest.raises(InputError, match="of activations with 7 numbers, but 24 pass"):
        fit_of(TopK(7, 9, k=1, site="transformer.h.0"), model, torch.ones(4, 4).long())
