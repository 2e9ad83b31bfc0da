"""What ReAGent's recipe compares, which claims it judges, and the tables it prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lineament.report.outcome import Claim, Table

# The seven of the paper; input x gradient and the attention and gradient scores go through a softmax, as there.
BASELINES = (
    "input_x_grad", "integrated_gradients", "gradient_shap", "rollout", "attention_last", "attention_all", "grad_norm",
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "reagent": {},
    "reagent, 16 probes": {"probes": 16},
    "reagent, 50 steps": {"steps": 50},
    "reagent, 200 steps, r 0.1": {"steps": 200, "ratio": 0.1},
}


@dataclass(frozen=True)
class Attributed:
    """The importances of each prompt, and what ReAGent took for them."""

    scores: list[Tensor]
    steps: list[int] = field(default_factory=list)
    converged: list[bool] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Budgets:
    """P@2 by what was asked of the model: (steps, rows, P@2) of fixed budgets, (variant, rows, P@2) of early stopping."""

    fixed: list[tuple[int, float, float]]
    early: list[tuple[str, float, float]]


def claims(table: dict[str, dict[str, Any]], known: bool) -> list[Claim]:
    """The paper's claims and our controls, judged by predicates that were written before the first run."""

    def best(column: str, among: tuple[str, ...] = BASELINES) -> tuple[str, float]:
        values = {n: -float("inf") if table[n][column] is None else float(table[n][column]) for n in among}
        name = max(values, key=lambda n: values[n])
        return name, values[name]

    def against(column: str, among: tuple[str, ...] = BASELINES) -> tuple[str, bool]:
        own, (name, rival) = float(table["reagent"][column] or 0.0), best(column, among)
        return f"ReAGent {own:.3g}, best other {rival:.3g} ({name})", own > rival

    def sharper(column: str) -> str:
        own, other = (float(table[n]["sharpness"]) for n in ("reagent", best(column)[0]))
        if own <= other:
            return "the best other is no sharper: it points better, or the difference is within the noise"
        return f"the best other is sharper (entropy {other:.2f} against {own:.2f} nats), which soft scores reward"

    flat = ("rollout", "attention_last", "attention_all", "grad_norm", "input_x_grad")
    found = []
    for name, paper, column, among, reason in (
        (
            "Soft comprehensiveness of ReAGent is above all seven baselines' (log ratio to random importances)",
            "token level, six models: ReAGent 4.0 to 7.6, best other 0.9 to 4.9; best in all six",
            "log plain NC", BASELINES, "",
        ),
        (
            "Soft sufficiency of ReAGent is above all seven baselines' (log ratio to random importances)",
            "token level: ReAGent 0.5 to 2.1; best in four of six models, integrated gradients in two",
            "log plain NS", BASELINES, "",
        ),
        (
            "Soft comprehensiveness of ReAGent is above that of softmaxed attention and gradient scores",
            "token level, six models: attention and gradients -0.7 to 2.8",
            "log plain NC", flat, "",
        ),
        (
            "Control: the lead in soft comprehensiveness stays when all methods have ReAGent's entropy",
            "not tested there; a lead that vanishes was one of sharpness", "entropy NC", BASELINES,
            "at one sharpness others point better: the published gap is one of sharpness",
        ),
        (
            "Control: the lead in soft comprehensiveness stays when all methods keep as much of the input",
            "not tested there", "retention NC", BASELINES, "at one retention others point better",
        ),
    ):  # fmt: skip
        observed, holds = against(column, among)
        found.append(Claim(name, paper, observed, holds, "" if holds else reason or sharper(column)))
    if known:
        observed, holds = against("P@2")
        found.append(
            Claim(
                "Ground truth: ReAGent names the two deciding tokens more often than all seven baselines (P@2)",
                "no ground truth there",
                observed,
                holds,
                "" if holds else "probes that stop early stop by luck",
            )
        )
        early, fixed = (float(table[n]["P@2"]) for n in ("reagent", "reagent, 50 steps"))
        found.append(
            Claim(
                "Ground truth: a fixed budget of 50 steps beats the published stopping rule by at least 0.1 (P@2)",
                "the stopping rule is the paper's; a fixed budget is ours",
                f"{early:.2f} with early stopping, {fixed:.2f} with 50 steps",
                fixed - early >= 0.1,
                "" if fixed - early >= 0.1 else "the differences are within the noise",
            )
        )
    return found


def tables(
    table: dict[str, dict[str, Any]], scores: dict[str, Attributed], correct: float | None, prompts: int
) -> list[Table]:
    columns = [
        "P@2",
        "sharpness",
        *(f"{form} {m}" for form in ("plain", "log plain", "hard") for m in ("NS", "NC")),
    ]
    matched = [f"{form} {m}" for form in ("entropy", "retention") for m in ("NS", "NC")]
    matched = [*matched[:2], "log entropy NC", *matched[2:], "log retention NC"]
    found = [
        Table(
            "Faithfulness as published (soft, Hellinger; hard: mean over ratios 0.05 to 0.5; sharpness: mean entropy, nats)",
            ["method", *columns],
            [[n, *(_rounded(row.get(c)) for c in columns)] for n, row in table.items()],
        ),
        Table(
            "The same at one sharpness",
            ["method", *matched],
            [[n, *(_rounded(row.get(c)) for c in matched)] for n, row in table.items()],
        ),
        Table(
            "What ReAGent took",
            ["variant", "median steps", "most steps", "converged, %", "mean rows asked"],
            [
                [
                    n, int(torch.tensor(scores[n].steps).median()), max(scores[n].steps),
                    round(100 * sum(scores[n].converged) / prompts, 1), round(sum(scores[n].sequences) / prompts, 1),
                ]
                for n in VARIANTS
            ],
        ),
    ]  # fmt: skip
    if correct is not None:
        found.append(
            Table("The model", ["measure", "value"], [["right answers, %", round(100 * correct, 1)]])
        )
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
