"""The one linear solve of a gradient-regularised Newton step, h = -(H + λB)⁻¹ g, for every form that H comes in.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), section 6 of whose method is this solve. A *form* says how H is stored
(dense, low rank, diagonal, zero, products only); a *system* is H, B and g at one point, asked for several λ. What is
not obvious: a rejected probe only raises λ, so a Krylov space that was built for one λ serves all that follow, and a
low-rank H needs its r x r Gram matrix once, whatever the number of probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from scipy.linalg.lapack import dptsv  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from lineament.core import checks
from lineament.optim.gns.forms import FORMS, Diagonal, Form, LowRank, Operator, Zero, as_dense
from lineament.optim.gns.linear_algebra import Metric, Positive

SOLVERS = ("auto", "cholesky", "eigh", "woodbury", "rank1", "cg")
INDEFINITE = ("reject", "shift", "project")


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed. Rarely needed.

    Args:
        form: what is kept of H: ``"as is"``, ``"dense"``, ``"diagonal"``, ``"low_rank"`` (Nyström of ``rank``) or ``"operator"``.
        rank: directions of the low-rank form, and products that estimate an operator's diagonal.
        solver: ``"cholesky"``, n³/3 a probe; ``"eigh"``, one decomposition of (H, B), then n² a probe; ``"woodbury"`` (``"rank1"``)
            for a low-rank H, n r² a point and n r a probe; ``"cg"``, products only; ``"auto"``, what fits the form.
        indefinite: what an H with negative eigenvalues gets: ``"reject"`` the probe, until λ is large enough; ``"shift"`` H by its
            smallest eigenvalue; ``"project"`` negative eigenvalues to 0.
        max_probes: at most so many probes in one search.
        cg_tol: the residual allowed, as a multiple of λ‖h‖. cg_steps: products at most.
        seed: of the random directions in ``form``.

    Raises:
        InputError: unknown names, numbers out of range.

    >>> StepOptions(form="low_rank", rank=50).solver
    'auto'
    """

    form: str = "as is"
    rank: int = 10
    solver: str = "auto"
    indefinite: str = "reject"
    max_probes: int = 60
    cg_tol: float = 0.1
    cg_steps: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("form", FORMS), ("solver", SOLVERS), ("indefinite", INDEFINITE)):
            checks.one_of(name, getattr(self, name), choices)
        for name, low in (("rank", 1), ("max_probes", 1), ("cg_steps", 1), ("seed", 0)):
            checks.number(name, getattr(self, name), low=low, integer=True)
        checks.number("cg_tol", self.cg_tol, low=0, open_low=True)


USUAL = StepOptions()


class System(Protocol):
    """H + λB at one point. ``products`` counts the products with H that were spent."""

    products: int

    def solve(self, lam: float) -> Tensor | None:
        """-(H + λB)⁻¹ g, or ``None`` where that matrix is not positive definite."""
        ...


def system(
    form: Form, metric: Metric, g: Float[Tensor, "n"], z: Float[Tensor, "n"], options: StepOptions = USUAL
) -> System:
    """The solver for one point: H in its form, B, the gradient g and z = B⁻¹g.

    Raises:
        InputError: a solver that does not fit the form.

    >>> from lineament.optim.gns.forms import Dense
    >>> g = torch.tensor([3.0, 4.0], dtype=torch.float64); B = Metric(None, g)
    >>> system(Dense(torch.eye(2, dtype=torch.float64)), B, g, g).solve(1.0)
    tensor([-1.5000, -2.0000], dtype=torch.float64)
    """
    solver, indefinite = options.solver, options.indefinite
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
        return _KrylovSystem(form, metric, g, options)
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
        self.entries = _repaired(entries / self.base, indefinite) * self.base
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
        return cls(_repaired(d, indefinite), Q.T @ metric.half(g), lambda y: metric.half_t(Q @ y))

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

    def __init__(self, form: Form, metric: Metric, g: Tensor, options: StepOptions):
        self.form, self.metric, self.indefinite, self.tol = form, metric, options.indefinite, options.cg_tol
        self.products = 0
        start = metric.half(g)
        self.length = float(start.norm())
        self.basis = [start / self.length]
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.steps = min(options.cg_steps, len(g))
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
        if not inside:
            d = max(self.alpha[0], 0.0) if self.indefinite != "reject" else self.alpha[0]
            return rhs / (d + lam) if d + lam > 0 else None
        if self.indefinite == "reject":
            _, _, y, info = dptsv([a + lam for a in self.alpha], inside, rhs.numpy())
            return torch.from_numpy(y).reshape(-1) if info == 0 else None
        values, vectors = eigh_tridiagonal(self.alpha, inside)
        d = _repaired(torch.from_numpy(values), self.indefinite)
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


def _repaired(values: Tensor, indefinite: str) -> Tensor:
    """Eigenvalues made non-negative: all shifted by the smallest, or the negative ones set to zero; or left."""
    if indefinite == "shift":
        return values - values.min().clamp(max=0)
    return values.clamp(min=0) if indefinite == "project" else values
