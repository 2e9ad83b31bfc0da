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

from lineament.explain.tokens import Script, reagent

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
                None,
                a["input_ids"],
                int(a["target_id"]),
                script=Script(a["init_logit"], a["U"], a["replace_ids"], a["stop_fill_ids"]),
                ratio=h["replacing_ratio"],
                keep=h["keep_top_n"],
                top_k=h["stop_top_k"],
                probes=h["B"],
                max_steps=h["max_steps"],
                overlap=h["overlap_threshold"],
                lookahead=lookahead,
                trace=True,
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
