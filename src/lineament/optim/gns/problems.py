"""Problems with every Hessian approximation of the paper: log-sum-exp, logistic and softmax regression, functions of residuals.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), section 2.5 of the method's description: how far each approximation is from the Hessian decides
which rate survives. A curvature Σ w_i a_i a_iᵀ is handed on as its factor √w A, so that the solver can stay in
the smaller of the two dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad_and_value, hessian, jacrev, vjp

from lineament.core import checks
from lineament.optim.gns.linear_algebra import Metric, add_outer_, at_home, gram, like, matvec, tensor
from lineament.optim.gns.solvers import Dense, Form, LowRank, as_dense


class LogSumExp:
    """f(x) = μ ln Σ_i exp((a_iᵀx - b_i)/μ), a smooth maximum.

    Kinds: ``"exact"`` (1/μ)(Aᵀdiag(π)A - ggᵀ); ``"gauss_newton"``, the weighted Gauss-Newton (1/μ)Aᵀdiag(π)A, which is off by ggᵀ/μ.

    Args:
        A: (m, n). b: (m,), zeros by default. mu: μ > 0.

    Raises:
        InputError: shapes that do not fit, values that are not finite, μ ≤ 0.

    >>> LogSumExp(torch.eye(2, dtype=torch.float64)).value_and_grad(torch.zeros(2, dtype=torch.float64))[1].tolist()
    [0.5, 0.5]
    """

    kinds = ("exact", "gauss_newton")

    def __init__(self, A: Float[Tensor, "m n"], b: Float[Tensor, "m"] | None = None, *, mu: float = 1.0):
        self.A = checks.tensor("A", A, shape=("m", "n"), floating=True)
        self.b = (
            torch.zeros_like(A[:, 0]) if b is None else checks.tensor("b", b, shape=(len(A),), floating=True)
        )
        self.mu = float(checks.number("mu", mu, low=0, open_low=True))
        self.size, self.dtype = A.shape[1], A.dtype
        self._last = Last()

    @classmethod
    def centred(cls, A: Float[Tensor, "m n"], b: Float[Tensor, "m"], *, mu: float = 1.0) -> LogSumExp:
        """The same with the rows of A shifted so that the minimiser is x = 0."""
        weights = torch.softmax(-b / mu, 0)
        return cls(A - weights @ A, b, mu=mu)

    def value_and_grad(self, x: Float[Tensor, "n"]) -> tuple[float, Tensor]:
        z = (self.A @ x).sub_(self.b).div_(self.mu)
        pi = torch.softmax(z, 0)
        g = self.A.T @ pi
        self._last.keep(x, (pi, g))
        return self.mu * float(torch.logsumexp(z, 0)), g.clone()

    def curvature(self, x: Float[Tensor, "n"], kind: str = "exact") -> Form:
        checks.one_of("kind", kind, self.kinds)
        pi, g = self._last.at(x, self.value_and_grad)
        factor = self.A * (pi / self.mu).sqrt()[:, None]
        if kind == "gauss_newton":
            return LowRank(factor)
        return Dense(add_outer_(gram(factor), g, -1 / self.mu))

    def concordance(self, metric: Any = None) -> float:
        """M of quasi-self-concordance, |D³f[u,u,v]| ≤ M <∇²f u,u>‖v‖: max_ij ‖a_i - a_j‖_* / μ."""
        rows = Metric(metric, self.A[0]).half(self.A.T).T
        return float(torch.cdist(rows, rows).max()) / self.mu


class Logistic:
    """f(x) = mean_i ln(1 + exp(-y_i a_iᵀx)) + (l2/2)‖x‖², with labels -1 and 1 (or 0 and 1).

    Kinds: ``"exact"`` (which is the Gauss-Newton matrix too, and the Fisher matrix of the model's own labels); ``"fisher"``, the empirical
    Fisher (1/n) Σ g_i g_iᵀ + l2 I.

    Raises:
        InputError: shapes that do not fit, values that are not finite, labels of more than two kinds, l2 < 0.

    >>> problem = Logistic(torch.ones(1, 1, dtype=torch.float64), torch.tensor([1]))
    >>> round(problem.value_and_grad(torch.zeros(1, dtype=torch.float64))[0], 6)
    0.693147
    """

    kinds = ("exact", "gauss_newton", "fisher")

    def __init__(self, A: Float[Tensor, "m n"], y: Tensor, *, l2: float = 0.0):
        self.A = checks.tensor("A", A, shape=("m", "n"), floating=True)
        checks.tensor("y", y, shape=(len(A),))
        found = set(y.unique().tolist())
        checks.require(
            found <= {-1, 1} or found <= {0, 1},
            f"y: got labels {sorted(found)[:4]}, expected -1 and 1, or 0 and 1",
        )
        self.y = (2 * y - 1 if found <= {0, 1} else y).to(A)
        self.l2 = float(checks.number("l2", l2, low=0))
        self.rows = self.A * -self.y[:, None]
        self.size, self.dtype = A.shape[1], A.dtype
        self._last = Last()

    def value_and_grad(self, x: Float[Tensor, "n"]) -> tuple[float, Tensor]:
        z = self.rows @ x
        s = torch.sigmoid(z)
        self._last.keep(x, s)
        value = torch.nn.functional.softplus(z, threshold=40).mean()
        gradient = (self.rows.T @ s).div_(len(z)).add_(x, alpha=self.l2)
        return float(value) + 0.5 * self.l2 * float(x @ x), gradient

    def curvature(self, x: Float[Tensor, "n"], kind: str = "exact") -> Form:
        checks.one_of("kind", kind, self.kinds)
        s = self._last.at(x, self.value_and_grad)
        # √(s²/n) or √(s(1-s)/n), row by row.
        weights = s if kind == "fisher" else (s * (1 - s)).sqrt()
        return LowRank(self.rows * (weights / len(s) ** 0.5)[:, None], self.l2)

    def concordance(self, metric: Any = None) -> float:
        """M of quasi-self-concordance: max_i ‖a_i‖_*."""
        return float(Metric(metric, self.A[0]).half(self.A.T).norm(dim=0).max())


class Softmax:
    """Multinomial logistic regression, f(W) = mean_n (ln Σ_k exp(Wᵀa_n)_k - (Wᵀa_n)_{y_n}) + (l2/2)‖W‖²; x is W (d, K) row by row.

    Kinds: ``"exact"`` (1/N) Σ (diag(p) - ppᵀ) ⊗ aaᵀ; ``"gauss_newton"``, the weighted one with diag(p) alone, block-diagonal over classes;
    ``"fisher"``, the empirical (1/N) Σ g_n g_nᵀ.

    Args:
        A: (N, d). labels: (N,) classes. classes: K, by default the largest label and one.

    Raises:
        InputError: shapes that do not fit, values that are not finite, labels out of range, l2 < 0.

    >>> problem = Softmax(torch.ones(2, 1, dtype=torch.float64), torch.tensor([0, 1]))
    >>> problem.value_and_grad(torch.zeros(2, dtype=torch.float64))[1].tolist()
    [0.0, 0.0]
    """

    kinds = ("exact", "gauss_newton", "fisher")

    def __init__(
        self,
        A: Float[Tensor, "N d"],
        labels: Int[Tensor, "N"],
        *,
        classes: int | None = None,
        l2: float = 0.0,
    ):
        self.A = checks.tensor("A", A, shape=("N", "d"), floating=True)
        labels = checks.labels("labels", labels, count=len(A), classes=classes)
        self.labels = labels
        self.classes = int(labels.max()) + 1 if classes is None else classes
        self.l2 = float(checks.number("l2", l2, low=0))
        self.size, self.dtype = A.shape[1] * self.classes, A.dtype

    def _logits(self, x: Tensor) -> Tensor:
        return self.A @ x.view(-1, self.classes)

    def value_and_grad(self, x: Float[Tensor, "n"]) -> tuple[float, Tensor]:
        z = self._logits(x)
        value = torch.nn.functional.cross_entropy(z, self.labels)
        residual = torch.softmax(z, 1)
        residual[torch.arange(len(z)), self.labels] -= 1
        gradient = torch.add((self.A.T @ residual).reshape(-1) / len(z), x, alpha=self.l2)
        return float(value) + 0.5 * self.l2 * float(x @ x), gradient

    def curvature(self, x: Float[Tensor, "n"], kind: str = "exact") -> Form:
        checks.one_of("kind", kind, self.kinds)
        p = torch.softmax(self._logits(x), 1)
        N, K = p.shape
        if kind == "fisher":
            p[torch.arange(N), self.labels] -= 1
            each = self.A[:, :, None] * (p / N**0.5)[:, None, :]
            return LowRank(each.flatten(1), self.l2)
        d = self.A.shape[1]
        matrix = self.A.new_zeros(d, K, d, K)
        for k in range(K):
            for j in range(k + 1) if kind == "exact" else (k,):
                if j == k:
                    own = p[:, k] * (1 - p[:, k]) if kind == "exact" else p[:, k]
                    block = gram(self.A * (own / N).sqrt()[:, None])
                else:
                    block = self.A.T @ (self.A * (p[:, k] * p[:, j] / -N)[:, None])
                matrix[:, k, :, j] = matrix[:, j, :, k] = block
        matrix = matrix.view(self.size, self.size)
        matrix.diagonal().add_(self.l2)
        return Dense(matrix)

    def concordance(self, metric: Any = None) -> float:
        """M of quasi-self-concordance, an upper bound: √2 max_n ‖a_n‖ (B = I only)."""
        checks.require(
            metric is None, f"metric: got {checks.show(metric)}, expected None: known for B = I only"
        )
        return 2**0.5 * float(self.A.norm(dim=1).max())


class PowerOfResiduals:
    """f(x) = (1/p)‖u(x)‖^p of a system of equations u(x) = 0, with the inner metric G, ‖u‖² = uᵀGu; p ≥ 2.

    With s = ‖u‖ and w = JᵀGu/s, ∇²f = s^{p-2}(JᵀGJ + Σ_i (Gu)_i ∇²u_i) + (p-2) s^{p-2} wwᵀ. Kinds: ``"exact"``; ``"gauss_newton"`` without the
    sum; ``"fisher"``, the last term alone, of rank one. All are 0 where u = 0 and p > 2.

    Args:
        equations: :class:`Equations` of a PyTorch function, :class:`Linear`, or an object with u as ``residuals(x)``, Jᵀv as ``pulled(x, v)``,
            ``jacobian(x)`` and Σ_i v_i ∇²u_i as ``second(x, v)`` (a matrix, its diagonal or ``None``). It may have ``normal(x)``, JᵀJ where that is
            cheaper than a product; ``arrays``, true where it takes NumPy arrays too; and the ``size`` and ``dtype`` of x. p: the power. G: (m, m), the identity by default.

    Raises:
        InputError: p < 2, or a G that is not symmetric positive definite.

    >>> PowerOfResiduals(Linear(torch.eye(1), torch.ones(1)), p=4).value_and_grad(torch.zeros(1))[0]
    0.25
    """

    kinds = ("exact", "gauss_newton", "fisher")

    def __init__(self, equations: Any, *, p: float = 2, G: Float[Tensor, "m m"] | None = None):
        _check_equations(equations)
        self.equations = equations
        self.size, self.dtype = getattr(equations, "size", None), getattr(equations, "dtype", None)
        self.p = float(checks.number("p", p, low=2))
        self.G = G
        self._metric: Metric | None = None
        self._last = Last()

    @property
    def arrays(self) -> bool:
        return getattr(self.equations, "arrays", False)

    def value_and_grad(self, x: Any) -> tuple[float, Any]:
        u = Gu = self.equations.residuals(x)
        if self.G is not None:
            if self._metric is None:
                self._metric = Metric(self.G, torch.as_tensor(u))
            Gu = self._metric.apply(u)
        s = max(float(u.dot(Gu)), 0.0) ** 0.5
        pulled = self.equations.pulled(x, Gu)
        self._last.keep(x, (Gu, s, pulled))
        return _power(s, self.p) / self.p, pulled * _power(s, self.p - 2)

    def curvature(self, x: Any, kind: str = "exact") -> Form:
        checks.one_of("kind", kind, self.kinds)
        Gu, s, pulled = self._last.at(x, self.value_and_grad)
        scale = _power(s, self.p - 2)
        w = pulled / s if s > 0 else 0 * x
        if kind == "fisher":
            return LowRank(torch.as_tensor(w * ((self.p - 2) * scale) ** 0.5)[None])
        if self.G is not None:
            J = torch.as_tensor(self.equations.jacobian(x))
            matrix = like(J.T @ (self.G.to(J) @ J), x)
        elif hasattr(self.equations, "normal"):
            matrix = self.equations.normal(x)
        else:
            matrix = like(gram(torch.as_tensor(self.equations.jacobian(x))), x)
        if kind == "exact":
            second = self.equations.second(x, Gu)
            if second is not None and second.ndim == 1:
                matrix.reshape(-1)[:: len(x) + 1] += second
            elif second is not None:
                matrix += second
        # Every branch has made a matrix of its own, so that it may be changed.
        matrix *= scale
        if self.p > 2:
            add_outer_(matrix, w, (self.p - 2) * scale)
        return Dense(tensor(matrix))


class Composite:
    """f(x) = s(u(x)): a convex function s of the residuals u of a system of equations, such as a robust loss of a model's errors.

    Kinds: ``"exact"``, ∇²f = Jᵀ∇²s(u)J + Σ_i ∂_i s(u) ∇²u_i; ``"gauss_newton"``, Jᵀ∇²s(u)J alone, which is positive semi-definite.

    Args:
        outer: s, a PyTorch function of u (m,); PyTorch takes its derivatives. equations: as for :class:`PowerOfResiduals`.

    Raises:
        InputError: an ``outer`` that returns no scalar, or whose Hessian at some u is not positive semi-definite.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> problem = Composite(lambda u: (1 + u**2).sqrt().sum(), Linear(one, one[0]))
    >>> problem.value_and_grad(one[0])[0], dense_curvature(problem, one[0], "gauss_newton").item()
    (1.0, 1.0)
    """

    kinds = ("exact", "gauss_newton")

    def __init__(self, outer: Callable[[Tensor], Tensor], equations: Any):
        checks.require(callable(outer), f"outer: got {checks.show(outer)}, expected a function of a tensor")
        _check_equations(equations)
        self.outer, self.equations = outer, equations
        self.size, self.dtype = getattr(equations, "size", None), getattr(equations, "dtype", None)
        self._last = Last()

    def _outer(self, u: Tensor) -> Tensor:
        value = self.outer(u)
        checks.require(
            isinstance(value, Tensor) and value.numel() == 1,
            f"outer: it returned {checks.show(value)}, expected a tensor of one element",
        )
        return value.reshape(())

    def value_and_grad(self, x: Float[Tensor, "n"]) -> tuple[float, Tensor]:
        u = self.equations.residuals(x)
        slope, value = grad_and_value(self._outer)(u)
        self._last.keep(x, (u, slope))
        return float(value), self.equations.pulled(x, slope)

    def curvature(self, x: Float[Tensor, "n"], kind: str = "exact") -> Form:
        checks.one_of("kind", kind, self.kinds)
        u, slope = self._last.at(x, self.value_and_grad)
        values, vectors = torch.linalg.eigh(hessian(self._outer)(u))
        least = float(values[0])
        checks.require(
            least >= -1e-8 * float(values.abs().max()),
            f"outer: the smallest eigenvalue of its Hessian is {least:.3g} at the residuals of x, expected a convex function",
        )
        factor = (vectors * values.clamp(min=0).sqrt()).T @ self.equations.jacobian(x)
        if kind == "gauss_newton":
            return LowRank(factor)
        matrix = gram(factor)
        second = self.equations.second(x, slope)
        if second is not None:
            matrix += torch.diag(second) if second.ndim == 1 else second
        return Dense(matrix)


class Last:
    """What the gradient's oracle computed at its last point, for the curvature at that point."""

    def __init__(self) -> None:
        self._point: Any = None
        self._found: Any = None

    def keep(self, x: Any, found: Any) -> None:
        self._point, self._found = self._by_value(x), found

    def at(self, x: Any, compute: Callable[[Any], Any]) -> Any:
        """What was kept for ``x``; ``compute`` keeps it anew where that was another point."""
        if self._point != self._by_value(x):
            compute(x)
        return self._found

    @staticmethod
    def _by_value(x: Any) -> tuple[Any, ...]:
        # The caller may go on in the same memory.
        if isinstance(x, np.ndarray):
            return x.dtype, x.tobytes()
        return x.dtype, x.device, x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


class Linear:
    """u = Ax - b.

    >>> Linear(torch.eye(2), torch.ones(2)).residuals(torch.zeros(2)).tolist()
    [-1.0, -1.0]
    """

    def __init__(self, A: Float[Tensor, "m n"], b: Float[Tensor, "m"]):
        self.A = checks.tensor("A", A, shape=("m", "n"), floating=True)
        self.b = checks.tensor("b", b, shape=(len(A),), floating=True)
        self.size, self.dtype = A.shape[1], A.dtype
        self._normal: Tensor | None = None

    @property
    def arrays(self) -> bool:
        return at_home(self.A)

    def residuals(self, x: Any) -> Any:
        return matvec(self.A, x) - like(self.b, x)

    def pulled(self, x: Any, v: Any) -> Any:
        return matvec(self.A.T, v)

    def jacobian(self, x: Any) -> Any:
        return like(self.A, x)

    def normal(self, x: Any) -> Any:
        """JᵀJ, the same everywhere."""
        if self._normal is None:
            self._normal = gram(self.A)
        return self._normal.numpy().copy() if isinstance(x, np.ndarray) else self._normal.clone()

    def second(self, x: Any, v: Any) -> None:
        return None


class Equations:
    """A PyTorch function u(x) of the user's; PyTorch takes its derivatives.

    >>> Equations(lambda x: x**2).jacobian(torch.tensor([3.0])).tolist()
    [[6.0]]
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        checks.require(
            callable(function), f"function: got {checks.show(function)}, expected a function of a tensor"
        )
        self.function = function

    def residuals(self, x: Tensor) -> Tensor:
        return checks.tensor(
            "equations", self.function(x).detach(), shape=("m",), floating=True, finite=False
        )

    def pulled(self, x: Tensor, v: Tensor) -> Tensor:
        return vjp(self.function, x)[1](v)[0]

    def jacobian(self, x: Tensor) -> Tensor:
        return jacrev(self.function)(x)

    def second(self, x: Tensor, v: Tensor) -> Tensor:
        return hessian(lambda at: v @ self.function(at))(x)


def _check_equations(equations: Any) -> None:
    for name in ("residuals", "pulled", "jacobian", "second"):
        checks.require(
            hasattr(equations, name), f"equations: got {checks.show(equations)}, which has no {name}()"
        )


def _power(s: float, exponent: float) -> float:
    try:
        return s**exponent
    except OverflowError:
        return float("inf")


def dense_curvature(problem: Any, x: Float[Tensor, "n"], kind: str = "exact") -> Float[Tensor, "n n"]:
    """A problem's curvature as a matrix."""
    return as_dense(problem.curvature(x, kind), len(x))
