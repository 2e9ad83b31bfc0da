"""What is a condensed set worth? Networks are trained on it from nothing and tested, beside those trained on what it must beat.

The two scores are those of DD-Ranking (Li et al. 2025, arXiv 2505.13300), for hard labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import require, show
from lineament.core.results import Readable, axes, plain
from lineament.learn.condensation.condensed import Condensed
from lineament.learn.condensation.condensing import Network, _Data, _maker, scale_of
from lineament.learn.condensation.learning import drawn_from
from lineament.learn.condensation.trials import Protocol, TestData, Trial

_PROTOCOL = Protocol()
# What is also trained on with augmentation.
_AUGMENTED = ("condensed", "own start", "random real")


@dataclass(frozen=True)
class Evaluation(Readable):
    """Accuracy of every network in [0, 1], by what it was trained on.

    Attributes:
        accuracy: {what: {network: [networks]}} without augmentation: ``"condensed"``, ``"clamped"``, ``"8 bit"``, and beside them ``"own start"``, ``"random real"``,
            ``"class means"``, ``"all pictures"``, those that there are. augmented: the same with augmentation.
        label_robust, augmentation_robust: the scores of DD-Ranking in percent, of the first network; ``None`` where what they compare was not trained.
        nearest: distance (root mean square, of the scale) of each picture of the set to the nearest training picture; nearest_real: of as many training pictures to the
            nearest other one. apart: of as many pairs of random training pictures.
        storage: share of the training pictures' number that the set holds. seconds: {what: {network: time}} of one network's training and test without augmentation.

    >>> Evaluation({"condensed": {"mlp": torch.tensor([0.5, 1.0])}}).mean("condensed", "mlp")
    0.75
    """

    accuracy: Mapping[str, Mapping[str, Tensor]]
    augmented: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    label_robust: float | None = None
    augmentation_robust: float | None = None
    nearest: Tensor = field(default_factory=lambda: torch.empty(0))
    nearest_real: Tensor = field(default_factory=lambda: torch.empty(0))
    apart: Tensor = field(default_factory=lambda: torch.empty(0))
    storage: float = 0.0
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def mean(self, what: str, network: str, *, augmented: bool = False) -> float:
        """The mean accuracy over networks."""
        return float((self.augmented if augmented else self.accuracy)[what][network].mean())

    def to_dict(self) -> dict[str, Any]:
        return plain(vars(self))

    def plot(self, ax: Any = None) -> Any:
        """Accuracy by what was trained on, one colour a network, with the population deviation over networks."""
        ax = axes(ax)
        names = list(self.accuracy)
        nets = list(self.accuracy[names[0]])
        for place, net in enumerate(nets):
            held = [
                (k, self.accuracy[name][net]) for k, name in enumerate(names) if net in self.accuracy[name]
            ]
            ax.errorbar(
                [k + 0.12 * (place - (len(nets) - 1) / 2) for k, _ in held],
                [100 * float(v.mean()) for _, v in held],
                [100 * float(v.std(correction=0)) for _, v in held],
                fmt="o", label=net,
            )  # fmt: skip
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        ax.set(ylabel="test accuracy, %")
        ax.legend()
        return ax


def evaluate(
    condensed: Condensed,
    test: tuple[Tensor, Tensor],
    *,
    real: tuple[Tensor, Tensor] | None = None,
    networks: Sequence[str] | Mapping[str, Network] = ("convnet",),
    protocol: Protocol = _PROTOCOL,
    augmented: bool = True,
    normalisation: tuple[Tensor, Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
    note: Callable[[str], None] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Train networks on a condensed set, and on what it must beat, with the same beginnings, and test them.

    Args:
        test: pictures and labels that the condensing has not seen, in the set's scale. real: the training pictures and labels; without them, what they are needed for
            is left out.
        networks: names of the pool (the first is the one whose scores are told), or names with functions that make one.
        augmented: whether each is also trained with augmentation.
        normalisation: mean and deviation of each channel, where they are given; other ones than the set's are refused, since a set is worth nothing under them.
        checkpoint: keeps networks that were tested, so that a run that was killed goes on. note: is told how long it will take, from a few steps of each training.

    >>> x = torch.rand(12, 1, 8, 8); y = torch.arange(12) % 2
    >>> made = Condensed(x[:2], y[:2], x.mean((0, 2, 3)), x.std((0, 2, 3)))
    >>> found = evaluate(made, (x[6:], y[6:]), networks=["mlp"], protocol=Protocol(networks=2, epochs=2), augmented=False)
    >>> list(found.accuracy), tuple(found.accuracy["condensed"]["mlp"].shape)
    (['condensed', 'clamped', '8 bit'], (2,))
    """
    if normalisation is not None:
        given = [torch.as_tensor(v, dtype=torch.float32).flatten() for v in normalisation]
        own = (condensed.mean.cpu(), condensed.std.cpu())
        same = all(
            a.numel() == b.numel() and torch.allclose(a.cpu(), b, rtol=1e-3, atol=1e-5)
            for a, b in zip(given, own)
        )
        require(
            same,
            f"normalisation: got {[v.tolist() for v in given]}, but the set was made with {[v.tolist() for v in own]}; leave it out",
        )
    classes = int(condensed.labels.max()) + 1
    shape = tuple(condensed.pictures.shape[1:])
    test_y = labels_of_test(test, shape, condensed.top, classes)
    pool = networks if isinstance(networks, Mapping) else {name: name for name in networks}
    require(len(pool) > 0, "networks: got none, expected at least one")
    makers = {name: _maker(made, shape, classes) for name, made in pool.items()}
    sets = _sets(condensed, real, seed)
    trials: dict[tuple[str, str, bool], Trial] = {}
    for what, (x, y) in sets.items():
        epochs = protocol.full_epochs if what == "all pictures" else None
        for name, make in makers.items() if epochs != 0 else ():
            trials[what, name, False] = Trial(x, y, make, epochs=epochs)
            if augmented and what in _AUGMENTED:
                trials[what, name, True] = Trial(x, y, make, protocol.strategy)
    found, taken = _all_tested(
        trials, condensed, TestData(condensed, test[0], test_y), protocol, checkpoint=checkpoint, note=note, seed=seed
    )  # fmt: skip
    accuracy: dict[str, dict[str, Tensor]] = {}
    with_draws: dict[str, dict[str, Tensor]] = {}
    seconds: dict[str, dict[str, float]] = {}
    for (what, name, drawn), values, times in zip(trials, found, taken):
        (with_draws if drawn else accuracy).setdefault(what, {})[name] = values
        if not drawn:
            seconds.setdefault(what, {})[name] = times
    first = next(iter(makers))
    near = _nearest(condensed, real, seed)
    return Evaluation(
        accuracy, with_draws, _label_robust(accuracy, first), _augmentation_robust(accuracy, with_draws, first), *near,
        storage=0.0 if real is None else len(condensed.labels) / len(real[1]), seconds=seconds,
    )  # fmt: skip


def _all_tested(
    trials: Mapping[tuple[str, str, bool], Trial],
    condensed: Condensed,
    test: TestData,
    protocol: Protocol,
    *,
    checkpoint: Checkpoint | None,
    note: Callable[[str], None] | None,
    seed: int,
) -> tuple[list[Tensor], list[float]]:
    """Of each trial the accuracy of its networks, and the mean time of one."""
    each = protocol.networks
    jobs = [(trial, k) for trial in trials.values() for k in range(each)]
    found: list[float] = []
    taken: list[float] = []
    numbers: Iterator[int] = iter(range(len(jobs)))
    if checkpoint is not None:
        numbers = checkpoint.loop("evaluation", len(jobs), {"found": found, "taken": taken})
    first = next(numbers, None)
    if first is not None:
        numbers = chain([first], numbers)
    work = None
    if note is not None and first is not None:
        work = _expected(trials, condensed, len(test.labels), protocol)
        left = timedelta(seconds=math.ceil(sum(work[first:])))
        note(
            f"training {len(jobs) - first:,} networks, {each} in each of {len(trials)} ways"
            + f" without the {first:,} that an earlier run did" * bool(first)
            + f", in about {left}"
        )
    for n in progress(numbers, "networks trained", len(jobs), before=int, work=work):
        trial, k = jobs[n]
        begun = time.monotonic()
        found.append(trial.accuracy(k, condensed, test, protocol, seed))
        taken.append(time.monotonic() - begun)
    values = torch.tensor(found, dtype=torch.float64).split(each)
    return list(values), [sum(taken[at : at + each]) / each for at in range(0, len(jobs), each)]


def _expected(
    trials: Mapping[tuple[str, str, bool], Trial], condensed: Condensed, tested: int, protocol: Protocol
) -> list[float]:
    """About how many seconds each network will take. Those of a kind take as long on other sets of as many pictures."""
    known: dict[tuple[Any, ...], float] = {}
    work: list[float] = []
    for (_, name, drawn), trial in trials.items():
        of = (name, drawn, len(trial.labels), trial.epochs)
        if of not in known:
            known[of] = trial.seconds(condensed, tested, protocol)
        work += [known[of]] * protocol.networks
    return work


def labels_of_test(test: tuple[Tensor, Tensor], shape: tuple[int, ...], top: float, classes: int) -> Tensor:
    """The labels of pictures on which a set of this shape, scale and number of classes can be tested.

    Raises:
        InputError: pictures of another shape or scale, labels of other classes.

    >>> labels_of_test((torch.zeros(2, 1, 4, 4), torch.arange(2)), (1, 4, 4), 1.0, 2).tolist()
    [0, 1]
    """
    white = scale_of(test[0], "test")
    require(tuple(test[0].shape[1:]) == shape, f"test: got {show(test[0])}, expected pictures of {shape}")
    require(
        white <= top and (top == 1 or test[0].dtype != torch.uint8),
        f"test: got pictures in [0, {white:g}], but the set is in [0, {top:g}]",
    )
    return checks.labels("test", test[1], count=len(test[0]), classes=classes)


def _sets(
    condensed: Condensed, real: tuple[Tensor, Tensor] | None, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """What is trained on, by name."""
    labels = condensed.labels
    found = {
        "condensed": (condensed.pictures, labels),
        "clamped": (condensed.clamped(), labels),
        "8 bit": (condensed.as_bytes().float() * (condensed.top / 255), labels),
    }
    if condensed.start.numel():
        found["own start"] = (condensed.start, labels)
    if real is not None:
        data = _Data.of(real[0], real[1], condensed.per_class, condensed.classes)
        require(
            data.top == condensed.top,
            f"real: got pictures in [0, {data.top:g}], but the set is in [0, {condensed.top:g}]",
        )
        generator = drawn_from(seed, 8)
        drawn = [
            rows[torch.randperm(len(rows), generator=generator)[: condensed.per_class].to(rows.device)]
            for rows in data.rows
        ]
        classes = torch.arange(data.classes, device=labels.device)
        found["random real"] = (data.own(torch.cat(drawn)), classes.repeat_interleave(condensed.per_class))
        found["class means"] = (torch.stack([data.own(rows).mean(0) for rows in data.rows]), classes)
        found["all pictures"] = (real[0], data.targets)
    return found


def _mean(found: Mapping[str, Mapping[str, Tensor]], what: str, network: str) -> float | None:
    held = found.get(what, {}).get(network)
    return None if held is None else float(held.mean())


def robust_score(value: float) -> float:
    """(e^α - e^-1) / (e - e^-1) in percent, of α in [-1, 1].

    >>> robust_score(1.0), robust_score(-1.0), round(robust_score(0.0), 1)
    (100.0, 0.0, 26.9)
    """
    return 100 * (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _label_robust(accuracy: Mapping[str, Mapping[str, Tensor]], network: str) -> float | None:
    """α = (improvement over random real - what all pictures are ahead) / 2."""
    mine, random, full = (_mean(accuracy, w, network) for w in ("condensed", "random real", "all pictures"))
    if mine is None or random is None or full is None:
        return None
    return robust_score(0.5 * (mine - random) - 0.5 * (full - mine))


def _augmentation_robust(
    plain: Mapping[str, Any], augmented: Mapping[str, Any], network: str
) -> float | None:
    """β = the mean improvement over random real, with and without augmentation."""
    pairs = [[_mean(found, w, network) for w in ("condensed", "random real")] for found in (augmented, plain)]
    gains = [mine - random for mine, random in pairs if mine is not None and random is not None]
    return robust_score(sum(gains) / 2) if len(gains) == 2 else None


def _nearest(
    condensed: Condensed, real: tuple[Tensor, Tensor] | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances to the nearest training picture, of the set and of as many training pictures (themselves left out), and of pairs of random ones, in parts of the scale."""
    if real is None:
        return torch.empty(0), torch.empty(0), torch.empty(0)
    count = len(real[0])
    some = torch.randperm(count, generator=drawn_from(seed, 9))[: len(condensed.labels)].to(real[0].device)
    scale = 1 / 255 if real[0].dtype == torch.uint8 else 1.0
    size = real[0][0].numel()

    def least(pictures: Tensor, own: Tensor | None) -> Tensor:
        best = torch.full((len(pictures),), torch.inf, device=pictures.device)
        for at in range(0, count, 4096):
            part = real[0][at : at + 4096].float().flatten(1) * scale
            # Squares and products would lose the small distances that are looked for.
            found = torch.cdist(pictures.flatten(1), part, compute_mode="donot_use_mm_for_euclid_dist")
            if own is not None:
                here = (own >= at) & (own < at + len(part))
                found[here.nonzero()[:, 0], own[here] - at] = torch.inf
            best = torch.minimum(best, found.min(1).values)
        return best / math.sqrt(size) / condensed.top

    first = real[0][some].float() * scale
    apart = (first - first.roll(1, 0)).flatten(1).square().mean(1).sqrt() / condensed.top
    return least(condensed.pictures, None), least(first, some), apart
