"""Condense a data set: a few learned, or chosen, pictures of each class in place of all.

Lee et al., "Dataset Condensation with Contrastive Signals", ICML 2022, arXiv 2202.02916; DC and DSA are those of Zhao, Mopuri, Bilen 2021 and Zhao, Bilen 2021.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require, show
from lineament.learn.condensation.condensed import Condensed
from lineament.learn.condensation.coresets import k_means
from lineament.learn.condensation.learning import drawn_from, learn_pictures
from lineament.learn.condensation.networks import POOL, SMALLEST, network
from lineament.learn.condensation.options import LOOPS, Condensation
from lineament.learn.condensation.selection import CHOSEN, chosen_rows
from lineament.learn.condensation.siamese import DSA, Strategy

# Of each method that learns: whether it sums over classes, and its augmentation.
LEARNED = {"dc": (False, None), "dsa": (False, DSA), "dcc": (True, None), "dsac": (True, DSA)}
METHODS = (*LEARNED, "random", *CHOSEN)
_PLAIN = Condensation()
Network = str | Callable[[], nn.Module]


def condense(
    images: Tensor,
    targets: Tensor,
    *,
    per_class: int,
    method: str = "dsac",
    network: Network = "convnet",
    start: str | Path | Condensed = "real",
    options: Condensation = _PLAIN,
    classes: Sequence[str] = (),
    checkpoint: Checkpoint | None = None,
    seed: int = 0,
) -> Condensed:
    """A few pictures of each class that cause the gradients of all of them.

    Args:
        images: bytes, or floats in [0, 1] or [0, 255], [n, 1 or 3, height, width]; bytes become [0, 1]. They stay where they are, and all is computed there.
        targets: labels from 0 without gaps, [n].
        per_class: pictures of each class in the set.
        method: ``"dsac"`` (summed over classes, with augmentation), ``"dcc"`` (without), ``"dsa"`` and ``"dc"`` (class by class); or pictures that are chosen:
            ``"random"``, ``"herding"``, ``"k_center"``, ``"k_means"``.
        network: of :data:`~lineament.learn.condensation.networks.POOL`, or a function that makes one from the global random state.
        start: ``"real"`` pictures, ``"noise"``, or a set condensed earlier, or its folder.
        options: see :class:`Condensation`. classes: their names.
        checkpoint: keeps finished networks, so that a run that was killed goes on and gives the same bits.

    Raises:
        InputError: whatever cannot be used, before the first step. NotFiniteError: the pictures diverged.

    >>> x = torch.rand(20, 1, 8, 8); y = torch.arange(20) % 2
    >>> made = condense(x, y, per_class=1, method="dcc", options=Condensation(outer=1, inner=2, epochs=1))
    >>> tuple(made.pictures.shape), made.trace.shape[0]
    ((2, 1, 8, 8), 2)
    """
    begin = ready(
        images, targets, per_class=per_class, method=method, network=network, start=start, options=options, classes=classes, seed=seed,
    )  # fmt: skip
    return begin(checkpoint)


def ready(
    images: Tensor,
    targets: Tensor,
    *,
    per_class: int,
    method: str = "dsac",
    network: Network = "convnet",
    start: str | Path | Condensed = "real",
    options: Condensation = _PLAIN,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> Callable[[Checkpoint | None], Condensed]:
    """What :func:`condense` is to do, once all that it is given has been looked at; called, with a checkpoint or ``None``, it does it.

    >>> x = torch.rand(20, 1, 8, 8); y = torch.arange(20) % 2
    >>> len(ready(x, y, per_class=1, method="random")(None).pictures)
    2
    """
    checks.one_of("method", method, METHODS)
    checks.seed("seed", seed)
    data = _Data.of(images, targets, per_class, classes)
    interpolated = per_class not in LOOPS and None in (options.inner, options.epochs)
    options = options.resolved(per_class, data.classes)
    make = _maker(network, data.shape, data.classes)
    _matchable(make)
    record: dict[str, Any] = {"classes": tuple(map(str, classes)), "method": method}
    settings = {
        "per_class": per_class,
        "seed": seed,
        "network": network if isinstance(network, str) else getattr(network, "__name__", "own"),
    }
    if method not in LEARNED:
        return lambda _: _chosen(data, make, settings, record)
    begun = _start(start, data, per_class, seed)
    told = f"inner steps and epochs for {per_class} pictures a class are interpolated"
    notes = (told,) * interpolated + begun[1]
    return lambda checkpoint: _learned(
        data, make, begun[0], options, settings, {**record, "notes": notes}, checkpoint
    )


def _chosen(
    data: _Data, make: Callable[[int], nn.Module], settings: Mapping[str, Any], record: Mapping[str, Any]
) -> Condensed:
    per_class, seed = settings["per_class"], settings["seed"]
    rows = chosen_rows(record["method"], data.normalised, data.targets, per_class, make, seed)
    chosen = data.own(rows.to(data.images.device))
    return Condensed(
        chosen, data.labels(per_class), data.mean, data.std, data.top, settings=settings, source=data.digest(), **record
    )  # fmt: skip


def _learned(
    data: _Data,
    make: Callable[[int], nn.Module],
    begun: Tensor,
    options: Condensation,
    settings: Mapping[str, Any],
    record: Mapping[str, Any],
    checkpoint: Checkpoint | None,
) -> Condensed:
    contrast, words = LEARNED[record["method"]]
    if options.strategy is not None:
        words = None if options.strategy == "none" else options.strategy
    if not contrast:
        options = replace(options, outer_warmup=options.outer, inner_warmup=options.inner)
    low, high = data.bounds()
    labels, seed = data.labels(settings["per_class"]), settings["seed"]
    pictures, trace = learn_pictures(
        make,
        data.scaled(begun),
        labels,
        lambda outer, inner: data.drawn(options.batch_real, drawn_from(seed, outer, inner, 2)),
        options,
        strategy=None if words is None else Strategy(words, options.mode, options.align_corners),
        groups=_groups(options, data, seed),
        bounds=(low, high) if options.in_range else None,
        seed=seed,
        checkpoint=checkpoint,
    )
    return Condensed(
        data.unscaled(pictures), labels, data.mean, data.std, data.top, begun, trace,
        settings={**settings, **asdict(options), "strategy": words or "none"}, source=data.digest(), **record,
    )  # fmt: skip


@dataclass(frozen=True)
class _Data:
    """Training pictures as they are stored, the rows of each class, and the normalisation."""

    images: Tensor
    targets: Tensor
    rows: list[Tensor]
    mean: Tensor
    std: Tensor
    top: float

    @classmethod
    def of(cls, images: Tensor, targets: Tensor, per_class: int, names: Sequence[str]) -> _Data:
        checks.number("per_class", per_class, low=1, integer=True)
        top = scale_of(images)
        require(
            isinstance(targets, Tensor),
            f"targets: got {show(targets)}, expected numbers from 0; load_data numbers names",
        )
        targets = checks.labels("targets", targets, count=len(images)).to(images.device)
        counts = torch.bincount(targets, minlength=len(names))
        require(len(counts) > 1, "targets: got one class, expected at least two")
        require(
            not names or len(names) == len(counts),
            f"classes: got {len(names)} names for {len(counts)} classes",
        )
        twice = [name for name, times in Counter(names).items() if times > 1]
        require(
            not twice,
            f"classes: {', '.join(map(repr, twice[:1]))} is the name of several classes, expected one name a class",
        )
        empty = (counts == 0).nonzero()[:, 0].tolist()
        told = ", ".join(str(names[c] if names else c) for c in empty[:5]) + ", ..." * (len(empty) > 5)
        require(
            not empty,
            f"targets: no picture is of class{'es' * (len(empty) > 1)} {told}; "
            + (
                "leave out the name, or add pictures"
                if names
                else f"expected labels from 0 to {len(counts) - 1} without gaps, number them anew"
            ),
        )
        fewest = int(counts.argmin())
        require(
            int(counts[fewest]) >= per_class,
            f"per_class: got {per_class}, but class {names[fewest] if names else fewest} has only {int(counts[fewest])}; expected at most as many",
        )
        rows = [(targets == c).nonzero()[:, 0] for c in range(len(counts))]
        total, square, count = 0.0, 0.0, images[:, 0].numel()
        for part in images.split(4096):
            x = _floats(part).double()
            total, square = total + x.sum((0, 2, 3)), square + x.square().sum((0, 2, 3))
        mean = torch.as_tensor(total) / count
        deviation = (torch.as_tensor(square) / count - mean.square()).clamp(min=0).sqrt()
        require(
            bool((deviation > 1e-6 * top).all()),
            "images: all pixels of a channel are alike, expected pictures",
        )
        return cls(images, targets, rows, mean.float(), deviation.float(), top)

    @property
    def classes(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def labels(self, per_class: int) -> Tensor:
        """Those of a set of so many pictures a class."""
        return torch.arange(self.classes, device=self.images.device).repeat_interleave(per_class)

    def own(self, rows: Tensor) -> Tensor:
        return _floats(self.images[rows])

    def normalised(self, rows: Tensor) -> Tensor:
        return self.scaled(self.own(rows))

    def scaled(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    def unscaled(self, z: Tensor) -> Tensor:
        return z * self.std[:, None, None] + self.mean[:, None, None]

    def bounds(self) -> tuple[Tensor, Tensor]:
        black = torch.zeros(self.shape[0], 1, 1, device=self.images.device)
        return self.scaled(black), self.scaled(black + self.top)

    def drawn(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """At most so many random pictures of each class, each once."""
        orders = [torch.randperm(len(rows), generator=generator)[:count] for rows in self.rows]
        return [self.normalised(rows[order.to(rows.device)]) for rows, order in zip(self.rows, orders)]

    def digest(self) -> str:
        found = hashlib.sha256()
        for part in (*self.images.split(4096), self.targets):
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def scale_of(images: Any, what: str = "images") -> float:
    """The value of white in pictures that can be condensed: 1 or 255.

    Raises:
        InputError: no pictures, NaN, whole numbers above 255, values that were normalised already.

    >>> scale_of(torch.zeros(2, 1, 4, 4))
    1.0
    """
    shape = ("pictures", "channels", "height", "width")
    require(
        not (isinstance(images, (list, tuple)) and len({tuple(getattr(x, "shape", ())) for x in images}) > 1),
        f"{what}: they have several sizes, expected one; load_data brings them to image_size",
    )
    images = checks.tensor(what, images, shape=shape)
    require(
        images.shape[1] in (1, 3),
        f"{what}: got {images.shape[1]} channels, expected 1 or 3"
        + (
            "; leave out the fourth (alpha): images[:, :3]"
            if images.shape[1] == 4
            else "; channels come second"
        ),
    )
    if images.dtype == torch.uint8:
        return 1.0
    require(not images.is_complex(), f"{what}: got {show(images)}, expected bytes or floats; take abs()")
    low, high = float(images.min()), float(images.max())
    if not images.is_floating_point():
        raise InputError(
            f"{what}: got {show(images)} with values to {high:g}, expected bytes or floats"
            + ("; divide 16 bits by 65535" if high > 255 else "; convert to uint8")
        )
    require(
        low >= 0 and high <= 255,
        f"{what}: got values from {low:.4g} to {high:.4g}, expected [0, 1] or [0, 255]; pass them as they were before they were normalised",
    )
    require(
        high <= 1 or high > 2,
        f"{what}: got values to {high:.4g}, expected [0, 1] or [0, 255]; clamp what is a little above 1",
    )
    return 1.0 if high <= 1 else 255.0


def _floats(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _maker(given: Network, shape: tuple[int, ...], classes: int) -> Callable[[int], nn.Module]:
    """A network from a number; the caller has set the random state."""
    if isinstance(given, str):
        checks.one_of("network", given, POOL)
        require(
            min(shape[1:]) >= SMALLEST,
            f"images: got pictures of {shape[1]} x {shape[2]}, expected at least {SMALLEST} x {SMALLEST}",
        )
        return lambda k: network(given, shape, classes)
    require(
        callable(given) and not isinstance(given, nn.Module),
        f"network: got {show(given)}, expected a name or a function that makes one",
    )
    with torch.random.fork_rng(devices=[]):
        made = given()
        require(isinstance(made, nn.Module), f"network: it makes {show(made)}, expected a module")
        try:
            found = made.eval()(torch.zeros(2, *shape))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            why = str(error).partition("\n")[0]
            raise InputError(f"network: it cannot take pictures of {shape} ({why})") from error
    require(
        isinstance(found, Tensor) and found.shape == (2, classes),
        f"network: it gives {show(found)} of 2 pictures, expected (2, {classes}), one number a class",
    )
    return lambda k: given()


def _matchable(make: Callable[[int], nn.Module]) -> None:
    with torch.random.fork_rng(devices=[]):
        model = make(0)
    require(
        any(p.ndim > 1 and p.requires_grad for p in model.parameters()),
        "network: none of its weights has two or more dimensions, so that there are no gradients to match",
    )


def earlier_set(start: str | Path) -> Condensed:
    """The set in a folder from which another begins.

    Raises:
        InputError: no folder of a set, and neither ``"real"`` nor ``"noise"``.

    >>> earlier_set("nois")
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: start: got 'nois', expected 'real', 'noise' or the folder of a condensed set; nearest: 'noise'
    """
    require(
        isinstance(start, (str, Path)) and Path(start).exists(),
        f"start: got {show(start)}, expected 'real', 'noise' or the folder of a condensed set"
        + (
            f"; nearest: {near[0]!r}" if (near := get_close_matches(str(start), ("real", "noise"), 1)) else ""
        ),
    )
    return Condensed.load(start)


def _start(start: Any, data: _Data, per_class: int, seed: int) -> tuple[Tensor, tuple[str, ...]]:
    """The first pictures, in the data's own scale."""
    if isinstance(start, str) and start in ("real", "noise"):
        if start == "real":
            rows = chosen_rows(
                "random", data.normalised, data.targets, per_class, lambda k: nn.Identity(), seed
            )
            return data.own(rows.to(data.images.device)), ()
        drawn = torch.randn(data.classes * per_class, *data.shape, generator=drawn_from(seed, 4))
        return data.unscaled(drawn.to(data.images.device)), ("the pictures began as noise",)
    earlier = start if isinstance(start, Condensed) else earlier_set(start)
    wanted = (data.classes * per_class, *data.shape)
    require(
        tuple(earlier.pictures.shape) == wanted and earlier.top == data.top,
        f"start: a set of {tuple(earlier.pictures.shape)} in [0, {earlier.top:g}], expected {wanted} in [0, {data.top:g}]",
    )
    counts = torch.bincount(earlier.labels, minlength=data.classes).tolist()
    require(
        counts == [per_class] * data.classes,
        f"start: a set of {counts} pictures by class, expected {per_class} of each of {data.classes}",
    )
    order = earlier.labels.argsort(stable=True)
    return earlier.pictures[order].to(data.images.device), (
        f"the pictures began as a set made by {earlier.method}",
    )


def _groups(options: Condensation, data: _Data, seed: int) -> Callable[[int], Sequence[Sequence[int]]]:
    """Which classes are summed together with each network."""
    if not isinstance(options.groups, str):
        given = [list(group) for group in options.groups]
        return lambda outer: given
    if options.groups == "random":

        def random(outer: int) -> Sequence[Sequence[int]]:
            order = torch.randperm(data.classes, generator=drawn_from(seed, outer, 5))
            return [part.tolist() for part in order.tensor_split(options.group_count)]

        return random
    if options.groups == "clustered":
        means = torch.stack([data.normalised(rows[:512]).mean(0).flatten() for rows in data.rows]).cpu()
        centres = means[torch.tensor(k_means(means, options.group_count))]
        nearest = torch.cdist(means, centres).argmin(1)
        held = [g for k in range(options.group_count) if (g := (nearest == k).nonzero()[:, 0].tolist())]
        return lambda outer: held
    return lambda outer: [range(data.classes)]
