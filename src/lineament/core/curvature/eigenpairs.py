"""Extreme eigenvalues and their eigenvectors of a symmetric operator that is known by its products only.

Block Lanczos with thick restarts (Wu and Simon 2000): the basis never outgrows a few times the pairs asked for, and a
restart keeps the best Ritz vectors in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks, results
from lineament.core.batching import progress
from lineament.core.curvature.krylov import (
    Operator,
    apply,
    at_least_single,
    negligible,
    orthogonal_part,
    random_normal,
    rounding,
    side_length,
)
from lineament.core.results import Readable

# Eigenvalues below this share of the largest are held to the accuracy of one of that size.
_SMALL = 0.01


@dataclass(frozen=True)
class Eigenpairs(Readable):
    """Eigenvalues and eigenvectors.

    Attributes:
        values: (k,), in the order asked for.
        vectors: (size, k), of unit length, one a column.
        residuals: (k,), ‖A v - λ v‖ of each, never below the rounding of the products.
        converged: whether all of them reached the tolerance.
        products: how many products with the matrix it took.
    """

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
        ax = results.axes(ax)
        ax.stem(range(1, len(self.values) + 1), self.values.tolist(), basefmt=" ")
        ax.set(xlabel="eigenvalue number", ylabel="eigenvalue")
        return ax


def top_eigenpairs(
    operator: Operator,
    k: int = 1,
    *,
    which: Literal["largest", "smallest", "both", "magnitude"] = "largest",
    tol: float = 1e-3,
    accurate: Literal["vectors", "values"] = "vectors",
    max_products: int = 500,
    seed: int = 0,
) -> Eigenpairs:
    """Extreme eigenvalues and their eigenvectors, by block Lanczos with thick restarts.

    The block is as wide as ``k`` (at most 8), so that an eigenvalue of multiplicity up to that is found as often as it is there.

    Args:
        k: how many; with ``which="both"`` that many at each end, largest first.
        which: the end of the spectrum (``"largest"`` and ``"smallest"`` are algebraic).
        tol: a pair is converged when its error is at most tol · |λ|, or tol · 0.01 · max |λ| where that is more. (Measured by the
            largest |λ| alone, almost any vector would pass for the smallest eigenvalue of a spectrum that hardly reaches below zero.)
        accurate: what must be as accurate as that. ``"vectors"``: the residual ‖A v - λ v‖. ``"values"``: only the eigenvalue, whose
            error is estimated by the smaller of the residual and its square over the distance to the other eigenvalues
            (Parlett 1980, theorem 11.7.1), and by its last change; that takes fewer products where the vectors are not needed. It is
            an estimate: eigenvalues that lie closer than ``tol`` of their size may not have been told apart.
        max_products: products to spend at most, at least as many as pairs; what was found by then is returned, with its
            residuals.

    Raises:
        InputError: an operator that is not square, an unknown end, NaN in a product.

    Source: Wu and Simon (2000), *Thick-restart Lanczos method for large symmetric eigenvalue problems*.

    >>> top_eigenpairs(torch.diag(torch.tensor([5.0, -7.0, 1.0, 2.0])), 1, which="magnitude").values.round(decimals=4).tolist()
    [-7.0]
    """
    size = side_length(operator)
    operator = at_least_single(operator)
    checks.one_of("which", which, ("largest", "smallest", "both", "magnitude"))
    checks.number("k", k, low=1, high=size, integer=True)
    checks.number("tol", tol, low=0, open_low=True)
    checks.one_of("accurate", accurate, ("vectors", "values"))
    wanted = min(2 * k if which == "both" else k, size)
    checks.number("max_products", max_products, low=wanted, integer=True)
    width = min(k, 8)
    # Whole blocks only: a part of one would leave residuals that the basis does not account for.
    room = min(size, -(-max(3 * wanted + 3 * width, 24) // width) * width)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(room, size, dtype=operator.dtype, device=operator.device)
    matrix = torch.zeros(room, room, dtype=torch.float64)
    fresh = random_normal(operator, (width, size), generator)
    block, _ = _extend(operator, fresh, basis[:0], generator)
    filled = products = 0
    before = matrix.new_empty(0)
    # One round past the limit: the last one always returns.
    for _ in progress(range(max_products // width + 1), "eigenpairs (at most)"):
        images = apply(operator, block, f"top_eigenpairs: product {products + 1}")
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
        every = (leftover @ ritz[filled:end]).norm(dim=0)
        residuals = every[order].clamp_min(rounding(operator) * float(values.abs().max()))
        sizes = values[order].abs().clamp_min(_SMALL * float(values.abs().max()))
        errors = residuals
        if accurate == "values":
            # Where the others are may not be known yet; so the change, which is power iteration's rule, must agree.
            change = (values[order] - before).abs() if len(before) == len(order) else residuals
            errors = torch.maximum(_value_errors(values, every)[order], change if end < size else residuals)
            before = values[order]
        converged = end >= wanted and bool((errors <= tol * sizes).all())
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
    raise AssertionError("unreachable: the last round spends the products")


def _extend(
    operator: Operator, images: Tensor, basis: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The images' parts outside a basis as orthonormal rows Q, and R with parts = Rᵀ Q; random rows where none is left."""
    size = images.shape[1]
    rows: list[Tensor] = []
    leftovers = torch.zeros_like(images)
    for index, image in enumerate(images):
        scale = float(image.norm())
        outside = orthogonal_part(image, basis)
        leftovers[index] = outside
        part = orthogonal_part(outside, torch.stack(rows)) if rows else outside
        length = float(part.norm())
        if len(basis) + len(rows) >= size:
            break
        nothing = negligible(length, scale, operator)
        if nothing or length < 0.1 * float(outside.norm()):
            # What the block's own rows leave may be mostly rounding, which lies anywhere, in the basis too.
            part = random_normal(operator, (size,), generator) if nothing else part
            part = orthogonal_part(part, torch.cat([basis, *(row[None] for row in rows)]))
            length = float(part.norm())
        rows.append(part / length)
    found = torch.stack(rows) if rows else images[:0]
    return found, (found @ leftovers.T).double().cpu()


def _value_errors(values: Tensor, residuals: Tensor) -> Tensor:
    """Estimates of the Ritz values' errors: ρ² over the distance to the other eigenvalues, where that is less than ρ itself.

    Where the others are is known up to their own residuals.
    """
    distance = (values[:, None] - values[None, :]).abs() - residuals[None, :]
    distance.fill_diagonal_(float("inf"))
    gap = distance.amin(1)
    return torch.where(gap > residuals, residuals.square() / gap.clamp_min(1e-300), residuals)


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
