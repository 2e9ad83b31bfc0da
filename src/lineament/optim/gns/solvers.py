"""The one linear solve of a gradient-regularised Newton step, h = -(H + λB)⁻¹ g, for every form that H comes in.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), section 6 of whose method is this solve. A *form* says how H is stored
(dense, low rank, diagonal, zero, products only); a *system* is H, B and g at one point, asked for several λ. What is
not obvious: a rejected probe only raises λ, so a Krylov space that was built for one λ serves all that follow, and a
low-rank H needs its r x r Gram matrix once, whatever the number of probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from scipy.linalg.lapack import dptsv  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from lineament.core import checks
from lineament.optim.gns.blas import Positive
from lineament.optim.gns.forms import Diagonal, Form, LowRank, Operator, Zero, as_dense
from lineament.optim.gns.metric import Metric

SOLVERS = ("auto", "cholesky", "eigh", "woodbury", "rank1", "cg")
INDEFINITE = ("reject", "shift", "project")


class System(Protocol):
    """H + λB at one point. ``products`` counts the products with H that were spent."""

    products: int

    def solve(self, lam: float) -> Tensor | None:
        """-(H + λB)⁻¹ g, or ``None`` where that matrix is not positive definite."""
        ...


def system(
    form: Form,
    metric: Metric,
    g: Float[Tensor, "n"],
    z: Float[Tensor, "n"],
    *,
    solver: str = "auto",
    indefinite: str = "reject",
    cg_tol: float = 0.1,
    cg_steps: int = 250,
) -> System:
    """The solver for one point.

    Args:
        form: H. metric: B. g, z: the gradient and B⁻¹g, both (n,).
        solver: ``"cholesky"`` n³/3 a probe; ``"eigh"`` one decomposition of (H, B), then n² a probe; ``"woodbury"`` (``"rank1"``)
            for a low-rank H, n r² a point and n r a probe; ``"cg"`` products only; ``"auto"`` what fits the form.
        indefinite: ``"reject"`` the probe; ``"shift"`` H by its least eigenvalue; ``"project"`` negative eigenvalues to 0.
        cg_tol: the residual allowed, as a multiple of λ‖h‖. cg_steps: products at most.

    Raises:
        InputError: a solver that does not fit the form.

    >>> from lineament.optim.gns.forms import Dense
    >>> g = torch.tensor([3.0, 4.0], dtype=torch.float64); B = Metric(None, g)
    >>> system(Dense(torch.eye(2, dtype=torch.float64)), B, g, g).solve(1.0)
    tensor([-1.5000, -2.0000], dtype=torch.float64)
    """
    checks.one_of("solver", solver, SOLVERS)
    checks.one_of("indefinite", indefinite, INDEFINITE)
    return chosen_system(form, metric, g, z, solver, indefinite, cg_tol, cg_steps)


def chosen_system(
    form: Form,
    metric: Metric,
    g: Tensor,
    z: Tensor,
    solver: str,
    indefinite: str,
    cg_tol: float,
    cg_steps: int,
) -> System:
    """:func:`system` for options that were checked, as they are once for many points."""
    if isinstance(form, Zero):
        return _ZeroSystem(z)
    if isinstance(form, Diagonal) and metric.kind != "matrix" and solver == "auto":
        return _DiagonalSystem(form.entries, metric, g, indefinite)
    low_rank = isinstance(form, LowRank) and (form.shift == 0 or metric.kind == "identity")
    if solver == "auto":
        solver = "cg" if isinstance(form, Operator) else "woodbury" if low_rank else "cholesky"
    if solver in ("woodbury", "rank1"):
        checks.require(
            low_rank and isinstance(form, LowRank) and (solver == "woodbury" or len(form.factor) == 1),
            f"solver: got {solver!r} for {form.describe()}, expected a low-rank form"
            + (" of rank 1" if solver == "rank1" else ", plus a multiple of the identity only where B = I"),
        )
        assert isinstance(form, LowRank)
        return _WoodburySystem(form, metric, g, z)
    if solver == "cg":
        return _KrylovSystem(form, metric, g, indefinite, cg_tol, cg_steps)
    H = as_dense(form, g.shape[0]).to(g)
    if solver == "eigh" or indefinite == "project":
        return Spectral.of(H, metric, g, indefinite)
    return _CholeskySystem(H, metric, g, indefinite)


class _ZeroSystem:
    def __init__(self, z: Tensor):
        self.z, self.products = z, 0

    def solve(self, lam: float) -> Tensor | None:
        return self.z / -lam


class _DiagonalSystem:
    def __init__(self, entries: Tensor, metric: Metric, g: Tensor, indefinite: str):
        self.products = 0
        self.base = metric.diagonal
        self.entries = _mended(entries / self.base, indefinite) * self.base
        self.g = g

    def solve(self, lam: float) -> Tensor | None:
        total = self.entries + lam * self.base
        return None if not bool((total > 0).all()) else self.g / -total


class _CholeskySystem:
    def __init__(self, H: Tensor, metric: Metric, g: Tensor, indefinite: str):
        self.H, self.metric, self.indefinite = H.contiguous(), metric, indefinite
        self.g, self.products = g, 0
        self._positive = Positive(self.H, metric.stored, g)
        self._spectral: Spectral | None = None

    def solve(self, lam: float) -> Tensor | None:
        if self._spectral is not None:
            return self._spectral.solve(lam)
        h = self._positive.solve(lam)
        if h is not None or self.indefinite == "reject":
            return h
        self._spectral = Spectral.of(self.H, self.metric, self.g, self.indefinite)
        return self._spectral.solve(lam)


class Spectral:
    """H + λB diagonal: values d of L⁻¹HL⁻ᵀ (B = LLᵀ), coefficients c of L⁻¹g, and the way back to h."""

    def __init__(self, d: Tensor, c: Tensor, back: Callable[[Tensor], Tensor]):
        self.d, self.c, self.back, self.products = d, c, back, 0

    @classmethod
    def of(cls, H: Tensor, metric: Metric, g: Tensor, indefinite: str) -> Spectral:
        A = metric.half(metric.half(H).T)
        d, Q = torch.linalg.eigh((A + A.T) / 2)
        return cls(_mended(d, indefinite), Q.T @ metric.half(g), lambda y: metric.half_t(Q @ y))

    def solve(self, lam: float) -> Tensor | None:
        if not float(self.d[0]) + lam > 0:
            return None
        return self.back(self.c / -(self.d + lam))


class _WoodburySystem:
    """H = VᵀV (+ shift I, with B = I): h = -(z - Z (λI + V Z)⁻¹ V z) / λ with Z = B⁻¹Vᵀ, z = B⁻¹g."""

    def __init__(self, form: LowRank, metric: Metric, g: Tensor, z: Tensor):
        self.shift, self.z, self.products = form.shift, z, 0
        V = form.factor
        self.Z = metric.inverse(V.T)
        self.K = V @ self.Z
        self.Vz = V @ z
        self.single = (float(self.K), float(self.Vz)) if len(V) == 1 else None

    def solve(self, lam: float) -> Tensor | None:
        lam = lam + self.shift
        if self.single is not None:
            k, vz = self.single
            return torch.add(self.z, self.Z[:, 0], alpha=-vz / (lam + k)).div_(-lam)
        inner = self.K.clone()
        inner.diagonal().add_(lam)
        L, info = torch.linalg.cholesky_ex(inner)
        if int(info) != 0:
            return None
        return (self.z - self.Z @ torch.cholesky_solve(self.Vz[:, None], L)[:, 0]).div_(-lam)


class _KrylovSystem:
    """Conjugate gradients on A + λI with A = L⁻¹HL⁻ᵀ, run as the Lanczos process: one basis for every λ."""

    def __init__(
        self, form: Form, metric: Metric, g: Tensor, indefinite: str, tol: float, steps: int
    ) -> None:
        self.form, self.metric, self.indefinite, self.tol = form, metric, indefinite, tol
        self.products = 0
        start = metric.half(g)
        self.length = float(start.norm())
        self.basis = [start / self.length]
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.steps = min(steps, len(g))
        self.exhausted = False

    def solve(self, lam: float) -> Tensor | None:
        while True:
            if self.alpha:
                y = self._coefficients(lam)
                if y is None:
                    return None
                residual = 0.0 if self.exhausted else self.beta[-1] * abs(float(y[-1]))
                enough = self.exhausted or len(self.alpha) >= self.steps
                # Below 1e-14 of the right-hand side the residual is rounding.
                if enough or residual <= max(self.tol * lam * float(y.norm()), 1e-14 * self.length):
                    h = torch.stack(self.basis[: len(self.alpha)]).T @ y.to(self.basis[0])
                    return self.metric.half_t(h)
            self._extend()

    def _coefficients(self, lam: float) -> Tensor | None:
        """-(T + λI)⁻¹ ‖L⁻¹g‖ e₁, or ``None`` where conjugate gradients would meet a direction of negative curvature."""
        inside = self.beta[: len(self.alpha) - 1]
        rhs = torch.zeros(len(self.alpha), dtype=torch.float64)
        rhs[0] = -self.length
        if self.indefinite == "reject" or not inside:
            if not inside:
                d = max(self.alpha[0], 0.0) if self.indefinite != "reject" else self.alpha[0]
                return rhs / (d + lam) if d + lam > 0 else None
            _, _, y, info = dptsv([a + lam for a in self.alpha], inside, rhs.numpy())
            return torch.from_numpy(y).reshape(-1) if info == 0 else None
        values, vectors = eigh_tridiagonal(self.alpha, inside)
        d = _mended(torch.from_numpy(values), self.indefinite)
        Q = torch.from_numpy(vectors)
        return Q @ (Q[0] * -self.length / (d + lam))

    def _extend(self) -> None:
        q = self.basis[-1]
        w = self.metric.half(self.form.product(self.metric.half_t(q)))
        self.products += 1
        scale = float(w.norm())
        self.alpha.append(float(w @ q))
        V = torch.stack(self.basis)
        for _ in range(2):
            w = w - V.T @ (V @ w)
        length = float(w.norm())
        if not math.isfinite(length) or length <= 1e-13 * max(scale, 1e-300) or len(V) == len(q):
            self.exhausted = True
            return
        self.beta.append(length)
        self.basis.append(w / length)


def _mended(values: Tensor, indefinite: str) -> Tensor:
    """Eigenvalues made non-negative: all shifted by the least one, or the negative ones set to zero; or left."""
    if indefinite == "shift":
        return values - values.min().clamp(max=0)
    return values.clamp(min=0) if indefinite == "project" else values


def cubic_step(spectral: Spectral, M: float) -> tuple[Any, float, float]:
    """The global minimiser of <g,h> + <Hh,h>/2 + (M/6)‖h‖³: (h, λ = M‖h‖/2, the model's value there).

    With d and c of :class:`Spectral`, r = ‖h‖ solves r² = Σ c_i² / (d_i + M r / 2)², found by bisection in r above
    max(0, -2 d_min / M); in the hard case the rest of the length goes along the least eigenvector.

    >>> d, c = torch.zeros(1), torch.tensor([-2.0])
    >>> h, lam, value = cubic_step(Spectral(d, c, lambda y: y), 1.0)
    >>> h.item(), lam
    (2.0, 1.0)
    """
    d, c = spectral.d.double(), spectral.c.double()

    def length(r: float) -> float:
        return float((c / (d + 0.5 * M * r)).norm())

    low = max(0.0, -2 * float(d[0]) / M)
    high = max(2 * low, 1e-300, math.sqrt(2 * float(c.norm()) / M) + 2 * low)
    for _ in range(200):
        r = 0.5 * (low + high)
        if r in (low, high):
            break
        low, high = (r, high) if length(r) > r else (low, r)
    r = high
    y = -c / (d + 0.5 * M * r)
    short = r * r - float(y @ y)
    if float(d[0]) < 0 and short > 1e-8 * r * r:
        y[0] += math.copysign(math.sqrt(short), -float(c[0]) or 1.0)
    value = float(c @ y + 0.5 * (d * y) @ y) + M / 6 * r**3
    return spectral.back(y.to(spectral.c.dtype)), 0.5 * M * r, value
