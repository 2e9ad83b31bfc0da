"""The method inside ``scipy.optimize.minimize``: ``minimize(f, x0, jac=..., hess=..., method=scipy_method)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult
from scipy.sparse.linalg import LinearOperator

from lineament.core import checks
from lineament.learn.optim.gns.algorithm import minimize


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
    """A ``method`` for ``scipy.optimize.minimize``; ``options`` are those of :func:`lineament.learn.optim.gns.minimize`, and ``tol`` is ``grad_tol``.

    Raises:
        InputError: bounds or constraints, or no gradient.

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

    tol = options.pop("tol", None)
    if tol is not None:
        options.setdefault("grad_tol", tol)
    wanted = curvature if callable(hess) or hessp is not None else hess
    found = minimize(
        lambda x: fun(x, *args),
        np.asarray(x0, dtype=np.float64),
        jac=lambda x: jac(x, *args),
        hess=wanted,
        callback=None if callback is None else lambda x, record: callback(x),
        **options,
    )
    fields = {
        name: getattr(found, name)
        for name in ("x", "fun", "jac", "success", "message", "nit", "nfev", "njev", "nhev")
    }
    codes = ("converged", "target", "max_iters", "precision", "search_failed", "stopped")
    return OptimizeResult(
        **fields, status=max(0, codes.index(found.status) - 1), nsolve=found.nsolve, log=found.log
    )
