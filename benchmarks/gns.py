"""The method against the reference's formula in NumPy and SciPy, its low-rank solves, and time to 1e-8 beside SciPy's methods.

The reference side is Algorithm 3 as its authors' code runs it: H once an iteration, a Cholesky factorisation a probe, value and gradient
together and SciPy's checks for NaN left out (which favours it), λ = ‖g‖/(γ + 1e-8). Both sides stop at f - f* < 1e-8.
One thread each: with more, the threads that NumPy and SciPy each leave spinning slow the reference's loop down ten times, and ours beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from scipy.special import logsumexp, softmax
from threadpoolctl import threadpool_limits
from torch import Tensor

from lineament.bench import Row, compare, quick
from lineament.data.digits import digit_images
from lineament.optim.gns.algorithm import minimize
from lineament.optim.gns.linear_algebra import Metric
from lineament.optim.gns.problems import (
    Linear,
    Logistic,
    LogSumExp,
    PowerOfResiduals,
    Softmax,
    dense_curvature,
)
from lineament.optim.gns.rules import Backtracking
from lineament.optim.gns.solvers import LowRank, StepOptions, system
from lineament.recipes.gns.equations import Chebyshev, Rosenbrock

SLUG = "gns"
EPS = 1e-8


def reference(
    both: Callable[..., Any], hess: Callable[..., Any], x: Any, B: Any, f_star: float
) -> tuple[int, int]:
    """Iterations and solves of the reference's loop, with its failed factorisation counted as a rejected probe."""
    if B is None:
        eye, dual = np.eye(len(x)), lambda s: np.sqrt(s @ s)
    else:
        eye, factor = B, scipy.linalg.cho_factor(B)
        dual = lambda s: np.sqrt(s @ scipy.linalg.cho_solve(factor, s, check_finite=False))  # noqa: E731
    gamma, solves = 1.0, 0
    f, g = both(x)
    for k in range(1000):
        if f - f_star < EPS:
            return k, solves
        H = hess(x)
        norm = dual(g)
        for _ in range(40):
            lam = norm / (gamma + EPS)
            solves += 1
            try:
                L = scipy.linalg.cho_factor(H + lam * eye, overwrite_a=True, check_finite=False)
                h = -scipy.linalg.cho_solve(L, g, check_finite=False)
            except np.linalg.LinAlgError:
                gamma /= 2
                continue
            f_new, g_new = both(x + h)
            if f - f_new >= dual(g_new) ** 2 / (8 * lam):
                gamma = max(2 * gamma, 1e-9)
                x, f, g = x + h, f_new, g_new
                break
            gamma /= 2
    return 1000, solves


def lse(A: Any, b: Any) -> tuple[Any, Any, Any]:
    def both(x: Any) -> Any:
        z = A @ x - b
        return logsumexp(z), A.T @ softmax(z)

    def weighted(x: Any) -> Any:
        return A.T @ (softmax(A @ x - b)[:, None] * A)

    def exact(x: Any) -> Any:
        p = softmax(A @ x - b)
        g = A.T @ p
        return A.T @ (p[:, None] * A) - np.outer(g, g)

    return both, exact, weighted


def power(u: Any, jacobian: Any, second: Any, p: float) -> tuple[Any, Any, Any]:
    def both(x: Any) -> Any:
        r = u(x)
        s = np.linalg.norm(r)
        return s**p / p, s ** (p - 2) * (jacobian(x).T @ r)

    def approximate(x: Any, extra: Any = 0.0) -> Any:
        r, J = u(x), jacobian(x)
        s = np.linalg.norm(r)
        w = J.T @ r
        return s ** (p - 2) * (J.T @ J + extra) + (p - 2) * s ** (p - 4) * np.outer(w, w)

    return both, lambda x: approximate(x, second(x, u(x))), approximate


def chebyshev(p: float) -> tuple[Any, Any, Any]:
    def jacobian(x: Any) -> Any:
        J = np.eye(len(x)) - np.diag(4 * x[:-1], -1)
        J[0, 0] = -0.5
        return J

    return power(
        lambda x: np.concatenate([[(1 - x[0]) / 2], x[1:] - 2 * x[:-1] ** 2 + 1]),
        jacobian,
        lambda x, v: np.diag(np.append(-4 * v[1:], 0.0)),
        p,
    )


def rosenbrock(p: float) -> tuple[Any, Any, Any]:
    return power(
        lambda x: np.array([1 - x[0], 10 * (x[1] - x[0] ** 2)]),
        lambda x: np.array([[-1.0, 0.0], [-20 * x[0], 10.0]]),
        lambda x, v: np.array([[-20 * v[1], 0.0], [0.0, 0.0]]),
        p,
    )


def table() -> Iterator[tuple[str, Any, str, Any, Any, Any, float, int]]:
    """What, our problem, its kind, NumPy's (both, hess), x_0, B, f*, repeats at most."""
    rng = np.random.RandomState(3124)
    for n in (200,) if quick() else (200, 1000):
        raw, b = rng.uniform(-1, 1, (n, n)), rng.uniform(-1, 1, n)
        ours = LogSumExp.centred(torch.from_numpy(raw), torch.from_numpy(b))
        both, exact, weighted = lse(ours.A.numpy(), b)
        B, f_star, x = raw.T @ raw, float(both(np.zeros(n))[0]), np.ones(n)
        most = 7 if n < 1000 else 1
        yield f"log-sum-exp, n = m = {n}, Hessian", ours, "exact", (both, exact), x, B, f_star, most
        yield (
            f"log-sum-exp, n = m = {n}, weighted Gauss-Newton",
            ours,
            "gauss_newton",
            (both, weighted),
            x,
            B,
            f_star,
            most,
        )
    A, b = rng.uniform(-1, 1, (100, 200)), rng.uniform(-1, 1, 100)
    ours = PowerOfResiduals(Linear(torch.from_numpy(A), torch.from_numpy(b)), p=4)
    both, exact, _ = power(lambda x: A @ x - b, lambda x: A, lambda x, v: 0.0, 4)

    def fisher(x: Any) -> Any:
        r = A @ x - b
        w = A.T @ r
        return 2 * np.outer(w, w)

    B = A.T @ A + 1e-8 * np.eye(200)
    yield "‖Ax - b‖⁴/4, 100 x 200, Hessian", ours, "exact", (both, exact), np.ones(200), B, 0.0, 7
    yield (
        "‖Ax - b‖⁴/4, 100 x 200, Fisher term (reference: dense)",
        ours,
        "fisher",
        (both, fisher),
        np.ones(200),
        B,
        0.0,
        7,
    )
    for p in (4,) if quick() else (2, 3, 4, 5, 6, 8):
        both, exact, approximate = rosenbrock(p)
        ours = PowerOfResiduals(Rosenbrock(), p=p)
        for name, kind, hess in (("Hessian", "exact", exact), ("Gauss-Newton", "gauss_newton", approximate)):
            yield (
                f"Rosenbrock's residuals, p = {p}, {name}",
                ours,
                kind,
                (both, hess),
                np.array([-2.0, 2.0]),
                None,
                0.0,
                7,
            )
    for n in (100,) if quick() else (100, 1000):
        both, exact, approximate = chebyshev(4)
        ours, x = PowerOfResiduals(Chebyshev(), p=4), rng.uniform(0, 1, n)
        for name, kind, hess in (("Hessian", "exact", exact), ("Gauss-Newton", "gauss_newton", approximate)):
            yield (
                f"Chebyshev chain, n = {n}, {name}",
                ours,
                kind,
                (both, hess),
                x,
                None,
                0.0,
                7 if n == 100 else 1,
            )


def low_rank(repeats: int) -> Iterator[Row]:
    def probes(n: int, r: int, solver: str = "woodbury") -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        form = LowRank(torch.randn(r, n, generator=generator, dtype=torch.float64))
        g = torch.randn(n, generator=generator, dtype=torch.float64)
        B = Metric(None, g)

        def run() -> None:
            equations = system(form, B, g, g, StepOptions(solver=solver))
            equations.solve(1.0), equations.solve(2.0)

        return run

    wide, narrow = probes(40_000, 64), probes(20_000, 64)
    yield compare(
        SLUG, "Woodbury, a point and two probes, n = 40,000, r = 64", wide, "twice n = 20,000", narrow,
        target=1 / 1.3, repeats=repeats, scale=2.0, note="linear in n: the limit is 1",
    )  # fmt: skip
    yield compare(
        SLUG, "Woodbury, n = 20,000, r = 128", probes(20_000, 128), "four times r = 64", narrow,
        target=1 / 1.3, repeats=repeats, scale=4.0, note="quadratic in r: the limit is 1, or more where products grow more efficient",
    )  # fmt: skip
    yield compare(
        SLUG, "rank one, a point and two probes, n = 2,000", probes(2_000, 1, "rank1"), "Cholesky", probes(2_000, 1, "cholesky"),
        target=100.0, repeats=repeats, note="O(n) against n³/3 a probe",
    )  # fmt: skip


def beside_scipy(repeats: int) -> Iterator[Row]:
    from sklearn.datasets import load_breast_cancer

    rng = np.random.RandomState(3124)
    raw = torch.from_numpy(rng.uniform(-1, 1, (200, 200)))
    cancer = load_breast_cancer()
    pixels, labels = digit_images().pair
    scaled = (cancer.data - cancer.data.mean(0)) / cancer.data.std(0)
    A = torch.from_numpy(np.c_[scaled, np.ones(len(scaled))])
    D = torch.cat([pixels.double().flatten(1), torch.ones(len(pixels), 1, dtype=torch.float64)], 1)
    problems = {
        "log-sum-exp, n = m = 200": (
            LogSumExp.centred(raw, torch.from_numpy(rng.uniform(-1, 1, 200))), np.ones(200), raw.T @ raw,
        ),
        "logistic regression, breast cancer, l2 = 1e-4": (
            Logistic(A, torch.from_numpy(cancer.target), l2=1e-4), np.zeros(31), A.T @ A / len(A),
        ),
        "softmax regression, digits, l2 = 1e-3": (
            Softmax(D, labels, l2=1e-3), np.zeros(650), None,
        ),
        "Chebyshev chain, n = 100, p = 2": (PowerOfResiduals(Chebyshev(), p=2), rng.uniform(0, 1, 100), None),
    }  # fmt: skip
    for name, (problem, x0, B) in list(problems.items())[: 2 if quick() else None]:
        start = torch.from_numpy(x0)
        f_star = 0.0 if "Chebyshev" in name else minimize(problem, start, grad_tol=1e-11, metric=B).fun

        def ours(problem: Any = problem, start: Tensor = start, f_star: float = f_star) -> Any:
            return minimize(problem, start, f_star=f_star, eps=EPS)

        peers = {
            f"SciPy {m}": scipys(m, problem, x0, f_star)
            for m in ("trust-exact", "trust-krylov", "trust-ncg", "Newton-CG", "L-BFGS-B")
        }
        if "Chebyshev" in name:
            peers["SciPy least_squares (its own stop)"] = least_squares(problem, x0)
        peers["torch.optim.LBFGS, strong Wolfe"] = torch_lbfgs(problem, start, f_star)
        if isinstance(problem, (Logistic, Softmax)):
            peers["scikit-learn newton-cholesky (its own stop)"] = newton_cholesky(problem, f_star)
        peers["gradient method with backtracking"] = first_order(problem, start, None, f_star)
        if B is not None:
            peers["gradient method preconditioned by AᵀA"] = first_order(problem, start, B, f_star)
        mine = ours()
        for peer, theirs in peers.items():
            left, count = theirs()
            note = f"ours {mine.nit} iterations, {mine.nsolve} solves; the peer {count} iterations"
            if left >= EPS:
                note += f", stopped with {left:.1e} left"
            yield compare(
                SLUG,
                f"time to 1e-8, {name}",
                ours,
                peer,
                theirs,
                repeats=min(3, repeats),
                warmup=0,
                note=note,
            )


def scipys(method: str, problem: Any, x0: Any, f_star: float) -> Callable[[], tuple[float, int]]:
    def both(x: Any) -> Any:
        value, gradient = problem.value_and_grad(torch.from_numpy(x))
        return value, gradient.numpy()

    def hess(x: Any) -> Any:
        return dense_curvature(problem, torch.from_numpy(np.ascontiguousarray(x))).numpy()

    def run() -> tuple[float, int]:
        def stop(intermediate_result: Any) -> None:
            if intermediate_result.fun - f_star < EPS:
                raise StopIteration

        options: dict[str, Any] = {"maxiter": 5000}
        options |= {"L-BFGS-B": {"ftol": 0, "gtol": 1e-10}, "Newton-CG": {"xtol": 1e-12}}.get(
            method, {"gtol": 1e-10}
        )
        given = {} if method == "L-BFGS-B" else {"hess": hess}
        found: Any = scipy.optimize.minimize(
            both, x0, jac=True, method=method, options=options, callback=stop, **given
        )
        return float(found.fun) - f_star, int(found.nit)

    return run


class _Reached(Exception):
    """The value that was asked for."""


def torch_lbfgs(problem: Any, start: Tensor, f_star: float) -> Callable[[], tuple[float, int]]:
    def run() -> tuple[float, int]:
        x, left = torch.nn.Parameter(start.clone()), [float("inf")]
        optimizer = torch.optim.LBFGS(
            [x], max_iter=5000, history_size=10, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
        )  # fmt: skip

        def closure() -> Tensor:
            value, x.grad = problem.value_and_grad(x.detach())
            left[0] = min(left[0], value - f_star)
            if left[0] < EPS:
                raise _Reached
            return torch.tensor(value, dtype=x.dtype)

        with contextlib.suppress(_Reached):
            optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        return left[0], optimizer.state[x]["n_iter"]

    return run


def newton_cholesky(problem: Logistic | Softmax, f_star: float) -> Callable[[], tuple[float, int]]:
    """The same objective: (1 / l2) of ours, whose column of ones is a weight like the others."""
    from sklearn.linear_model import LogisticRegression

    A = problem.A.numpy()
    labels = (problem.y if isinstance(problem, Logistic) else problem.labels).numpy()
    C = 1 / (len(A) * problem.l2)

    def run() -> tuple[float, int]:
        model = LogisticRegression(
            C=C, fit_intercept=False, solver="newton-cholesky", tol=1e-6, max_iter=1000
        )
        model.fit(A, labels)
        x = torch.from_numpy(np.ascontiguousarray(model.coef_.T)).reshape(-1)
        return problem.value_and_grad(x)[0] - f_star, int(model.n_iter_.max())

    return run


def least_squares(problem: Any, x0: Any) -> Callable[[], tuple[float, int]]:
    equations = problem.equations

    def run() -> tuple[float, int]:
        found = scipy.optimize.least_squares(equations.residuals, x0, equations.jacobian)
        return float(found.cost), int(found.nfev)

    return run


def first_order(
    problem: Any, start: Tensor, B: Tensor | None, f_star: float
) -> Callable[[], tuple[float, int]]:
    def run() -> tuple[float, int]:
        found = minimize(
            problem,
            start,
            hess=None,
            rule=Backtracking(),
            metric=B,
            f_star=f_star,
            grad_tol=0.0,
            max_iters=5000,
        )
        return found.fun - f_star, found.nit

    return run


def rows(repeats: int = 7) -> Iterator[Row]:
    """The rows of `lineament bench gns`, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield from _rows(repeats)
    finally:
        torch.set_num_threads(before)


def _rows(repeats: int) -> Iterator[Row]:
    for what, problem, kind, (both, hess), x, B, f_star, most in table():
        metric, start = None if B is None else torch.from_numpy(B), torch.from_numpy(x)

        def ours(problem=problem, kind=kind, metric=metric, start=start, f_star=f_star) -> Any:
            return minimize(problem, start, hess=kind, metric=metric, f_star=f_star, grad_tol=0.0)

        def theirs(both=both, hess=hess, x=x, B=B, f_star=f_star) -> tuple[int, int]:
            return reference(both, hess, x, B, f_star)

        mine, other = ours(), theirs()
        fewer = (mine.nit, mine.nsolve) <= other and mine.nsolve <= other[1]
        note = f"iterations (solves): ours {mine.nit} ({mine.nsolve}), reference {other[0]} ({other[1]})"
        note += "" if fewer else ": MORE than the reference"
        yield compare(
            SLUG, what, ours, "the reference's formula in NumPy and SciPy", theirs,
            target=1.0, repeats=min(most, repeats), warmup=0, note=note,
        )  # fmt: skip
    yield from low_rank(repeats)
    yield from beside_scipy(repeats)


if __name__ == "__main__":
    for row in rows():
        print(row)
