"""Systems of equations u(x) = 0 with their derivatives: linear, Rosenbrock's, the Chebyshev chain, and a user's own.

For :class:`~lineament.optim.gns.problems.PowerOfResiduals`. Each gives u, Jᵀv, J and Σ_i v_i ∇²u_i (``second``: a matrix, its diagonal
or ``None``), and ``normal``, JᵀJ, where that is cheaper than a product. Those with ``arrays`` take NumPy arrays as well as tensors;
``size`` and ``dtype`` are those that x must have, where that is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import hessian, jacrev, vjp

from lineament.core import checks
from lineament.optim.gns.linear_algebra import at_home, gemv, gemv_t, gram, like


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
        return gemv(self.A, x) - like(self.b, x)

    def pulled(self, x: Any, v: Any) -> Any:
        return gemv_t(self.A, v)

    def jacobian(self, x: Any) -> Any:
        return like(self.A, x)

    def normal(self, x: Any) -> Any:
        """JᵀJ, the same everywhere."""
        if self._normal is None:
            self._normal = gram(self.A)
        return self._normal.numpy().copy() if isinstance(x, np.ndarray) else self._normal.clone()

    def second(self, x: Any, v: Any) -> None:
        return None


class Rosenbrock:
    """u = (a - x_1, √b (x_2 - x_1²)): half its square is half of Rosenbrock's function.

    >>> Rosenbrock().residuals(torch.tensor([0.0, 2.0])).tolist()
    [1.0, 20.0]
    """

    arrays = True
    size = 2

    def __init__(self, a: float = 1.0, b: float = 100.0):
        self.a, self.root = float(checks.number("a", a)), checks.number("b", b, low=0, open_low=True) ** 0.5

    def residuals(self, x: Any) -> Any:
        first, second = x.tolist()
        return _small(x, [self.a - first, self.root * (second - first * first)])

    def pulled(self, x: Any, v: Any) -> Any:
        first, _ = x.tolist()
        a, b = v.tolist()
        return _small(x, [-a - 2 * self.root * first * b, self.root * b])

    def jacobian(self, x: Any) -> Any:
        return _small(x, [[-1.0, 0.0], [-2 * self.root * float(x[0]), self.root]])

    def normal(self, x: Any) -> Any:
        slope = -2 * self.root * float(x[0])
        across = slope * self.root
        return _small(x, [[1 + slope * slope, across], [across, self.root * self.root]])

    def second(self, x: Any, v: Any) -> Any:
        return _small(x, [-2 * self.root * float(v[1]), 0.0])


class Chebyshev:
    """u_1 = (1 - x_1)/2, u_i = x_i - (2x_{i-1}² - 1): the chain whose only solution is x = (1, ..., 1).

    >>> Chebyshev().residuals(torch.ones(4)).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    arrays = True

    def residuals(self, x: Any) -> Any:
        found = x + 1
        found[1:] -= 2 * x[:-1] ** 2
        found[:1] *= -0.5
        found[:1] += 1
        return found

    def pulled(self, x: Any, v: Any) -> Any:
        found = 1.0 * v
        found[:1] *= -0.5
        found[:-1] -= 4 * x[:-1] * v[1:]
        return found

    def jacobian(self, x: Any) -> Any:
        J = _square(x)
        J[:: len(x) + 1] = 1
        J[len(x) :: len(x) + 1] = -4 * x[:-1]
        J[0] = -0.5
        return J.reshape(len(x), len(x))

    def normal(self, x: Any) -> Any:
        """JᵀJ, which is tridiagonal."""
        n, below = len(x), -4 * x[:-1]
        straight = 0 * x + 1
        straight[:1] = 0.25
        straight[:-1] += below**2
        matrix = _square(x)
        matrix[:: n + 1] = straight
        matrix[1 :: n + 1] = matrix[n :: n + 1] = below
        return matrix.reshape(n, n)

    def second(self, x: Any, v: Any) -> Any:
        found = 0 * x
        found[:-1] = -4 * v[1:]
        return found


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


def _small(like: Any, values: list[Any]) -> Any:
    found = np.array(values)
    if isinstance(like, np.ndarray):
        return found
    # Half the time of ``new_tensor``, which counts where a tensor has two entries.
    found = torch.from_numpy(found)
    return found if like.dtype is torch.float64 and like.is_cpu else found.to(like)


def _square(x: Any) -> Any:
    """Zeros for an (n, n) matrix, row after row."""
    n = len(x)
    return np.zeros(n * n) if isinstance(x, np.ndarray) else x.new_zeros(n * n)
