"""How small can the network get when channels are taken out of it, and does that save more than merging those that do the same?

One half of some samples calibrates, without labels, and chooses; the other half judges. The criterion alone stands beside the criterion with both repairs,
compensation and batch norms measured again (:func:`lineament.edit.prune`), because the repairs do most of the work.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lineament.audit.lenses import redundancy
from lineament.audit.phrases import percent, short, wilson
from lineament.audit.subject import Subject
from lineament.core.batching import progress
from lineament.core.checks import InputError
from lineament.core.models import decided
from lineament.edit.pruned import Pruned, PruneOptions
from lineament.edit.pruning import prune
from lineament.edit.readers import prunable
from lineament.edit.targets import Timing, timed
from lineament.report.figures import picture
from lineament.report.outcome import Table

_SHARES = (0.9, 0.75, 0.5, 0.25)  # of every group's channels that are kept
_EIGHTHS = 8  # a layer's share that can go is found to an eighth
_LITTLE = 0.01  # of answers
_WORK = 1.5e12
_MOST_GROUPS = 24


@dataclass(frozen=True)
class Shrunk:
    """The network with a share of every group's channels: what is left, and the share of answers that stay; ``alone``: by the criterion without repairs."""

    keep: float
    parameters: float
    flops: float
    same: float
    low: float
    high: float
    accuracy: float
    alone_same: float
    alone_accuracy: float


@dataclass(frozen=True)
class Removal:
    """What channels that are taken out leave.

    Attributes:
        steps: by the share that is kept, judged on the samples ``rows``.
        chosen: the smallest share with which the samples ``choosing`` keep 95 % of their answers.
        spare: {group: the share of its channels that can go, alone and with both repairs, while under 1 % of the answers change}.
        timing: of a forward of ``batch`` samples, before and at the share that is chosen; it says where other work on the machine made it unsteady.
        merged: the share of the parameters that merging leaves at as many answers kept, ``None`` where it keeps all.
        whole: {group: why nothing is taken out of it}.
    """

    steps: Sequence[Shrunk]
    chosen: float | None
    spare: Mapping[str, float]
    timing: Timing | None
    batch: int
    merged: float | None
    accuracy: float
    rows: Sequence[int]
    choosing: Sequence[int]
    whole: Mapping[str, str]

    @property
    def step(self) -> Shrunk | None:
        return next((s for s in self.steps if s.keep == self.chosen), None)


def removal(subject: Subject) -> tuple[Removal | None, str]:
    """What is left when channels are taken out, or why that was not tried."""
    if why := redundancy.applies(subject):
        return None, why
    if len(subject) < 80 or subject.fixed_batch:
        return None, "It takes 80 samples, and a network that takes batches of any size."
    try:
        _, readers, whole = prunable(subject.model, subject.inputs(subject.example))
        passes = 5 * len(readers) * (2 * len(_SHARES) + 3)
        if subject.flops * passes * 80 > 10 * _WORK:
            return None, "The network is too large to try several sizes here; lineament edit prune makes one."
        return _removal(subject, list(readers), whole, subject.affordable(_WORK, passes, 500, 80)), ""
    except InputError as error:
        return None, f"Nothing can be taken out: {error}."


def _removal(subject: Subject, groups: list[str], whole: Mapping[str, str], count: int) -> Removal:
    rows = subject.subset(count, salt=7)
    choosing, judging = rows[::2], rows[1::2]
    batches = [subject.inputs(part) for part in subject.parts(choosing)]
    was = {
        "choose": _answers(subject, subject.model, choosing),
        "judge": _answers(subject, subject.model, judging),
    }
    right = subject.targets[judging]

    def smaller(keep: float, sites: str | None = None, repaired: bool = True) -> Pruned:
        return prune(
            subject.model, batches, keep=keep, compensate="delta" if repaired else None, recalibrate=repaired,
            options=PruneOptions(sites=sites, seed=subject.seed, bias=repaired),
        )  # fmt: skip

    steps: list[Shrunk] = []
    chosen: tuple[float, nn.Module] | None = None
    for keep in progress(_SHARES, "taking channels out"):
        found = smaller(keep)
        if steps and found.share == steps[-1].parameters:
            continue
        here, alone = (
            _answers(subject, m, judging) for m in (found.model, smaller(keep, repaired=False).model)
        )
        same = int((here == was["judge"]).sum())
        low, high = wilson(same, len(judging))
        steps.append(
            Shrunk(
                keep, found.share, found.flops[1] / max(found.flops[0], 1), same / len(judging), low, high,
                *(float((a == b).double().mean()) for a, b in ((here, right), (alone, was["judge"]), (alone, right))),
            )
        )  # fmt: skip
        stays = float((_answers(subject, found.model, choosing) == was["choose"]).double().mean())
        if stays < redundancy.KEPT:
            break
        chosen = keep, found.model
    spare = {}
    for name in progress(groups if len(groups) <= _MOST_GROUPS else [], "taking channels out of one layer"):
        low, high = 0, _EIGHTHS  # so many eighths can go, and so many cannot
        while high - low > 1:
            middle = (low + high) // 2
            model = smaller(1 - middle / _EIGHTHS, name).model
            changed = float((_answers(subject, model, judging) != was["judge"]).double().mean())
            low, high = (middle, high) if changed < _LITTLE else (low, middle)
        spare[name] = low / _EIGHTHS
    some = subject.inputs(judging[: subject.batch_size])
    times = None if chosen is None else timed(subject.model, chosen[1], some)
    merged = redundancy.merging(subject)
    step = merged.step if merged else None
    return Removal(
        steps, chosen[0] if chosen else None, spare, times, len(judging[: subject.batch_size]),
        step.parameters if step else None, float((was["judge"] == right).double().mean()),
        subject.samples.index[judging].tolist(), subject.samples.index[choosing].tolist(), dict(whole),
    )  # fmt: skip


def _answers(subject: Subject, model: nn.Module, rows: Tensor) -> Tensor:
    return decided(replace(subject, model=model).answer(rows))


def written_by(subject: Subject, keep: float) -> str:
    """The command, or the calls, that write the network at one share."""
    if not subject.command:
        return f"lineament.edit.prune(model, inputs, keep={keep:g}).save('smaller')"
    return shlex.join(
        ["lineament", "edit", "prune", *subject.command, "--keep", f"{keep:g}", "--out", "smaller"]
    )


def sentence(subject: Subject, found: Removal) -> str:
    """What was found, for the section."""
    judged = f"{len(found.rows)} samples that neither calibrated nor chose"
    step = found.step
    if step is None:
        first = found.steps[0]
        told = f"Taking channels out costs answers at once: with {percent(first.keep, 0)} of every group's channels and both repairs {percent(first.same)} of the answers stay (95 % interval {percent(first.low)} to {percent(first.high)}, {judged})."
    else:
        assert found.timing is not None
        told = (
            f"Channels can be taken out: with {percent(step.keep, 0)} of every group's channels, {percent(step.parameters, 0)} of the parameters and {step.flops:.2f} times the operations, "
            f"it gives the same answer on {percent(step.same)} of the samples when compensation and batch norms repair it (95 % interval {percent(step.low)} to {percent(step.high)}, {judged}), "
            f"and on {percent(step.alone_same)} by the criterion alone; accuracy is {percent(step.accuracy)} where it was {percent(found.accuracy)}. "
            f"{found.timing.said(f'A forward of {found.batch} samples')} To write it: {written_by(subject, step.keep)} ."
        )
    ours, theirs = step.parameters if step else 1.0, found.merged if found.merged is not None else 1.0
    least = percent(redundancy.KEPT, 0)
    if ours == theirs == 1:
        return f"{told} Neither this nor merging channels that do the same saves any with {least} of the answers kept."
    which = (
        "this saves more" if ours < theirs else "merging saves more" if theirs < ours else "they save as much"
    )
    return f"{told} Merging channels that do the same (lens redundancy) leaves {percent(theirs, 0)} of the parameters with {least} of the answers kept, this {percent(ours, 0)}: {which}."


def tables(found: Removal) -> list[Table]:
    """Accuracy against parameters, and what each layer can spare."""
    columns = [
        "kept",
        "parameters",
        "operations",
        "same answers",
        "accuracy",
        "same, alone",
        "accuracy, alone",
    ]
    rows = [
        [percent(v, 1) for v in (s.keep, s.parameters, s.flops, s.same, s.accuracy, s.alone_same, s.alone_accuracy)]
        for s in found.steps
    ]  # fmt: skip
    made = [
        Table(
            f"What is left of {len(found.rows)} samples' answers when channels are taken out, with both repairs and by the criterion alone",
            columns,
            rows,
        )
    ]
    if found.spare:
        spare = sorted(found.spare.items(), key=lambda item: -item[1])
        made.append(
            Table(
                f"The share of each layer's channels that can go alone, with both repairs, while fewer than 1 % of answers change (to an eighth, {len(found.rows)} samples)",
                ["layer", "can go"],
                [[short(name, 40), percent(share)] for name, share in spare],
            )
        )
    return made


def figure(found: Removal) -> Any:
    """Accuracy against the parameters that are left."""

    def draw(ax: Any) -> None:
        left = [1.0, *(s.parameters for s in found.steps)]
        ax.plot(
            left, [found.accuracy, *(s.accuracy for s in found.steps)], "o-", color="C0", label="both repairs"
        )
        alone = [found.accuracy, *(s.alone_accuracy for s in found.steps)]
        ax.plot(left, alone, "s--", color="C1", label="criterion alone")
        ax.set(xlabel="parameters left", ylabel="accuracy", ylim=(0, 1.05), xlim=(0, 1.05))
        ax.legend()

    told = "; ".join(
        f"{percent(s.parameters)} left: {percent(s.accuracy)}, alone {percent(s.alone_accuracy)}"
        for s in found.steps
    )
    return picture(
        draw,
        alt=f"Accuracy over the share of parameters that are left when channels are taken out. {told}.",
        caption=f"Accuracy when channels are taken out ({len(found.rows)} samples that did not calibrate).",
    )
