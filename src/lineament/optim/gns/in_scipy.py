"""The method inside ``scipy.optimize.minimize``: ``minimize(f, x0, jac=..., hess=..., method=scipy_method)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult
from scipy.sparse.linalg import LinearOperator

from lineament.core import checks
from lineament.optim.gns.algorithm import Record, minimize
from lineament.optim.gns.solvers import StepOptions

# SciPy's names of options.
_NAMES = {"tol": "grad_tol", "gtol": "grad_tol", "maxiter": "max_iters"}
_CODES = {"converged": 0, "target": 0, "max_iters": 1, "precision": 2, "search_failed": 3, "stopped": 99}


def scipy_method(
    fun: Callable[..., Any],
    x0: Any,
    args: tuple[Any, ...] = (),
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    callback: Any = None,
    **options: Any,
) -> OptimizeResult:
    """A ``method`` for ``scipy.optimize.minimize``; ``options`` are those of
    :func:`~lineament.optim.gns.algorithm.minimize` and of :class:`~lineament.optim.gns.solvers.StepOptions`.

    SciPy's ``tol`` and ``gtol`` are ``grad_tol``, ``maxiter`` is ``max_iters``, and ``disp`` prints how it ended. The callback is SciPy's: called after
    each iteration with ``xk`` or ``intermediate_result``, it stops the run by ``StopIteration`` (then status 99, no success), not by what it returns.

    Raises:
        InputError: bounds or constraints, no gradient, or an unknown option.

    >>> import scipy.optimize as so
    >>> found = so.minimize(so.rosen, [-2.0, 2.0], jac=so.rosen_der, hess=so.rosen_hess, method=scipy_method)
    >>> found.success, found.x.round(6).tolist()
    (True, [1.0, 1.0])
    """
    checks.require(
        bounds is None and len(constraints) == 0,
        "bounds, constraints: got some, expected none: the method is for free x",
    )
    checks.require(
        callable(jac), f"jac: got {checks.show(jac)}, expected the gradient as a function (or jac=True)"
    )
    size = np.size(x0)

    def curvature(x: Any) -> Any:
        if callable(hess):
            return hess(x, *args)
        product = lambda v: hessp(x, np.asarray(v).reshape(-1), *args)  # noqa: E731
        return LinearOperator((size, size), matvec=product, dtype="float64")  # pyright: ignore

    disp = options.pop("disp", False)
    for theirs, ours in _NAMES.items():
        value = options.pop(theirs, None)
        if value is not None:
            options.setdefault(ours, value)
    inside = set(StepOptions.__dataclass_fields__)
    known = set(inspect.signature(minimize).parameters) - {"fun", "x0", "jac", "hess", "callback", "step"}
    for name in options:
        checks.one_of("options", name, sorted(known | inside))
    step = StepOptions(**{name: options.pop(name) for name in inside & set(options)})
    wanted = curvature if callable(hess) or hessp is not None else hess
    found = minimize(
        lambda x: fun(x, *args),
        np.asarray(x0, dtype=np.float64),
        jac=lambda x: jac(x, *args),
        hess=wanted,
        callback=None if callback is None else _wrapped(callback),
        step=step,
        **options,
    )
    if disp:
        print(f"{found.message}: f = {found.fun:.6g} after {found.nit} iterations")
    fields = {
        name: getattr(found, name)
        for name in ("x", "fun", "jac", "message", "nit", "nfev", "njev", "nhev", "nsolve", "log")
    }
    success = found.success and found.status != "stopped"
    return OptimizeResult(**fields, success=success, status=_CODES[found.status])


def _wrapped(callback: Callable[..., Any]) -> Callable[[Any, Record], bool]:
    """SciPy's callback as one of :func:`minimize`."""
    whole = set(inspect.signature(callback).parameters) == {"intermediate_result"}

    def call(x: Any, record: Record) -> bool:
        if record.iteration == 0:
            return False
        try:
            if whole:
                callback(intermediate_result=OptimizeResult(x=x, fun=record.value))
            else:
                callback(x)
        except StopIteration:
            return True
        return False

    return call
