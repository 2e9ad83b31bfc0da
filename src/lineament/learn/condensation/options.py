"""How a set is condensed: the numbers of the published loops, and what else may be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from lineament.core.checks import InputError, number, one_of, require, show, suggest
from lineament.learn.condensation.distances import KINDS
from lineament.learn.condensation.siamese import Mode, Strategy

# Pictures a class: matching steps of an inner loop, and the network's epochs after each.
LOOPS = {1: (10, 5), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
PAPER_RATE = 0.1
# The most that a step of the scaled rate moves a picture, root mean square in deviations of the pixels. At the published rate one of CIFAR-10 moves by 0.002 (10 a class,
# summed) to 0.02 (one a class, class by class); one of 8 x 8 would move by 0.2 to 1, which is more than it holds of its class.
LARGEST_STEP = 0.005
Kind = Literal["rows", "squares", "cosine"]


@dataclass(frozen=True)
class Condensation:
    """Options of :func:`~lineament.learn.condense`; what is ``None`` follows from the others.

    Attributes:
        outer, inner: fresh networks, and matching steps with each; epochs: of the network between them. By default the published table.
        outer_warmup, inner_warmup: steps are class by class while both numbers are below these, and summed from then on; by default a quarter of ``outer``, and 10.
        rate: of the pictures: ``"scaled"`` is 0.1 times the root of classes over groups, which makes up for a sum of C distances, and moves no picture by more than 0.005 of
            the pixels' deviation in a step, see :meth:`capped`; ``"paper"`` 0.1; or a number.
        momentum: of the pictures. network_rate, network_momentum: of the networks.
        batch_real, batch_train: real pictures of each class in a step, and synthetic ones in a step of the network.
        distance: ``"rows"``, ``"squares"`` or ``"cosine"``, see :func:`~lineament.learn.condensation.distances.gradient_distance`.
        groups: which classes are summed: ``"all"``, ``"random"`` (drawn anew for each network) or ``"clustered"`` (by the mean pictures) into
            ``group_count`` groups, or lists of class numbers.
        strategy: words of the augmentation, or ``"none"``; by default the method's own. mode, align_corners: see
            :class:`~lineament.learn.condensation.siamese.Strategy`. siamese: whether real and synthetic pictures share what is drawn.
        in_range: keep the pictures where bytes can hold them.
        chunk: synthetic pictures of which second derivatives are held at a time. bfloat16: for all that is differentiated once.
        parity: treat batch norm as the published code does: one pass moves its statistics, and the network's training moves them on. Else they are
            those of real pictures at every step.

    >>> Condensation().resolved(10, 10).inner
    10
    """

    outer: int = 1000
    inner: int | None = None
    epochs: int | None = None
    outer_warmup: int | None = None
    inner_warmup: int | None = None
    rate: float | str = "scaled"
    momentum: float = 0.5
    network_rate: float = 0.01
    network_momentum: float = 0.0
    batch_real: int = 256
    batch_train: int = 256
    distance: Kind = "rows"
    groups: str | Sequence[Sequence[int]] = "all"
    group_count: int = 2
    strategy: str | None = None
    mode: Mode = "S"
    align_corners: bool = False
    siamese: bool = True
    in_range: bool = False
    chunk: int = 256
    bfloat16: bool = False
    parity: bool = False

    def resolved(self, per_class: int, classes: int) -> Condensation:
        """The same options with every ``None`` but the strategy's replaced, checked."""
        inner, epochs = interpolated_loops(per_class)
        inner, epochs = (
            inner if self.inner is None else self.inner,
            epochs if self.epochs is None else self.epochs,
        )
        for name, value in (
            ("outer", self.outer),
            ("inner", inner),
            ("chunk", self.chunk),
            ("batch_real", self.batch_real),
        ):
            number(name, value, low=1, integer=True)
        number("batch_train", self.batch_train, low=1, integer=True)
        number("epochs", epochs, low=0, integer=True)
        first = self.outer // 4 if self.outer_warmup is None else self.outer_warmup
        second = min(10, inner) if self.inner_warmup is None else self.inner_warmup
        for name, value, most in (("outer_warmup", first, self.outer), ("inner_warmup", second, inner)):
            number(name, value, low=0, high=most, integer=True)
        if isinstance(self.rate, str):
            one_of("rate", self.rate, ("scaled", "paper"))
        else:
            number("rate", self.rate, low=0, open_low=True)
        number("momentum", self.momentum, low=0, high=1, open_high=True)
        number("network_rate", self.network_rate, low=0)
        number("network_momentum", self.network_momentum, low=0, high=1, open_high=True)
        one_of("distance", self.distance, KINDS)
        if self.strategy not in (None, "none"):
            Strategy(str(self.strategy), self.mode)
        if isinstance(self.groups, str):
            one_of("groups", self.groups, ("all", "random", "clustered"))
            if self.groups != "all":
                number("group_count", self.group_count, low=1, high=classes, integer=True)
        else:
            told = sorted(c for group in self.groups for c in group)
            require(
                told == list(range(classes)) and all(len(g) for g in self.groups),
                f"groups: got {show(self.groups)}, expected every class from 0 to {classes - 1} once",
            )
        return replace(self, inner=inner, epochs=epochs, outer_warmup=first, inner_warmup=second)

    def summed(self, outer: int, inner: int) -> bool:
        """Whether a step matches sums over classes; of resolved options."""
        return outer >= (self.outer_warmup or 0) or inner >= (self.inner_warmup or 0)

    def rate_of(self, classes: int, groups: int) -> float:
        """The rate of a step whose loss is a sum over so many groups of classes.

        ``"scaled"`` is 0.1 √(classes / groups). A sum over C classes has C distances, one for the pictures of each. In the one distance of the mean gradient, the share of
        a class is 1/C, and where gradients of classes are nearly orthogonal their mean is shorter by √C: it is less steep by √C.

        >>> Condensation(rate="scaled").rate_of(25, 1), Condensation(rate="paper").rate_of(25, 1)
        (0.5, 0.1)
        """
        if isinstance(self.rate, str):
            return PAPER_RATE * ((classes / groups) ** 0.5 if self.rate == "scaled" else 1)
        return self.rate

    def capped(self, gradient: Tensor, rate: float) -> Tensor:
        """With ``"scaled"``, the gradient by pictures [pictures, ...] shortened for each that it would move too far: losses of small pictures are far steeper, as each norm
        and pooling sees few pixels.

        >>> Condensation(rate="scaled").capped(Tensor([[4.0, 4.0], [0.01, 0.01]]), 0.1)
        tensor([[0.0500, 0.0500],
                [0.0100, 0.0100]])
        """
        if self.rate != "scaled":
            return gradient
        moved = rate * gradient.flatten(1).square().mean(1).sqrt()
        return gradient * (LARGEST_STEP / moved).clamp(max=1).view(-1, *[1] * (gradient.ndim - 1))


def loops(per_class: int) -> tuple[int, int]:
    """Inner steps and network epochs for so many pictures a class; the published table has no others.

    >>> loops(10)
    (10, 50)
    """
    if per_class not in LOOPS:
        raise InputError(
            f"per_class: got {show(per_class)}{suggest(str(per_class), map(str, LOOPS))}; for other numbers give inner steps and epochs"
        )
    return LOOPS[per_class]


def interpolated_loops(per_class: int) -> tuple[int, int]:
    """As :func:`loops`; between the table's rows linearly, and above its last row as there.

    >>> interpolated_loops(10), interpolated_loops(15), interpolated_loops(100)
    ((10, 50), (15, 38), (50, 10))
    """
    number("per_class", per_class, low=1, integer=True)
    below = max(n for n in LOOPS if n <= per_class)
    above = min((n for n in LOOPS if n >= per_class), default=below)
    share = 0.0 if above == below else (per_class - below) / (above - below)
    first, second = LOOPS[below], LOOPS[above]
    inner, epochs = (round(a + share * (b - a)) for a, b in zip(first, second))
    return inner, epochs
