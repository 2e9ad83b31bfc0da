"""Do answers follow what images share wherever it lies: a small patch that moves, colour, brightness, texture, or the place of the object?

Each cue of one image (the giver) is put on another (the receiver) that the network answers otherwise: the patch that decides the giver's own answer,
cut out and pasted somewhere else, or a statistic of the whole image. If the answer becomes the giver's, it follows the cue. Any such change also
disturbs, so that the same change is made with the cue of images of other answers (the controls), and only what exceeds the stronger control
counts. A third of the pairs chooses whether all answers are spoken of or the one that follows most, the others measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.audit.phrases import spread
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.batching import progress
from lineament.core.statistics.shares import Interval, difference, share
from lineament.measure.shortcuts.exchanges import Change, moved, pasted, recoloured, relit, respectrum

PairChange = Callable[[Tensor, Tensor, Tensor], Tensor]
# On the pairs that choose: whether all of an interval says that a cue decides, and by how much it is followed.
Strength = tuple[bool, float]
# The excess over the controls whose lower bound must be passed before a cue is said to decide.
DECIDES = 0.15
PATCH = "patch that moves"
_PAIRS, _EACH, _LEAST = 400, 40, 12
_WORK, _MARKING = 6e12, 4e12
_PEAKS = 3


@dataclass(frozen=True)
class Cue:
    """What exchanging one cue showed, on the pairs that did not choose the answer; shares with 95 % intervals (Wilson; Newcombe's for a difference).

    ``answer``: the class whose cue is followed, ``None`` for all; ``controls``: the share of answers that become the giver's under the same
    change from other images; ``kept``: of images with this answer, the share that keep it when their cue comes from an image answered otherwise, and
    ``kept_control`` when it comes from one answered alike (or, for a patch, when another patch of theirs goes).
    """

    name: str
    answer: int | None
    samples: int
    followed: Interval
    controls: dict[str, float]
    excess: Interval
    kept: Interval
    kept_control: float

    @property
    def decides(self) -> bool:
        return self.excess[1] > DECIDES

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "decides": self.decides}


@dataclass(frozen=True)
class Pairs:
    """Receivers, each with a giver answered otherwise and two controls: a sample answered like the receiver, and one like neither."""

    receivers: Tensor
    givers: Tensor
    same: Tensor
    third: Tensor | None
    lent: Tensor
    measure: Tensor

    def __len__(self) -> int:
        return len(self.receivers)

    def to_dict(self) -> dict[str, Any]:
        return {name: None if rows is None else rows.tolist() for name, rows in vars(self).items()}


@dataclass(frozen=True)
class Cues:
    """All cues tried, the strongest first, and how each is exchanged between ``pairs``.

    ``patch``: (height, width) of the patches, ``proposed_by``: maps, a grid or both; ``left_out``: answers with too few samples to be tried one by one; ``places``: of each
    pair the top and left of the patch that is pasted over (``to``), of the one that is cut out (``taken``), and of those of the two controls.
    """

    tried: Sequence[Cue]
    patch: tuple[int, int]
    left_out: int
    proposed_by: str
    places: dict[str, Any] = field(repr=False)
    pairs: Pairs = field(repr=False)
    changes: dict[str, PairChange] = field(repr=False)

    @property
    def deciding(self) -> list[Cue]:
        return [cue for cue in self.tried if cue.decides]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tried": [cue.to_dict() for cue in self.tried],
            "patch": list(self.patch),
            "answers_left_out": self.left_out,
            "proposed_by": self.proposed_by,
            "pairs": self.pairs.to_dict(),
            "places": self.places,
        }

    def examples(
        self, subject: Subject, cue: Cue, most: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Some pairs that measured a cue, and of each the receiver, the giver and the receiver with the giver's cue, as pictures."""
        fits = (
            self.pairs.measure if cue.answer is None else self.pairs.measure & (self.pairs.lent == cue.answer)
        )
        at = fits.nonzero().flatten()
        at = at[spread(len(at), most)]
        shown = []
        for position in at:
            pair = [
                subject.display(int(rows[position])) for rows in (self.pairs.receivers, self.pairs.givers)
            ]
            x, giver = (
                image[None, None] if image.ndim == 2 else image.movedim(-1, 0)[None] for image in pair
            )
            mixed = self.changes[cue.name](x, giver, position[None])[0].movedim(0, -1)
            shown.append((*pair, mixed[..., 0] if pair[0].ndim == 2 else mixed))
        return at, shown

    def answers(self, subject: Subject, cue: Cue, at: Tensor) -> Tensor:
        """What the network says of some pairs' receivers with the giver's cue."""
        padded = at
        if subject.fixed_batch:
            padded = at.repeat(subject.batch_size)[
                : math.ceil(len(at) / subject.batch_size) * subject.batch_size
            ]

        def change(x: Tensor, part: Tensor) -> Tensor:
            return self.changes[cue.name](x, subject.inputs(self.pairs.givers[padded[part]]), padded[part])

        return _answers(subject, self.pairs.receivers[padded], change)[: len(at)]


def exchange_cues(
    subject: Subject, explain: Callable[..., Tensor] | None, *, fractions: Sequence[float] = (0.25, 0.375)
) -> Cues | None:
    """Exchange every cue between images, or ``None`` where the network gives all samples one answer.

    Args:
        explain: the saliency maps, ``explain(inputs, targets)``, whose peaks are among the patches tried; ``None`` where there are none.
        fractions: a patch's side as a fraction of the image's; of several the one that is followed most is measured.
    """
    pairs, left_out = draw_pairs(subject)
    if not len(pairs):
        return None
    height, width = subject.inputs(pairs.receivers[:1]).shape[-2:]
    sizes = [(max(2, math.ceil(f * height)), max(2, math.ceil(f * width))) for f in fractions]
    found: list[Cue] = []
    shown: dict[str, PairChange] = {}
    changes = whole_image_changes(subject)
    for name, change in progress(list(changes.items()), "exchanging whole-image cues"):
        found.append(_whole(subject, pairs, name, change)[0])
        shown[name] = lambda x, giver, _, change=change: change(x, giver)
    proposed_by, patches = "", []
    for patch in sizes:
        marks, proposed_by = _marks(subject, pairs, patch, explain)
        patches.append((*_patches(subject, pairs, patch, marks), patch))
    # Chosen on the pairs that do not measure.
    cue, _, shown[PATCH], places, patch = max(patches, key=lambda item: item[1])
    found.append(cue)
    found.sort(key=lambda cue: -cue.excess[1])
    return Cues(found, patch, left_out, proposed_by, places, pairs, shown)


def draw_pairs(subject: Subject) -> tuple[Pairs, int]:
    """Pairs with about as many givers of every answer, and how many answers had too few samples."""
    draw = torch.Generator().manual_seed(subject.seed + 29)
    decisions = subject.outputs.argmax(1)
    answers, counts = decisions.unique(return_counts=True)
    total = subject.affordable(_WORK, 30, most=_PAIRS, least=48)
    order = counts.argsort(descending=True, stable=True)
    frequent = [int(answers[k]) for k in order.tolist() if counts[k] >= _LEAST][: max(total // _LEAST, 1)]

    givers: list[int] = []
    if len(answers) > 1:
        each = max(_LEAST, min(_EACH * max(1, 10 // max(len(frequent), 1)), total // max(len(frequent), 1)))
        for answer in frequent:
            own = (decisions == answer).nonzero().flatten()
            givers += own[torch.randperm(len(own), generator=draw)][:each].tolist()
        if not frequent:
            givers = torch.randperm(len(decisions), generator=draw)[:total].tolist()
    if subject.fixed_batch:
        givers = givers[: len(givers) // subject.batch_size * subject.batch_size]
    chosen = torch.zeros(len(decisions), dtype=torch.bool)
    chosen[givers] = True

    def one_of(fits: Tensor) -> int:
        # A giver too, where one fits: then fewer samples must be marked.
        rows = (fits & chosen if bool((fits & chosen).any()) else fits).nonzero().flatten()
        return int(rows[int(torch.randint(len(rows), (1,), generator=draw))])

    receivers, same, third = [], [], []
    for giver in givers:
        receivers.append(one_of(decisions != decisions[giver]))
        alike = decisions == decisions[receivers[-1]]
        others = alike.clone()
        others[receivers[-1]] = False
        same.append(one_of(others if bool(others.any()) else alike))
        if len(answers) > 2:
            third.append(one_of((decisions != decisions[giver]) & ~alike))
    drawn = torch.tensor(givers, dtype=torch.long)
    return Pairs(
        torch.tensor(receivers, dtype=torch.long),
        drawn,
        torch.tensor(same, dtype=torch.long),
        torch.tensor(third, dtype=torch.long) if third else None,
        decisions[drawn],
        torch.arange(len(givers)) % 3 > 0,
    ), len(answers) - len(frequent)


def whole_image_changes(subject: Subject) -> dict[str, Change]:
    """The changes that give an image a statistic of another, by name."""
    channels = subject.inputs(torch.tensor([0])).shape[1]
    return {
        **({"colour": recoloured} if channels > 1 else {}),
        "brightness and contrast": relit,
        "coarse frequencies": lambda x, giver: respectrum(x, giver, fine=False),
        "texture and fine frequencies": lambda x, giver: respectrum(x, giver, fine=True),
        "place of the object": moved,
    }


def _whole(subject: Subject, pairs: Pairs, name: str, change: Change) -> tuple[Cue, Strength]:
    def answers(givers: Tensor) -> Tensor:
        return _answers(subject, pairs.receivers, lambda x, at: change(x, subject.inputs(givers[at])))

    follows = answers(pairs.givers) == pairs.lent
    controls = {"an image answered alike": answers(pairs.same) == pairs.lent}
    if pairs.third is not None:
        controls["an image answered as neither is"] = answers(pairs.third) == pairs.lent

    # The other way round: givers, which have the answer, get the cue of their receivers, and of others that share their answer.
    kept = _answers(subject, pairs.givers, lambda x, at: change(x, subject.inputs(pairs.receivers[at])))
    alike = _partners(subject, pairs.givers)
    control = _answers(subject, pairs.givers, lambda x, at: change(x, subject.inputs(alike[at])))
    return _cue(name, pairs, follows, controls, kept == pairs.lent, control == pairs.lent)


def _patches(
    subject: Subject, pairs: Pairs, patch: tuple[int, int], marks: dict[int, Tensor]
) -> tuple[Cue, Strength, PairChange, dict[str, Any]]:
    """The patch that decides the giver's answer, pasted over the one that decides the receiver's; its own place does not come along."""
    draw = torch.Generator().manual_seed(subject.seed + 31)
    height, width = subject.inputs(pairs.receivers[:1]).shape[-2:]

    def of(rows: Tensor) -> Tensor:
        return torch.stack([marks[row] for row in rows.tolist()])

    def elsewhere(corners: Tensor) -> Tensor:
        """Places that do not overlap the given ones, as far as there are such."""
        room = torch.tensor([height - patch[0] + 1, width - patch[1] + 1])
        found = corners
        for _ in range(20):
            near = ((found - corners).abs() < torch.tensor(patch)).all(1)
            found = torch.where(
                near[:, None], (torch.rand(len(corners), 2, generator=draw) * room).long(), found
            )
        return found

    def answers(receivers: Tensor, to: Tensor, givers: Tensor, taken: Tensor) -> Tensor:
        def change(x: Tensor, at: Tensor) -> Tensor:
            return pasted(x, subject.inputs(givers[at]), to[at], taken[at], patch)

        return _answers(subject, receivers, change)

    to, marked = of(pairs.receivers), of(pairs.givers)
    # Where receiver and giver are marked at one place, that place could decide; so the patch goes somewhere else then.
    still = ((to - marked).abs() < torch.tensor(patch)).all(1)
    to = torch.where(still[:, None], elsewhere(marked), to)
    follows = answers(pairs.receivers, to, pairs.givers, marked) == pairs.lent
    other = pairs.same if pairs.third is None else pairs.third
    another, theirs = elsewhere(marked), of(other)
    controls = {
        "another patch of the same image": answers(pairs.receivers, to, pairs.givers, another),
        "the marked patch of another image": answers(pairs.receivers, to, other, theirs),
    }
    kept = answers(pairs.givers, marked, pairs.receivers, marked) == pairs.lent
    aside = elsewhere(marked)
    control = answers(pairs.givers, aside, pairs.receivers, aside) == pairs.lent
    controls = {name: found == pairs.lent for name, found in controls.items()}
    cue, bound = _cue(PATCH, pairs, follows, controls, kept, control)
    places = {"to": to, "taken": marked, "another": another, "theirs": theirs}
    told = {name: corners.tolist() for name, corners in places.items()}
    return cue, bound, lambda x, giver, at: pasted(x, giver, to[at], marked[at], patch), told


def _marks(
    subject: Subject, pairs: Pairs, patch: tuple[int, int], explain: Callable[..., Tensor] | None
) -> tuple[dict[int, Tensor], str]:
    """For each sample the corner of the patch that its answer hangs on most, among those that its map marks and a grid, and who proposed them.

    What it hangs on is tried: the patch is filled from an image answered otherwise, and the answer's log-probability falls.
    """
    groups = (pairs.receivers, pairs.givers, pairs.same if pairs.third is None else pairs.third)
    rows = torch.cat(groups).unique()
    if subject.fixed_batch:
        rows = rows.repeat(subject.batch_size)[
            : math.ceil(len(rows) / subject.batch_size) * subject.batch_size
        ]
    height, width = subject.inputs(rows[:1]).shape[-2:]
    fillers = _partners(subject, rows, alike=False)
    answer = subject.outputs.argmax(1)[rows]
    corners: list[Tensor] = [] if explain is None else _map_peaks(subject, rows, answer, patch, explain)
    proposed_by = "maps"
    grid = [
        torch.tensor([top, left])
        for top in _half_steps(height, patch[0])
        for left in _half_steps(width, patch[1])
    ]
    if not corners or subject.flops * len(rows) * len(grid) <= _MARKING:
        proposed_by = "maps and a grid" if corners else "a grid"
        corners += [corner.expand(len(rows), 2) for corner in grid]

    def best_of(tried: Sequence[Tensor]) -> Tensor:
        drops = []
        for corner in progress(tried, "marking patches"):

            def filled(x: Tensor, at: Tensor, corner: Tensor = corner) -> Tensor:
                return pasted(x, subject.inputs(fillers[at]), corner[at], corner[at], patch)

            logits = _logits(subject, rows, filled)
            drops.append(-torch.log_softmax(logits, 1).gather(1, answer[:, None])[:, 0])
        return torch.stack(list(tried))[torch.stack(drops).argmax(0), torch.arange(len(rows))]

    best = best_of(corners)
    room, step = torch.tensor([height - patch[0], width - patch[1]]), [max(1, side // 4) for side in patch]
    around = [torch.tensor([i * step[0], j * step[1]]) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    best = best_of([torch.minimum((best + shift).clamp_min(0), room) for shift in around])
    return dict(zip(rows.tolist(), best)), proposed_by


def _map_peaks(
    subject: Subject, rows: Tensor, answer: Tensor, patch: tuple[int, int], explain: Callable[..., Tensor]
) -> list[Tensor]:
    """The corners of the patches in which most of each map lies, the first, the second, ... of every sample."""
    batches = torch.arange(len(rows)).split(subject.batch_size)
    maps = shards.each(
        batches, lambda at: explain(subject.inputs(rows[at]), answer[at])[:, 0].float().cpu(), "maps"
    )
    sums = F.avg_pool2d(torch.cat(maps)[:, None], patch, stride=1)[:, 0]
    down, across = torch.arange(sums.shape[1])[:, None], torch.arange(sums.shape[2])
    found = []
    for _ in range(_PEAKS):
        best = sums.flatten(1).argmax(1)
        corner = torch.stack([best // sums.shape[2], best % sums.shape[2]], 1)
        found.append(corner)
        near = ((down - corner[:, :1, None]).abs() < patch[0]) & (
            (across - corner[:, 1:, None]).abs() < patch[1]
        )
        sums = sums.masked_fill(near, -math.inf)
    return found


def _half_steps(length: int, side: int) -> list[int]:
    return sorted({min(at, length - side) for at in range(0, length, max(1, side // 2))})


def _partners(subject: Subject, rows: Tensor, alike: bool = True) -> Tensor:
    """For each sample a random other one that is answered alike, or otherwise."""
    draw = torch.Generator().manual_seed(subject.seed + 37)
    decisions = subject.outputs.argmax(1)
    found = []
    for row in rows.tolist():
        fits = (decisions == decisions[row]) == alike
        fits[row] = False
        pool = fits.nonzero().flatten()
        found.append(int(pool[int(torch.randint(len(pool), (1,), generator=draw))]) if len(pool) else row)
    return torch.tensor(found)


def _logits(subject: Subject, rows: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Outputs for samples, of which one can occur more than once; ``change`` is told positions in ``rows``."""
    return subject.answer(rows, change, by_position=True)


def _answers(subject: Subject, rows: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return _logits(subject, rows, change).argmax(1)


def _cue(
    name: str, pairs: Pairs, follows: Tensor, controls: dict[str, Tensor], kept: Tensor, kept_control: Tensor
) -> tuple[Cue, Strength]:
    """The answer to speak of and the stronger control, chosen on some pairs, and what the others say of it; how sure the choice was."""
    choose, measure = ~pairs.measure, pairs.measure

    def excess(part: Tensor) -> tuple[Interval, str]:
        worst = max(controls, key=lambda c: float(controls[c][part].double().mean()))
        return difference(follows[part], controls[worst][part]), worst

    every = torch.ones_like(choose)
    answer, (best, worst) = None, excess(choose)
    # Where all answers do not follow, the few pairs of one can hardly prove that it does: its share itself chooses, and the others measure.
    at = 1 if best[1] > DECIDES else 0
    for each in pairs.lent.unique().tolist():
        part = choose & (pairs.lent == each)
        if int(part.sum()) < _LEAST // 3:
            continue
        found, control = excess(part)
        # One answer is spoken of only where it stands out from all.
        if found[at] > best[at] + (0.1 if answer is None else 0):
            answer, best, worst = each, found, control
    part = measure & (every if answer is None else pairs.lent == answer)
    cue = Cue(
        name,
        answer,
        int(part.sum()),
        share(follows[part]),
        {control: share(values[part])[0] for control, values in controls.items()},
        difference(follows[part], controls[worst][part]),
        share(kept[part]),
        share(kept_control[part])[0],
    )
    return cue, (best[1] > DECIDES, best[at])
