"""ReAGent's recursion, soft and hard faithfulness, and the baselines against the numbers of the official classes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor, nn

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

DISTANCES = {"official": "squared_official", "code": "squared_official", "hellinger": "hellinger"}
EXACT = {"per_mask": exact_soft_faithfulness}
QUANTITIES = {
    "ES": "raw_sufficiency",
    "ENS": "sufficiency",
    "EC": "raw_comprehensiveness",
    "ENC": "comprehensiveness",
    "S0": "zero_sufficiency",
}
SIZES = {"V": ("E", 0), "d": ("E", 1), "T": ("input_ids", 0), "B": ("init_logit", 0)}


class Toy(nn.Module):
    """logits = tanh(Σ_t c_t E[ids_t]) W + b, the language model of the files."""

    def __init__(self, file: Scope):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(file.input("E"), freeze=False)
        self.c, self.W, self.b = (nn.Parameter(file.input(k)) for k in "cWb")

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids):
        return torch.einsum("t,btd->bd", self.c, self.words(input_ids)).tanh() @ self.W + self.b


def explained(file: File, model: Any, script: Script, max_steps: int, **options: Any) -> Any:
    return reagent(
        model,
        file.input("input_ids"),
        target=int(file.input("target_id")),
        probes=file["n_probes"],
        options=ReagentOptions(
            script=script,
            ratio=file["replacing_ratio"],
            keep=file["keep_top_n"],
            top_k=file["stop_top_k"],
            max_steps=max_steps,
            overlap=file["overlap_threshold"],
            trace=True,
            **options,
        ),
    )


def check_recursion(file: File) -> None:
    toy = Toy(file)
    assert (file["vocab_size"], file["dim"]) == tuple(toy.words.weight.shape) and file["length"] == len(toy.c)
    draws = [file.input(key) for key in ("U", "replace_ids", "stop_fill_ids")]
    script = Script(file.input("init_logit"), *draws)
    for model in (toy, lambda ids: toy(ids).detach().softmax(1)):
        for lookahead in (None, 1, 3):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = explained(file, model, script, file["max_steps"], lookahead=lookahead)
            stopped = bool(found.stopped.any())
            assert found.converged == stopped == (not any("no probe passed" in str(w.message) for w in said))
            file.compare("n_steps", found.n_steps)
            file.compare("scores", found.history)
            file.compare("stop_mask", found.stopped)
            file.compare("mean_importance", found.probes[found.stopped].mean(0))
            file.compare("mean_importance" if stopped else "fallback_mean_all_probes", found.scores)
            file.compare("pos_top_n", found.probes.topk(file["keep_top_n"], dim=1).indices)
            file.compare("rationale_pos", torch.tensor(found.rationale, dtype=torch.long))
            tested = torch.cat(
                [torch.zeros_like(found.hits[:1]), found.hits[:-1].cumsum(0).bool()]
            ).logical_not()
            file.compare(
                "stop_hit", torch.where(tested, found.hits, raw_stops(file, toy, found.history, draws))
            )


def raw_stops(file: File, model: nn.Module, scores: Tensor, draws: list[Tensor]) -> Tensor:
    """The stop test of every probe after each step, those that have stopped too: a run of one step, which replaces nothing, from its scores."""
    hits = []
    with warnings.catch_warnings(action="ignore"):
        for step, row in enumerate(scores):
            nothing = torch.full_like(draws[0][step : step + 1], math.inf)
            script = Script(row.log(), nothing, *(ids[step : step + 1] for ids in draws[1:]))
            hits.append(explained(file, model, script, 1).hits[0])
    return torch.stack(hits)


def check_soft(file: File) -> None:
    toy, ids, a = Toy(file), file.input("input_ids"), file.input("importance")
    kept = file.input("U_suff"), file.input("U_comp")
    for prefix, none, distance in (
        ("soft", "code_suff0", DISTANCES[file["distance"]]),
        ("hell", "hell_suff0", DISTANCES["hellinger"]),
    ):
        uniforms = (kept[0][None], kept[1][None])
        found = soft_faithfulness(toy, ids, a, distance=distance, uniforms=uniforms)
        assert found.n_samples == 1
        file.compare(f"{prefix}_suff", found.raw_sufficiency)
        file.compare(f"{prefix}_comp", found.raw_comprehensiveness)
        file.compare(f"{prefix}_ns", found.sufficiency)
        file.compare(f"{prefix}_nc", found.comprehensiveness)
        file.compare(none, found.zero_sufficiency)
    masks = {"p_suff": kept[0] < a[:, None], "p_comp": kept[1] < 1 - a[:, None]}
    masks |= {"p_zero": torch.zeros_like(kept[0]), "p_orig": torch.ones_like(kept[0])}
    for name, mask in masks.items():
        scores = through_embeddings(NextToken(toy), ids[None], 0, lambda e, columns, mask=mask: e * mask)[0]
        file.compare(name, scores.softmax(1)[0])


def check_exact(file: File) -> None:
    ids, a = file.input("input_ids"), file.input("importance")
    for name in file["distance"]:
        found = EXACT[file["clamp"]](Toy(file), ids, a, distance=DISTANCES[name])
        for quantity in file["quantity"]:
            file.compare(f"{name}_{quantity}", found[QUANTITIES[quantity]])


def check_hard(file: File) -> None:
    ids, a, ratios = file.input("input_ids"), file.input("importance"), [file["ratio"]]
    found, rooted = (
        hard_faithfulness(Toy(file), ids, a, ratios=ratios, distance=distance)
        for distance in (DISTANCES[file["distance"]], DISTANCES["hellinger"])
    )
    file.compare("norm_suff", found["sufficiency"][0])
    # The official comprehensiveness takes the root of its distance and divides it by one without the root.
    file.compare("norm_comp", rooted["raw_comprehensiveness"][0] / (1 - found["zero_sufficiency"]))


def check_attributions(file: File) -> None:
    if file.has("attn"):
        for how in file["attention"]:
            raw = from_attention(file.input("attn"), how)
            for form in file["attention_form"]:
                file.compare(f"attn_{how}_{form}", {"raw": raw, "softmax": normalized(raw, "softmax")}[form])
    toy, ids, target = Toy(file), file.input("input_ids"), int(file.input("target_id"))
    grid = {"rule": {True: "grid"}[file["include_endpoints"]], "steps": file["n_steps"] - 1}
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "grad_l2": ("grad_norm", {}),
        "input_x_grad": ("input_x_grad", {}),
        f"ig_{file['n_steps']}_{file['baseline']}_baseline": ("integrated_gradients", grid),
        "ig_exact": ("integrated_gradients", {"rule": "gauss", "steps": file["quadrature_points"]}),
    }
    for name, (method, options) in methods.items():
        if file.has(name):
            found = attribute_tokens(toy, ids, target=target, method=method, **options)
            file.compare(name, found.scores)
            file.compare("logp_input", {"log_probability": math.log}[file["score"]](found.probability))
    zero = through_embeddings(NextToken(toy), ids[None], 0, lambda e, columns: torch.zeros_like(e))[0]
    file.compare("logp_zero", zero.log_softmax(1)[0, target])


def check_settings(file: File) -> None:
    for name in file["file"]:
        if name in file.nodes:
            told = file.input(name)  # read for the recursion
            if not (file.path.parent / f"{name}.npz").exists():
                continue
            beside = file.beside(f"{name}.npz")
            for key, (array, side) in SIZES.items():
                if key in told:
                    file.compare(f"{name}.{key}", beside.input(array).shape[side])
            if "ratio" in told:
                file.compare(f"{name}.ratio", beside["ratio"])


test_golden, test_a_wrong_number_is_noticed = golden(
    "reagent",
    {
        "recursion": check_recursion,
        "soft": check_soft,
        "soft_exact_expectation": check_exact,
        "hard_ratio": check_hard,
        "attributions": check_attributions,
        "hyperparameters": check_settings,
    },
    fixed=("importance_kind", "quadrature_points"),
)
