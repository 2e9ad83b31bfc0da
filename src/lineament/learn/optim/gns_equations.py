"""Systems of equations u(x) = 0 with their derivatives: linear, Rosenbrock's, the Chebyshev chain, and a user's own.

For :class:`~lineament.learn.optim.gns_problems.PowerOfResiduals`. Each gives u, Jᵀv, J and Σ_i v_i ∇²u_i, and, where J is
sparse (Chebyshev), JᵀJ at less than the cost of a product.
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
from lineament.learn.optim.gns_blas import gemv, gemv_t, gram


class Linear:
    """u = Ax - b.

    >>> Linear(torch.eye(2), torch.ones(2)).residuals(torch.zeros(2)).tolist()
    [-1.0, -1.0]
    """

    def __init__(self, A: Float[Tensor, "m n"], b: Float[Tensor, "m"]):
        self.A = checks.tensor("A", A, shape=("m", "n"), floating=True)
        self.b = checks.tensor("b", b, shape=(len(A),), floating=True)
        self._normal: Tensor | None = None

    def residuals(self, x: Tensor) -> Tensor:
        return gemv(self.A, x).sub_(self.b)

    def pulled(self, x: Tensor, v: Tensor) -> Tensor:
        return gemv_t(self.A, v)

    def jacobian(self, x: Tensor) -> Tensor:
        return self.A

    def normal(self, x: Tensor) -> Tensor:
        """JᵀJ, the same everywhere."""
        if self._normal is None:
            self._normal = gram(self.A)
        return self._normal.clone()

    def second(self, x: Tensor, v: Tensor) -> Tensor | None:
        return None


class Rosenbrock:
    """u = (a - x_1, √b (x_2 - x_1²)): half its square is half of Rosenbrock's function.

    >>> Rosenbrock().residuals(torch.tensor([0.0, 2.0])).tolist()
    [1.0, 20.0]
    """

    def __init__(self, a: float = 1.0, b: float = 100.0):
        self.a, self.root = float(checks.number("a", a)), checks.number("b", b, low=0, open_low=True) ** 0.5

    def residuals(self, x: Tensor) -> Tensor:
        first, second = x.tolist()
        return _small(x, [self.a - first, self.root * (second - first * first)])

    def pulled(self, x: Tensor, v: Tensor) -> Tensor:
        first = float(x[0])
        a, b = v.tolist()
        return _small(x, [-a - 2 * self.root * first * b, self.root * b])

    def jacobian(self, x: Tensor) -> Tensor:
        return _small(x, [[-1.0, 0.0], [-2 * self.root * float(x[0]), self.root]])

    def normal(self, x: Tensor) -> Tensor:
        slope = -2 * self.root * float(x[0])
        return _small(x, [[1 + slope**2, slope * self.root], [slope * self.root, self.root**2]])

    def second(self, x: Tensor, v: Tensor) -> Tensor:
        return _small(x, [[-2 * self.root * float(v[1]), 0.0], [0.0, 0.0]])


class Chebyshev:
    """u_1 = (1 - x_1)/2, u_i = x_i - (2x_{i-1}² - 1): the chain whose only solution is x = (1, ..., 1).

    >>> Chebyshev().residuals(torch.ones(4)).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    def residuals(self, x: Tensor) -> Tensor:
        found = x + 1
        found[:1].mul_(-0.5).add_(1)
        found[1:].addcmul_(x[:-1], x[:-1], value=-2)
        return found

    def pulled(self, x: Tensor, v: Tensor) -> Tensor:
        found = v.clone()
        found[0] *= -0.5
        found[:-1].addcmul_(x[:-1], v[1:], value=-4)
        return found

    def jacobian(self, x: Tensor) -> Tensor:
        J = torch.diag(torch.ones_like(x)) + torch.diag(-4 * x[:-1], -1)
        J[0, 0] = -0.5
        return J

    def normal(self, x: Tensor) -> Tensor:
        """JᵀJ, which is tridiagonal."""
        below = -4 * x[:-1]
        straight = torch.ones_like(x)
        straight[0] = 0.25
        straight[:-1] += below**2
        matrix = torch.diag(straight)
        matrix.diagonal(1).copy_(below)
        matrix.diagonal(-1).copy_(below)
        return matrix

    def second(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.diag(torch.cat([-4 * v[1:], v.new_zeros(1)]))


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


def _small(like: Tensor, values: list[Any]) -> Tensor:
    # Half the time of ``new_tensor``, which counts where a tensor has two entries.
    found = torch.from_numpy(np.array(values))
    return found if like.dtype is torch.float64 and like.is_cpu else found.to(like)
