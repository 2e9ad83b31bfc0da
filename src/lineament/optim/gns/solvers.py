"""How H is stored, and the one linear solve of a gradient-regularised Newton step, h = -(H + λB)⁻¹ g, for every such form.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), sections 2.4, 2.5 and 6. A *form* says how H is stored (dense, low rank, diagonal, zero,
products only); :func:`reduced` takes one to a cheaper one, which stays positive semi-definite. A *system* is H, B and g at one point, asked
for several λ. What is not obvious: a rejected probe only raises λ, so a Krylov space that was built for one λ serves all that follow,
and a low-rank H needs its r x r Gram matrix once, whatever the number of probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from scipy.linalg.lapack import dposv, dptsv  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from lineament.core import checks
from lineament.optim.gns.linear_algebra import Metric, at_home, gram, require_symmetric

FORMS = ("as is", "dense", "diagonal", "low_rank", "operator")
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


def reduced(form: Form, like: Float[Tensor, "n"], options: StepOptions) -> Form:
    """What is kept of a form, as the ``form``, ``rank`` and ``seed`` of a :class:`StepOptions` say.

    - ``"dense"``, ``"operator"``: the same matrix, for the direct solvers and for conjugate gradients.
    - ``"diagonal"``: its diagonal, negative entries set to 0; of an operator, estimated from ``rank`` products with random signs.
    - ``"low_rank"``: the Nyström approximation Y (ΩᵀY)⁺ Yᵀ with Y = HΩ of ``rank`` random directions, its positive part.

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
    """A Cholesky factorisation for each λ; one decomposition for all of them once an indefinite H is to be repaired."""

    def __init__(self, H: Tensor, metric: Metric, g: Tensor, indefinite: str):
        self.H, self.metric, self.indefinite = H.contiguous(), metric, indefinite
        self.g, self.products = g, 0
        self._spectral: Spectral | None = None
        self._home = at_home(H)
        if self._home:
            self._h, self._down, self._whole = self.H.numpy(), -g.numpy(), metric.kind == "matrix"
            self._b: Any = 1.0
            if metric.kind != "identity":
                self._b = (metric.matrix if self._whole else metric.diagonal).numpy()
            # One memory for every probe: fresh pages cost more than the copy.
            self._room = np.empty(H.shape)
            self._diagonal = self._room.reshape(-1)[:: len(g) + 1]

    def solve(self, lam: float) -> Tensor | None:
        if self._spectral is None:
            h = self._in_scipy(lam) if self._home else self._in_torch(lam)
            if h is not None or self.indefinite == "reject":
                return h
            self._spectral = Spectral.of(self.H, self.metric, self.g, self.indefinite)
        return self._spectral.solve(lam)

    def _in_scipy(self, lam: float) -> Tensor | None:
        if self._whole:
            np.multiply(self._b, lam, self._room)
            self._room += self._h
        else:
            self._room[...] = self._h
            self._diagonal += lam * self._b
        _, x, info = dposv(self._room.T, self._down, lower=1, overwrite_a=1)
        return None if info else torch.from_numpy(x)

    def _in_torch(self, lam: float) -> Tensor | None:
        B = self.metric
        total = self.H + lam * (B.matrix if B.kind == "matrix" else torch.diag(B.diagonal))
        L, info = torch.linalg.cholesky_ex(total)
        return None if int(info) else -torch.cholesky_solve(self.g[:, None], L)[:, 0]


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
