"""Metrics, agreement of maps, texts and what results can do."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.language_models import prompts, tiny

from lineament.core.checks import InputError
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.metrics import (
    kl_divergence,
    logit_difference,
    probability,
    probability_difference,
    single_tokens,
)
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.patching.result import fidelity

METRIC = logit_difference([5, 6, 7], [8, 9, 10])


def test_metrics_are_their_formulas():
    logits = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0)).double()
    last = logits[:, -1]
    right, wrong = torch.tensor([[0, 1]] * 4), torch.tensor([2, 3, 4, 5])
    want = last[:, :2].mean(1) - last[range(4), wrong]
    torch.testing.assert_close(logit_difference(right, wrong)(logits), want)
    torch.testing.assert_close(probability(right)(logits), last.softmax(-1)[:, :2].sum(1))
    torch.testing.assert_close(probability(wrong, log=True)(logits), last.log_softmax(-1)[range(4), wrong])
    mask = torch.zeros(4, 7, dtype=torch.bool)
    mask[:, 3:] = True
    torch.testing.assert_close(probability_difference(mask)(logits), 2 * last.softmax(-1)[:, 3:].sum(1) - 1)
    other = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).double()
    p = other.softmax(-1)
    torch.testing.assert_close(kl_divergence(other)(logits), (p * (p.log() - last.log_softmax(-1))).sum(-1))


def test_fidelity_by_hand():
    a, b = torch.tensor([[1.0, 5.0, 2.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    found = fidelity({"x": a}, {"x": b}, k=1)["x"]
    assert found.pearson == pytest.approx(5 / 70**0.5) and found.spearman == pytest.approx(0.8)
    assert found.rmse == pytest.approx((10 / 4) ** 0.5) and found.overlap == 0.0 and found.entries == 4
    import math

    assert math.isnan(fidelity({"x": torch.zeros(1, 3)}, {"x": torch.ones(1, 3)})["x"].pearson)


class Words:
    """A tokenizer of one word a token; `AND` is two."""

    pad_token_id = None
    eos_token_id = 1
    unk_token_id = None

    def __call__(self, text, add_special_tokens=True):
        ids = [
            3 + sum(map(ord, word)) % 47 for word in text.split() for _ in range(2 if word == "AND" else 1)
        ]
        return {"input_ids": ids}

    def convert_ids_to_tokens(self, ids):
        return [f"<{i}>" for i in ids]


def test_texts_are_tokenised_padded_and_refused_with_both_tokenisations():
    model = tiny("gpt2")
    clean, corrupt = ["a b c d e", "f g h i j k"], ["a b x d e", "f g h y j k"]
    metric = logit_difference([5, 6], [8, 9])
    found = activation_patching(model, clean, corrupt, metric, sites="resid_pre", tokenizer=Words())
    assert (
        found.scores["resid_pre"].shape == (2, 6) and found.per_example["resid_pre"][0, :, 0].abs().max() == 0
    )
    assert len(found.labels) == 6
    alone = activation_patching(
        model,
        clean[:1],
        corrupt[:1],
        logit_difference([5], [8]),
        sites="resid_pre",
        tokenizer=Words(),
        normalise=False,
    )
    both = activation_patching(
        model, clean, corrupt, metric, sites="resid_pre", tokenizer=Words(), normalise=False
    )
    torch.testing.assert_close(
        both.per_example["resid_pre"][0, :, 1:], alone.per_example["resid_pre"][0], atol=1e-4, rtol=1e-4
    )
    with pytest.raises(InputError, match=r"pair 0 has 5 and 6 tokens[\s\S]*<\d+>[\s\S]*<\d+>"):
        activation_patching(model, clean, ["a b AND d e", corrupt[1]], metric, tokenizer=Words())
    with pytest.raises(InputError, match="is 2 tokens"):
        single_tokens(Words(), ["AND"])
    assert single_tokens(Words(), ["b"]).tolist() == [3 + 98 % 47]


def test_results_say_what_is_greatest_and_draw_themselves():
    model, (clean, corrupt) = tiny("gpt2"), prompts()
    result = relevance_patching(model, clean, corrupt, METRIC, sites=["resid_pre", "z"])
    top = result.top(4)
    every = torch.cat([s.flatten() for s in result.scores.values()]).abs().sort(descending=True).values
    assert [abs(node.score) for node in top] == pytest.approx(every[:4].tolist())
    node = top[0]
    at = (node.layer, node.position) if node.unit is None else (node.layer, node.position, node.unit)
    assert float(result.scores[node.kind][at]) == node.score
    assert result.map("z").shape == (2, 4)
    for kind in ("resid_pre", "z"):
        assert result.plot(kind=kind).get_ylabel() == "layer"
    import json

    assert json.loads(json.dumps(result.to_dict()))["scores"]["z"][0][0][0] == float(
        result.scores["z"][0, 0, 0]
    )
