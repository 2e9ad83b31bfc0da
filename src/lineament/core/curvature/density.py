"""The density of a symmetric operator's eigenvalues, from products with it alone.

It takes any object with ``@``, ``.shape``, ``.dtype`` and ``.device``: a :class:`~lineament.core.curvature.operator.Curvature`, or a
matrix as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks, results
from lineament.core.curvature.krylov import (
    REORTHOGONALISE,
    Lanczos,
    Operator,
    at_least_single,
    basis_size,
    lanczos_runs,
    random_signs,
    rounding,
    side_length,
)
from lineament.core.results import Readable

# Probes whose bases fit in this much memory run in step.
_BASES_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Density(Readable):
    """The spectral density as weighted nodes.

    Attributes:
        nodes, weights: (probes, steps), nodes in the units of the eigenvalues; the weights of a probe sum to one.
        moments: ``moments[p - 1]`` estimates tr(A^p) / size for p = 1 to 4.
        moment_errors: their standard errors over the probes; NaN where these cannot tell (a single one, or all the same).
        size: P of the (P, P) matrix.
        products: how many products with the matrix it took.
    """

    nodes: Float[Tensor, "probes steps"]
    weights: Float[Tensor, "probes steps"]
    moments: Float[Tensor, "4"]
    moment_errors: Float[Tensor, "4"]
    size: int
    products: int
    seed: int = 0

    def curve(self, points: int = 512, *, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """The density smoothed by a Gaussian: grid and values, which integrate to one.

        Args:
            sigma: width of the Gaussian in units of the eigenvalues; 1 % of the spectrum's range by default.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        span = max(high - low, 1e-12 + 1e-6 * abs(high))
        width = 0.01 * span if sigma is None else checks.number("sigma", sigma, low=0, open_low=True)
        grid = torch.linspace(low - 4 * width, high + 4 * width, points, dtype=torch.float64)
        bell = torch.exp(-0.5 * ((grid[:, None] - self.nodes.reshape(1, -1)) / width) ** 2)
        values = bell @ self.weights.reshape(-1) / (len(self.nodes) * width * math.sqrt(2 * math.pi))
        return grid, values

    def to_dict(self) -> dict[str, Any]:
        return {
            "nodes": self.nodes.tolist(),
            "weights": self.weights.tolist(),
            "moments": self.moments.tolist(),
            "moment_errors": [None if math.isnan(e) else e for e in self.moment_errors.tolist()],
            "size": self.size,
            "products": self.products,
            "seed": self.seed,
        }

    def plot(self, ax: Any = None) -> Any:
        """The smoothed density on a logarithmic axis."""
        ax = results.axes(ax)
        grid, values = self.curve()
        ax.semilogy(grid.tolist(), values.clamp_min(1e-7).tolist())
        ax.set(xlabel="eigenvalue", ylabel="density")
        return ax


def spectral_density(
    operator: Operator,
    *,
    steps: int = 20,
    probes: int = 2,
    reorthogonalise: str = "full",
    window: int = 10,
    seed: int = 0,
) -> Density:
    """The density of the eigenvalues by stochastic Lanczos quadrature (Ghorbani et al. 2019, arXiv 1901.10159).

    Each probe runs Lanczos from random signs; the Ritz values are the nodes, the squared first entries of T's eigenvectors
    the weights. A quadrature with m nodes is exact for polynomials up to degree 2m - 1, so the moments are those of
    Hutchinson's estimator.

    Args:
        operator: a symmetric (P, P) matrix: a tensor, or anything with a shape and ``@``.
        steps: products per probe; more of them resolve finer parts of the spectrum.
        probes: independent random vectors; the standard errors need two.
        reorthogonalise: ``"full"`` keeps steps · size numbers a probe; ``"window"`` (the last ``window`` vectors) and ``"none"`` need less
            memory, and count converged eigenvalues more than once; ``"selective"`` orthogonalises against converged Ritz vectors.

    Raises:
        InputError: an operator that is not square, no step or probe, an unknown way to reorthogonalise, NaN in a product.

    >>> round(spectral_density(torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0])), steps=2).moments[0].item(), 4)
    2.5
    """
    size = side_length(operator)
    operator = at_least_single(operator)
    checks.number("probes", probes, low=1, integer=True)
    checks.number("steps", steps, low=1, integer=True)
    checks.one_of("reorthogonalise", reorthogonalise, REORTHOGONALISE)
    checks.number("window", window, low=2, integer=True)
    generator = torch.Generator().manual_seed(seed)
    starts = [random_signs(operator, (size,), generator) for _ in range(probes)]
    generators = [torch.Generator().manual_seed(seed + probe + 1) for probe in range(probes)]
    itemsize = torch.finfo(operator.dtype).bits // 8
    together = max(
        1, _BASES_BYTES // (basis_size(min(steps, size), reorthogonalise, window) * size * itemsize)
    )
    runs = []
    for first in range(0, probes, together):
        part = slice(first, first + together)
        found = lanczos_runs(operator, steps, starts[part], generators[part], reorthogonalise, window)
        # The bases are let go.
        runs += [Lanczos(run.diagonal, run.off_diagonal, run.basis[:, :0]) for run in found]
    return density_of(operator, runs, seed)


def density_of(operator: Operator, runs: Sequence[Lanczos], seed: int) -> Density:
    """The density that Lanczos runs of an operator from random signs have seen, one a probe."""
    nodes, weights = [], []
    for run in runs:
        # Past an exhausted Krylov space a run goes on from another vector, which has no weight in this probe.
        values, vectors = run.ritz()
        nodes.append(values)
        weights.append(vectors[0].square())
    theta, tau = torch.stack(nodes), torch.stack(weights)
    powers = torch.stack([(tau * theta**p).sum(1) for p in range(1, 5)], dim=1)
    moments, count = powers.mean(0), len(runs)
    spread = powers.std(0) if count > 1 else torch.zeros_like(moments)
    errors = torch.maximum(spread / math.sqrt(count), rounding(operator) * moments.abs())
    errors = torch.where(spread > 0, errors, math.nan)
    return Density(theta, tau, moments, errors, side_length(operator), count * theta.shape[1], seed)
