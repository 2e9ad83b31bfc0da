"""The dense products and solves of the method, and the metric B in which steps and gradients are measured.

For Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), section 2. What is not obvious: all of it comes from one library, SciPy's BLAS and LAPACK
for float64 on a CPU and PyTorch otherwise. NumPy, SciPy and PyTorch each bring threads of their own, which wait for work by spinning; a loop
that goes from one library to the next makes them fight for the cores. And on a vector of two entries NumPy takes a third of PyTorch's time,
so small problems are computed on arrays: whatever takes vectors takes tensors or arrays, and gives back what it got. This is the only module
(besides :mod:`~lineament.optim.gns.problems`, which starts them) that knows the difference.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg.blas import dgemm, dgemv, dger, dsyrk  # pyright: ignore[reportAttributeAccessIssue]
from scipy.linalg.lapack import dposv, dpotrf, dpotrs  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from lineament.core import checks

Vector = Tensor | np.ndarray

# Rows that are mirrored at a time: a block and its mirror image stay in the cache.
_BLOCK = 64


def at_home(t: Tensor) -> bool:
    """Whether SciPy can work on the tensor's own memory."""
    return t.dtype is torch.float64 and t.is_cpu


def like(found: Tensor, x: Vector) -> Any:
    """A tensor as what ``x`` is."""
    return found.numpy() if isinstance(x, np.ndarray) else found


def tensor(v: Vector) -> Tensor:
    """A vector as a tensor, in the same memory."""
    return torch.from_numpy(v) if isinstance(v, np.ndarray) else v


def gemv(A: Float[Tensor, "m n"], x: Any) -> Any:
    """A x for a vector (n,).

    >>> gemv(torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)).tolist()
    [1.0, 1.0]
    """
    plain = isinstance(x, np.ndarray)
    if not plain and not (at_home(A) and x.dtype is A.dtype):
        return A @ x
    a, v = A.detach().numpy(), x if plain else x.detach().numpy()
    # Fortran's order: a matrix by rows is the transpose of one by columns.
    found = dgemv(1.0, a, v) if a.flags.f_contiguous else dgemv(1.0, a.T, v, trans=1)
    return found if plain else torch.from_numpy(found)


def gemv_t(A: Float[Tensor, "m n"], v: Any) -> Any:
    """Aᵀ v for a vector (m,)."""
    return gemv(A.T, v)


def weighted_rows(A: Float[Tensor, "m n"], weights: Float[Tensor, "m"]) -> Float[Tensor, "m n"]:
    """diag(w) A."""
    if at_home(A):
        return torch.from_numpy(A.detach().numpy() * weights.numpy()[:, None])
    return A * weights[:, None]


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


def cholesky(B: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], int]:
    """L with B = LLᵀ, and the order of the first leading minor that is not positive (0 where all are)."""
    if not at_home(B):
        L, info = torch.linalg.cholesky_ex(B)
        return L, int(info)
    U, info = dpotrf(B.detach().numpy(), lower=0, clean=1)
    return torch.from_numpy(U.T), info


def cholesky_solve(v: Any, L: Float[Tensor, "n n"]) -> Any:
    """(LLᵀ)⁻¹ v for v of shape (n,) or (n, k)."""
    if isinstance(v, np.ndarray):
        return dpotrs(L.numpy().T, v, lower=0)[0]
    if at_home(L) and v.dtype is L.dtype:
        return torch.from_numpy(dpotrs(L.numpy().T, v.detach().numpy(), lower=0)[0])
    return torch.cholesky_solve(v if v.ndim == 2 else v[:, None], L).reshape(v.shape)


class Positive:
    """H + λB for one H and many λ: its solutions, by a Cholesky factorisation each.

    >>> solver = Positive(torch.eye(2, dtype=torch.float64), None, torch.ones(2, dtype=torch.float64))
    >>> solver.solve(1.0).round(decimals=6).tolist(), solver.solve(-2.0)
    ([-0.5, -0.5], None)
    """

    def __init__(self, H: Float[Tensor, "n n"], B: Tensor | None, g: Float[Tensor, "n"]):
        """``B``: ``None`` for the identity, (n,) for a diagonal, (n, n)."""
        self.H, self.B, self.g = H, B, g
        self.home = at_home(H)
        if self.home:
            self._h, self._down = H.numpy(), -g.numpy()
            self._b = None if B is None else B.numpy()
            # One memory for every probe: fresh pages cost more than the copy.
            self._room = np.empty(self._h.shape)
            self._diagonal = self._room.reshape(-1)[:: H.shape[0] + 1]

    def solve(self, lam: float) -> Tensor | None:
        """-(H + λB)⁻¹ g, or ``None`` where that matrix is not positive definite."""
        if not self.home:
            L, info = torch.linalg.cholesky_ex(self._total(lam))
            return None if int(info) else -torch.cholesky_solve(self.g[:, None], L)[:, 0]
        room, b = self._room, self._b
        if b is not None and b.ndim == 2:
            np.multiply(b, lam, room)
            room += self._h
        else:
            room[...] = self._h
            self._diagonal += lam if b is None else b * lam
        _, x, info = dposv(room.T, self._down, lower=1, overwrite_a=1)
        return None if info else torch.from_numpy(x)

    def _total(self, lam: float) -> Tensor:
        if self.B is not None and self.B.ndim == 2:
            return torch.add(self.H, self.B, alpha=lam)
        total = self.H.clone()
        total.diagonal().add_(lam if self.B is None else self.B * lam)
        return total


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
        # Without a kernel of PyTorch's over the whole matrix, whose threads would wait beside the solver's.
        fine = at_home(B) and bool(np.isfinite(B.numpy()).all())
        checks.tensor("metric", B, floating=True, finite=not fine)
        if B.ndim == 1:
            least = float(B.min())
            checks.require(least > 0, f"metric: its smallest entry is {least:g}, expected positive entries")
            self.kind, self.diagonal = "diagonal", B
            self._root = B.sqrt()
            return
        require_symmetric("metric", B)
        L, info = cholesky(B)
        checks.require(
            info == 0,
            f"metric: its leading minor of order {info} is not positive, expected a positive definite matrix; "
            "add a small multiple of the identity",
        )
        self.kind, self.matrix, self._L = "matrix", B, L
        self.diagonal = B.diagonal()

    def apply(self, v: Any) -> Any:
        """B v for v of shape (n,)."""
        if self.kind == "identity":
            return v
        return (
            like(self.diagonal * torch.as_tensor(v), v) if self.kind == "diagonal" else gemv(self.matrix, v)
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

    @property
    def stored(self) -> Tensor | None:
        """B as it was given: ``None`` for the identity, (n,) for a diagonal, (n, n)."""
        if self.kind == "identity":
            return None
        return self.diagonal if self.kind == "diagonal" else self.matrix

    def norm(self, h: Any) -> float:
        """‖h‖ of a step."""
        return max(float(h.dot(self.apply(h))), 0.0) ** 0.5

    def dual(self, s: Any, z: Any) -> float:
        """‖s‖_* of a gradient, given z = B⁻¹s."""
        return max(float(s.dot(z)), 0.0) ** 0.5
