"""The paper's systems of equations u(x) = 0, with their derivatives: Rosenbrock's, and the Chebyshev chain.

For :class:`~lineament.optim.gns.problems.PowerOfResiduals`, which says what each method gives. Written for arrays and tensors alike, since a
problem of two unknowns is computed three times as fast on arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lineament.core import checks


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
