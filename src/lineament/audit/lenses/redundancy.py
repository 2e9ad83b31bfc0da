"""How much of the network repeats itself? Its closest channels are merged, without data, and its answers are compared.

Chen, Zhou, Yan (2023, arXiv 2310.06756), as :func:`lineament.measure.merge` does it. Beta, which says how alike channels have to be, is chosen on one
half of the samples; everything that is said is measured on the other half. The control removes as many channels of each layer by their norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament.audit.phrases import percent, short, wilson
from lineament.audit.subject import Subject
from lineament.core.batching import progress
from lineament.core.checks import InputError
from lineament.core.models import decided, offloaded
from lineament.core.surgery.rewriting import remove
from lineament.measure.merging.distance import Weights
from lineament.measure.merging.plan import Plan, prepare
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain

TITLE = "How much of it repeats itself?"
HELP = "how many channels are left when those that do the same are merged"
ORDER = 55
METHOD = "ifm"
OPTIONAL = True
_BETAS = (0.01, 0.03, 0.07, 0.15, 0.3, 0.5)
KEPT = 0.95  # the share of answers that have to stay
_MOST = 1000
_PARAMETERS = 40_000_000


@dataclass(frozen=True)
class Step:
    """The network merged at one beta: what is left of it, and the share of answers that stay, with the interval; the same for removal by norm."""

    beta: float
    sizes: dict[str, int]
    channels: float
    parameters: float
    kept: float
    low: float
    high: float
    accuracy: float
    removed_kept: float
    removed_accuracy: float


@dataclass(frozen=True)
class Redundancy:
    """Each beta, judged on the samples ``rows``; ``chosen`` is the largest at which the samples ``choosing`` keep their answers."""

    layers: dict[str, int]
    steps: Sequence[Step]
    chosen: float | None
    accuracy: float
    rows: Sequence[int]
    choosing: Sequence[int]
    whole: Mapping[str, str]

    @property
    def step(self) -> Step | None:
        return next((s for s in self.steps if s.beta == self.chosen), None)


def applies(subject: Subject) -> str:
    if subject.sealed:
        return subject.sealed
    if offloaded(subject.model):
        return "Some of the network's weights are kept elsewhere until they are computed with (offloaded), so that none can be merged here."
    if subject.task != "classification" or subject.tokenizer is not None:
        return "It compares the answers of a classifier of images or numbers."
    if len(subject) < 40:
        return f"{len(subject)} samples are too few to compare answers on; expected at least 40."
    count = sum(p.numel() for p in subject.model.parameters())
    return (
        ""
        if count <= _PARAMETERS
        else f"Comparing all channels of {count:,} parameters takes too long here; call lineament.measure.merge."
    )


def look(subject: Subject) -> Section:
    try:
        found = merging(subject)
    except InputError as error:
        return Section("", "", "skipped", sentence=f"Nothing can be merged: {error}.", numbers={})
    if not found.layers:
        return Section(
            "",
            "",
            "skipped",
            sentence="No layer of it can be narrowed; report.json says why for each.",
            numbers={"whole": dict(found.whole)},
        )
    return _section(found)


def merging(subject: Subject) -> Redundancy:
    """Merge channels at each beta; measured once for all lenses that ask.

    Raises:
        InputError: a network that cannot be followed.
    """
    if "merging" not in subject.shared:
        subject.shared["merging"] = _merging(subject)
    return subject.shared["merging"]


def _merging(subject: Subject) -> Redundancy:
    rows = subject.subset(_MOST, salt=5)
    choosing, judging = rows[::2], rows[1::2]
    plan = _plan(subject)
    if not plan.channels:
        return Redundancy({}, (), None, 0.0, (), (), dict(plan.whole))
    layers = {name: c.group.size for name, c in plan.channels.items()}
    straight = {
        "choose": _answers(subject, subject.model, choosing),
        "judge": _answers(subject, subject.model, judging),
    }
    accuracy = float((straight["judge"] == subject.targets[judging]).double().mean())
    steps: list[Step] = []
    chosen: float | None = None
    sizes: dict[str, int] = {}
    for beta in progress(_BETAS, "merging channels"):
        plan.rounds(beta)
        now = {name: len(c) for name, c in plan.channels.items()}
        if now == sizes:
            continue
        sizes = now
        model = plan.finished(beta).model
        agree = float((_answers(subject, model, choosing) == straight["choose"]).double().mean())
        steps.append(_step(subject, plan, model, beta, sizes, judging, straight["judge"]))
        if agree >= KEPT:
            chosen = beta
        elif agree < 0.5:
            break
    if chosen is not None:  # as one merge at this beta gives it, and not several one after another
        plan = _plan(subject)
        plan.rounds(chosen)
        sizes = {name: len(c) for name, c in plan.channels.items()}
        exact = _step(subject, plan, plan.finished(chosen).model, chosen, sizes, judging, straight["judge"])
        steps = [exact if s.beta == chosen else s for s in steps]
    return Redundancy(
        layers,
        steps,
        chosen if any(s.beta == chosen and s.channels < 1 for s in steps) else None,
        accuracy,
        subject.samples.index[judging].tolist(),
        subject.samples.index[choosing].tolist(),
        dict(plan.whole),
    )


def _plan(subject: Subject) -> Plan:
    return prepare(
        subject.model,
        subject.inputs(subject.example),
        None,
        rule="mean_sum",
        norms="fold",
        distance="all",
        rescale=False,
    )


def _answers(subject: Subject, model: nn.Module, rows: Tensor) -> Tensor:
    return decided(replace(subject, model=model).answer(rows))


def _step(
    subject: Subject,
    plan: Plan,
    model: nn.Module,
    beta: float,
    sizes: dict[str, int],
    rows: Tensor,
    straight: Tensor,
) -> Step:
    full = {name: c.group.size for name, c in plan.channels.items()}
    answers = _answers(subject, model, rows)
    same = int((answers == straight).sum())
    other = _answers(subject, _by_norm(plan, sizes), rows)
    targets = subject.targets[rows]
    low, high = wilson(same, len(rows))
    return Step(
        beta, dict(sizes), sum(sizes.values()) / sum(full.values()),
        sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in subject.model.parameters()),
        same / len(rows), low, high, float((answers == targets).double().mean()),
        float((other == straight).double().mean()), float((other == targets).double().mean()),
    )  # fmt: skip


def _by_norm(plan: Plan, sizes: Mapping[str, int]) -> nn.Module:
    """The network without its channels of smallest norm."""
    tensors = {
        n: t.detach().double().cpu() for n, t in (*plan.base.named_parameters(), *plan.base.named_buffers())
    }
    weights = Weights(tensors)
    gone = {}
    for name, channels in plan.channels.items():
        group = channels.group
        wide = [e for e in group.entries if e.role in ("write", "scale") and tensors[e.parameter].ndim > 1]
        norms = torch.stack([weights.rows(e, list(range(group.size))).square().sum(1) for e in wide]).sum(0)
        if group.size > sizes[name]:
            gone[group] = norms.argsort()[: group.size - sizes[name]].tolist()
    return remove(plan.base, gone)


def _section(found: Redundancy) -> Section:
    step, judged = found.step, len(found.rows)
    tables = [
        Table(
            f"What is left when channels are merged that are closer than beta times the furthest two of their layer, on {judged:,} samples",
            [
                "beta",
                "channels",
                "parameters",
                "same answers",
                "accuracy",
                "removed by norm: same answers",
                "accuracy ",
            ],
            [
                [
                    s.beta,
                    percent(s.channels),
                    percent(s.parameters),
                    percent(s.kept),
                    percent(s.accuracy),
                    percent(s.removed_kept),
                    percent(s.removed_accuracy),
                ]
                for s in found.steps
            ],
        ),
        Table(
            "Channels of each layer that are left",
            ["layer", "channels", *(f"beta {s.beta:g}" for s in found.steps)],
            [
                [short(name, 40), size, *(s.sizes[name] for s in found.steps)]
                for name, size in found.layers.items()
            ],
        ),
    ]
    if step is None:
        worst = found.steps[0] if found.steps else None
        text = "No two of its channels do the same: " + (
            f"merging those closer than {worst.beta:g} of the furthest leaves {percent(worst.channels, 0)} of its channels and keeps {percent(worst.kept)} of the answers "
            f"(95 % interval {percent(worst.low)} to {percent(worst.high)}, {judged:,} samples)."
            if worst and worst.channels < 1
            else f"even at beta {_BETAS[-1]:g} none are close enough to merge."
        )
        finding = Finding("good", text, key="no repetition")
        return Section(
            "",
            "",
            "good",
            percent(1.0),
            "of its channels are needed",
            text,
            _pictures(found),
            tables,
            numbers=plain(found),
            findings=[finding],
        )
    most = min(step.sizes, key=lambda name: step.sizes[name] / found.layers[name])
    named = f"Layer {most}" if most.isdigit() else short(most, 40)
    interval = f"95 % interval {percent(step.low)} to {percent(step.high)}, {judged:,} samples that did not choose beta"
    text = (
        f"Merged at beta {step.beta:g}, without data, {percent(step.channels, 0)} of its channels ({percent(step.parameters, 0)} of its parameters) give the same answer on {percent(step.kept)} of the samples ({interval}); "
        f"as many channels chosen by their norm give it on {percent(step.removed_kept)}. {named} repeats itself most: {step.sizes[most]} of {found.layers[most]} channels are left."
    )
    lines = (
        f" The smaller network: found = lineament.measure.merge(model, example=inputs, beta={step.beta:g}); "
        "lineament.core.surgery.save(found.model, 'smaller'); lineament.core.surgery.load('smaller', build)."
    )
    finding = Finding(
        "note" if step.channels < 0.8 else "good",
        text,
        advice="Where size or speed matter, merge it (beta is named above) and measure the smaller network."
        if step.channels < 0.8
        else "",
        key="repeats itself" if step.channels < 0.8 else "repeats little",
    )
    return Section(
        "", "", finding.severity, percent(step.channels, 0), f"of its channels give {percent(step.kept, 0)} of its answers", text + lines,
        _pictures(found), tables, numbers=plain(found), findings=[finding],
    )  # fmt: skip


def _pictures(found: Redundancy) -> list[Any]:
    if not found.steps:
        return []

    def draw(ax: Any) -> None:
        left = [1.0, *(s.parameters for s in found.steps)]
        ax.plot(left, [1.0, *(s.kept for s in found.steps)], "o-", color="C0", label="merged")
        ax.plot(
            left, [1.0, *(s.removed_kept for s in found.steps)], "s--", color="C7", label="removed by norm"
        )
        ax.axhline(KEPT, color="C7", linewidth=0.8, linestyle=":")
        ax.set(xlabel="parameters left", ylabel="same answers", ylim=(0, 1.05), xscale="log")
        ax.legend()

    told = "; ".join(
        f"{percent(s.parameters)} left: {percent(s.kept)} merged, {percent(s.removed_kept)} removed"
        for s in found.steps
    )
    return [
        picture(
            draw,
            alt=f"The share of answers that stay over the share of parameters that are left. {told}.",
            caption=f"Answers that stay when channels are merged, and when as many are removed by their norm ({len(found.rows):,} samples).",
        )
    ]
