"""The method: Lemma 1 on every accepted step, the count of probes, invariances, faults of the reference, stopping."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize as so
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator

from lineament.core.checks import InputError
from lineament.optim.gns.algorithm import minimize
from lineament.optim.gns.in_scipy import scipy_method
from lineament.optim.gns.problems import Linear, Logistic, LogSumExp, PowerOfResiduals, dense_curvature
from lineament.optim.gns.rules import Backtracking, Cubic, Smoothness, SuperUniversal
from lineament.optim.gns.solvers import StepOptions
from lineament.recipes.gns.equations import Chebyshev, Rosenbrock

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def log_sum_exp(m=30, n=8, seed=0):
    return LogSumExp.centred(2 * random(m, n, seed=seed).sigmoid() - 1, random(m, seed=seed + 1), mu=0.5)


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


START = torch.tensor([-2.0, 2.0], dtype=F64)


def walk(problem, x0, **options):
    """The result and every iterate."""
    seen = []
    found = minimize(problem, x0, callback=lambda x, record: seen.append(x) and None, **options)
    return found, seen


@pytest.mark.parametrize("gamma", [1e-3, 1.0, 1e6])
def test_a_quadratic_with_its_hessian(gamma):
    H, b = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=F64)), torch.ones(3, dtype=F64)
    problem = lambda x: 0.5 * x @ H @ x - b @ x  # noqa: E731
    found, seen = walk(problem, torch.zeros(3, dtype=F64), rule=Smoothness(start=gamma))
    assert found.column("probes")[0] == 1 and float((seen[1] - seen[0]).norm()) <= gamma * (1 + 1e-12)
    torch.testing.assert_close(found.x, b / H.diagonal(), atol=1e-7, rtol=0)
    if gamma == 1e6:
        assert found.nit <= 2


@pytest.mark.parametrize("kind", ["exact", "gauss_newton"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_accepted_step_satisfies_the_lemma(kind, seed):
    problem = log_sum_exp(seed=seed)
    least = problem.value_and_grad(torch.zeros(8, dtype=F64))[0]
    found, seen = walk(problem, torch.ones(8, dtype=F64), hess=kind, f_star=least)
    log = found.log
    assert found.success and log[0].hessians == 0 and found.nhev == found.nit
    for k, (old, new) in enumerate(itertools.pairwise(seen)):
        h, lam, gamma = new - old, log[k].lam, log[k].gamma
        assert lam == log[k].grad_norm / gamma and float(h.norm()) <= gamma * (1 + 1e-12)
        assert log[k].value - log[k + 1].value >= log[k + 1].grad_norm ** 2 / (8 * lam)
        # The step is that of this H and of no other.
        H, g = dense_curvature(problem, old, kind), problem.value_and_grad(old)[1]
        torch.testing.assert_close(H @ h + lam * h, -g, atol=1e-12, rtol=1e-9)
    values = found.column("value")
    assert all(a > b for a, b in itertools.pairwise(values))
    powers = [math.log2(gamma) for gamma in found.column("gamma")[:-1]]
    assert all(power == int(power) for power in powers)
    assert found.nsolve <= 2 * found.nit + max(0, -min(powers)) + 2
    assert found.nfev == found.nsolve + 1


def test_approximations_are_not_replaced_by_the_hessian():
    problem, x = log_sum_exp(), torch.ones(8, dtype=F64)
    gammas = {
        kind: minimize(problem, x, hess=kind, max_iters=12).column("gamma")
        for kind in ("exact", "gauss_newton", None)
    }
    assert len({str(values) for values in gammas.values()}) == 3


def test_without_curvature_the_step_is_gamma_long():
    found, seen = walk(log_sum_exp(), torch.ones(8, dtype=F64), hess=None, max_iters=30)
    lengths = [float((b - a).norm()) for a, b in itertools.pairwise(seen)]
    np.testing.assert_allclose(lengths, found.column("gamma")[: len(lengths)], rtol=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.floats(1e-3, 1e3))
def test_a_scaled_function_has_the_same_iterates(c):
    A, b = random(20, 4), random(20, seed=1)
    problem = LogSumExp.centred(A, b)

    class Scaled:
        kinds = ("exact",)

        def value_and_grad(self, x):
            f, g = problem.value_and_grad(x)
            return c * f, c * g

        def curvature(self, x, kind):
            return c * dense_curvature(problem, x, kind)

    x0 = torch.ones(4, dtype=F64)
    first, second = (walk(p, x0, max_iters=6)[1] for p in (problem, Scaled()))
    torch.testing.assert_close(torch.stack(first), torch.stack(second), rtol=1e-6, atol=1e-8)


def test_affine_invariance_with_the_metric_transformed():
    A, b = random(20, 4), random(20, seed=1)
    T = random(4, 4, seed=2) + 3 * torch.eye(4, dtype=F64)
    x0 = torch.ones(4, dtype=F64)
    plain = walk(LogSumExp(A, b), x0, max_iters=8)
    moved = walk(LogSumExp(A @ T, b), torch.linalg.solve(T, x0), metric=T.T @ T, max_iters=8)
    assert plain[0].column("gamma") == moved[0].column("gamma")
    torch.testing.assert_close(torch.stack(plain[1]), torch.stack(moved[1]) @ T.T, rtol=1e-6, atol=1e-8)


def test_alpha_one_is_the_step_of_one_over_M():
    problem, x0 = log_sum_exp(), torch.ones(8, dtype=F64)
    first = walk(problem, x0, rule=Smoothness(start=0.25), max_iters=1)[1][1]
    torch.testing.assert_close(
        walk(problem, x0, rule=SuperUniversal(alpha=1.0, start=4.0), max_iters=1)[1][1], first
    )


@pytest.mark.slow
@pytest.mark.parametrize("hess", ["exact", None])
def test_the_bound_for_functions_that_are_not_convex(hess):
    eps = 1e-3
    found = minimize(rosenbrock, START, hess=hess, grad_tol=eps, max_iters=20000)
    assert found.status == "converged"
    least, first = min(found.column("gamma")[:-1]), found.log[0]
    bound = 8 * (first.value - found.fun) / (least * eps) + math.log(first.grad_norm / eps)
    assert found.nit <= bound


@pytest.mark.parametrize(
    ("p", "exact", "approximate"),
    [(2, 51, 49), (3, 53, 50), (4, 55, 55), (5, 56, 57), (6, 58, 57), (8, 59, 58)],
)
def test_rosenbrock_residuals_take_the_references_iterations(p, exact, approximate):
    problem = PowerOfResiduals(Rosenbrock(), p=p)
    for kind, most in (("exact", exact), ("gauss_newton", approximate)):
        found = minimize(problem, START, hess=kind, f_star=0.0)
        assert found.status == "target" and found.nit <= most


@pytest.mark.parametrize("kind", ["exact", "gauss_newton"])
def test_the_chebyshev_chain_does_not_break_down(kind):
    x0 = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=F64)
    problem = PowerOfResiduals(Chebyshev(), p=4)
    found = minimize(problem, x0, hess=kind, f_star=0.0)
    assert found.status == "target" and found.nit <= 60
    values = found.column("value")
    assert values == sorted(values, reverse=True)


def test_an_indefinite_hessian_is_a_rejected_probe_not_a_stale_step():
    # At 0.1 the second derivative of x⁴/4 - x²/2 is -0.97: every λ below it fails.
    found = minimize(lambda x: (x**4 / 4 - x**2 / 2).sum(), torch.tensor([0.1], dtype=F64))
    assert found.success and abs(abs(float(found.x)) - 1) < 1e-6 and found.column("probes")[0] > 1
    first = found.log[1]
    assert first.solves - first.evaluations + 1 > 0  # failed solves are not evaluated
    for mode in ("shift", "project"):
        assert minimize(rosenbrock, START, step=StepOptions(indefinite=mode)).success


@pytest.mark.parametrize("rule", ["gns", "gradient"])
def test_a_failed_search_stops_at_the_best_point(rule):
    # The gradient has the wrong sign: no probe can be accepted.
    wrong = lambda x: ((x**2).sum(), -2 * x)  # noqa: E731
    found = minimize(wrong, np.ones(2), jac=True, hess=None, rule=rule, step=StepOptions(max_probes=20))
    assert (
        found.status == "search_failed"
        and not found.success
        and found.fun == 2.0
        and "gradient" in found.message
    )
    assert found.x.tolist() == [1.0, 1.0] and found.nsolve == 20


def test_a_trial_that_is_not_finite_is_rejected():
    found = minimize(
        lambda x: (x - torch.log(x)).sum(), torch.tensor([0.1], dtype=F64), rule=Smoothness(start=1e3)
    )
    assert found.success and abs(float(found.x) - 1) < 1e-6 and found.column("probes")[0] > 1


def test_rounding_does_not_collapse_gamma():
    problem = Logistic(random(50, 5), (random(50, seed=3) > 0).long(), l2=0.1)
    found = minimize(problem, torch.zeros(5, dtype=F64), grad_tol=1e-14)
    assert found.status in ("converged", "precision") and found.log[-1].grad_norm < 1e-13
    gradient = minimize(
        problem, torch.zeros(5, dtype=F64), grad_tol=1e-13, rule=Smoothness(test="gradient", constant=4)
    )
    assert gradient.status == "converged" and gradient.log[-1].grad_norm < 1e-13


def test_gamma_is_capped_and_the_aggressive_search_grows_faster():
    problem, x0 = log_sum_exp(), torch.ones(8, dtype=F64)
    capped = minimize(problem, x0, rule=Smoothness(most=4.0), max_iters=20)
    assert max(capped.column("gamma_start")) == 4.0
    slow, fast = (minimize(problem, x0, rule=Smoothness(start=1e-4, aggressive=a)) for a in (False, True))
    assert fast.success and fast.nit < slow.nit


def test_a_start_at_the_minimum_costs_no_solve():
    found = minimize(log_sum_exp(), torch.zeros(8, dtype=F64))
    assert found.status == "converged" and found.nit == 0 and found.nsolve == 0
    assert minimize(rosenbrock, torch.ones(2, dtype=F64), grad_tol=0.0).nit == 0


@pytest.mark.parametrize(
    "rule", [SuperUniversal(alpha=0.0), SuperUniversal(alpha=0.5), SuperUniversal(), Cubic()]
)
def test_the_other_rules_reach_the_same_minimum(rule):
    found = minimize(log_sum_exp(), torch.ones(8, dtype=F64), rule=rule)
    assert found.success and float(found.x.norm()) < 1e-6
    assert minimize(rosenbrock, START, rule=rule).fun < 1e-12


@pytest.mark.parametrize("metric", [None, torch.arange(1.0, 9.0, dtype=F64)])
def test_cubic_newton_without_curvature_steps_down_the_gradient(metric):
    problem, x0 = log_sum_exp(), torch.ones(8, dtype=F64)
    found, seen = walk(problem, x0, rule=Cubic(), hess=None, metric=metric, max_iters=1)
    B = torch.ones(8, dtype=F64) if metric is None else metric
    z = problem.value_and_grad(x0)[1] / B
    # ‖h‖² = 2‖g‖_*/M with the M of the step, which λ = M‖h‖/2 tells.
    h, norm, lam = seen[1] - x0, found.log[0].grad_norm, found.log[0].lam
    torch.testing.assert_close(h, -z / lam)
    assert float(h @ (B * h)) == pytest.approx((norm / lam) ** 2) and found.log[1].value < found.log[0].value


@pytest.mark.parametrize("metric", [None, "A'A"])
def test_first_order_baselines(metric):
    A, b = random(30, 5), random(30, seed=1)
    problem = LogSumExp.centred(A, b)
    least = problem.value_and_grad(torch.zeros(5, dtype=F64))[0]
    given = {"metric": None if metric is None else A.T @ A, "f_star": least, "max_iters": 3000}
    x0 = torch.ones(5, dtype=F64)
    assert minimize(problem, x0, hess=None, rule=Backtracking(), **given).status == "target"
    assert minimize(problem, x0, hess=None, **given).fun - least < 1e-6


def test_a_preconditioner_that_moves():
    calls = []
    problem = PowerOfResiduals(Linear(random(20, 5), random(20, seed=1)), p=4)
    precondition = lambda x: calls.append(1) or dense_curvature(problem, x, "gauss_newton")  # noqa: E731
    found = minimize(problem, torch.ones(5, dtype=F64), hess=None, metric=precondition, grad_tol=1e-5)
    assert found.success and len(calls) == found.nit + 1


def test_scipy_functions_and_quasi_newton():
    options = {"jac": so.rosen_der, "grad_tol": 1e-6}
    newton = minimize(so.rosen, np.array([-2.0, 2.0]), hess=so.rosen_hess, **options)
    assert isinstance(newton.x, np.ndarray) and np.allclose(newton.x, 1)
    assert np.allclose(minimize(so.rosen, [-2.0, 2.0], hess=so.BFGS(), **options).x, 1, atol=1e-5)
    inside = so.minimize(
        so.rosen, np.full(5, -1.0), jac=so.rosen_der, hessp=so.rosen_hess_prod, hess=None,
        method=scipy_method, options={"cg_tol": 1e-3},
    )  # fmt: skip
    assert inside.success and np.allclose(inside.x, 1, atol=1e-6) and inside.nsolve >= inside.nit


def in_scipy(**given):
    return so.minimize(
        so.rosen, [-2.0, 2.0], jac=so.rosen_der, hess=so.rosen_hess, method=scipy_method, **given
    )


def test_scipys_callback_is_told_of_every_iteration_and_stops_by_stop_iteration_only():
    points, values = [], []
    found = in_scipy(callback=lambda xk: points.append(xk) or True)
    assert found.success and len(points) == found.nit and np.array_equal(points[-1], found.x)
    found = in_scipy(callback=lambda intermediate_result: values.append(intermediate_result.fun))
    assert values == [so.rosen(x) for x in points]

    def stop(xk):
        if len(points) == 3:
            raise StopIteration
        points.append(xk)

    points.clear()
    found = in_scipy(callback=stop)
    assert (found.success, found.status, found.nit) == (False, 99, 4) and "callback" in found.message


def test_scipys_options(capsys):
    found = in_scipy(options={"maxiter": 5, "disp": False})
    assert (found.success, found.nit, found.status) == (False, 5, 1) and not capsys.readouterr().out
    found = in_scipy(tol=1e-3, options={"disp": True})
    assert found.success and np.linalg.norm(found.jac) > 1e-8
    assert f"after {found.nit} iterations" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"options: got 'max_iter'.*nearest: 'max_iters'"):
        in_scipy(options={"max_iter": 5})


def test_results_can_be_kept_and_drawn():
    import json

    found = minimize(rosenbrock, START)
    assert json.loads(json.dumps(found.to_dict()))["nit"] == found.nit
    assert found.plot().get_xlabel() == "iteration"
    with pytest.raises(InputError, match="nearest: 'gamma'"):
        found.column("gama")


def test_separable_data_without_a_penalty_have_no_minimiser_and_are_fitted_all_the_same():
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    scaled = (data.data - data.data.mean(0)) / data.data.std(0)
    A = torch.from_numpy(np.c_[scaled, np.ones(len(scaled))])
    problem = Logistic(A, torch.from_numpy(data.target))
    found = minimize(problem, torch.zeros(31, dtype=F64), f_star=0.0, grad_tol=0.0)
    # The distance to the minimum is infinite, and the reference takes 47 to 62 iterations.
    assert found.status == "target" and found.nit <= 62 and float(found.x.norm()) > 1e3


def test_no_evaluation_of_H_for_the_probes():
    calls = []
    found = minimize(
        so.rosen, np.array([-2.0, 2.0]), jac=so.rosen_der, hess=lambda x: calls.append(1) or so.rosen_hess(x)
    )
    assert len(calls) == found.nit == found.nhev < found.nsolve


BAD = {
    "x0: f is nan": lambda: minimize(lambda x: x.log().sum(), -torch.ones(2, dtype=F64)),
    "x0: 1 of 2": lambda: minimize(rosenbrock, torch.tensor([float("nan"), 1.0])),
    "x0: got a float64 tensor of shape": lambda: minimize(rosenbrock, torch.ones(2, 2, dtype=F64)),
    "differs from its transpose": lambda: minimize(
        so.rosen, np.zeros(2), jac=so.rosen_der, hess=lambda x: np.array([[1.0, 1.0], [0.0, 1.0]])
    ),
    r"hess: it returned a float64 tensor of shape \(3, 3\)": lambda: minimize(
        so.rosen, np.zeros(2), jac=so.rosen_der, hess=lambda x: np.eye(3)
    ),
    "hess: 4 of 4 values": lambda: minimize(
        so.rosen, np.zeros(2), jac=so.rosen_der, hess=lambda x: np.full((2, 2), np.nan)
    ),
    "hess: 2 of 2 values of a product with it": lambda: minimize(
        so.rosen, np.zeros(2), jac=so.rosen_der, hess=lambda x: aslinearoperator(np.full((2, 2), np.nan))
    ),
    "expected a positive definite matrix": lambda: minimize(rosenbrock, START, metric=-torch.eye(2)),
    "expected positive entries": lambda: minimize(rosenbrock, START, metric=torch.tensor([1.0, 0.0])),
    "metric: it differs": lambda: minimize(rosenbrock, START, metric=torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
    "rule: got 'newton'": lambda: minimize(rosenbrock, START, rule="newton"),
    "solver: got 'chol'.*nearest: 'cholesky'": lambda: StepOptions(solver="chol"),
    "max_probes: got 0": lambda: StepOptions(max_probes=0),
    "grad_tol: got -1": lambda: minimize(rosenbrock, START, grad_tol=-1.0),
    "start: got 0": lambda: Smoothness(start=0),
    "growth: got 1": lambda: Smoothness(growth=1),
    "constant: got 3": lambda: Smoothness(constant=3),
    "alpha: got 2": lambda: SuperUniversal(alpha=2),
    "jac: got None; for NumPy": lambda: minimize(so.rosen, np.zeros(2), hess=None),
    "hess: 'exact' differentiates": lambda: minimize(so.rosen, np.zeros(2), jac=so.rosen_der),
    "hess: got 'fishr'.*nearest: 'fisher'": lambda: minimize(
        Logistic(random(4, 2), torch.tensor([0, 1, 0, 1])), START, hess="fishr"
    ),
    r"jac: it returned .*expected shape \(2,\)": lambda: minimize(
        so.rosen, np.zeros(2), jac=lambda x: np.zeros(3), hess=None
    ),
    "fun: it returned .*expected a tensor of one": lambda: minimize(lambda x: x, START),
    "p: got 1": lambda: PowerOfResiduals(Rosenbrock(), p=1),
    "labels": lambda: Logistic(random(3, 2), torch.tensor([0, 1, 2])),
    "mu: got 0": lambda: LogSumExp(random(3, 2), mu=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(InputError, match=message):
        BAD[message]()


def test_the_same_on_another_number_of_threads():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(minimize(log_sum_exp(), torch.ones(8, dtype=F64)).column("gamma"))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_the_blas_of_other_libraries_has_one_thread_for_the_run_and_as_before_afterwards():
    from threadpoolctl import threadpool_info, threadpool_limits

    def blas():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    seen = []
    with threadpool_limits(2, user_api="blas"):
        before = blas()
        minimize(
            log_sum_exp(),
            torch.ones(8, dtype=F64),
            max_iters=1,
            callback=lambda x, record: seen.append(blas()),
        )
        with pytest.raises(KeyError):
            minimize(lambda x: {}["f"], torch.ones(2, dtype=F64))
        assert blas() == before
    assert seen == [{1}, {1}]
