"""The metric B in which steps and gradients are measured: ‖h‖² = hᵀBh and ‖s‖_*² = sᵀB⁻¹s.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), section 2. The identity, a diagonal, or a full matrix that is factored once.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lineament.core import checks
from lineament.optim.gns.blas import at_home, cholesky, cholesky_solve, gemv, like


def asymmetry_allowed(matrix: Tensor) -> float:
    """How far a matrix may be from its transpose: 1e-8 of its greatest entry, more only where the dtype rounds more."""
    greatest = abs(matrix.detach().numpy()).max() if at_home(matrix) else matrix.abs().max()
    return max(1e-8, 64 * torch.finfo(matrix.dtype).eps) * float(greatest)


def asymmetry(matrix: Tensor) -> float:
    """How far a matrix is from its transpose, in the greatest entry of the difference."""
    if at_home(matrix):
        held = matrix.detach().numpy()
        return float(abs(held - held.T).max())
    return float((matrix - matrix.T).abs().max())


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
            checks.require(least > 0, f"metric: its least entry is {least:g}, expected positive entries")
            self.kind, self.diagonal = "diagonal", B
            self._root = B.sqrt()
            return
        gap = asymmetry(B)
        checks.require(
            gap <= asymmetry_allowed(B),
            f"metric: it differs from its transpose by {gap:.3g}, expected a symmetric matrix",
        )
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
