"""Eigenvalues, trace and spectral density of a symmetric operator that is known by its products only.

Everything here takes any object with ``@``, ``.shape``, ``.dtype`` and ``.device``: a :class:`~lineament.core.curvature.Curvature`, or
a matrix as a tensor. Lanczos keeps its basis and orthogonalises against all of it, twice: without that, converged
eigenvalues come back as ghosts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks

# Probes whose bases fit in this much memory run in step.
_BASES_BYTES = 2 * 1024**3


class Operator(Protocol):
    """A symmetric matrix known by its products."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __matmul__(self, other: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Lanczos:
    """A V ≈ V T: the orthonormal ``basis`` V (size, steps) and the tridiagonal T (``diagonal``, ``off_diagonal``)."""

    diagonal: Float[Tensor, "steps"]
    off_diagonal: Float[Tensor, "steps"]
    basis: Float[Tensor, "size steps"]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (ascending) and eigenvectors of T, in float64."""
        inside = self.off_diagonal[:-1].double()
        t = torch.diag(self.diagonal.double()) + torch.diag(inside, 1) + torch.diag(inside, -1)
        values, vectors = torch.linalg.eigh(t)
        return values, vectors


def lanczos(operator: Operator, steps: int, *, start: Tensor | None = None, seed: int = 0) -> Lanczos:
    """The Lanczos process with full reorthogonalisation.

    When the Krylov space is exhausted, it goes on with a new random direction (a zero in ``off_diagonal`` marks
    the place), so that repeated eigenvalues are found too. The last entry of ``off_diagonal`` is the residual's norm.

    Args:
        steps: products to spend, at most the operator's side.
        start: first vector (size,); random normal from ``seed`` by default.

    Raises:
        InputError: an operator that is not square, a start of zeros, NaN in a product.

    >>> lanczos(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 3).ritz()[0].float().round(decimals=4).tolist()
    [1.0, 2.0, 3.0]
    """
    size = _side(operator)
    checks.number("steps", steps, low=1, integer=True)
    generator = torch.Generator().manual_seed(seed)
    vector = (
        _normal(operator, (size,), generator)
        if start is None
        else checks.tensor("start", start, shape=(size,))
    )
    checks.require(float(vector.norm()) > 0, "start: got a vector of zeros, expected a direction")
    return _runs(operator, steps, [vector], [generator])[0]


def _runs(
    operator: Operator, steps: int, starts: list[Tensor], generators: list[torch.Generator]
) -> list[Lanczos]:
    """Independent Lanczos processes in step, so that each product is taken of a block of vectors."""
    size, count = _side(operator), len(starts)
    steps = min(steps, size)
    vectors = [(v / v.norm()).to(operator.dtype).to(operator.device) for v in starts]
    bases = torch.zeros(count, steps, size, dtype=operator.dtype, device=operator.device)
    diagonal = torch.zeros(count, steps, dtype=torch.float64)
    off_diagonal = torch.zeros(count, steps, dtype=torch.float64)
    for step in range(steps):
        images = _images(operator, torch.stack(vectors), f"lanczos: step {step + 1} of {steps}")
        for run, image in enumerate(images):
            bases[run, step] = vectors[run]
            basis = bases[run, : step + 1]
            diagonal[run, step] = float(image @ vectors[run])
            scale = float(image.norm())
            image = _against(image, basis)
            length = float(image.norm())
            if step + 1 < steps:
                if _negligible(length, scale, operator):
                    off_diagonal[run, step] = 0.0
                    image = _against(_normal(operator, (size,), generators[run]), basis)
                    vectors[run] = image / image.norm()
                    continue
                vectors[run] = image / length
            off_diagonal[run, step] = length
    return [Lanczos(diagonal[r], off_diagonal[r], bases[r].T) for r in range(count)]


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues in the order asked for, unit eigenvectors as columns, and ‖A v - λ v‖ for each."""

    values: Float[Tensor, "k"]
    vectors: Float[Tensor, "size k"]
    residuals: Float[Tensor, "k"]
    converged: bool
    products: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "values": self.values.tolist(),
            "residuals": self.residuals.tolist(),
            "converged": self.converged,
            "products": self.products,
        }

    def plot(self, ax: Any = None) -> Any:
        """The eigenvalues as stems, in order."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.stem(range(1, len(self.values) + 1), self.values.tolist(), basefmt=" ")
        ax.set(xlabel="eigenvalue number", ylabel="eigenvalue")
        return ax


def top_eigenpairs(
    operator: Operator,
    k: int = 1,
    *,
    which: Literal["largest", "smallest", "both", "magnitude"] = "largest",
    tol: float = 1e-3,
    max_products: int = 500,
    seed: int = 0,
) -> Eigenpairs:
    """Extreme eigenvalues and their eigenvectors, by block Lanczos with thick restarts.

    The block is as wide as ``k`` (at most 8), so that an eigenvalue of multiplicity up to that is found as often as it is there.

    Args:
        k: how many; with ``which="both"`` that many at each end, largest first.
        which: the end of the spectrum (``"largest"`` and ``"smallest"`` are algebraic).
        tol: a pair is converged when ‖A v - λ v‖ <= tol · max |λ|.
        max_products: products to spend at most, at least as many as pairs; what was found by then is returned, with its
            residuals.

    Raises:
        InputError: an operator that is not square, an unknown end, NaN in a product.

    Source: Wu and Simon (2000), *Thick-restart Lanczos method for large symmetric eigenvalue problems*.

    >>> top_eigenpairs(torch.diag(torch.tensor([5.0, -7.0, 1.0, 2.0])), 1, which="magnitude").values.round(decimals=4).tolist()
    [-7.0]
    """
    size = _side(operator)
    checks.one_of("which", which, ("largest", "smallest", "both", "magnitude"))
    checks.number("k", k, low=1, high=size, integer=True)
    checks.number("tol", tol, low=0, open_low=True)
    wanted = min(2 * k if which == "both" else k, size)
    checks.number("max_products", max_products, low=wanted, integer=True)
    width = min(k, 8)
    # Whole blocks only: a part of one would leave residuals that the basis does not account for.
    room = min(size, -(-max(3 * wanted + 3 * width, 24) // width) * width)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(room, size, dtype=operator.dtype, device=operator.device)
    matrix = torch.zeros(room, room, dtype=torch.float64)
    fresh = _normal(operator, (width, size), generator)
    block, _ = _extend(operator, fresh, basis[:0], generator)
    filled = products = 0
    while True:
        images = _images(operator, block, f"top_eigenpairs: product {products + 1}")
        products += len(block)
        end = filled + len(block)
        basis[filled:end] = block
        # Projecting on the whole basis fills the arrow left by a restart without a special case.
        rows = (images @ basis[:end].T).double().cpu()
        matrix[filled:end, :end] = rows
        matrix[:end, filled:end] = rows.T
        block, leftover = _extend(operator, images, basis[:end], generator)
        values, ritz = torch.linalg.eigh(0.5 * (matrix[:end, :end] + matrix[:end, :end].T))
        order = _order(values, which, min(wanted, end))
        residuals = (leftover @ ritz[filled:end, order]).norm(dim=0)
        largest = float(values.abs().max())
        converged = end >= wanted and bool((residuals <= tol * largest).all())
        spent = products + len(block) > max_products or end == size
        if converged or spent:
            vectors = basis[:end].T @ ritz[:, order].to(operator.dtype).to(operator.device)
            return Eigenpairs(
                values[order].to(operator.dtype),
                vectors / vectors.norm(dim=0),
                residuals.to(operator.dtype),
                converged,
                products,
            )
        filled = end
        if end == room:
            # A restart keeps more pairs than wanted: the next candidates, which speed convergence.
            keep = _order(values, which, (wanted // width + 1) * width)
            basis[: len(keep)] = ritz[:, keep].T.to(operator.dtype).to(operator.device) @ basis
            filled = len(keep)
            matrix.zero_()
            matrix[range(filled), range(filled)] = values[keep]


def _extend(
    operator: Operator, images: Tensor, basis: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The images' parts outside a basis as orthonormal rows Q, and R with parts = Rᵀ Q; random rows where none is left."""
    size = images.shape[1]
    rows: list[Tensor] = []
    leftovers = torch.zeros_like(images)
    for index, image in enumerate(images):
        scale = float(image.norm())
        outside = _against(image, basis)
        leftovers[index] = outside
        part = _against(outside, torch.stack(rows)) if rows else outside
        length = float(part.norm())
        if len(basis) + len(rows) >= size:
            break
        if _negligible(length, scale, operator):
            part = _normal(operator, (size,), generator)
            part = _against(part, torch.cat([basis, *(row[None] for row in rows)]))
            length = float(part.norm())
        rows.append(part / length)
    found = torch.stack(rows) if rows else images[:0]
    return found, (found @ leftovers.T).double().cpu()


@dataclass(frozen=True)
class Density:
    """The spectral density as weighted nodes, (probes, steps) each; weights of a probe sum to one.

    ``moments[p - 1]`` estimates tr(A^p) / size for p = 1 to 4, with ``moment_errors`` over the probes.
    """

    nodes: Float[Tensor, "probes steps"]
    weights: Float[Tensor, "probes steps"]
    moments: Float[Tensor, "4"]
    moment_errors: Float[Tensor, "4"]
    size: int
    products: int

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
        }

    def plot(self, ax: Any = None) -> Any:
        """The smoothed density on a logarithmic axis."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        grid, values = self.curve()
        ax.semilogy(grid.tolist(), values.clamp_min(1e-7).tolist())
        ax.set(xlabel="eigenvalue", ylabel="density")
        return ax


def spectral_density(operator: Operator, *, steps: int = 40, probes: int = 2, seed: int = 0) -> Density:
    """The density of the eigenvalues by stochastic Lanczos quadrature (Ghorbani et al. 2019, arXiv 1901.10159).

    Each probe runs Lanczos from random signs; the Ritz values are the nodes, the squared first entries of T's eigenvectors
    the weights. A quadrature with m nodes is exact for polynomials up to degree 2m - 1, so the moments are those of
    Hutchinson's estimator.

    Args:
        steps: products per probe.
        probes: independent random vectors; the standard errors need two.

    >>> round(spectral_density(torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0])), steps=2).moments[0].item(), 4)
    2.5
    """
    size = _side(operator)
    checks.number("probes", probes, low=1, integer=True)
    checks.number("steps", steps, low=1, integer=True)
    generator = torch.Generator().manual_seed(seed)
    starts = [_signs(operator, (size,), generator) for _ in range(probes)]
    generators = [torch.Generator().manual_seed(seed + probe + 1) for probe in range(probes)]
    itemsize = torch.finfo(operator.dtype).bits // 8
    together = max(1, _BASES_BYTES // (min(steps, size) * size * itemsize))
    nodes, weights = [], []
    for first in range(0, probes, together):
        part = slice(first, first + together)
        for run in _runs(operator, steps, starts[part], generators[part]):
            # Past an exhausted Krylov space a run goes on from another vector, which has no weight in this probe.
            values, vectors = run.ritz()
            nodes.append(values)
            weights.append(vectors[0].square())
    theta, tau = torch.stack(nodes), torch.stack(weights)
    powers = torch.stack([(tau * theta**p).sum(1) for p in range(1, 5)], dim=1)
    errors = (
        powers.std(0) / math.sqrt(probes) if probes > 1 else torch.full((4,), math.nan, dtype=torch.float64)
    )
    return Density(theta, tau, powers.mean(0), errors, size, probes * theta.shape[1])


def _images(operator: Operator, rows: Tensor, what: str) -> Tensor:
    """A v for each row v; a single row as a vector, for operators that know no blocks."""
    images = (operator @ rows[0])[None] if len(rows) == 1 else (operator @ rows.T).T
    if not bool(torch.isfinite(images.sum())) and not bool(torch.isfinite(images).all()):
        raise checks.InputError(f"{what}: the product holds NaN or infinite values")
    return images


def _negligible(length: float, scale: float, operator: Operator) -> bool:
    """Whether what orthogonalisation left of a vector is rounding."""
    return length <= 10 * torch.finfo(operator.dtype).eps * max(scale, 1e-30) * math.sqrt(_side(operator))


def _side(operator: Operator) -> int:
    shape = tuple(operator.shape)
    square = len(shape) == 2 and shape[0] == shape[1] and shape[0] > 0
    checks.require(square, f"operator: got shape {shape}, expected a square matrix or operator")
    return int(shape[0])


def _normal(operator: Operator, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that a seed means the same vector on every device.
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(operator.dtype).to(operator.device)


def _signs(operator: Operator, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, shape, generator=generator)
    return (2 * bits - 1).to(operator.dtype).to(operator.device)


def _against(vector: Tensor, basis: Tensor) -> Tensor:
    """The part of a vector orthogonal to the rows of a basis; a second pass removes what rounding left."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


def _order(values: Tensor, which: str, count: int) -> list[int]:
    """Positions of the wanted Ritz values, most extreme first."""
    up = values.argsort().tolist()
    if which == "largest":
        return up[::-1][:count]
    if which == "smallest":
        return up[:count]
    if which == "magnitude":
        return values.abs().argsort(descending=True).tolist()[:count]
    top = up[::-1][: (count + 1) // 2]
    return top + [index for index in up[: count // 2] if index not in top]
