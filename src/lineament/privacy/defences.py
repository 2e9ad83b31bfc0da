"""What a client may do to a gradient before it is sent, and how an attacker who knows of it repeats it on a guess.

Fang et al. 2023, arXiv 2308.04699, section 1.6; Soteria: Sun et al., CVPR 2021. The others are what deployers switch on, in their own parameters: clipping and
noise per sample (Opacus), the Gaussian mechanism at (epsilon, delta) (Flower), truncation (NVFLARE), 16 and 8 bits, secure aggregation.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, require, suggest


@dataclass(frozen=True)
class Context:
    """What a client knows when it defends its message.

    ``images``, ``targets``: the batch, normalised; ``gradient_of``: the gradient of other pictures with the same labels; ``per_sample()``: gradients of single pictures, one list of tensors [pictures, ...]; ``features()``: the network up to its last layer's input, and the
    pictures; ``head``: the place of the last layer's weights among the tensors, None where the network does not end in a linear layer. ``others(m)``: plain messages of m
    other clients, None where there are no pictures to make them of.
    """

    count: int
    per_sample: Callable[[], list[list[Tensor]]]
    features: Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]
    generator: torch.Generator
    head: int | None
    images: Tensor
    targets: Tensor
    gradient_of: Callable[[Tensor], list[Tensor]]
    others: Callable[[int], list[list[Tensor]]] | None = None


class Defence:
    """What is done to a message; this one does nothing. Defences are put one after another with ``+``.

    An own defence gives ``apply`` and, where the attacker can repeat it on the gradient of a guess, ``mirror``, whose result can be differentiated.

    >>> str(Clip(4.0) + Prune(90.0)), str(Defence())
    ('clip 4, prune 90', 'nothing')
    """

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        """The message that is sent."""
        return list(gradient)

    def mirror(self, guess: Sequence[Tensor], message: Sequence[Tensor]) -> list[Tensor]:
        """The same on the gradient of a guess, as far as an attacker can."""
        return list(guess)

    def copies(self) -> dict[str, Defence]:
        """Ways in which an attacker may repeat this, by name; an audit tries each. The first has no name."""
        return {"": self}

    def __add__(self, other: Defence) -> Defence:
        return Chain((*(self.parts), *(other.parts)))

    @property
    def parts(self) -> tuple[Defence, ...]:
        return () if type(self) is Defence else (self,)

    def __str__(self) -> str:
        if type(self) is Defence:
            return "nothing"
        values = [f"{value:g}" for value in vars(self).values() if isinstance(value, (int, float))]
        return " ".join([NAMES.get(type(self), type(self).__name__), *values])


@dataclass(frozen=True)
class Chain(Defence):
    """Several defences, the first one first."""

    several: tuple[Defence, ...]

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        for defence in self.several:
            gradient = defence.apply(gradient, context)
        return list(gradient)

    def mirror(self, guess: Sequence[Tensor], message: Sequence[Tensor]) -> list[Tensor]:
        for defence in self.several:
            guess = defence.mirror(guess, message)
        return list(guess)

    def copies(self) -> dict[str, Defence]:
        found: dict[str, Defence] = {}
        for some in itertools.product(*(defence.copies().items() for defence in self.several)):
            found[", ".join(filter(None, (name for name, _ in some)))] = Chain(tuple(one for _, one in some))
        return found or {"": self}

    @property
    def parts(self) -> tuple[Defence, ...]:
        return self.several

    def __str__(self) -> str:
        return ", ".join(map(str, self.several)) or "nothing"


@dataclass(frozen=True)
class Clip(Defence):
    """All tensors together clipped to a norm.

    >>> Clip(5.0).mirror([torch.tensor([30.0, 40.0])], [])[0].round().tolist()
    [3.0, 4.0]
    """

    bound: float = 4.0

    def __post_init__(self) -> None:
        number("bound", self.bound, low=0, open_low=True)

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        return clip(gradient, self.bound)

    def mirror(self, guess: Sequence[Tensor], message: Sequence[Tensor]) -> list[Tensor]:
        norm = torch.stack([g.detach().square().sum() for g in guess]).sum().sqrt()
        factor = torch.clamp(self.bound / (norm + 1e-6), max=1.0)
        return [g * factor for g in guess]


@dataclass(frozen=True)
class Prune(Defence):
    """Of each tensor, entries smaller than a percentile become 0; the attacker takes the guess's own threshold, or the message's zeros.

    >>> Prune(50.0, by="message").mirror([torch.ones(2)], [torch.tensor([0.0, 3.0])])[0].tolist()
    [0.0, 1.0]
    """

    percentile: float = 90.0
    by: str = "guess"

    def __post_init__(self) -> None:
        number("percentile", self.percentile, low=0, high=100)
        require(self.by in ("guess", "message"), f"by: got {self.by!r}, expected 'guess' or 'message'")

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        return prune(gradient, self.percentile)

    def mirror(self, guess: Sequence[Tensor], message: Sequence[Tensor]) -> list[Tensor]:
        if self.by == "message":
            return [g * (m != 0) for g, m in zip(guess, message)]
        return prune(guess, self.percentile)

    def copies(self) -> dict[str, Defence]:
        return {"": replace(self, by="guess"), "zeros of the message": replace(self, by="message")}


@dataclass(frozen=True)
class Noise(Defence):
    """Independent Gaussian noise, which nobody can repeat."""

    deviation: float = 0.01

    def __post_init__(self) -> None:
        number("deviation", self.deviation, low=0)

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        return [_noisy(g, self.deviation, context.generator) for g in gradient]


@dataclass(frozen=True)
class Private(Defence):
    """Each picture's gradient clipped to a norm, and noise of ``multiplier`` times that norm on their sum, as DP-SGD does it."""

    bound: float = 1.0
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        number("bound", self.bound, low=0, open_low=True)
        number("multiplier", self.multiplier, low=0)

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        (each,) = context.per_sample()
        norm = torch.stack([g.flatten(1).square().sum(1) for g in each]).sum(0).sqrt()
        factor = (self.bound / (norm + 1e-6)).clamp(max=1.0)
        total = [torch.einsum("b,b...->...", factor, g) for g in each]
        deviation = self.multiplier * self.bound
        return [_noisy(t, deviation, context.generator) / context.count for t in total]


@dataclass(frozen=True)
class Gaussian(Defence):
    """Clipped as a whole, with the noise of the Gaussian mechanism: deviation = bound √(2 ln(1.25 / delta)) / epsilon."""

    epsilon: float = 1.0
    delta: float = 1e-5
    bound: float = 1.0

    def __post_init__(self) -> None:
        number("epsilon", self.epsilon, low=0, open_low=True)
        number("delta", self.delta, low=0, high=1, open_low=True, open_high=True)
        number("bound", self.bound, low=0, open_low=True)

    @property
    def deviation(self) -> float:
        return self.bound * math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        return [_noisy(g, self.deviation, context.generator) for g in clip(gradient, self.bound)]

    def mirror(self, guess: Sequence[Tensor], message: Sequence[Tensor]) -> list[Tensor]:
        return Clip(self.bound).mirror(guess, message)


@dataclass(frozen=True)
class Truncate(Defence):
    """Only entries of at least a percentile of their tensor's magnitudes are sent, and these cut to ±gamma.

    >>> Truncate(50.0, 2.0).apply([torch.tensor([1.0, 5.0])], None)[0].tolist()
    [0.0, 2.0]
    """

    percentile: float = 10.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        number("percentile", self.percentile, low=0, high=100)
        number("gamma", self.gamma, low=0, open_low=True)

    def apply(self, gradient: Sequence[Tensor], context: Context | None) -> list[Tensor]:
        return [g.clamp(-self.gamma, self.gamma) for g in prune(gradient, self.percentile)]

    def mirror(self, guess: Sequence[Tensor], message: Sequence[Tensor]) -> list[Tensor]:
        """Values are clipped as constants, so that what lies outside still has a slope."""
        kept = prune(guess, self.percentile)
        return [g * (self.gamma / g.detach().abs().clamp(min=self.gamma)) for g in kept]


@dataclass(frozen=True)
class Bits(Defence):
    """Numbers rounded to 16 bits, or to 8 with one scale a tensor.

    >>> Bits(8).apply([torch.tensor([1.0, 0.001])], None)[0].tolist()
    [1.0, 0.0]
    """

    bits: int = 16

    def __post_init__(self) -> None:
        require(self.bits in (8, 16), f"bits: got {self.bits!r}, expected 8 or 16")

    def apply(self, gradient: Sequence[Tensor], context: Context | None) -> list[Tensor]:
        if self.bits == 16:
            return [g.half().to(g.dtype) for g in gradient]
        found = []
        for g in gradient:
            scale = g.abs().max().clamp(min=torch.finfo(g.dtype).tiny) / 127
            found.append((g / scale).round() * scale)
        return found


@dataclass(frozen=True)
class Soteria(Defence):
    """The columns of the last layer's weights whose features are least sensitive to the pictures are not sent."""

    rate: float = 80.0

    def __post_init__(self) -> None:
        number("rate", self.rate, low=0, high=100)

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        if context.head is None:
            raise InputError(
                "model: Soteria hides features of the last linear layer, and this network has none"
            )
        features, images = context.features()
        found = list(gradient)
        found[context.head] = soteria(features, images, found[context.head], self.rate)
        return found

    def mirror(self, guess: Sequence[Tensor], message: Sequence[Tensor]) -> list[Tensor]:
        """Columns of matrices that are 0 in the message are taken as hidden."""
        return [g * (m != 0).any(0) if g.ndim == 2 else g for g, m in zip(guess, message)]


@dataclass(frozen=True, eq=False)
class Aggregate(Defence):
    """The mean with the messages of other clients, which the attacker does not know."""

    others: Sequence[Sequence[Tensor]]

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        return [torch.stack(each).mean(0) for each in zip(gradient, *self.others)]

    def __str__(self) -> str:
        return f"aggregate {len(self.others) + 1}"


@dataclass(frozen=True)
class Secure(Defence):
    """Secure aggregation: the server sees the mean of ``clients`` messages only, of which this is one; the others are made of other pictures.

    The attacker knows how many there are, and not what the others sent, which is to a guess as noise.

    >>> Secure(2).mirror([torch.tensor([4.0])], [])[0].tolist()
    [2.0]
    """

    clients: int = 10

    def __post_init__(self) -> None:
        number("clients", self.clients, low=2, integer=True)

    def apply(self, gradient: Sequence[Tensor], context: Context) -> list[Tensor]:
        if context.others is None:
            raise InputError(
                "others: secure aggregation needs the messages of other clients, and there are no pictures to make them of; expected others="
            )
        return Aggregate(context.others(self.clients - 1)).apply(gradient, context)

    def mirror(self, guess: Sequence[Tensor], message: Sequence[Tensor]) -> list[Tensor]:
        return [g / self.clients for g in guess]


NAMES: dict[type[Any], str] = {
    Clip: "clip", Prune: "prune", Noise: "noise", Private: "private", Gaussian: "gaussian", Truncate: "truncate", Bits: "bits", Soteria: "soteria",
    Secure: "secagg",
}  # fmt: skip


def defence_of(text: str) -> Defence:
    """A defence by its description: names with their values, ``+`` or a comma between several.

    >>> str(defence_of("clip=4,noise=0.01")), str(defence_of("gaussian=1:1e-5:2"))
    ('clip 4, noise 0.01', 'gaussian 1 1e-05 2')
    """
    known = {name: kind for kind, name in NAMES.items()}
    found = Defence()
    for word in text.replace("+", ",").split(","):
        name, _, values = (part.strip() for part in word.partition("="))
        if name in ("none", "nothing", ""):
            continue
        if name not in known:
            raise InputError(
                f"defence: got {name!r}, expected a defence by name, or none{suggest(name, [*known, 'none'])}"
            )
        try:
            numbers = [float(v) for v in values.split(":")] if values else []
        except ValueError:
            raise InputError(f"defence: got {word.strip()!r}, expected numbers after the =") from None
        most = len(inspect.signature(known[name]).parameters) - (name == "prune")
        require(
            len(numbers) <= most,
            f"defence: got {len(numbers)} values for {name!r}, expected at most {most}",
        )
        whole = [int(v) if name in ("bits", "secagg") and v == int(v) else v for v in numbers]
        try:
            found = found + known[name](*whole)
        except InputError as error:
            raise InputError(f"defence: in {word.strip()!r}, {error}") from None
    return found


def _noisy(value: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return value + deviation * torch.randn(
        value.shape, generator=generator, dtype=value.dtype, device=value.device
    )


def clip(gradient: Sequence[Tensor], bound: float, *, eps: float = 1e-6) -> list[Tensor]:
    """All tensors times min(1, bound / (norm + eps)), the norm over everything.

    >>> clip([torch.tensor([3.0, 4.0])], 10.0)[0].tolist()
    [3.0, 4.0]
    """
    number("bound", bound, low=0, open_low=True)
    norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    factor = torch.clamp(bound / (norm + eps), max=1.0)
    return [g * factor for g in gradient]


def prune(gradient: Sequence[Tensor], percentile: float) -> list[Tensor]:
    """Entries whose size is below a percentile of their tensor (linear interpolation) become 0.

    >>> prune([torch.tensor([1.0, 2.0, 3.0])], 50)[0].tolist()
    [0.0, 2.0, 3.0]
    """
    number("percentile", percentile, low=0, high=100)
    return [g * (g.abs() >= percentile_of(g.abs(), percentile)) for g in gradient]


def percentile_of(values: Tensor, percentile: float) -> Tensor:
    """The percentile of all entries by linear interpolation; no limit on their number."""
    ordered = values.detach().flatten().sort().values
    place = (len(ordered) - 1) * percentile / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def soteria(
    features: Callable[[Tensor], Tensor], inputs: Tensor, gradient: Tensor, rate: float, *, eps: float = 1e-10
) -> Tensor:
    """The gradient [classes, features] of the last weights without the columns of the least sensitive features.

    q = Σ over the batch of |∂r/∂x| / (r + eps) for each feature r >= 0; columns whose q is below the ``rate``-th percentile lose their gradient.

    Args:
        features: the network up to the last layer's input.

    >>> net = torch.nn.Linear(2, 3)
    >>> soteria(net, torch.ones(1, 2), torch.ones(2, 3), 0.0).shape
    torch.Size([2, 3])
    """
    number("rate", rate, low=0, high=100)
    x = inputs.detach().requires_grad_()
    found = features(x)
    require(
        found.ndim == 2 and found.shape[1] == gradient.shape[1],
        "features: do not give the last layer's input",
    )
    told = []
    for k in range(found.shape[1]):
        (slope,) = torch.autograd.grad(found[:, k].sum(), x, retain_graph=True)
        told.append(slope.detach().flatten(1).norm(dim=1) / (found[:, k].detach() + eps))
    score = torch.stack(told, 1).sum(0)
    return gradient * (score >= percentile_of(score, rate))
