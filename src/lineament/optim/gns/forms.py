"""How a Hessian approximation is stored: dense, low rank, diagonal, zero, or known by its products only.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), sections 2.4 and 2.5. The form decides what a step costs; :func:`reduced` takes one
form to a cheaper one (its diagonal, a Nyström approximation), which stays positive semi-definite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.optim.gns.linear_algebra import gram, require_symmetric

FORMS = ("as is", "dense", "diagonal", "low_rank", "operator")


class Form:
    """A symmetric (n, n) matrix."""

    def product(self, v: Tensor) -> Tensor:
        """H v for v of shape (n,) or (n, k)."""
        raise NotImplementedError

    def describe(self) -> str:
        return f"a {type(self).__name__} form"


@dataclass(frozen=True)
class Dense(Form):
    """The matrix itself."""

    matrix: Float[Tensor, "n n"]

    def product(self, v: Tensor) -> Tensor:
        return self.matrix @ v


@dataclass(frozen=True)
class LowRank(Form):
    """VᵀV + shift·I, with the rows of ``factor`` = V."""

    factor: Float[Tensor, "r n"]
    shift: float = 0.0

    def product(self, v: Tensor) -> Tensor:
        found = self.factor.T @ (self.factor @ v)
        return found.add_(v, alpha=self.shift) if self.shift else found

    def describe(self) -> str:
        rank = f"a low-rank form of rank {len(self.factor)}"
        return f"{rank} plus {self.shift:g} times the identity" if self.shift else rank


@dataclass(frozen=True)
class Diagonal(Form):
    """A diagonal matrix by its entries."""

    entries: Float[Tensor, "n"]

    def product(self, v: Tensor) -> Tensor:
        return v * (self.entries if v.ndim == 1 else self.entries[:, None])


@dataclass(frozen=True)
class Zero(Form):
    """No curvature: the normalised gradient method."""

    def product(self, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


@dataclass(frozen=True)
class Operator(Form):
    """A matrix known by ``operator @ v``: a :class:`~lineament.core.curvature.operator.Curvature`, a SciPy ``LinearOperator``."""

    operator: Any

    def product(self, v: Tensor) -> Tensor:
        if isinstance(getattr(self.operator, "dtype", None), torch.dtype):
            found = (self.operator @ v.to(self.operator.dtype)).to(v)
        else:
            found = torch.as_tensor(np.asarray(self.operator @ v.cpu().numpy())).to(v)
        return _finite(found, "of a product with it ")


def finite(form: Form) -> Form:
    """The form, once its numbers are known to be finite; an operator's are asked for at each product."""
    for stored in vars(form).values():
        if isinstance(stored, Tensor):
            _finite(stored)
    return form


def _finite(values: Tensor, of: str = "") -> Tensor:
    # The sum of values of which one is not finite is not: to count them is slower.
    bad = 0 if math.isfinite(float(values.sum())) else int((~torch.isfinite(values)).sum())
    if bad:
        raise checks.NotFiniteError(
            f"hess: {bad} of {values.numel()} values {of}are NaN or infinite; expected finite values only"
        )
    return values


def as_form(value: Any, like: Float[Tensor, "n"], *, symmetric: bool = False) -> Form:
    """What a user's Hessian function returned, as a form: ``None`` or 0, (n,), (n, n), a form, or anything with ``@``.

    Args:
        like: a vector whose size, dtype and device count. symmetric: check that a matrix is (1e-8 relative).

    Raises:
        InputError: a wrong shape, NaN, or a matrix that is not symmetric.

    >>> as_form(torch.ones(3), torch.zeros(3))
    Diagonal(entries=tensor([1., 1., 1.]))
    """
    n = like.shape[0]
    if value is None or (isinstance(value, (int, float)) and value == 0):
        return Zero()
    if isinstance(value, LowRank) and len(value.factor) >= n:
        return Dense(as_dense(value, n))
    if isinstance(value, Form):
        return value
    if scipy.sparse.issparse(value):
        sparse: Any = value
        value = sparse.toarray()
    if isinstance(value, (np.ndarray, list, tuple, float)):
        value = torch.as_tensor(np.asarray(value, dtype=np.float64))
    if not isinstance(value, Tensor):
        checks.require(
            hasattr(value, "__matmul__") and tuple(getattr(value, "shape", ())) == (n, n),
            f"hess: it returned {checks.show(value)} ({type(value).__name__}), expected a matrix ({n}, {n}), a diagonal "
            f"({n},), None, a form of lineament.optim.gns, or an operator with @ and shape ({n}, {n})",
        )
        return Operator(value)
    value = value.detach().to(like)
    if n == 1 and value.numel() == 1:
        value = value.reshape(1, 1)
    checks.require(
        tuple(value.shape) in ((n,), (n, n)),
        f"hess: it returned {checks.show(value)}, expected a matrix ({n}, {n}) or a diagonal ({n},)",
    )
    _finite(value)
    if value.ndim == 1:
        return Diagonal(value)
    if symmetric:
        require_symmetric("hess", value)
    return Dense(value)


def as_dense(form: Form, n: int) -> Float[Tensor, "n n"]:
    """The matrix of a form; products of an operator are refused above 5000 parameters."""
    if isinstance(form, Dense):
        return form.matrix
    if isinstance(form, Diagonal):
        return torch.diag(form.entries)
    if isinstance(form, LowRank):
        matrix = gram(form.factor)
        matrix.diagonal().add_(form.shift)
        return matrix
    if isinstance(form, Zero):
        return torch.zeros(n, n, dtype=torch.float64)
    checks.require(
        n <= 5000,
        f"solver: {n} parameters make a matrix of that side, expected at most 5000; use solver='cg'",
    )
    operator: Any = getattr(form, "operator", None)
    dtype = getattr(operator, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float64
    return form.product(torch.eye(n, dtype=dtype, device=getattr(operator, "device", None)))


def reduced(form: Form, like: Float[Tensor, "n"], options: Any) -> Form:
    """What is kept of a form, as the ``form``, ``rank`` and ``seed`` of a :class:`~lineament.optim.gns.solvers.StepOptions` say.

    - ``"dense"``, ``"operator"``: the same matrix, for the direct solvers and for conjugate gradients.
    - ``"diagonal"``: its diagonal, negative entries set to 0; of an operator, estimated from ``rank`` products with random signs.
    - ``"low_rank"``: the Nyström approximation Y (ΩᵀY)⁺ Yᵀ with Y = HΩ of ``rank`` random directions, its positive part.

    >>> from lineament.optim.gns.solvers import StepOptions
    >>> reduced(Dense(torch.diag(torch.tensor([2.0, -1.0]))), torch.zeros(2), StepOptions(form="diagonal")).entries.tolist()
    [2.0, 0.0]
    """
    kind, rank = options.form, options.rank
    n = like.shape[0]
    if kind == "as is" or isinstance(form, Zero):
        return form
    if kind == "dense":
        return Dense(as_dense(form, n).to(like))
    if kind == "operator":
        return form if isinstance(form, Operator) else Operator(Products(form.product, like))
    generator = torch.Generator().manual_seed(options.seed)
    if kind == "diagonal":
        if isinstance(form, Dense):
            entries = form.matrix.diagonal()
        elif isinstance(form, LowRank):
            entries = form.factor.square().sum(0) + form.shift
        elif isinstance(form, Diagonal):
            entries = form.entries
        else:
            signs = torch.randint(0, 2, (n, rank), generator=generator).to(like) * 2 - 1
            entries = (signs * form.product(signs)).mean(1)
        return Diagonal(entries.clamp(min=0))
    normal = torch.randn(n, min(rank, n), generator=generator, dtype=torch.float64).to(like)
    omega = torch.linalg.qr(normal).Q
    Y = form.product(omega)
    core = omega.T @ Y
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > torch.finfo(values.dtype).eps * len(values) * values.abs().max()
    if not bool(kept.any()):
        return Zero()
    return LowRank((Y @ (vectors[:, kept] / values[kept].sqrt())).T.contiguous())


class Products:
    """A function v -> H v as an operator with ``@``; with ``by_column`` the function takes vectors only."""

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor, by_column: bool = False):
        self.product, self.by_column = product, by_column
        self.shape, self.dtype, self.device = (len(like),) * 2, like.dtype, like.device

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.ndim == 1 or not self.by_column:
            return self.product(v)
        return torch.stack([self.product(column) for column in v.T], 1)
