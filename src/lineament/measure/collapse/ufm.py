"""The unconstrained-features model: a classifier whose penultimate features are free variables, and its minimisers.

Tirer, Huang, Niles-Weed (2022, arXiv 2210.16658), sections 2 and 3. With K classes of n samples, features H (d x Kn, class
by class), weights W (K x d) and Y = I_K ⊗ 1_nᵀ,

    f(W, H)     = (1/2Kn)‖WH - Y‖² + (λ_W/2K)‖W‖² + (λ_H/2Kn)‖H‖²                                  (1)
    f(W, H; H0) = f(W, H) + (β/2Kn)‖H - H0‖²                                                       (2)

(2) ties the features to given ones H0, say of an earlier layer. The squared loss lets W be eliminated: L(H) = min_W f(W, H)
has the gradient Kn ∇L = W*ᵀ(W*H - Y) + λ_H H. With ``loss="ce"`` the first term is the mean cross-entropy of WH.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable


@dataclass(frozen=True)
class UFM:
    """The model's constants, and its functions of ``W`` (classes x d) and ``H`` (d x classes·samples).

    Args:
        classes, samples: K and n.
        lambda_w, lambda_h: λ_W and λ_H in the normalisation of (1). An optimiser's weight decay wd, (wd/2)‖W‖², is λ_W = K wd;
            for H the likeness is only an analogy.
        loss: ``"mse"`` or ``"ce"``.

    >>> problem = UFM(3, 4, lambda_w=0.5, lambda_h=0.02)
    >>> W, H = problem.collapsed(5)
    >>> round(problem.c, 6), round(problem.value(W, H), 6), round(problem.c - problem.c**2 / 2, 6)
    (0.1, 0.095, 0.095)
    """

    classes: int
    samples: int
    lambda_w: float = 5e-3
    lambda_h: float = 5e-3
    loss: str = "mse"

    def __post_init__(self) -> None:
        checks.number("classes", self.classes, low=2, integer=True)
        checks.number("samples", self.samples, low=1, integer=True)
        checks.number("lambda_w", self.lambda_w, low=0, open_low=True)
        checks.number("lambda_h", self.lambda_h, low=0)
        checks.one_of("loss", self.loss, ["mse", "ce"])

    @property
    def c(self) -> float:
        """√(λ_H λ_W): below 1 the minimiser of (1) is collapsed, above 1 it is zero."""
        return math.sqrt(self.lambda_h * self.lambda_w)

    @property
    def rho(self) -> float:
        """‖h_k‖² = (1 - c) √(λ_W/λ_H) at the collapsed minimiser of (1); 0 for c ≥ 1."""
        self._squared("rho")
        require(self.lambda_h > 0, "lambda_h: got 0, for which no minimiser exists; expected more than 0")
        return max(0.0, 1 - self.c) * math.sqrt(self.lambda_w / self.lambda_h)

    def _squared(self, what: str) -> None:
        require(
            self.loss == "mse",
            f"{what}: has a closed form for loss='mse' only; use minimise() for loss={self.loss!r}",
        )

    def check(self, what: str, features: Any) -> Float[Tensor, "d columns"]:
        """``features`` if it is a floating d x Kn matrix of this model."""
        columns = self.classes * self.samples
        return checks.tensor(what, features, shape=("d", columns), floating=True).detach()

    def means(self, H: Float[Tensor, "... d columns"]) -> Float[Tensor, "... d classes"]:
        """Hbar, the class means as columns."""
        return H.unflatten(-1, (self.classes, self.samples)).mean(-1)

    def spread(self, M: Float[Tensor, "... d classes"]) -> Float[Tensor, "... d columns"]:
        """M ⊗ 1_nᵀ: every column repeated for each sample of its class."""
        return M.repeat_interleave(self.samples, -1)

    def traces(self, H: Float[Tensor, "d columns"]) -> tuple[float, float]:
        """tr S_W and tr S_B; their ratio is NC1~."""
        means = self.means(H)
        within = (H - self.spread(means)).square().sum() / H.shape[-1]
        between = (means - means.mean(-1, keepdim=True)).square().sum() / self.classes
        return float(within), float(between)

    def targets(self, like: Tensor) -> Float[Tensor, "classes columns"]:
        """Y = I_K ⊗ 1_nᵀ."""
        return self.spread(torch.eye(self.classes, dtype=like.dtype, device=like.device))

    def objective(
        self,
        W: Float[Tensor, "classes d"],
        H: Float[Tensor, "d columns"],
        H0: Float[Tensor, "d columns"] | None = None,
        beta: float = 0.0,
    ) -> Float[Tensor, ""]:
        """f(W, H), or f(W, H; H0), as a tensor (differentiable)."""
        columns = H.shape[-1]
        scores = W @ H
        if self.loss == "mse":
            fit = (scores - self.targets(H)).square().sum() / (2 * columns)
        else:
            fit = (scores.logsumexp(0) - (scores * self.targets(H)).sum(0)).mean()
        value = fit + self.lambda_w / (2 * self.classes) * W.square().sum()
        value = value + self.lambda_h / (2 * columns) * H.square().sum()
        if H0 is not None and beta:
            value = value + beta / (2 * columns) * (H - H0).square().sum()
        return value

    def value(self, W: Tensor, H: Tensor, H0: Tensor | None = None, beta: float = 0.0) -> float:
        """f(W, H) or f(W, H; H0) as a number."""
        return float(self.objective(W, H, H0, beta))

    def best_weight(self, H: Float[Tensor, "d columns"]) -> Float[Tensor, "classes d"]:
        """W*(H) = Y Hᵀ (H Hᵀ + n λ_W I)⁻¹, which minimises f(., H) (squared loss)."""
        self._squared("best_weight")
        return torch.cholesky_solve(H @ self.targets(H).T, _factor(self, H)).T

    def reduced(self, H: Float[Tensor, "d columns"]) -> float:
        """L(H) = min_W f(W, H) = (λ_W/2K) tr[Y (HᵀH + n λ_W I)⁻¹ Yᵀ] + (λ_H/2Kn)‖H‖²."""
        return self.value(self.best_weight(H), H)

    def gradient(self, H: Float[Tensor, "d columns"]) -> Float[Tensor, "d columns"]:
        """∇L(H) = (1/Kn) (W*ᵀ(W*H - Y) + λ_H H), by the envelope theorem."""
        W = self.best_weight(H)
        return (W.T @ (W @ H - self.targets(H)) + self.lambda_h * H) / H.shape[-1]

    def implicit_step(
        self, H: Float[Tensor, "d columns"], H0: Float[Tensor, "d columns"], beta: float
    ) -> Float[Tensor, "d columns"]:
        """(W*ᵀW* + (λ_H+β) I)⁻¹ (W*ᵀY + β H0) with W* = W*(H): one alternating minimisation of (2).

        Its fixed points are the stationary points of (2), where β(H - H0) = -Kn ∇L(H).
        """
        W = self.best_weight(H)
        left = W.T @ W + (self.lambda_h + beta) * torch.eye(len(H), dtype=H.dtype, device=H.device)
        return torch.linalg.solve(left, W.T @ self.targets(H) + beta * H0)

    def collapsed(
        self, d: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> tuple[Float[Tensor, "classes d"], Float[Tensor, "d columns"]]:
        """A minimiser (W, H) of (1): H = √ρ R ⊗ 1_nᵀ with RᵀR = I_K, W = √(λ_H/λ_W) Hbarᵀ; zeros for c ≥ 1.

        Args:
            d: feature dimension, at least K.
            generator: draws R; without one R is the first K columns of the identity.
        """
        checks.number("d", d, low=self.classes, integer=True)
        rotation = torch.eye(d, self.classes, dtype=dtype)
        if generator is not None:
            rotation = torch.linalg.qr(torch.randn(d, self.classes, dtype=dtype, generator=generator))[0]
        means = math.sqrt(self.rho) * rotation
        return math.sqrt(self.lambda_h / self.lambda_w) * means.T, self.spread(means)


def _factor(problem: UFM, H: Tensor) -> Tensor:
    """The Cholesky factor of H Hᵀ + n λ_W I."""
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return torch.linalg.cholesky(H @ H.T + problem.samples * problem.lambda_w * eye)


class ReducedHessian:
    """Kn times the Hessian of L(H) + (β/2Kn)‖H - H0‖² at H, as an operator on d x Kn matrices (batches of them too).

    With M = H Hᵀ + n λ_W I and C[D] = W D Hᵀ + (WH - Y) Dᵀ it maps D to (WᵀW + (λ_H+β) I) D - C*[C[D] M⁻¹]: the Schur
    complement f_HH - f_HW f_WW⁻¹ f_WH, never built as a (dKn)² matrix.

    >>> problem = UFM(2, 1, lambda_w=0.5, lambda_h=0.5)
    >>> image = ReducedHessian(problem, torch.zeros(2, 2).double(), beta=3.0) @ torch.eye(2).double()
    >>> [[round(v, 9) for v in row] for row in image.tolist()]
    [[1.5, 0.0], [0.0, 1.5]]
    """

    def __init__(self, problem: UFM, H: Float[Tensor, "d columns"], *, beta: float = 0.0) -> None:
        problem._squared("ReducedHessian")
        self.problem, self.beta = problem, beta
        self.H = problem.check("H", H)
        self.W = problem.best_weight(self.H)
        self.residual = self.W @ self.H - problem.targets(self.H)
        self.factor = _factor(problem, self.H)
        self.gram = self.W.T @ self.W

    def cross(self, D: Float[Tensor, "... d columns"]) -> Float[Tensor, "... classes d"]:
        """C[D] = W D Hᵀ + (WH - Y) Dᵀ, which is Kn f_WH."""
        return self.W @ D @ self.H.T + self.residual @ D.mT

    def over(self, V: Float[Tensor, "... classes d"]) -> Float[Tensor, "... classes d"]:
        """V M⁻¹, which is (Kn f_WW)⁻¹."""
        return torch.cholesky_solve(V.mT, self.factor).mT

    def leak(self, D: Float[Tensor, "... d columns"]) -> Float[Tensor, "... d columns"]:
        """Z D = C*[C[D] M⁻¹]: what the head passes on from one sample's features to the others'."""
        V = self.over(self.cross(D))
        return self.W.T @ V @ self.H + V.mT @ self.residual

    def __matmul__(self, D: Float[Tensor, "... d columns"]) -> Float[Tensor, "... d columns"]:
        return self.gram @ D + (self.problem.lambda_h + self.beta) * D - self.leak(D)


@dataclass(frozen=True)
class Minimum(Readable):
    """A stationary point of (2) reached from H0; ``gradient`` is the largest entry of Kn ∇f, ``value`` is f."""

    W: Float[Tensor, "classes d"]
    H: Float[Tensor, "d columns"]
    value: float
    gradient: float
    iterations: int
    converged: bool

    def to_dict(self) -> dict[str, Any]:
        names = ("value", "gradient", "iterations", "converged")
        return {"W": self.W.tolist(), "H": self.H.tolist(), **{name: getattr(self, name) for name in names}}

    def plot(self, ax: Any = None) -> Any:
        """The features as a picture, one column a sample, class by class."""
        ax = results.axes(ax)
        image = ax.imshow(self.H.cpu().numpy(), aspect="auto", cmap="RdBu_r")
        ax.figure.colorbar(image, ax=ax)
        ax.set(xlabel="sample, class by class", ylabel="feature")
        return ax


def minimise(
    problem: UFM,
    H0: Float[Tensor, "d columns"],
    beta: float,
    *,
    tolerance: float | None = None,
    max_iterations: int = 500,
) -> Minimum:
    """The minimiser of (2) on the branch that starts at H0: L-BFGS, fixed-point steps, then Newton-Krylov.

    For small β (2) is not convex; the point that is reached from H0 is given, not the best of all.

    Args:
        H0: the features to stay near; d x Kn, class by class.
        beta: β ≥ 0.
        tolerance: on the largest entry of Kn ∇f; by default 1e-12 in float64 and 1e-5 in float32.
        max_iterations: of L-BFGS; the Newton iteration that follows takes at most 50.

    Returns:
        :class:`Minimum`; ``converged`` says whether the tolerance was reached.

    >>> problem = UFM(3, 2, lambda_w=0.1, lambda_h=0.1)
    >>> W, H = problem.collapsed(4)
    >>> found = minimise(problem, H, beta=5.0)
    >>> found.converged, bool((found.H - H).abs().max() < 1e-10)
    (True, True)
    """
    H0 = problem.check("H0", H0)
    checks.number("beta", beta, low=0)
    checks.number("max_iterations", max_iterations, low=0, integer=True)
    if tolerance is None:
        tolerance = 1e-12 if H0.dtype == torch.float64 else 1e-5
    columns = H0.shape[1]
    if problem.loss == "mse":

        def gradient(H: Tensor) -> Tensor:
            return columns * problem.gradient(H) + beta * (H - H0)

        def value(H: Tensor) -> float:
            return columns * (problem.reduced(H) + beta / (2 * columns) * float((H - H0).square().sum()))

        def product(H: Tensor) -> Callable[[Tensor], Tensor]:
            return ReducedHessian(problem, H, beta=beta).__matmul__

        H, steps = _lbfgs(H0, value, gradient, tolerance, max_iterations)
        for _ in range(3):
            H = problem.implicit_step(H, H0, beta)
        H, more = _newton(H, gradient, product, tolerance)
        W, slope = problem.best_weight(H), gradient(H)
    else:
        # W cannot be eliminated: both are variables, stacked as the columns (Wᵀ | H) of one d x (K + Kn) matrix.
        k = problem.classes

        def joint(x: Tensor) -> Tensor:
            return columns * problem.objective(x[:, :k].T, x[:, k:], H0, beta)

        slope_of = torch.func.grad(joint)

        def along(x: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda v: torch.func.jvp(slope_of, (x,), (v,))[1]

        start = UFM(k, problem.samples, problem.lambda_w, problem.lambda_h).best_weight(H0)
        x = torch.cat([start.T, H0], 1)
        x, steps = _lbfgs(x, lambda v: float(joint(v)), slope_of, tolerance, max_iterations)
        x, more = _newton(x, slope_of, along, tolerance)
        W, H, slope = x[:, :k].T.contiguous(), x[:, k:].contiguous(), slope_of(x)
    largest = float(slope.abs().max())
    return Minimum(W, H, problem.value(W, H, H0, beta), largest, steps + more, largest <= tolerance)


def _lbfgs(
    start: Tensor,
    value: Callable[[Tensor], float],
    gradient: Callable[[Tensor], Tensor],
    tolerance: float,
    steps: int,
) -> tuple[Tensor, int]:
    if steps == 0:
        return start, 0
    x = start.clone()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=steps,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        x.grad = gradient(x)
        return value(x)

    optimizer.step(closure)
    require(bool(torch.isfinite(x).all()), "minimise: L-BFGS left the finite numbers; scale H0 or raise beta")
    return x.detach(), int(optimizer.state[x]["n_iter"])


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, *, tolerance: float = 1e-14, steps: int = 2000
) -> Tensor:
    """Solve A x = right for a symmetric positive (semi-)definite A; stops at a direction without positive curvature.

    >>> conjugate_gradients(lambda v: 2 * v, torch.tensor([[2.0, 4.0]])).tolist()
    [[1.0, 2.0]]
    """
    x = torch.zeros_like(right)
    r = right.clone()
    p = r.clone()
    size = float(r.square().sum())
    goal = tolerance**2 * size
    flat = max(1e-8, 4 * torch.finfo(right.dtype).eps)
    steepest = 0.0
    for _ in range(steps):
        if size <= goal:
            break
        image = product(p)
        curvature, length = float((p * image).sum()), float(p.square().sum())
        steepest = max(steepest, curvature / length)
        # What is flat to second order (a rotation of all features, say) would send the step far away.
        if curvature <= flat * steepest * length:
            return x if bool(x.any()) else right
        x = x + (size / curvature) * p
        r = r - (size / curvature) * image
        fresh = float(r.square().sum())
        p = r + (fresh / size) * p
        size = fresh
    return x


def _newton(
    x: Tensor,
    gradient: Callable[[Tensor], Tensor],
    product: Callable[[Tensor], Callable[[Tensor], Tensor]],
    tolerance: float,
) -> tuple[Tensor, int]:
    """Newton-Krylov steps, each halved until the gradient shrinks; ends when it no longer does."""
    slope = gradient(x)
    for step in range(50):
        size = float(slope.norm())
        # A tenth of the tolerance: the steps are cheap, and the last ones square the error.
        if float(slope.abs().max()) <= tolerance / 10:
            return x, step
        direction = conjugate_gradients(product(x), -slope, tolerance=1e-8)
        scale = 1.0
        while scale > 1e-4:
            trial = x + scale * direction
            fresh = gradient(trial)
            if float(fresh.norm()) < size:
                break
            scale /= 2
        else:
            return x, step
        x, slope = trial, fresh
    return x, 50
