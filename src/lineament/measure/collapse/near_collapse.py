"""Near collapse the features answer a perturbation linearly: the map, its large-β form and its spectrum in closed form.

Tirer, Huang, Niles-Weed (2022, arXiv 2210.16658), section 5. Let H minimise (2) of :mod:`lineament.measure.collapse.ufm` for H0. For
H0 + dH0 the minimiser moves, to first order, by

    vec(dH) = (β/Kn) (f_HH - f_HW f_WW⁻¹ f_WH)⁻¹ vec(dH0) = F vec(dH0)
    F       = I - (λ_H/β) I - (1/β) I ⊗ WᵀW + (1/β) Z + O(β⁻²)

At an exactly collapsed H0 the spectra are known. They show that λ_H attenuates nearly every direction while λ_W weakens the
attenuation in the span of the means. (The complete spectra go beyond the paper, which gives the extreme values.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable
from lineament.measure.collapse.ufm import UFM, ReducedHessian, conjugate_gradients

_LARGEST = 4000


class PerturbationMap:
    """The first-order map F from dH0 to dH at a minimiser, as an operator on d x Kn matrices with ``@``.

    Args:
        problem: the model (squared loss).
        H: the minimiser of (2) for H0; at exact collapse H = H0 = the minimiser of (1).
        beta: β > 0.
        method: ``"exact"`` keeps the inverse (conjugate gradients), ``"expansion"`` is the form for large β.

    >>> problem = UFM(3, 2, lambda_w=0.5, lambda_h=0.1)
    >>> F = PerturbationMap(problem, problem.collapsed(4)[1], beta=10.0)
    >>> F.shape, round(float(torch.linalg.eigvalsh(F.dense())[0]), 6), round(map_spectrum(problem, 4, 10.0).values[-1], 6)
    ((24, 24), 0.957193, 0.957193)
    """

    def __init__(
        self, problem: UFM, H: Float[Tensor, "d columns"], *, beta: float, method: str = "exact"
    ) -> None:
        checks.number("beta", beta, low=0, open_low=True)
        self.method = checks.one_of("method", method, ["exact", "expansion"])
        self.beta = beta
        self.hessian = ReducedHessian(problem, H, beta=beta)
        self.problem = problem
        size = self.hessian.H.numel()
        self.shape = (size, size)

    def __matmul__(self, change: Float[Tensor, "d columns"]) -> Float[Tensor, "d columns"]:
        """dH for dH0 = ``change``."""
        change = self.problem.check("change", change).to(self.hessian.H)
        require(
            change.shape == self.hessian.H.shape,
            f"change: got {checks.show(change)}, expected shape {tuple(self.hessian.H.shape)}",
        )
        if self.method == "exact":
            return conjugate_gradients(self.hessian.__matmul__, self.beta * change)
        return self._expanded(change)

    def _expanded(self, D: Tensor) -> Tensor:
        h = self.hessian
        return D - (self.problem.lambda_h * D + h.gram @ D - h.leak(D)) / self.beta

    def weight_change(self, dH: Float[Tensor, "d columns"]) -> Float[Tensor, "classes d"]:
        """dW = -f_WW⁻¹ f_WH dH: how the head follows."""
        return -self.hessian.over(self.hessian.cross(dH))

    def dense(self) -> Float[Tensor, "size size"]:
        """F as a matrix on vec(H), columns of H stacked; refused above 4000 rows (use ``@``)."""
        size = self.shape[0]
        require(
            size <= _LARGEST,
            f"dense: F would be {size} x {size}, expected at most {_LARGEST}; use the operator form, F @ dH0",
        )
        d, columns = self.hessian.H.shape
        # Row j of the batch is vec⁻¹(e_j): vec stacks columns, so that the transpose is filled row by row.
        units = torch.eye(size, dtype=self.hessian.H.dtype, device=self.hessian.H.device)
        units = units.view(size, columns, d).mT
        if self.method == "expansion":
            return self._expanded(units).mT.reshape(size, size).T.contiguous()
        hessian = (self.hessian @ units).mT.reshape(size, size)
        # Symmetric but for rounding, and so is its inverse.
        return self.beta * torch.linalg.inv((hessian + hessian.T) / 2)

    def block(self, to: int, of: int) -> Float[Tensor, "dn dn"]:
        """F_{to,of}: the effect on class ``to`` of perturbing class ``of``; (d·n) x (d·n)."""
        d, columns = self.hessian.H.shape
        for what, value in (("to", to), ("of", of)):
            checks.number(what, value, low=0, high=self.problem.classes - 1, integer=True)
        n = self.problem.samples
        size = d * n
        require(
            size <= _LARGEST, f"block: would be {size} x {size}, expected at most {_LARGEST}; use F @ dH0"
        )
        if self.method == "exact":
            return self.dense()[to * size : (to + 1) * size, of * size : (of + 1) * size]
        units = torch.zeros(size, d, columns, dtype=self.hessian.H.dtype, device=self.hessian.H.device)
        eye = torch.eye(size, dtype=units.dtype, device=units.device).view(size, n, d).mT
        units[:, :, of * n : (of + 1) * n] = eye
        image = self._expanded(units)[:, :, to * n : (to + 1) * n]
        return image.mT.reshape(size, size).T.contiguous()


@dataclass(frozen=True)
class Spectrum(Readable):
    """Distinct values, their multiplicities, and what each belongs to, from the largest value down."""

    values: tuple[float, ...]
    multiplicities: tuple[int, ...]
    kinds: tuple[str, ...]

    def expanded(self) -> Float[Tensor, " size"]:
        """Every value as often as it occurs, descending, float64."""
        parts = [
            torch.full((count,), value, dtype=torch.float64)
            for value, count in zip(self.values, self.multiplicities)
        ]
        return torch.cat(parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "values": list(self.values),
            "multiplicities": list(self.multiplicities),
            "kinds": list(self.kinds),
        }

    def plot(self, ax: Any = None) -> Any:
        """The values in descending order; flat pieces are the closed form's levels."""
        ax = results.axes(ax)
        ax.step(range(sum(self.multiplicities)), self.expanded(), where="mid")
        ax.set(xlabel="index", ylabel="value")
        return ax


def _spectrum(*levels: tuple[float, int, str]) -> Spectrum:
    ordered = sorted((level for level in levels if level[1] > 0), key=lambda level: -level[0])
    values, counts, kinds = zip(*ordered)
    return Spectrum(values, counts, kinds)


def _collapsible(problem: UFM, d: int, beta: float) -> None:
    problem._squared("spectrum")
    checks.number("d", d, low=problem.classes, integer=True)
    checks.number("beta", beta, low=0, open_low=True)
    require(
        problem.lambda_h > 0 and problem.c < 1,
        f"lambda_h * lambda_w: got c = {problem.c:.4g}, expected 0 < c < 1: "
        "otherwise the minimiser is not collapsed",
    )


def block_spectrum(problem: UFM, d: int, beta: float) -> Spectrum:
    """The singular values of the diagonal block F_kk of the large-β map at exact collapse (dn of them).

    1 and 1 - √(λ_H/λ_W)/β are the extremes (the paper's); the rest completes them, with c = √(λ_H λ_W):
    1 - λ_H/β, 1 - 2λ_H(1-c)/β, 1 - 4λ_H(1-c)/β.

    >>> problem = UFM(4, 10, lambda_w=2**0.5, lambda_h=0.25)
    >>> found = block_spectrum(problem, 10, 100.0)
    >>> found.values[0], round(found.values[-1], 7), sum(found.multiplicities)
    (1.0, 0.9957955, 100)
    """
    _collapsible(problem, d, beta)
    k, n, c, h = problem.classes, problem.samples, problem.c, problem.lambda_h
    inside = math.sqrt(h / problem.lambda_w)
    return _spectrum(
        (1.0, d - k, "class mean, out of the span of the means"),
        (1 - h / beta, (d - k) * (n - 1), "within the class, out of the span"),
        (1 - inside / beta, k * (n - 1), "within the class, in the span"),
        (1 - 2 * h * (1 - c) / beta, k - 1, "class mean, towards another mean"),
        (1 - 4 * h * (1 - c) / beta, 1, "class mean, along itself"),
    )


def cross_norm(problem: UFM, beta: float) -> float:
    """The only singular value of F_{k,l}, k ≠ l, at exact collapse: (2/β) λ_H (1 - √(λ_H λ_W)); the block has rank 1.

    >>> round(cross_norm(UFM(4, 10, lambda_w=2**0.5, lambda_h=0.25), 100.0), 6)
    0.002027
    """
    _collapsible(problem, problem.classes, beta)
    return 2 / beta * problem.lambda_h * (1 - problem.c)


def map_spectrum(problem: UFM, d: int, beta: float) -> Spectrum:
    """The eigenvalues of the whole exact map F at collapse (dKn of them), with no expansion in β.

    >>> problem = UFM(4, 10, lambda_w=2**0.5, lambda_h=0.25)
    >>> found = map_spectrum(problem, 10, 100.0)
    >>> list(zip([round(v, 6) for v in found.values], found.multiplicities))
    [(1.0, 30), (0.997506, 216), (0.995962, 10), (0.995813, 144)]
    """
    _collapsible(problem, d, beta)
    k, n, c, h = problem.classes, problem.samples, problem.c, problem.lambda_h
    inside = math.sqrt(h / problem.lambda_w)
    return _spectrum(
        (1.0, (d - k) * k + k * (k - 1) // 2, "class means, out of the span or rotating in it"),
        (beta / (beta + h), (d - k) * k * (n - 1), "within classes, out of the span"),
        (beta / (beta + inside), k * k * (n - 1), "within classes, in the span"),
        (beta / (beta + 4 * h * (1 - c)), k * (k + 1) // 2, "class means, symmetric in the span"),
    )
