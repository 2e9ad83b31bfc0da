"""A function to minimise as the method sees it: value with gradient, and curvature by name.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), section 6. A user's functions of NumPy arrays or tensors, with derivatives given or
taken by PyTorch, become a :class:`Problem`; the problem library and a network are problems already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from scipy.optimize import HessianUpdateStrategy
from torch import Tensor
from torch.func import grad, grad_and_value, jvp

from lineament.core import checks
from lineament.optim.gns.solvers import Products

# Above this many variables the exact Hessian of a PyTorch function is an operator: n products cost more than they save.
_DENSE = 2000


class Problem(Protocol):
    """What :func:`minimize` asks of a function, of tensors; one with a true attribute ``arrays`` takes NumPy arrays too.

    ``size`` and ``dtype``, where it has them, are those that x must have.
    """

    @property
    def kinds(self) -> tuple[str, ...]: ...
    def value_and_grad(self, x: Any) -> tuple[float, Any]: ...
    def curvature(self, x: Any, kind: Any) -> Any: ...


def is_problem(fun: Any) -> TypeGuard[Problem]:
    # Not ``isinstance``: Python 3.11 and older take most of a millisecond for it.
    return all(hasattr(fun, name) for name in ("kinds", "value_and_grad", "curvature"))


def as_problem(fun: Any, jac: Any, hess: Any, tensors: bool) -> tuple[Problem, Any]:
    """``fun`` as a problem, and what of its curvature is wanted: ``"zero"`` for none."""
    own = callable(hess) or isinstance(hess, HessianUpdateStrategy)
    kind = "zero" if hess is None else hess
    if is_problem(fun):
        checks.require(jac is None, "jac: a problem brings its own gradient; expected None")
        if own:
            return _Functions(fun.value_and_grad, True, hess, True), hess
        return fun, checks.one_of("hess", kind, (*fun.kinds, "zero"))
    checks.require(callable(fun), f"fun: got {checks.show(fun)}, expected a function or a problem")
    checks.require(
        own or kind in ("exact", "zero"),
        f"hess: got {checks.show(hess)}, expected a function, 'exact', None or a HessianUpdateStrategy; "
        "names such as 'fisher' belong to problems",
    )
    checks.require(
        kind != "exact" or tensors,
        "hess: 'exact' differentiates a PyTorch function; for NumPy functions give hess=, or x0 as a tensor",
    )
    checks.require(
        callable(jac) or jac is True or tensors,
        f"jac: got {checks.show(jac)}; for NumPy functions expected the gradient, or True when fun returns (f, gradient)",
    )
    return _Functions(fun, jac, hess, tensors), kind


def starting_point(x0: Any, fun: Any) -> Tensor:
    """A copy of x0, of the size and dtype that a problem takes."""
    if isinstance(x0, Tensor):
        x = x0.detach().clone()
        x = x if x.is_floating_point() or x.is_complex() else x.double()
    else:
        found = np.array(x0)
        x = torch.from_numpy(found if np.iscomplexobj(found) else found.astype(np.float64))
    checks.tensor("x0", x, shape=("n",))
    checks.require(
        x.dtype in (torch.float64, torch.float32),
        f"x0: got {checks.show(x0)}, expected real numbers in float64 (or float32)",
    )
    if is_problem(fun):
        size, dtype = getattr(fun, "size", None) or len(x), getattr(fun, "dtype", None) or x.dtype
        if (len(x), x.dtype) != (size, dtype):
            wanted = checks.show(torch.empty(size, dtype=dtype))
            raise checks.InputError(
                f"x0: got {checks.show(x0)}, expected {wanted} for this {type(fun).__name__}"
            )
    return x


class _Functions:
    """A user's functions."""

    kinds = ("exact",)

    def __init__(self, fun: Callable[..., Any], jac: Any, hess: Any, tensors: bool):
        self.fun, self.jac, self.hess, self.tensors = fun, jac, hess, tensors
        self.arrays = not tensors
        self._both = grad_and_value(self._scalar)
        self._last: tuple[Any, Any] | None = None  # the point and gradient of the last quasi-Newton update

    def _scalar(self, x: Tensor) -> Tensor:
        value = self.fun(x)
        checks.require(
            isinstance(value, Tensor) and value.numel() == 1,
            f"fun: it returned {checks.show(value)} ({type(value).__name__}), expected a tensor of one element",
        )
        return value.reshape(())

    def value_and_grad(self, x: Any) -> tuple[float, Any]:
        given = x if self.tensors else np.asarray(x)
        if self.jac is True:
            pair = self.fun(given)
            checks.require(
                isinstance(pair, (tuple, list)) and len(pair) == 2,
                f"fun: it returned {checks.show(pair)}, expected (f, gradient) as jac=True says",
            )
            value, gradient = pair
        elif callable(self.jac):
            value, gradient = self.fun(given), self.jac(given)
        else:
            gradient, value = self._both(x)
        checks.require(
            np.size(value) == 1 if not isinstance(value, Tensor) else value.numel() == 1,
            f"fun: it returned {checks.show(value)}, expected one number",
        )
        value = float(value) if isinstance(value, (float, Tensor)) else float(np.asarray(value).reshape(()))
        # A copy: a user's function may fill one array again and again.
        if isinstance(x, np.ndarray):
            found = np.array(gradient, dtype=np.float64).reshape(-1)
        else:
            gradient = torch.as_tensor(gradient)
            found = gradient.detach().reshape(-1).to(x, copy=True)
        if len(found) != len(x):
            raise checks.InputError(f"jac: it returned {checks.show(gradient)}, expected shape ({len(x)},)")
        return value, found

    def curvature(self, x: Any, kind: Any) -> Any:
        if isinstance(self.hess, HessianUpdateStrategy):
            return self._secant(self.hess, np.array(x), np.array(self.value_and_grad(x)[1]))
        if callable(self.hess):
            return self.hess(x if self.tensors else np.asarray(x))
        gradient = grad(self._scalar)
        if len(x) <= _DENSE:
            matrix = torch.func.hessian(self._scalar)(x)
            return (matrix + matrix.T) / 2
        return Products(lambda v: jvp(gradient, (x,), (v,))[1], x, by_column=True)

    def _secant(self, strategy: HessianUpdateStrategy, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        """SciPy's quasi-Newton matrix, updated from one iterate to the next."""
        if self._last is None:
            strategy.initialize(len(x), "hess")
        else:
            strategy.update(x - self._last[0], g - self._last[1])
        self._last = (x, g)
        matrix: Any = strategy.get_matrix()
        return np.array(matrix)
