"""Optimizers: each a ``torch.optim.Optimizer``, held to ``tests/contracts/test_optimizers.py``; and Newton-type minimisation (gns)."""

from lineament.learn.optim.diffgrad import DiffGrad
from lineament.learn.optim.gns import minimize
from lineament.learn.optim.gns_equations import Chebyshev, Equations, Linear, Rosenbrock
from lineament.learn.optim.gns_fast import fast_gradient
from lineament.learn.optim.gns_forms import Dense, Diagonal, LowRank, Operator, Zero
from lineament.learn.optim.gns_log import Minimum
from lineament.learn.optim.gns_network import Network
from lineament.learn.optim.gns_problems import Logistic, LogSumExp, PowerOfResiduals, Softmax
from lineament.learn.optim.gns_rules import Backtracking, Cubic, Smoothness, SuperUniversal
from lineament.learn.optim.gns_scipy import scipy_method
from lineament.learn.optim.gns_torch import GNS
from lineament.learn.optim.sam import ASAM, SAM

__all__ = [
    "ASAM",
    "GNS",
    "SAM",
    "Backtracking",
    "Chebyshev",
    "Cubic",
    "Dense",
    "Diagonal",
    "DiffGrad",
    "Equations",
    "Linear",
    "LogSumExp",
    "Logistic",
    "LowRank",
    "Minimum",
    "Network",
    "Operator",
    "PowerOfResiduals",
    "Rosenbrock",
    "Smoothness",
    "Softmax",
    "SuperUniversal",
    "Zero",
    "fast_gradient",
    "minimize",
    "scipy_method",
]
