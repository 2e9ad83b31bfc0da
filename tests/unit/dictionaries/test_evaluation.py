"""What a dictionary keeps: limiting cases, independence of batches, and the numbers that plain forwards give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.contracts.unchanged import unchanged
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.core.codes import Codes
from lineament.core.sites.hooks import replace, tap
from lineament.dictionaries.autoencoders import Neurons, ReLU, TopK
from lineament.dictionaries.evaluation import evaluate
from lineament.dictionaries.harvest import harvest
from lineament.dictionaries.metrics import ErrorMeter, atom_overlap, error_metrics, usage
from lineament.dictionaries.trainer import initialise

SITE = "transformer.h.1"


@pytest.fixture(scope="module")
def gpt() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3,
        n_embd=8,
        n_head=2,
        vocab_size=30,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.4,
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    found = torch.randint(1, 30, (10, 7), generator=torch.Generator().manual_seed(1))
    found[:, 0] = 0
    return found


@pytest.fixture(scope="module")
def sae(gpt: Any, ids: Tensor) -> TopK:
    made = TopK(8, 20, k=3, site=SITE).double()
    initialise(made, harvest(gpt, ids, site=SITE).rows_of(torch.arange(10)).x)
    return made


def test_the_identity_recovers_everything(gpt: Any, ids: Tensor) -> None:
    found = evaluate(gpt, Neurons(8, site=SITE).double(), ids, mode="activation")
    assert found.recovered_mean == pytest.approx(1) and found.recovered_zero == pytest.approx(1)
    assert found.kl == pytest.approx(0, abs=1e-12) and found.fvu == pytest.approx(0, abs=1e-20)
    assert found.agreement == 1 and found.l0 == 8 and found.tokens == 60 and found.sequences == 10
    assert found.accuracy == found.accuracy_substituted and found.kl_random == pytest.approx(0, abs=1e-12)


def test_the_ablation_s_value_recovers_nothing(gpt: Any, ids: Tensor) -> None:
    constant = ReLU(8, 3, site=SITE).double()
    found = evaluate(gpt, constant, ids, mode="activation")
    assert found.recovered_zero == pytest.approx(0, abs=1e-12) and found.dead == 1 and found.l0 == 0
    with torch.no_grad():
        constant.b_dec.copy_(harvest(gpt, ids, site=SITE).rows_of(torch.arange(10)).x.mean(0))
    found = evaluate(gpt, constant, ids, mode="activation")
    assert found.recovered_mean == pytest.approx(0, abs=1e-9) and found.fvu == pytest.approx(1)


@pytest.mark.parametrize("mode", ["activation", "gradient"])
def test_the_numbers_are_those_of_plain_forwards(gpt: Any, ids: Tensor, sae: TopK, mode: str) -> None:
    found = evaluate(gpt, sae, ids, mode=mode)
    rows = harvest(gpt, ids, site=SITE, gradient="sampled").rows_of(torch.arange(10))
    codes = sae.codes(rows.x, gradient=rows.gradient if mode == "gradient" else None)
    expected = {**error_metrics(rows.x, sae.decode(codes)), **usage(codes)}
    for name in ("fvu", "nmse", "mse", "cosine", "shrinkage", "l0", "dead"):
        assert getattr(found, name) == pytest.approx(expected[name]), name

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1:] = sae.decode(codes).detach().reshape(10, 6, 8)
        return x

    with torch.no_grad():
        clean = gpt(ids).logits
        with replace(gpt, {SITE: put}):
            other = gpt(ids).logits
    ce = [F.cross_entropy(each[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten()) for each in (clean, other)]
    kl = F.kl_div(other.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none").sum(-1)[
        :, 1:
    ]
    assert found.ce == pytest.approx(float(ce[0])) and found.ce_substituted == pytest.approx(float(ce[1]))
    assert found.kl == pytest.approx(float(kl.mean()))
    assert found.errors["kl"] == pytest.approx(float(kl.mean(1).std() / 10**0.5))
    assert found.mode == mode and found.gradient == ("sampled" if mode == "gradient" else None)


def test_batches_and_padding_do_not_matter(gpt: Any, ids: Tensor, sae: TopK, monkeypatch: Any) -> None:
    whole = evaluate(gpt, sae, ids, mode="gradient", gradient="labels")
    padded, mask = torch.full((10, 11), 3), torch.zeros(10, 11, dtype=torch.long)
    padded[:, 2:9], mask[:, 2:9] = ids, 1
    monkeypatch.setattr("lineament.dictionaries.evaluation.TOKENS_AT_ONCE", 25)
    data = {"input_ids": padded, "attention_mask": mask}
    parts = evaluate(gpt, sae, data, mode="gradient", gradient="labels")
    for name in (
        "ce",
        "ce_substituted",
        "ce_zero",
        "kl",
        "fvu",
        "l0",
        "accuracy",
        "agreement",
        "recovered_zero",
    ):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-8), name
    assert parts.tokens == whole.tokens


def test_layers_below_the_site_run_once_and_the_model_is_unchanged(gpt: Any, ids: Tensor, sae: TopK) -> None:
    calls = {"transformer.h.0": 0, "transformer.h.2": 0}

    def counting(name: str) -> Any:
        def see(_: Tensor) -> None:
            calls[name] += 1

        return see

    small = evaluate(gpt, [sae, sae], ids, mode="gradient")
    with unchanged(gpt), tap(gpt, {f"{name}.ln_1": counting(name) for name in calls}):
        again = evaluate(gpt, [sae, sae], ids, mode="gradient")
    assert again[0].kl == again[1].kl == small[0].kl
    # Below: once, and once to learn how long a sequence is. Above: clean, with gradient, two ablations, and two runs a dictionary.
    assert calls == {"transformer.h.0": 2, "transformer.h.2": 8}


def test_images_and_maps() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    data = (torch.randn(12, 1, 5, 5), torch.arange(12) % 3)
    found = evaluate(net, Neurons(4, k=2, site="1"), data, mode="activation")
    assert found.tokens == 12 * 9 and found.sequences == 12 and 0 < found.kl < 5
    with torch.no_grad():
        assert found.accuracy == pytest.approx(float((net(data[0]).argmax(1) == data[1]).double().mean()))
    unlabelled = evaluate(net, Neurons(4, k=2, site="1"), data[0], mode="activation")
    assert unlabelled.ce != unlabelled.ce and unlabelled.kl == pytest.approx(found.kl)


def test_meters_add_up() -> None:
    x, y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)) + 5
    whole, parts = error_metrics(x, y), [ErrorMeter(), ErrorMeter()]
    for i, (a, b) in enumerate(zip(x.split(7), y.split(7))):
        parts[i % 2].update(a, b)
    for name, value in (parts[0] + parts[1]).compute().items():
        assert value == pytest.approx(whole[name]), name


def test_shrinkage_is_the_factor_that_is_missing() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert error_metrics(x, x / 2)["shrinkage"] == pytest.approx(2)


def test_zeros_are_not_on() -> None:
    """A pick of value 0 is no firing."""
    found = usage(Codes(torch.tensor([[0, 1], [0, 2]]), torch.tensor([[1.0, 0.0], [2.0, 3.0]]), 4))
    assert found["l0"] == 1.5 and found["density"].tolist() == [1.0, 0.0, 0.5, 0.0] and found["dead"] == 0.5


def test_split_and_suppressing_features() -> None:
    sae = ReLU(2, 3)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]]))
        sae.W_enc.copy_(torch.tensor([[0.6, -1.0], [0.8, 0.6], [0.0, -1.0]]))
    nearest, suppressing = atom_overlap(sae, torch.ones(3, dtype=torch.bool))
    assert nearest == pytest.approx((0.8 + 0.8 + 0.0) / 3) and suppressing == pytest.approx(1 / 3)


def test_refused(gpt: Any, ids: Tensor, sae: TopK) -> None:
    for dictionary, options, match in (
        (sae, {"mode": "both"}, "mode: got 'both'"),
        (Neurons(8, site=SITE), {"mode": "gradient"}, "Neurons does not select by gradient"),
        (sae, {"mode": "gradient", "gradient": "kl"}, "at its minimum"),
        (Neurons(8), {"mode": "activation"}, "does not say where it sits"),
        (Neurons(5, site=SITE), {"mode": "activation"}, "expected a last dimension of 5"),
        ([], {"mode": "activation"}, "dictionary: got none"),
    ):
        with pytest.raises(InputError, match=match):
            evaluate(gpt, dictionary, ids, **options)
