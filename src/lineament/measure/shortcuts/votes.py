"""Which attribute of a user's samples does a network decide by? Reliance on each, for any number of classes and values.

The question of Hermann, Mobahi, Fel, Mozer (ICLR 2024, arXiv 2310.16228) on data whose attributes are named. An attribute's *vote* is the class that is
likeliest given its value. Where the votes of two attributes disagree, the answers say which of them decides:

    reliance of a against b = mean over conflict cells of (share of answers with a's vote - share with b's),

each cell (a pair of values) counting alike. For two binary attributes and two classes this is the paper's mean over the four groups of ŷ (a - b). The label itself is the
attribute that every data set has; the best rule is the class that is likeliest given both values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.batching import auto_batch
from lineament.core.checks import InputError, require
from lineament.core.models import answered, decided, device_of, dtype_of, frozen
from lineament.core.results import Readable
from lineament.core.statistics.shares import Interval, share, wilson
from lineament.data.samples import Samples
from lineament.data.two_latents import TwoLatents
from lineament.load.data import load_data
from lineament.measure.shortcuts.latents import LatentBias, latent_bias

LABEL = "label"
_MOST_VALUES = 200
_FEW = 5


@dataclass(frozen=True)
class Attribute(Readable):
    """One attribute: the class that each value votes for, and how often that is right in the reference table, each sample's vote being made without it (``chance``: the commonest class)."""

    name: str
    values: tuple[str, ...]
    votes: tuple[int, ...]
    predictivity: Interval
    chance: float
    samples: int

    @property
    def predictive(self) -> bool:
        """Whether it says more of the class than the commonest class does, beyond chance."""
        return self.predictivity[1] > self.chance


@dataclass(frozen=True)
class Cell(Readable):
    """Samples that share a label and all attributes' values, and how many are answered rightly (with Wilson's 95 % interval)."""

    label: int
    values: tuple[str, ...]
    samples: int
    accuracy: Interval


@dataclass(frozen=True)
class Conflict(Readable):
    """Where the votes of two attributes disagree: which of them answers go with.

    ``reliance``: the share with ``attribute`` less the share with ``other``, cells counting alike, with a 95 % interval; ``with_attribute`` and ``with_other`` are the
    two shares, ``best`` the reliance of the best rule, ``bias`` what is left when that is taken away. ``missing``: pairs of values that disagree and have no sample.
    """

    attribute: str
    other: str
    reliance: Interval
    with_attribute: float
    with_other: float
    best: float
    bias: float
    cells: int
    samples: int
    smallest: int
    missing: int


@dataclass(frozen=True)
class GroupBias(Readable):
    """What a network decides by, of the attributes given.

    Attributes:
        attributes: each with its votes and its predictivity.
        conflicts: each attribute against the label, and against each other attribute.
        cells: accuracy by label and values; ``worst`` is that of the lowest accuracy.
        accuracy: of all samples.
        reference: where votes and the best rule come from.
        notes: what to know before a number is believed.
    """

    attributes: tuple[Attribute, ...]
    conflicts: tuple[Conflict, ...]
    cells: tuple[Cell, ...]
    worst: Cell
    accuracy: Interval
    reference: str
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str | tuple[str, str]) -> Conflict:
        """The conflict of an attribute with the label, or of a pair."""
        pair = (name, LABEL) if isinstance(name, str) else tuple(name)
        for conflict in self.conflicts:
            if (conflict.attribute, conflict.other) == pair:
                return conflict
        there = [f"{c.attribute} against {c.other}" for c in self.conflicts]
        raise InputError(
            f"groups: no conflict of {pair[0]!r} and {pair[1]!r}{checks.suggest(str(name), there)}"
        )

    def to_dict(self) -> dict[str, Any]:
        return results.plain(vars(self))

    def plot(self, ax: Any = None) -> Any:
        """Reliance of each pair with its interval, and the best rule's as a mark."""
        ax = results.axes(ax)
        names = [f"{c.attribute}\nagainst {c.other}" for c in self.conflicts]
        middle = np.array([c.reliance[0] for c in self.conflicts])
        ends = np.array([c.reliance[1:] for c in self.conflicts]).reshape(-1, 2)
        at = range(len(names))
        ax.errorbar(at, middle, yerr=np.abs(ends.T - middle), fmt="o", color="C0", label="the network")
        ax.plot(at, [c.best for c in self.conflicts], "_", color="k", markersize=18, label="the best rule")
        ax.axhline(0, color="C7", linewidth=0.8)
        ax.set_xticks(at, names, parse_math=False)
        ax.set(ylim=(-1.05, 1.05), ylabel="reliance")
        ax.legend()
        return ax


Groups = Mapping[str, Any] | Sequence[Any]


def shortcut_bias(
    model: nn.Module,
    data: Any,
    *,
    groups: Groups | None = None,
    reference: Any = None,
    points: int = 30,
    reach: float = 3.0,
    density: str = "uniform",
    samples: int = 50_000,
    batch_size: int = 256,
) -> GroupBias | LatentBias:
    """Which attribute does a network decide by, and how far is that from the best rule?

    Args:
        model: a classifier.
        data: samples as any call here takes them, with ``groups``; or a :class:`~lineament.data.two_latents.TwoLatents`, which is probed on a grid
            (see :func:`~lineament.measure.shortcuts.latents.latent_bias`).
        groups: the attributes, one value a sample: ``{name: values}``, a list of such values, or names among the samples' ``extras``. Values are numbers or words,
            at most 200 different ones each. By default the samples' own groups.
        reference: the *training* table, from which votes and the best rule come: ``(targets, groups)`` with groups of the same names, or ``Samples``. Without it the
            audited samples are their own reference, which is said in the result. For two latents: samples to fit the best rule to.
        points, reach, density: of the grid for two latents.
        samples: read at most so many.

    Returns:
        :class:`GroupBias`, or :class:`~lineament.measure.shortcuts.latents.LatentBias` for two latents.

    Raises:
        InputError: a group of another length, with a single value or too many, NaN; one class only; a reference without a group's value.

    >>> colour, shape = torch.tensor([0, 0, 1, 1] * 10), torch.tensor([0, 1, 0, 1] * 10)
    >>> x = torch.stack([colour, shape], 1).float() - 0.5
    >>> net = nn.Linear(2, 2); net.weight.data = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]); _ = net.bias.data.zero_()
    >>> found = shortcut_bias(net, (x, shape), groups={"colour": colour}, reference=(colour, {"colour": colour}))
    >>> found["colour"].reliance[0], found.worst.accuracy[0]
    (1.0, 0.0)
    """
    if isinstance(data, TwoLatents):
        require(groups is None, "groups: two latents are probed on their grid; expected no groups")
        return latent_bias(
            model,
            data,
            reference=reference,
            points=points,
            reach=reach,
            density=density,
            batch_size=batch_size,
        )
    found = data if isinstance(data, Samples) else load_data(data, samples=samples)
    if groups is not None and len(found) < found.total:
        groups = {
            name: values[found.index.numpy()] for name, values in _named(groups, None, found.total).items()
        }
    answers = _answers(model, found, batch_size)
    return bias_of_answers(answers, found, groups=groups, reference=reference)


def bias_of_answers(
    answers: Tensor, samples: Samples, *, groups: Groups | None = None, reference: Any = None
) -> GroupBias:
    """The same as :func:`shortcut_bias` for answers that are there already: one class a sample.

    >>> y = torch.tensor([0, 1] * 8); wall = torch.tensor([0, 0, 1, 1] * 4)
    >>> data = Samples(torch.zeros(16, 1), y)
    >>> bias_of_answers(wall, data, groups={"wall": wall}, reference=(wall, {"wall": wall}))["wall"].reliance[0]
    1.0
    """
    y = checks.labels("targets", samples.targets)
    answers = checks.labels("answers", answers.cpu(), count=len(y))
    require(
        len(y.unique()) > 1, f"targets: all {len(y)} are of class {int(y[0])}, expected at least two classes"
    )
    named = _named(groups, samples, len(y))
    table_y, table, source = _reference(reference, y, named)
    codes, attributes = {}, []
    for name, values in named.items():
        words = np.unique(np.concatenate([values, table[name]]))
        codes[name] = np.searchsorted(words, values)
        attributes.append(_attribute(name, words, np.searchsorted(words, table[name]), table_y))
    notes = (
        []
        if reference is not None
        else [
            "Votes and the best rule come from the audited samples themselves; a training table may say otherwise."
        ]
    )
    notes += [
        f"{a.name} says no more of the class than the commonest class does (right for {a.predictivity[0]:.1%}, {a.chance:.1%} by chance)"
        for a in attributes
        if not a.predictive
    ]
    conflicts, votes = [], {a.name: np.array(a.votes) for a in attributes}
    for a in attributes:
        conflicts.append(_against_label(a, votes[a.name][codes[a.name]], codes[a.name], y, answers))
    for a, b in itertools.combinations(attributes, 2):
        conflicts.append(_pair(a, b, codes, answers, table, table_y, notes))
    cells = _cells(named, y, answers)
    worst = min(cells, key=lambda cell: cell.accuracy[0])
    for c in conflicts:
        if not c.samples:
            notes.append(
                f"{c.attribute} and {c.other} never disagree in these samples, so that nothing tells them apart"
            )
        elif c.missing:
            notes.append(
                f"{c.missing} of {c.missing + c.cells} cells in which {c.attribute} and {c.other} disagree have no sample"
            )
    small = sum(cell.samples < _FEW for cell in cells)
    if small:
        notes.append(
            f"{small} of {len(cells)} cells have fewer than {_FEW} samples; their accuracies say little"
        )
    whole = share(answers == y)
    return GroupBias(tuple(attributes), tuple(conflicts), tuple(cells), worst, whole, source, tuple(notes))


def _answers(model: nn.Module, samples: Samples, batch_size: int) -> Tensor:
    device, dtype = device_of(model), dtype_of(model)

    def answer(start: int, stop: int) -> Tensor:
        x = samples.inputs[start:stop].to(device)
        return decided(answered(model, x.to(dtype) if x.is_floating_point() else x, "inputs")).cpu()

    with frozen(model), torch.no_grad():
        return torch.cat(list(auto_batch(answer, len(samples), most=batch_size, memory=model)))


def _named(groups: Groups | None, samples: Samples | None, count: int) -> dict[str, np.ndarray]:
    """{name: values as words}."""
    if groups is None:
        require(
            samples is not None and samples.groups is not None,
            "groups: got none, and the samples have no groups of their own; expected {name: one value a sample}",
        )
        assert samples is not None and samples.groups is not None
        names = np.array(samples.group_names or [str(g) for g in range(int(samples.groups.max()) + 1)])
        return {"group": names[samples.groups.cpu().numpy()]}
    if isinstance(groups, Mapping):
        given = dict(groups)
    else:
        several = checks.listed("groups", groups, "attributes, such as {'background': values}")
        extras = {} if samples is None else samples.extras
        given = {}
        for number, one in enumerate(several):
            if isinstance(one, str):
                checks.one_of("groups", one, extras)
                given[one] = extras[one]
            else:
                given[f"attribute {number + 1}"] = one
    require(bool(given), "groups: got none, expected {name: one value a sample}")
    require(
        LABEL not in given,
        f"groups: {LABEL!r} is what the targets are called here; give the attribute another name",
    )
    return {str(name): _words(str(name), values, count) for name, values in given.items()}


def _words(name: str, values: Any, count: int) -> np.ndarray:
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    require(
        found.shape == (count,),
        f"groups: {name!r} has the shape {found.shape}, expected one value for each of {count} samples",
    )
    if found.dtype.kind == "f":
        bad = int((~np.isfinite(found)).sum())
        require(not bad, f"groups: {bad} of {count} values of {name!r} are NaN or infinite")
    different = len(np.unique(found))
    require(
        different > 1, f"groups: {name!r} has one value, {found[:1].tolist()[0]!r}; expected at least two"
    )
    require(
        different <= _MOST_VALUES,
        f"groups: {name!r} has {different} different values, expected at most {_MOST_VALUES}; bin it (numpy.digitize)",
    )
    return found.astype(str)


def _reference(
    reference: Any, y: Tensor, named: Mapping[str, np.ndarray]
) -> tuple[Tensor, dict[str, np.ndarray], str]:
    if reference is None:
        return y, dict(named), f"the {len(y)} audited samples themselves"
    if isinstance(reference, Samples):
        targets = reference.targets
        own = "group" in named and set(named) == {"group"} and reference.groups is not None
        table = _named(None if own else list(named), reference, len(targets))
    else:
        require(
            isinstance(reference, (tuple, list)) and len(reference) == 2,
            f"reference: got {checks.show(reference)}, expected Samples or (targets, groups)",
        )
        targets, given = reference
        targets = torch.as_tensor(targets)
        table = _named(given, None, len(targets))
    for name, values in named.items():
        require(name in table, f"reference: it has no group {name!r}{checks.suggest(name, table)}")
        lost = sorted(set(values) - set(table[name]))
        require(
            not lost,
            f"reference: no sample has {name} = {lost[0] if lost else ''}, which audited ones have, so that it has no vote; there are: {', '.join(sorted(set(table[name]))[:12])}",
        )
    return (
        checks.labels("reference", targets),
        {n: table[n] for n in named},
        f"a table of {len(targets)} samples",
    )


def _attribute(name: str, words: np.ndarray, codes: np.ndarray, y: Tensor) -> Attribute:
    counts = _table(codes[:, None], (len(words),), y)
    votes = counts.argmax(-1)
    # Without the sample itself: the likeliest of many classes is right by chance on the samples that made it so.
    top = -np.sort(-counts, axis=-1)[:, :2]
    hits, total = int(np.where(top[:, 0] - 1 > top[:, 1], top[:, 0], 0).sum()), len(y)
    chance = float(torch.bincount(y).max()) / total
    return Attribute(
        name,
        tuple(map(str, words)),
        tuple(map(int, votes)),
        (hits / total, *wilson(hits, total)),
        chance,
        total,
    )


def _table(codes: np.ndarray, sizes: tuple[int, ...], y: Tensor) -> np.ndarray:
    """Counts by values and class."""
    counts = np.zeros((*sizes, int(y.max()) + 1), dtype=np.int64)
    np.add.at(counts, (*codes.T, y.numpy()), 1)
    return counts


def _against_label(a: Attribute, vote: np.ndarray, codes: np.ndarray, y: Tensor, answers: Tensor) -> Conflict:
    label = y.numpy()
    return _conflict(
        a.name,
        LABEL,
        vote,
        label,
        np.stack([codes, label], 1),
        answers,
        label,
        votes=(a.votes, None),
    )


def _pair(
    a: Attribute,
    b: Attribute,
    codes: Mapping[str, np.ndarray],
    answers: Tensor,
    table: Mapping[str, np.ndarray],
    table_y: Tensor,
    notes: list[str],
) -> Conflict:
    values = [np.array(a.values), np.array(b.values)]
    known = np.stack([np.searchsorted(words, table[x.name]) for words, x in zip(values, (a, b))], 1)
    counts = _table(known, (len(a.values), len(b.values)), table_y)
    best = counts.argmax(-1)
    unseen = counts.sum(-1) == 0
    stronger = a if a.predictivity[0] > b.predictivity[0] else b
    alone = np.broadcast_to(
        np.array(stronger.votes)[:, None] if stronger is a else np.array(stronger.votes)[None], best.shape
    )
    best = np.where(unseen, alone, best)
    own = np.stack([codes[a.name], codes[b.name]], 1)
    if unseen[own[:, 0], own[:, 1]].any():
        notes.append(
            f"the reference has no sample of some pairs of {a.name} and {b.name}; there the best rule follows {stronger.name}, the more predictive"
        )
    votes = np.array(a.votes)[own[:, 0]], np.array(b.votes)[own[:, 1]]
    return _conflict(
        a.name, b.name, *votes, own, answers, best[own[:, 0], own[:, 1]], votes=(a.votes, b.votes)
    )


def _conflict(
    name: str,
    other: str,
    vote: np.ndarray,
    rival: np.ndarray,
    cells: np.ndarray,
    answers: Tensor,
    best: np.ndarray,
    *,
    votes: tuple[Sequence[int], Sequence[int] | None],
) -> Conflict:
    said = answers.numpy()
    rows = np.flatnonzero(vote != rival)
    _, cell = np.unique(cells[rows], axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    count = np.bincount(cell)
    right = range(int(max(rival.max(initial=0), vote.max(initial=0))) + 1)
    possible = sum(p != q for p in votes[0] for q in (votes[1] if votes[1] is not None else right))
    if not len(rows):
        return Conflict(
            name, other, (math.nan, -1.0, 1.0), math.nan, math.nan, math.nan, math.nan, 0, 0, 0, possible
        )

    def mean(hits: np.ndarray) -> float:
        return float((np.bincount(cell, hits[rows].astype(float)) / count).mean())

    ours, theirs = mean(said == vote), mean(said == rival)
    rule = mean(best == vote) - mean(best == rival)
    # Half an answer more for either vote and one for neither: a variance that is not 0 where all answers agree (Agresti and Min 2005).
    p, q = ((np.bincount(cell, (said == to)[rows].astype(float)) + 0.5) / (count + 2) for to in (vote, rival))
    error = math.sqrt(float(((p + q - (p - q) ** 2) / (count + 2)).sum())) / len(count)
    value = ours - theirs
    low, high = min(value, max(-1.0, value - 1.96 * error)), max(value, min(1.0, value + 1.96 * error))
    return Conflict(
        name, other, (value, low, high), ours, theirs, rule, value - rule,
        len(count), len(rows), int(count.min()), max(0, possible - len(count)),
    )  # fmt: skip


def _cells(named: Mapping[str, np.ndarray], y: Tensor, answers: Tensor) -> list[Cell]:
    rows = np.stack([y.numpy().astype(str), *named.values()], 1)
    kinds, cell = np.unique(rows, axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    right = (answers == y).numpy()
    found = [
        Cell(
            int(kind[0]),
            tuple(map(str, kind[1:])),
            int((cell == k).sum()),
            share(torch.from_numpy(right[cell == k])),
        )
        for k, kind in enumerate(kinds)
    ]
    return sorted(found, key=lambda c: (c.label, c.values))
