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

    >>> lanczos(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 3).ritz()[0].float().round(decimals=4).tolist()
    [1.0, 2.0, 3.0]
    """
    size = _side(operator)
    checks.number("steps", steps, low=1, integer=True)
    steps = min(steps, size)
    generator = torch.Generator().manual_seed(seed)
    vector = (
        _normal(operator, (size,), generator)
        if start is None
        else checks.tensor("start", start, shape=(size,))
    )
    checks.require(float(vector.norm()) > 0, "start: got a vector of zeros, expected a direction")
    vector = (vector / vector.norm()).to(operator.dtype).to(operator.device)
    basis = torch.zeros(steps, size, dtype=operator.dtype, device=operator.device)
    diagonal = torch.zeros(steps, dtype=torch.float64)
    off_diagonal = torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        basis[step] = vector
        image = operator @ vector
        if not bool(torch.isfinite(image).all()):
            raise checks.InputError(f"lanczos: product {step + 1} of {steps} holds NaN or infinite values")
        diagonal[step] = float(image @ vector)
        scale = float(image.norm())
        image = _against(image, basis[: step + 1])
        length = float(image.norm())
        off_diagonal[step] = length
        if step + 1 == steps:
            break
        if length <= 10 * torch.finfo(operator.dtype).eps * max(scale, 1e-30) * math.sqrt(size):
            off_diagonal[step] = 0.0
            image = _against(_normal(operator, (size,), generator), basis[: step + 1])
            length = float(image.norm())
        vector = image / length
    return Lanczos(diagonal, off_diagonal, basis.T)


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
    """Extreme eigenvalues and their eigenvectors, by Lanczos with thick restarts (Wu and Simon 2000).

    Args:
        k: how many; with ``which="both"`` that many at each end, largest first.
        which: the end of the spectrum (``"largest"`` and ``"smallest"`` are algebraic).
        tol: a pair is converged when ‖A v - λ v‖ <= tol · max |λ|.
        max_products: products to spend at most; fewer converged pairs are still returned, with their residuals.

    >>> top_eigenpairs(torch.diag(torch.tensor([5.0, -7.0, 1.0, 2.0])), 1, which="magnitude").values.round(decimals=3).tolist()
    [-7.0]
    """
    size = _side(operator)
    checks.one_of("which", which, ("largest", "smallest", "both", "magnitude"))
    checks.number("k", k, low=1, integer=True)
    checks.number("tol", tol, low=0, open_low=True)
    wanted = min(2 * k if which == "both" else k, size)
    room = min(size, max(2 * wanted + 10, 20))
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(room, size, dtype=operator.dtype, device=operator.device)
    matrix = torch.zeros(room, room, dtype=torch.float64)
    vector = _normal(operator, (size,), generator)
    vector = vector / vector.norm()
    kept = products = 0
    while True:
        # Extend the basis to its full size; the first `kept` rows are the Ritz vectors of the last round.
        length = 0.0
        for step in range(kept, room):
            basis[step] = vector
            image = operator @ vector
            products += 1
            if not bool(torch.isfinite(image).all()):
                raise checks.InputError(f"top_eigenpairs: product {products} holds NaN or infinite values")
            # Projecting on the whole basis fills the arrow left by the restart without a special case.
            row = (basis[: step + 1] @ image).double().cpu()
            matrix[step, : step + 1] = row
            matrix[: step + 1, step] = row
            scale = float(image.norm())
            image = _against(image, basis[: step + 1])
            length = float(image.norm())
            if length <= 10 * torch.finfo(operator.dtype).eps * max(scale, 1e-30) * math.sqrt(size):
                length = 0.0
                image = _normal(operator, (size,), generator)
                if step + 1 < size:
                    image = _against(image, basis[: step + 1])
            vector = image / image.norm()
        values, ritz = torch.linalg.eigh(matrix)
        order = _order(values, which, wanted)
        residuals = (length * ritz[-1, order]).abs()
        biggest = float(values.abs().max())
        converged = bool((residuals <= tol * max(biggest, 1e-30)).all())
        done = converged or products + 1 > max_products or room == size
        # A restart keeps some pairs more than wanted: they are the next candidates and speed convergence.
        keep = order if done else _order(values, which, min(wanted + 5, room - 3))
        vectors = basis.T @ ritz[:, keep].to(operator.dtype).to(operator.device)
        if done:
            return Eigenpairs(
                values[keep].to(operator.dtype),
                vectors / vectors.norm(dim=0),
                residuals.to(operator.dtype),
                converged,
                products,
            )
        kept = len(keep)
        basis[:kept] = vectors.T
        matrix.zero_()
        matrix[range(kept), range(kept)] = values[keep]


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace, its standard error (NaN from a single sample), and the products spent."""

    value: float
    standard_error: float
    products: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def trace(
    operator: Operator,
    products: int = 60,
    *,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    seed: int = 0,
) -> Trace:
    """An unbiased estimate of the trace from a number of products, with its standard error.

    ``"hutchinson"`` averages vᵀ A v over random signs. ``"hutch++"`` (Meyer et al. 2021, arXiv 2010.09649) takes the trace on the range of a
    sketch exactly and samples the rest. ``"xtrace"`` (Epperly, Tropp and Webber 2024, arXiv 2301.07825) does so once for each test vector left out,
    which makes use of every product twice; best where the spectrum decays.

    Args:
        products: products to spend, at least 2 (``xtrace``) or 3 (``hutch++``).

    >>> abs(trace(torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0])), 6).value - 6.0) < 1e-5
    True
    """
    checks.one_of("method", method, ("xtrace", "hutch++", "hutchinson"))
    checks.number(
        "products", products, low={"xtrace": 2, "hutch++": 3, "hutchinson": 1}[method], integer=True
    )
    size = _side(operator)
    generator = torch.Generator().manual_seed(seed)
    if method == "hutchinson":
        signs = _signs(operator, (size, products), generator)
        return _average((signs * (operator @ signs)).sum(0), 0.0, products, method)
    if method == "hutch++":
        width = min(products // 3, size)
        sketch = operator @ _signs(operator, (size, width), generator)
        q = torch.linalg.qr(sketch).Q
        known = float((q * (operator @ q)).sum())
        rest = products - 2 * width
        signs = _signs(operator, (size, rest), generator)
        signs = signs - q @ (q.T @ signs)
        if width == size:
            return Trace(known, 0.0, 2 * width, method)
        return _average((signs * (operator @ signs)).sum(0), known, products, method)
    return _xtrace(operator, min(products // 2, size), generator)


def _xtrace(operator: Operator, width: int, generator: torch.Generator) -> Trace:
    size = _side(operator)
    omega = _normal(operator, (size, width), generator)
    image = (operator @ omega).double()
    omega = omega.double()
    left, singular, _ = torch.linalg.svd(image, full_matrices=False)
    noise = float(singular[0]) * max(image.shape) * torch.finfo(operator.dtype).eps
    rank = int((singular > noise).sum())
    if rank < width or width == size:
        # The sketch holds the whole range, so that nothing is left to sample: the trace on it is the trace.
        q = left[:, : max(rank, 1)]
        value = float((q * (operator @ q.to(operator.dtype)).double()).sum())
        return Trace(value, 0.0, width + q.shape[1], "xtrace")
    q, r = torch.linalg.qr(image)
    z = (operator @ q.to(operator.dtype)).double()
    h = q.T @ z
    # Column i of s is the direction of range(q) that leaves with test vector i.
    s = torch.linalg.inv(r).T
    s = s / s.norm(dim=0)
    w = q.T @ omega
    x = w - s * (s * w).sum(0)
    outside = omega - q @ x
    quadratic = (omega * image).sum(0) - 2 * (x * (z.T @ omega)).sum(0) + (x * (h @ x)).sum(0)
    sampled = (size - width + 1) * quadratic / outside.square().sum(0)
    estimates = torch.trace(h) - (s * (h @ s)).sum(0) + sampled
    return _average(estimates, 0.0, 2 * width, "xtrace")


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
    nodes, weights = [], []
    for probe in range(probes):
        signs = _signs(operator, (size,), generator)
        run = lanczos(operator, steps, start=signs, seed=seed + probe + 1)
        # Past an exhausted Krylov space the run went on from another vector, which has no weight in this probe.
        values, vectors = run.ritz()
        nodes.append(values)
        weights.append(vectors[0].square())
    theta, tau = torch.stack(nodes), torch.stack(weights)
    powers = torch.stack([(tau * theta**p).sum(1) for p in range(1, 5)], dim=1)
    errors = (
        powers.std(0) / math.sqrt(probes) if probes > 1 else torch.full((4,), math.nan, dtype=torch.float64)
    )
    return Density(theta, tau, powers.mean(0), errors, size, probes * theta.shape[1])


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


def _average(samples: Tensor, known: float, products: int, method: str) -> Trace:
    count = samples.numel()
    error = float(samples.double().std()) / math.sqrt(count) if count > 1 else math.nan
    return Trace(known + float(samples.double().mean()), error, products, method)
