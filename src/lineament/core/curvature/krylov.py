"""The Lanczos process of a symmetric operator known by its products only, and what every user of it needs.

Lanczos keeps its basis and orthogonalises against all of it: without that, converged eigenvalues come back as ghosts. Where the basis does
not fit, a window of it may do, at the price of ghosts (:data:`REORTHOGONALISE`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.models import is_half
from lineament.core.results import Readable

# Against what each new vector is made orthogonal: all vectors, the last few, the converged Ritz vectors (Parlett and Scott 1979, on a
# basis that is kept), or the last two only, as the bare recurrence has it.
REORTHOGONALISE = ("full", "window", "selective", "none")


class Operator(Protocol):
    """A symmetric matrix known by its products."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __matmul__(self, other: Tensor, /) -> Tensor: ...


def at_least_single(operator: Operator) -> Operator:
    """The operator with products in float32 at least: half precision cannot hold what orthogonalisation leaves of a vector.

    A matrix in half precision is widened, and then multiplies exactly; of anything else the products stay as it computes them.

    >>> at_least_single(torch.eye(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    if not is_half(operator.dtype):
        return operator
    return operator.float() if isinstance(operator, Tensor) else _Widened(operator)


class _Widened:
    """An operator of half precision that takes and gives float32."""

    dtype = torch.float32

    def __init__(self, operator: Operator):
        self._operator = operator
        self.shape, self.device, self.precision = operator.shape, operator.device, operator.dtype

    def __matmul__(self, other: Tensor) -> Tensor:
        return (self._operator @ other.to(self.precision)).float()


def rounding(operator: Operator) -> float:
    """The relative rounding error of an operator's products."""
    return torch.finfo(getattr(operator, "precision", operator.dtype)).eps


@dataclass(frozen=True)
class Lanczos(Readable):
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
    size = side_length(operator)
    operator = at_least_single(operator)
    checks.number("steps", steps, low=1, integer=True)
    generator = torch.Generator().manual_seed(seed)
    vector = (
        random_normal(operator, (size,), generator)
        if start is None
        else checks.tensor("start", start, shape=(size,))
    )
    checks.require(float(vector.norm()) > 0, "start: got a vector of zeros, expected a direction")
    return lanczos_runs(operator, steps, [vector], [generator])[0]


def lanczos_runs(
    operator: Operator,
    steps: int,
    starts: list[Tensor],
    generators: list[torch.Generator],
    reorthogonalise: str = "full",
    window: int = 10,
) -> list[Lanczos]:
    """Independent Lanczos processes in step, so that each product is taken of a block of vectors.

    Only what the reorthogonalisation needs is kept: of a ``"window"`` or of ``"none"`` the basis holds the last vectors, in a ring.
    """
    size, count = side_length(operator), len(starts)
    steps = min(steps, size)
    vectors = [(v / v.norm()).to(operator.dtype).to(operator.device) for v in starts]
    held = basis_size(steps, reorthogonalise, window)
    bases = torch.zeros(count, held, size, dtype=operator.dtype, device=operator.device)
    diagonal = torch.zeros(count, steps, dtype=torch.float64)
    off_diagonal = torch.zeros(count, steps, dtype=torch.float64)
    for step in progress(range(steps), "Lanczos"):
        images = apply(operator, torch.stack(vectors), f"lanczos: step {step + 1} of {steps}")
        for run, image in enumerate(images):
            bases[run, step % held] = vectors[run]
            basis = bases[run, : min(step + 1, held)]
            diagonal[run, step] = float(image @ vectors[run])
            scale = float(image.norm())
            # What the recurrence says is there comes off first, so that one pass over the basis is enough most of the time.
            image = image - diagonal[run, step].item() * vectors[run]
            if step:
                image.sub_(bases[run, (step - 1) % held], alpha=off_diagonal[run, step - 1].item())
            if reorthogonalise == "selective":
                image = _without_converged(image, basis, diagonal[run, : step + 1], off_diagonal[run, :step])
            elif reorthogonalise != "none":
                image = orthogonal_part(image, basis)
            length = float(image.norm())
            if step + 1 < steps:
                if negligible(length, scale, operator):
                    off_diagonal[run, step] = 0.0
                    image = orthogonal_part(random_normal(operator, (size,), generators[run]), basis)
                    vectors[run] = image / image.norm()
                    continue
                vectors[run] = image / length
            off_diagonal[run, step] = length
    return [Lanczos(diagonal[r], off_diagonal[r], bases[r].T) for r in range(count)]


def basis_size(steps: int, reorthogonalise: str, window: int) -> int:
    """How many vectors of a basis are kept."""
    needed = {"full": steps, "selective": steps, "window": window, "none": 2}[reorthogonalise]
    return min(max(needed, 2), steps)


def _without_converged(vector: Tensor, basis: Tensor, diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """The part of a vector orthogonal to the Ritz vectors whose residuals are below √eps of the largest eigenvalue."""
    t = torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    values, ritz = torch.linalg.eigh(t)
    bound = math.sqrt(torch.finfo(basis.dtype).eps) * float(values.abs().max())
    done = float(vector.norm()) * ritz[-1].abs() <= bound
    if not bool(done.any()):
        return vector
    chosen = ritz[:, done].to(basis)
    return vector - basis.T @ (chosen @ (chosen.T @ (basis @ vector)))


def apply(operator: Operator, rows: Tensor, what: str) -> Tensor:
    """A v for each row v; a single row as a vector, for operators that know no blocks."""
    images = (operator @ rows[0])[None] if len(rows) == 1 else (operator @ rows.T).T
    if not bool(torch.isfinite(images.sum())) and not bool(torch.isfinite(images).all()):
        raise checks.InputError(f"{what}: the product holds NaN or infinite values")
    return images


def negligible(length: float, scale: float, operator: Operator) -> bool:
    """Whether what orthogonalisation left of a vector is rounding.

    The bound does not grow with the vector's length: rounding that passes for a direction is orthogonal to the others, and harms nothing; a
    direction that passes for rounding is lost.
    """
    return length <= 10 * torch.finfo(operator.dtype).eps * max(scale, 1e-30)


def side_length(operator: Operator) -> int:
    shape = tuple(operator.shape)
    square = len(shape) == 2 and shape[0] == shape[1] and shape[0] > 0
    checks.require(square, f"operator: got shape {shape}, expected a square matrix or operator")
    return int(shape[0])


def random_normal(operator: Operator, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that a seed means the same vector on every device.
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(operator.dtype).to(operator.device)


def random_signs(operator: Operator, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Eight signs come out of each random byte: drawing a number for each takes several times as long.
    size = math.prod(shape)
    drawn = torch.randint(0, 256, (-(-size // 8),), generator=generator, dtype=torch.uint8)
    bits = torch.from_numpy(np.unpackbits(drawn.numpy(), count=size)).reshape(shape)
    return bits.to(operator.dtype).mul_(2).sub_(1).to(operator.device)


def orthogonal_part(vector: Tensor, basis: Tensor) -> Tensor:
    """The part of a vector orthogonal to the rows of a basis.

    Another pass removes what rounding left, where one took much away (Daniel, Gragg, Kaufman and Stewart 1976); a third only of a vector
    that was rounding.
    """
    for _ in range(3):
        before = float(vector.norm())
        vector = vector - basis.T @ (basis @ vector)
        if float(vector.norm()) > 0.7 * before:
            break
    return vector
