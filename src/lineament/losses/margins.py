"""What does the right class have to beat? Margins on the cosine between a sample and its class.

SphereFace (Liu 2017), CosFace (Wang 2018), ArcFace (Deng 2019), MagFace (Meng 2021), CurricularFace (Huang 2020), AdaFace (Kim 2022), and
ElasticFace (Boutros et al., CVPR Workshops 2022, arXiv 2109.09416), which draws a margin for every sample and step. A margin is a function of the
target's cosine alone: cos(θ + m) = c cos m - √(1 - c²) sin m, whose gradient is finite also at c = ±1, where that of arccos is not.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of

Guard = Literal["none", "taylor", "easy"]
Gradient = Literal["exact", "straight"]


class Margin(nn.Module):
    """Base of all: no margin, which is the normalised soft-max loss.

    ``forward(cosine, norms, drawn)`` takes the targets' cosines [B], the embeddings' norms [B] and margins from :meth:`draw`, and gives the targets'
    modified cosines [B].
    """

    # Logits are multiplied by the embedding's norm, not by the head's scale.
    by_norm = False
    # The other classes' cosines change, too (see ``others``), so that all logits are needed at once.
    changes_others = False

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        return cosine

    def draw(self, cosine: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """The margins of one step, [B], where they are random."""
        return None

    def others(self, cosines: Tensor, target: Tensor) -> Tensor:
        """The cosines [B, C] of the other classes, which one margin changes too; ``target`` [B, 1] are the targets'."""
        return cosines

    def extra(self, norms: Tensor) -> Tensor | None:
        """A term of the loss that does not depend on the classes."""
        return None


class Cosine(Margin):
    """No margin: the normalised soft-max loss.

    >>> Cosine()(torch.tensor([0.5]), torch.ones(1)).item()
    0.5
    """


class SphereFace(Margin):
    """(-1)^k cos(mθ) - 2k with k = ⌊mθ/π⌋ for a whole m, on logits scaled by the embedding's norm; cos(m1 θ) for another.

    Args:
        by_norm: scale the logits by the embedding's norm, and not by the head's scale; by default where m is whole, as published.

    >>> SphereFace(2)(torch.tensor([1.0]), torch.ones(1)).item()
    1.0
    """

    def __init__(self, m: float = 4, *, by_norm: bool | None = None):
        super().__init__()
        self.m = number("m", m, low=1)
        self.whole = float(m).is_integer()
        self.by_norm = self.whole if by_norm is None else bool(by_norm)

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        if not self.whole:
            return torch.cos(self.m * angle(cosine))
        k = (self.m * angle(cosine.detach()) / math.pi).floor()
        # cos(mθ) is a polynomial of the cosine.
        before, power = torch.ones_like(cosine), cosine
        for _ in range(int(self.m) - 1):
            before, power = power, 2 * cosine * power - before
        return (1 - 2 * (k % 2)) * power - 2 * k


class CosFace(Margin):
    """cos θ - m.

    >>> round(CosFace(0.25)(torch.tensor([0.5]), torch.ones(1)).item(), 4)
    0.25
    """

    def __init__(self, m: float = 0.35):
        super().__init__()
        self.m = number("m", m)

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        return cosine - (self.m if drawn is None else drawn)


class ArcFace(Margin):
    """cos(θ + m).

    Args:
        m: radians.
        guard: beyond θ = π - m the function would rise again: ``"taylor"`` goes on as cos θ - m sin m there, ``"easy"`` has the margin only
            where cos θ > 0.
        gradient: ``"exact"``, or ``"straight"``: the target's cosine gets the gradient as if it had no margin, as in InsightFace, which leaves
            out the factor sin(θ + m) / sin θ.

    >>> round(ArcFace(math.pi / 3)(torch.tensor([1.0]), torch.ones(1)).item(), 4)
    0.5
    """

    def __init__(self, m: float = 0.5, *, guard: Guard = "none", gradient: Gradient = "exact"):
        super().__init__()
        self.m = number("m", m)
        self.guard = one_of("guard", guard, ("none", "taylor", "easy"))
        self.gradient = one_of("gradient", gradient, ("exact", "straight"))

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        found = guarded(cosine, torch.full_like(cosine, self.m) if drawn is None else drawn, self.guard)
        return found if self.gradient == "exact" else straight(cosine, found)


class Combined(Margin):
    """cos(m1 θ + m2) - m3; ``gradient`` as for :class:`ArcFace`.

    >>> round(Combined(1.0, 0.0, 0.25)(torch.tensor([0.5]), torch.ones(1)).item(), 4)
    0.25
    """

    def __init__(self, m1: float = 1.0, m2: float = 0.3, m3: float = 0.2, *, gradient: Gradient = "exact"):
        super().__init__()
        self.gradient = one_of("gradient", gradient, ("exact", "straight"))
        self.m1, self.m2, self.m3 = (number(f"m{k}", v) for k, v in enumerate((m1, m2, m3), 1))

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        if self.m1 == 1:
            found = added(cosine, torch.full_like(cosine, self.m2)) - self.m3
        else:
            found = torch.cos(self.m1 * angle(cosine) + self.m2) - self.m3
        return found if self.gradient == "exact" else straight(cosine, found)


class Elastic(Margin):
    """ElasticFace: ArcFace or CosFace with margins drawn from N(m, σ²), anew for every sample and step.

    Args:
        form: ``"arc"`` or ``"cos"``. m, sigma: by default the released models' 0.5 and 0.05, 0.35 and 0.05. σ = 0 draws nothing.
        match: ``"rank"`` gives the sample nearest to its class the smallest of the batch's margins, and so on (the paper's '+');
            ``"official"`` what the released code does instead: the margins in the order of the sort's indices.
        clip_sigma: keep the draws within so many σ of m.
        guard: as for :class:`ArcFace`, with each sample's own margin.

    >>> Elastic("cos", 0.25, 0.0)(torch.tensor([0.5]), torch.ones(1)).item()
    0.25
    """

    def __init__(
        self,
        form: Literal["arc", "cos"] = "arc",
        m: float | None = None,
        sigma: float = 0.05,
        *,
        match: Literal["rank", "official"] | None = None,
        clip_sigma: float | None = None,
        guard: Guard = "none",
    ):
        super().__init__()
        one_of("form", form, ("arc", "cos"))
        if match is not None:
            one_of("match", match, ("rank", "official"))
        m = {"arc": 0.5, "cos": 0.35}[form] if m is None else m
        self.fixed = ArcFace(m, guard=guard) if form == "arc" else CosFace(m)
        self.sigma = number("sigma", sigma, low=0)
        self.match = match
        self.clip_sigma = None if clip_sigma is None else number("clip_sigma", clip_sigma, low=0)

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        return self.fixed(cosine, norms, drawn)

    def draw(self, cosine: Tensor, generator: torch.Generator | None) -> Tensor | None:
        if not self.sigma:
            return None
        noise = torch.randn(len(cosine), generator=generator, dtype=torch.float64)
        if self.clip_sigma is not None:
            noise = noise.clamp(-self.clip_sigma, self.clip_sigma)
        drawn = (self.fixed.m + self.sigma * noise).to(cosine)
        return drawn if self.match is None else matched(cosine, drawn, self.match)


class MagFace(Margin):
    """cos(θ + m(a)) with a margin that grows with the embedding's clipped norm a, and a term that rewards large norms.

    m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a); the loss gains λ mean(a / u_a² + 1 / a).

    >>> round(MagFace().extra(torch.tensor([110.0])).item(), 4)
    0.6364
    """

    def __init__(
        self,
        norms: tuple[float, float] = (10, 110),
        margins: tuple[float, float] = (0.45, 0.8),
        *,
        weight: float = 35.0,
        guard: Guard = "easy",
    ):
        super().__init__()
        self.low, self.high = norms
        number("norms", self.low, low=0, open_low=True)
        number("norms", self.high, low=self.low, open_low=True)
        self.margins, self.weight = margins, number("weight", weight, low=0)
        self.guard = one_of("guard", guard, ("none", "taylor", "easy"))

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        share = (norms.clamp(self.low, self.high) - self.low) / (self.high - self.low)
        return guarded(cosine, self.margins[0] + (self.margins[1] - self.margins[0]) * share, self.guard)

    def extra(self, norms: Tensor) -> Tensor:
        a = norms.clamp(self.low, self.high)
        return self.weight * (a / self.high**2 + 1 / a)


class CurricularFace(Margin):
    """A guarded ArcFace in which hard other classes, nearer than the target with its margin, weigh more as training goes on.

    cos θ_j > cos(θ_y + m) becomes cos θ_j (t + cos θ_j); t is a running mean of the targets' cosines, a buffer.

    >>> CurricularFace().t.item()
    0.0
    """

    changes_others = True
    t: Tensor

    def __init__(self, m: float = 0.5, *, alpha: float = 0.01):
        super().__init__()
        self.m, self.alpha = number("m", m), number("alpha", alpha, low=0, high=1)
        self.register_buffer("t", torch.zeros(()))

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        return guarded(cosine, torch.full_like(cosine, self.m), "taylor")

    def others(self, cosines: Tensor, target: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.t.copy_(self.alpha * target.mean() + (1 - self.alpha) * self.t)
        hard = cosines > added(target.detach(), torch.full_like(target, self.m))
        return torch.where(hard, cosines * (self.t.to(cosines) + cosines), cosines)


class AdaFace(Margin):
    """cos(θ + g) - a with a margin that follows the image's quality, read off the norm: ArcFace's for small norms, CosFace's for typical ones.

    z = clip(h (norm - mean) / std, -1, 1), g = -m z, a = m + m z; mean and std are running, buffers.

    >>> AdaFace().mean.item()
    20.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, m: float = 0.4, h: float = 0.333, *, alpha: float = 0.99):
        super().__init__()
        self.m, self.h, self.alpha = number("m", m), number("h", h), number("alpha", alpha, low=0, high=1)
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            seen = norms.clamp(0.001, 100)
            if self.training and len(seen) > 1:
                self.mean.lerp_(seen.mean().to(self.mean), 1 - self.alpha)
                self.std.lerp_(seen.std().to(self.std), 1 - self.alpha)
            z = ((seen - self.mean) / (self.std + 1e-3) * self.h).clamp(-1, 1).to(cosine)
        # Not beyond 0 and π, where the cosine would turn.
        at = angle(cosine.detach())
        turn = (at - self.m * z).clamp(1e-3, math.pi - 1e-3) - at
        return added(cosine, turn) - self.m * (1 + z)


def added(cosine: Tensor, m: Tensor) -> Tensor:
    """cos(θ + m) of cos θ; its gradient at ±1 is cos m."""
    return cosine * torch.cos(m) - sine(cosine) * torch.sin(m)


def straight(cosine: Tensor, target: Tensor) -> Tensor:
    """The target's value with the cosine's own gradient."""
    return cosine + (target - cosine).detach()


def sine(cosine: Tensor) -> Tensor:
    """√(1 - c²), with gradient 0 where it is 0."""
    square = 1 - cosine.square()
    inside = square > 0
    return torch.where(inside, torch.where(inside, square, 1).sqrt(), 0)


def angle(cosine: Tensor) -> Tensor:
    """arccos, with gradient 0 at ±1."""
    return torch.atan2(sine(cosine), cosine)


def guarded(cosine: Tensor, m: Tensor, guard: str) -> Tensor:
    """cos(θ + m) where the guard lets it be."""
    found = added(cosine, m)
    if guard == "taylor":
        return torch.where(cosine > -torch.cos(m), found, cosine - m * torch.sin(m))
    return torch.where(cosine > 0, found, cosine) if guard == "easy" else found


def matched(cosine: Tensor, drawn: Tensor, how: str) -> Tensor:
    """The batch's margins, given out by how near samples are to their classes.

    >>> matched(torch.tensor([0.9, 0.1, 0.5]), torch.tensor([2.0, 3.0, 1.0]), "rank").tolist()
    [1.0, 3.0, 2.0]
    """
    order, margins = cosine.detach().argsort(descending=True), drawn.sort().values
    return margins[order] if how == "official" else torch.empty_like(margins).scatter_(0, order, margins)
