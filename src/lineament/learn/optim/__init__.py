"""Optimizers: Newton-type minimisation with approximate Hessians (gns)."""

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

__all__ = [
    "GNS",
    "Backtracking",
    "Chebyshev",
    "Cubic",
    "Dense",
    "Diagonal",
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
