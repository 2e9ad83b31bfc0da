"""Is the curvature around a network that of a settled minimum? Two numbers of the Hessian's spectrum, and what they mean.

Gabdullin 2024, arXiv 2412.10146 (and 2504.17618 for its limits): from the nodes ν and weights w of stochastic Lanczos quadrature,
r_e = |ν_min / ν_max| and K_Hn = Σ_{ν<0} |ν w|ⁿ / Σ_{ν>0} (ν w)ⁿ. What is not obvious: for n other than 1, K depends on the number of
Lanczos steps, so compare it only at the same steps and probes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.curvature.density import Density, spectral_density
from lineament.core.curvature.matrices import fisher, gauss_newton, hessian
from lineament.core.results import Readable
from lineament.measure.landscape.batchnorm_modes import LandscapeWarning

MATRICES = {"hessian": hessian, "gauss_newton": gauss_newton, "fisher": fisher}
# A quadrature weight is the square of a vector's entry: below this it is that entry's rounding, of a node the probe never saw.
_NO_WEIGHT = 1e-28


def extreme_ratio(nodes: Float[Tensor, "*probes steps"]) -> Float[Tensor, "*probes"]:
    """r_e = |ν_min / ν_max| of each probe: how far the spectrum reaches below zero, against how far above.

    >>> extreme_ratio(torch.tensor([-1.0, 0.0, 4.0])).item()
    0.25
    """
    return (nodes.amin(-1) / nodes.amax(-1)).abs()


def negative_ratio(
    nodes: Float[Tensor, "*probes steps"], weights: Float[Tensor, "*probes steps"], n: float = 0.5
) -> Float[Tensor, "*probes"]:
    """K_Hn = Σ_{ν<0} |ν w|ⁿ / Σ_{ν>0} (ν w)ⁿ of each probe; n = 1 is the negative part of the trace over the positive.

    Infinite where nothing is positive, and NaN where all is zero.

    >>> negative_ratio(torch.tensor([-1.0, 4.0]), torch.tensor([0.5, 0.5])).item()
    0.5
    """
    checks.number("n", n, low=0, open_low=True)
    mass = (nodes * weights).abs() ** n
    return torch.where(nodes < 0, mass, 0.0).sum(-1) / torch.where(nodes > 0, mass, 0.0).sum(-1)


def density_curve(
    nodes: Tensor, weights: Tensor, *, variance: float = 1e-5, margin: float = 1e-3, points: int = 10_000
) -> tuple[Float[Tensor, "points"], Float[Tensor, "points"]]:
    """The density on a grid as the official code draws it: Gaussians of variance ``variance`` · max(1, range), scaled to sum to one.

    The grid goes from the mean smallest node less a margin to the mean largest one plus it. (:meth:`Density.curve` chooses its width
    by the spectrum instead, which shows more of small curvatures.)

    >>> grid, height = density_curve(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), variance=1e-2, margin=1.0)
    >>> round(float(height.sum() * (grid[1] - grid[0])), 6)
    1.0
    """
    checks.number("variance", variance, low=0, open_low=True)
    checks.number("points", points, low=2, integer=True)
    nodes, weights = (x.double().reshape(-1, x.shape[-1]) for x in (nodes, weights))
    low, high = float(nodes.amin(1).mean()) - margin, float(nodes.amax(1).mean()) + margin
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    spread = variance * max(1.0, high - low)
    height = torch.zeros_like(grid)
    for node, weight in zip(nodes.reshape(-1), weights.reshape(-1)):
        height += weight * torch.exp(-((grid - node) ** 2) / (2 * spread))
    height /= len(nodes) * math.sqrt(2 * math.pi * spread)
    return grid, height / (height.sum() * (grid[1] - grid[0]))


@dataclass(frozen=True)
class Criteria(Readable):
    """The criteria of a spectrum, one of each for each probe, and the density they come from.

    Attributes:
        re, k: (probes,).
        n: the exponent of ``k``.
        negative, positive: mean share of the trace's absolute value below and above zero.
    """

    re: Float[Tensor, "probes"]
    k: Float[Tensor, "probes"]
    n: float
    negative: float
    positive: float
    density: Density

    @property
    def mainly_negative(self) -> bool:
        """Whether more curves downwards than upwards, where the criteria mean nothing (arXiv 2504.17618)."""
        return self.negative > self.positive

    @property
    def reach(self) -> float:
        """The mean of r_e, with 0 where no node is below zero: there r_e is the inverse of a condition number and reaches nowhere.

        >>> found = criteria(spectral_density(torch.diag(torch.tensor([1.0, 2.0, 4.0])), steps=3))
        >>> round(float(found.re.mean()), 3), found.reach, found.verdict
        (0.25, 0.0, 'settled')
        """
        seen = self.density.weights > _NO_WEIGHT
        least = torch.where(seen, self.density.nodes, math.inf).amin(-1)
        return float(torch.where(least < 0, self.re, 0.0).mean())

    @property
    def verdict(self) -> str:
        """``"settled"`` (reach and K below 0.3), ``"unsettled"``, ``"untrained"`` (both above 0.5), ``"mainly negative"`` or ``"flat"`` (zero)."""
        re, k = self.reach, float(self.k.mean())
        if self.negative == self.positive == 0:
            return "flat"
        if self.mainly_negative:
            return "mainly negative"
        if re < 0.3 and k < 0.3:
            return "settled"
        return "untrained" if re > 0.5 and k > 0.5 else "unsettled"

    @property
    def meaning(self) -> str:
        """One sentence that says what the numbers say; the bounds are this library's reading, not the paper's."""
        reach = f"{100 * self.reach:.3g} % as far below zero as above"
        if self.verdict == "unsettled" and self.reach < 0.3:
            return f"The curvature reaches {reach}, but many directions curve gently downwards: training has not quite settled, or these are not quite data like those it was trained on."
        return {
            "settled": f"The curvature reaches {reach}, and few directions curve downwards: the spectrum of a trained network on data like those it was trained on.",
            "unsettled": "A good part curves downwards: training has not settled, or these are not data like those it was trained on.",
            "untrained": "As much curves downwards as upwards: the nearly symmetric spectrum of a network that has not learned these data.",
            "flat": "Nothing curves either way: the loss is a linear function of these weights, or does not depend on them.",
            "mainly negative": "More curves downwards than upwards: the criteria do not apply to such a spectrum.",
        }[self.verdict]

    def average(self, function: Callable[[Tensor], Tensor]) -> float:
        """tr f(H) / P by the same quadrature, for any f.

        >>> found = criteria(spectral_density(torch.diag(torch.tensor([1.0, 3.0])), steps=2))
        >>> round(found.average(torch.square), 4)
        5.0
        """
        terms = self.density.weights.double() * function(self.density.nodes.double())
        return float(torch.where(self.density.weights > 0, terms, 0.0).sum(-1).mean())

    @property
    def trace(self) -> float:
        """The trace, as Hutchinson's estimator of the same probes has it."""
        return float(self.density.moments[0]) * self.density.size

    @property
    def trace_error(self) -> float:
        """Its standard error; NaN from one probe."""
        return float(self.density.moment_errors[0]) * self.density.size

    @property
    def below(self) -> float:
        """Σ w over the nodes below zero: which share of all directions curves downwards."""
        weights = self.density.weights.double()
        return float(weights[self.density.nodes < 0].sum() / weights.sum())

    @property
    def above(self) -> float:
        """Σ w over the nodes above zero."""
        weights = self.density.weights.double()
        return float(weights[self.density.nodes > 0].sum() / weights.sum())

    @property
    def condition(self) -> float:
        """max |ν| / min |ν| over the nodes, a lower bound of the condition number."""
        size = self.density.nodes.abs()
        return float(size.max() / size.min())

    @property
    def effective_rank(self) -> float:
        """(Σ |λ|)² / Σ λ² as the quadrature has it: how many directions of equal curvature would have that spectrum."""
        second = self.average(torch.square)
        return self.average(torch.abs) ** 2 / second * self.density.size if second > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        names = ("trace", "trace_error", "below", "above", "condition", "effective_rank")
        numbers = {name: float(getattr(self, name)) for name in names}
        return {
            "re": _json(self.re),
            "k": _json(self.k),
            "n": self.n,
            "negative": self.negative,
            "positive": self.positive,
            "verdict": self.verdict,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "density": self.density.to_dict(),
        }

    def plot(self, ax: Any = None) -> Any:
        """The density, with the criteria as its title."""
        ax = self.density.plot(ax)
        ax.set_title(f"r_e {float(self.re.mean()):.3g}, K_H{self.n:g} {float(self.k.mean()):.3g}")
        return ax


def criteria(density: Density, *, n: float = 0.5) -> Criteria:
    """The criteria of a spectral density; a warning where more curves downwards than upwards, since they mean nothing there.

    Args:
        density: of :func:`~lineament.core.curvature.density.spectral_density`.
        n: the exponent of K, between 0 and 1 to weigh small curvatures up; 0.5 is the paper's.

    >>> found = criteria(spectral_density(torch.diag(torch.tensor([-2.0, 1.0, 3.0, 4.0])), steps=4))
    >>> round(float(found.re.mean()), 3), found.verdict
    (0.5, 'unsettled')
    """
    checks.require(
        isinstance(density, Density),
        f"density: got {checks.show(density)}, expected a Density such as spectral_density(...)",
    )
    checks.number("n", n, low=0, open_low=True)
    nodes, weights = density.nodes.double(), density.weights.double()
    seen = weights > _NO_WEIGHT
    # What a probe never saw becomes a copy of one that it did, without weight: neither criterion feels it.
    anchor = torch.gather(nodes, -1, weights.argmax(-1, keepdim=True))
    nodes, weights = torch.where(seen, nodes, anchor), torch.where(seen, weights, 0.0)
    mass = nodes * weights
    total = float(mass.abs().sum())
    negative, positive = (float(mass.clamp(max=0).abs().sum()), float(mass.clamp(min=0).sum()))
    share = (negative / total, positive / total) if total > 0 else (0.0, 0.0)
    found = Criteria(extreme_ratio(nodes), negative_ratio(nodes, weights, n), n, *share, density)
    if found.mainly_negative:
        warnings.warn(
            f"{100 * share[0]:.0f} % of the spectrum's mass is below zero: r_e and K_H{n:g} do not apply to a mainly negative spectrum",
            LandscapeWarning,
            stacklevel=2,
        )
    return found


def hessian_criteria(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    n: float = 0.5,
    steps: int = 80,
    probes: int = 3,
    matrix: str = "hessian",
    params: str | Sequence[str] | None = None,
    batchnorm: str = "eval",
    reorthogonalise: str = "full",
    window: int = 10,
    seed: int = 0,
    **options: Any,
) -> Criteria:
    """r_e, K_Hn, trace and density of a network's Hessian, all from the same Lanczos runs.

    Args:
        loader: any iterable of ``(inputs, targets)``; the criteria depend on the data, so compare on the same number of samples.
        steps, probes: Lanczos steps for each probe; the paper's are 100 and 1.
        matrix: ``"hessian"``, or ``"gauss_newton"`` or ``"fisher"``, which are never negative.
        params: names or globs: the spectrum of some layers.
        batchnorm: ``"eval"`` or ``"train"`` (each batch's statistics).
        reorthogonalise, window: as for :func:`~lineament.core.curvature.density.spectral_density`; the official code's is a window of 10, whose
            ghosts change K.
        options: for the operator (``chunk``, ``cache_bytes``, ...).

    >>> net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> data = [(torch.randn(8, 2), torch.arange(8) % 2)]
    >>> bool(hessian_criteria(net, nn.functional.cross_entropy, data, steps=10).re.mean() < 1.5)
    True
    """
    checks.one_of("matrix", matrix, MATRICES)
    operator = MATRICES[matrix](model, loss_fn, loader, params=params, batchnorm=batchnorm, **options)
    density = spectral_density(
        operator, steps=steps, probes=probes, reorthogonalise=reorthogonalise, window=window, seed=seed
    )
    return criteria(density, n=n)


def _json(values: Tensor) -> list[float | None]:
    return [float(v) if math.isfinite(float(v)) else None for v in values]
