"""ReAGent's recursion, soft and hard faithfulness, and the baselines against the numbers of the official classes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.golden.common import files
from torch import nn

from lineament.explain.tokens.attention import from_attention
from lineament.explain.tokens.faithfulness import (
    exact_soft_faithfulness,
    hard_faithfulness,
    soft_faithfulness,
)
from lineament.explain.tokens.gradients import through_embeddings
from lineament.explain.tokens.methods import attribute_tokens
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.options import ReagentOptions, Script
from lineament.explain.tokens.recursion import reagent
from lineament.explain.tokens.results import normalized

TOLERANCE = {"rtol": 0.0, "atol": 1e-10}
FILES = files("reagent")


class Toy(nn.Module):
    """logits = tanh(Σ_t c_t E[ids_t]) W + b, the language model of the golden files."""

    def __init__(self, arrays):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(arrays["E"], freeze=False)
        self.c, self.W, self.b = (nn.Parameter(arrays[k]) for k in "cWb")

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids):
        return torch.einsum("t,btd->bd", self.c, self.words(input_ids)).tanh() @ self.W + self.b


def load(path: Path):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path, allow_pickle=False).items()}


def settings(path: Path):
    found = json.loads((path.parent / "hyperparameters.json").read_text())
    return found[path.stem]


def kind(path: Path) -> str:
    if path.name == "hyperparameters.json":
        return "settings"
    arrays = np.load(path, allow_pickle=False).files
    for name, needed in {
        "recursion": {"init_logit", "U", "replace_ids", "stop_fill_ids", "stop_hit"},
        "soft": {"U_suff", "U_comp", "hell_ns"},
        "exact": {"hellinger_ENS", "code_ENS"},
        "hard": {"norm_suff", "norm_comp", "ratio"},
        "attributions": {"attn", "grad_l2", "ig_exact"},
    }.items():
        if needed <= set(arrays):
            return name
    return "unknown"


def of(wanted: str):
    return [pytest.param(p, id=p.stem) for p in FILES if kind(p) == wanted]


def test_every_file_is_known():
    assert [p.name for p in FILES if kind(p) == "unknown"] == []


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("path", of("recursion"))
def test_recursion(path, as_function):
    a, h = load(path), settings(path)
    toy = Toy(a)
    model = (lambda ids: toy(ids).detach().softmax(1)) if as_function else toy
    steps, probes = a["stop_hit"].shape
    expected_stop = bool(a["stop_mask"].any())
    for lookahead in (None, 1, 3):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = reagent(
                model,
                a["input_ids"],
                target=int(a["target_id"]),
                probes=h["B"],
                options=ReagentOptions(
                    script=Script(a["init_logit"], a["U"], a["replace_ids"], a["stop_fill_ids"]),
                    ratio=h["replacing_ratio"],
                    keep=h["keep_top_n"],
                    top_k=h["stop_top_k"],
                    max_steps=h["max_steps"],
                    overlap=h["overlap_threshold"],
                    lookahead=lookahead,
                    trace=True,
                ),
            )
        assert found.n_steps == int(a["n_steps"]) == steps and found.probes.shape[0] == probes
        torch.testing.assert_close(found.history, a["scores"], **TOLERANCE)
        before = torch.cat([torch.zeros(1, probes, dtype=torch.bool), a["stop_hit"].cumsum(0).bool()[:-1]])
        assert torch.equal(found.hits, a["stop_hit"] & ~before)
        assert torch.equal(found.stopped, a["stop_mask"]) and found.converged == expected_stop
        mean = a["mean_importance"] if expected_stop else a["fallback_mean_all_probes"]
        torch.testing.assert_close(found.scores, mean, **TOLERANCE)
        assert torch.equal(found.probes.topk(h["keep_top_n"], dim=1).indices, a["pos_top_n"])
        assert list(found.rationale) == a["rationale_pos"].tolist()
        assert any("no probe passed" in str(w.message) for w in said) == (not expected_stop)


@pytest.mark.parametrize("path", of("soft"))
def test_soft_faithfulness(path):
    a = load(path)
    for prefix, suff0, distance in (
        ("soft", "code_suff0", "squared_official"),
        ("hell", "hell_suff0", "hellinger"),
    ):
        found = soft_faithfulness(
            Toy(a),
            a["input_ids"],
            a["importance"],
            distance=distance,
            uniforms=(a["U_suff"][None], a["U_comp"][None]),
        )
        assert found.n_samples == 1
        for ours, theirs in (
            (found.raw_sufficiency, f"{prefix}_suff"),
            (found.raw_comprehensiveness, f"{prefix}_comp"),
            (found.sufficiency, f"{prefix}_ns"),
            (found.comprehensiveness, f"{prefix}_nc"),
        ):
            torch.testing.assert_close(ours, a[theirs], **TOLERANCE)
        assert abs(found.zero_sufficiency - float(a[suff0])) < 1e-10


@pytest.mark.parametrize("path", of("soft"))
def test_distributions(path):
    a = load(path)
    face = NextToken(Toy(a))
    e_rows = a["input_ids"][None]
    for keep, name in (
        (a["U_suff"] < a["importance"][:, None], "p_suff"),
        (a["U_comp"] < 1 - a["importance"][:, None], "p_comp"),
        (torch.zeros_like(a["U_suff"]), "p_zero"),
        (torch.ones_like(a["U_suff"]), "p_orig"),
    ):
        scores, _, _ = through_embeddings(face, e_rows, 0, lambda e, columns, keep=keep: e * keep)
        torch.testing.assert_close(scores.softmax(1)[0], a[name], **TOLERANCE)


@pytest.mark.parametrize("path", of("exact"))
def test_exact_expectation(path):
    a = load(path)
    for prefix, distance in (("hellinger", "hellinger"), ("code", "squared_official")):
        found = exact_soft_faithfulness(Toy(a), a["input_ids"], a["importance"], distance=distance)
        for ours, theirs in (
            ("raw_sufficiency", "ES"),
            ("sufficiency", "ENS"),
            ("raw_comprehensiveness", "EC"),
            ("comprehensiveness", "ENC"),
            ("zero_sufficiency", "S0"),
        ):
            assert abs(found[ours] - float(a[f"{prefix}_{theirs}"])) < 1e-10


@pytest.mark.parametrize("path", of("hard"))
def test_hard_ratio(path):
    a = load(path)
    found, rooted = (
        hard_faithfulness(
            Toy(a), a["input_ids"], a["importance"], ratios=[float(a["ratio"])], distance=distance
        )
        for distance in ("squared_official", "hellinger")
    )
    torch.testing.assert_close(found["sufficiency"][0], a["norm_suff"], **TOLERANCE)
    # The official hard comprehensiveness takes the root of its distance and divides it by one without the root.
    mixed = rooted["raw_comprehensiveness"][0] / (1 - found["zero_sufficiency"])
    torch.testing.assert_close(mixed, a["norm_comp"], **TOLERANCE)


@pytest.mark.parametrize("path", of("attributions"))
def test_attributions(path):
    a = load(path)
    for how in ("last", "all", "rollout"):
        raw = from_attention(a["attn"], how)
        torch.testing.assert_close(raw, a[f"attn_{how}_raw"], **TOLERANCE)
        torch.testing.assert_close(normalized(raw, "softmax"), a[f"attn_{how}_softmax"], **TOLERANCE)
    for method, name, options in (
        ("grad_norm", "grad_l2", {}),
        ("input_x_grad", "input_x_grad", {}),
        ("integrated_gradients", "ig_101_zero_baseline", {}),
        ("integrated_gradients", "ig_exact", {"rule": "gauss", "steps": 64}),
    ):
        found = attribute_tokens(Toy(a), a["input_ids"], target=int(a["target_id"]), method=method, **options)
        torch.testing.assert_close(found.scores, a[name], **TOLERANCE)
        assert abs(np.log(found.probability) - float(a["logp_input"])) < 1e-10
    assert abs(float(a["ig_exact"].sum()) - float(a["logp_input"] - a["logp_zero"])) < 1e-9
