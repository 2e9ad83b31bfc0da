"""The dense arithmetic of the method, and the metric B in which steps and gradients are measured.

For Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), section 2. What is not obvious: float64 on a CPU goes through SciPy's BLAS and LAPACK, which
has the products that a symmetric matrix needs, and everything else through PyTorch. And on a vector of two entries NumPy takes a third of
PyTorch's time, so small problems are computed on arrays: whatever takes vectors takes tensors or arrays, and gives back what it got.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg.blas import dgemm, dger, dsyrk  # pyright: ignore[reportAttributeAccessIssue]
from scipy.linalg.lapack import dpotrs  # pyright: ignore[reportAttributeAccessIssue]
from threadpoolctl import ThreadpoolController
from torch import Tensor

from lineament.core import checks

Vector = Tensor | np.ndarray

# Rows that are mirrored at a time: a block and its mirror image stay in the cache.
_BLOCK = 64
# From this many variables on a factorisation is worth more than one thread.
_LARGE = 2000


def at_home(t: Tensor) -> bool:
    """Whether SciPy can work on the tensor's own memory."""
    return t.dtype is torch.float64 and t.is_cpu


def like(found: Tensor, x: Vector) -> Any:
    """A tensor as what ``x`` is."""
    return found.numpy() if isinstance(x, np.ndarray) else found


def tensor(v: Vector) -> Tensor:
    """A vector as a tensor, in the same memory."""
    return torch.from_numpy(v) if isinstance(v, np.ndarray) else v


def blas_threads(n: int) -> AbstractContextManager[Any]:
    """One thread for the BLAS of NumPy and of SciPy where there are few variables, as before afterwards.

    Their threads and PyTorch's wait for work by spinning. A loop that goes from one library to the next makes them fight for the cores, which
    costs up to sixty times the arithmetic (n = 300, two cores).
    """
    return _libraries().limit(limits=1 if n < _LARGE else None, user_api="blas")


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries, which takes milliseconds


def matvec(A: Float[Tensor, "m n"], x: Any) -> Any:
    """A x for a vector (n,)."""
    return A.numpy() @ x if isinstance(x, np.ndarray) else A @ x


def gram(V: Float[Tensor, "r n"]) -> Float[Tensor, "n n"]:
    """VᵀV, by half of the arithmetic of a product.

    >>> gram(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    if not at_home(V):
        return V.T @ V
    v = V.detach().contiguous().numpy().T
    if len(v) <= _BLOCK:
        return torch.from_numpy(dgemm(1.0, v, v, trans_b=1).T)
    found = dsyrk(1.0, v).T  # one triangle: seen by rows, the lower one
    for i in range(0, len(found), _BLOCK):
        j = i + _BLOCK
        found[i:j, j:] = found[j:, i:j].T
        corner = found[i:j, i:j]
        corner += np.tril(corner, -1).T
    return torch.from_numpy(found)


def add_outer_(H: Any, w: Any, alpha: float) -> Any:
    """H + α wwᵀ in H's own memory, both tensors or arrays; H is symmetric and contiguous."""
    if isinstance(H, Tensor) and not at_home(H):
        return H.addr_(w, w, alpha=alpha)
    h, v = (H.numpy(), w.numpy()) if isinstance(H, Tensor) else (H, w)
    dger(alpha, v, v, a=h.T, overwrite_a=1)
    return H


def cholesky_solve(v: Any, L: Float[Tensor, "n n"]) -> Any:
    """(LLᵀ)⁻¹ v for v of shape (n,) or (n, k)."""
    if isinstance(v, np.ndarray) or (at_home(L) and v.dtype is L.dtype):
        # Fortran's order: a matrix by rows is the transpose of one by columns.
        found = dpotrs(L.numpy().T, np.asarray(v), lower=0)[0]
        return found if isinstance(v, np.ndarray) else torch.from_numpy(found)
    return torch.cholesky_solve(v if v.ndim == 2 else v[:, None], L).reshape(v.shape)


def require_symmetric(name: str, matrix: Float[Tensor, "n n"]) -> None:
    """Refuse a matrix that differs from its transpose by more than 1e-8 of its largest entry, or what its dtype rounds."""
    held: Any = matrix.detach().numpy() if at_home(matrix) else matrix
    gap, largest = float(abs(held - held.T).max()), float(abs(held).max())
    checks.require(
        gap <= max(1e-8, 64 * torch.finfo(matrix.dtype).eps) * largest,
        f"{name}: it differs from its transpose by {gap:.3g}, expected a symmetric matrix",
    )


class Metric:
    """A symmetric positive definite B: ``None`` for the identity, (n,) for a diagonal, (n, n) for a matrix.

    Args:
        B: the matrix. like: a vector (n,) whose size, dtype and device it follows.

    Raises:
        InputError: a wrong shape, not symmetric (beyond 1e-8 relative), not positive definite, not finite.

    >>> like = torch.zeros(2, dtype=torch.float64)
    >>> Metric(torch.tensor([4.0, 1.0]), like).norm(torch.ones(2, dtype=torch.float64))
    2.23606797749979
    """

    def __init__(self, B: Any, like: Tensor):
        n = len(like)
        self.kind: Literal["identity", "diagonal", "matrix"] = "identity"
        self.diagonal = torch.ones(n, dtype=like.dtype, device=like.device)
        if B is None:
            return
        B = torch.as_tensor(B).to(like)
        checks.require(
            tuple(B.shape) in ((n,), (n, n)),
            f"metric: got {checks.show(B)}, expected a vector ({n},) or a matrix ({n}, {n})",
        )
        checks.tensor("metric", B, floating=True)
        if B.ndim == 1:
            least = float(B.min())
            checks.require(least > 0, f"metric: its smallest entry is {least:g}, expected positive entries")
            self.kind, self.diagonal = "diagonal", B
            self._root = B.sqrt()
            return
        require_symmetric("metric", B)
        L, info = torch.linalg.cholesky_ex(B)
        checks.require(
            int(info) == 0,
            f"metric: its leading minor of order {int(info)} is not positive, expected a positive definite matrix; "
            "add a small multiple of the identity",
        )
        self.kind, self.matrix, self._L = "matrix", B, L.contiguous()
        self.diagonal = B.diagonal()

    def apply(self, v: Any) -> Any:
        """B v for v of shape (n,)."""
        if self.kind == "identity":
            return v
        return (
            like(self.diagonal * torch.as_tensor(v), v) if self.kind == "diagonal" else matvec(self.matrix, v)
        )

    def inverse(self, v: Any) -> Any:
        """B⁻¹ v for v of shape (n,) or (n, k)."""
        if self.kind == "identity":
            return v
        if self.kind == "diagonal":
            return like(torch.as_tensor(v) / (self.diagonal if v.ndim == 1 else self.diagonal[:, None]), v)
        return cholesky_solve(v, self._L)

    def half(self, v: Tensor) -> Tensor:
        """L⁻¹ v for B = LLᵀ and v of shape (n,) or (n, k): ‖s‖_* is the Euclidean norm of L⁻¹s."""
        return self._halved(v, transposed=False)

    def half_t(self, v: Tensor) -> Tensor:
        """L⁻ᵀ v: takes a Euclidean vector to a step of the same length in the metric."""
        return self._halved(v, transposed=True)

    def _halved(self, v: Tensor, transposed: bool) -> Tensor:
        if self.kind == "identity":
            return v
        if self.kind == "diagonal":
            return v / (self._root if v.ndim == 1 else self._root[:, None])
        L = self._L.T if transposed else self._L
        wide = v[:, None] if v.ndim == 1 else v
        found = torch.linalg.solve_triangular(L, wide, upper=transposed)
        return found[:, 0] if v.ndim == 1 else found

    def norm(self, h: Any) -> float:
        """‖h‖ of a step."""
        return max(float(h.dot(self.apply(h))), 0.0) ** 0.5

    def dual(self, s: Any, z: Any) -> float:
        """‖s‖_* of a gradient, given z = B⁻¹s."""
        return max(float(s.dot(z)), 0.0) ** 0.5
