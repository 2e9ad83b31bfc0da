"""How far real-valued answers are off, in all and by group: R² and the mean absolute error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.audit.correctness.shares import compared
from lineament.audit.phrases import compact, percent
from lineament.audit.subject import Subject
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain, printable


@dataclass(frozen=True)
class Errors:
    """R² (NaN where the targets are all alike) and the mean absolute error of a group's answers, with their standard errors over samples."""

    name: str
    r2: float
    mae: float
    count: int
    mae_error: float = math.inf
    r2_error: float = math.inf

    @property
    def off(self) -> str:
        return f"{compact(self.mae)}{_give_or_take(1.96 * self.mae_error)}"


@dataclass(frozen=True)
class Values:
    """How far real-valued answers are off, in all and by group, and how far always answering the mean would be."""

    overall: Errors
    groups: Sequence[Errors]
    mean_predictor_mae: float
    task: str = "regression"


def of_values(subject: Subject) -> Section:
    targets = subject.targets.reshape(len(subject), -1).double()
    answers = subject.outputs.reshape(len(subject), -1).double()
    error = (answers - targets).abs().mean(1)
    groups = subject.samples.groups

    def errors(name: str, rows: Tensor | slice) -> Errors:
        chosen = targets[rows]
        own = error[rows].flatten(1).mean(1) if error.ndim > 1 else error[rows]
        spread = float(own.std()) / math.sqrt(len(own)) if len(own) > 1 else math.inf
        return Errors(
            name,
            r2(answers[rows], chosen),
            float(own.mean()),
            len(chosen),
            spread,
            _r2_error(answers[rows], chosen),
        )

    by_group = [
        errors(subject.samples.group_names[g], groups == g)
        for g in (torch.unique(groups).tolist() if groups is not None else [])
    ]
    overall = errors("all", slice(None))
    found = Values(overall, by_group, float((targets - targets.mean(0)).abs().mean()))
    mean = f"where always answering the mean would be off by {compact(found.mean_predictor_mae)}"
    sentence = f"{_explained(overall)}; they are off by {overall.off} on average, {mean}."
    worst = max(by_group, key=lambda g: g.mae, default=None)
    if worst is not None and len(by_group) > 1:
        sentence += f" The worst group is “{printable(worst.name, limit=60)}”, off by {worst.off} ({worst.count} samples)."
    told = _value_findings(found)

    def draw(ax: Any) -> None:
        count = min(len(targets), 2000)
        ax.scatter(targets[:count, 0], answers[:count, 0], s=9, alpha=0.5, color="C0", linewidth=0)
        ends = [float(targets[:, 0].min()), float(targets[:, 0].max())]
        ax.plot(ends, ends, color="C7", linestyle="--", linewidth=1)
        ax.set(xlabel="target", ylabel="answer")

    return Section(
        method="",  # that of the lens is about classes
        status="warning"
        if overall.r2 < 0
        else "good"
        if {each.severity for each in told} == {"good"}
        else "note",
        number=compact(overall.r2),
        unit="R², the share of variance explained",
        sentence=sentence,
        pictures=[
            picture(
                draw,
                size=(5.2, 3.6),
                kind="png",
                caption="Answers against targets; a perfect network lies on the line.",
                alt=f"Scatter of answers against targets with R² {compact(overall.r2)}.",
            )
        ],
        tables=[
            Table.of(
                "Errors",
                {"group": "name", "R²": "r2", "mean absolute error": "mae", "samples": "count"},
                [overall, *by_group],
            )
        ],
        numbers=plain(found),
        findings=told,
    )


def _explained(overall: Errors) -> str:
    """How much of the variance the answers explain, with its interval."""
    if math.isnan(overall.r2):
        return f"The targets of the {overall.count} samples are all alike, so that its answers have no variance to explain"
    spread = _give_or_take(1.96 * overall.r2_error)
    if overall.r2 < 0:
        return f"By their squared errors, its answers are worse than always answering the mean (R² {compact(overall.r2)}{spread} on {overall.count} samples)"
    return f"Its answers explain {percent(overall.r2)}{_give_or_take(1.96 * overall.r2_error, percent)} of the variance of the targets of {overall.count} samples"


def _give_or_take(half: float, form: Callable[[float], str] = compact) -> str:
    """Half a 95 % interval behind its number."""
    return f" ± {form(float(f'{half:.2g}'))} (95 % interval)" if math.isfinite(half) else ""


def _value_findings(found: Values) -> list[Finding]:
    told = []
    worst = max(found.groups, key=lambda g: g.mae, default=None)
    best = min(found.groups, key=lambda g: g.mae, default=None)
    z = compared(len(found.groups))
    if (
        worst
        and best
        and worst.mae - z * worst.mae_error > best.mae + z * best.mae_error
        and worst.mae > 1.5 * best.mae
    ):
        told.append(
            Finding(
                "warning",
                f"Its error rises from {best.off} in group “{printable(best.name, limit=60)}” ({best.count} samples) to {worst.off} in group “{printable(worst.name, limit=60)}” ({worst.count} samples).",
                advice="Look at what sets that group apart, and train on more samples of it; give the error by group wherever you give it.",
                key="groups differ",
            )
        )
    overall = found.overall
    useless = overall.r2 < 0
    # An R² that its interval does not part from 0, or that there is none of, is no praise.
    unsure = not useless and not overall.r2 - 1.96 * overall.r2_error > 0
    told.append(
        Finding(
            "warning" if useless else "note" if unsure else "good",
            f"{_explained(overall)}; it is off by {compact(overall.mae)} on average"
            + (", which may be no better than always answering the mean." if unsure else "."),
            advice="Make sure that inputs and targets are scaled as they were in training."
            if useless or unsure
            else "",
            key="worse than the mean" if useless else "no better than the mean" if unsure else "accuracy",
        )
    )
    return told


def r2(found: Tensor, targets: Tensor) -> float:
    """1 - Σ(y - ŷ)² / Σ(y - ȳ)², over all values together.

    >>> r2(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]]))
    1.0
    """
    total = float((targets - targets.mean(0)).square().sum())
    return 1 - float((targets - found).square().sum()) / total if total > 0 else float("nan")


def _r2_error(found: Tensor, targets: Tensor) -> float:
    """The standard error of R² over samples, to first order in the two sums that it is made of."""
    off, spread = ((targets - other).square().sum(1) for other in (found, targets.mean(0)))
    total = float(spread.sum())
    if len(targets) < 2 or total == 0:
        return math.inf
    ratio = float(off.sum()) / total
    return float((off - ratio * spread).std()) * math.sqrt(len(targets)) / total
