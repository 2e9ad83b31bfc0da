"""Newton-type minimisation with any Hessian approximation and nothing to tune: gradient-normalised smoothness (arXiv 2506.13710).

| file | what is in it |
| --- | --- |
| **the method** | |
| `algorithm.py` | `minimize`: Algorithm 3, from a start to a minimum |
| `rules.py` | λ from γ, and when a trial is accepted; the rules that it is compared with |
| `accelerated.py` | `fast_gradient`, the first-order baseline |
| `optimizer.py` | `GNS`, the same as a `torch.optim.Optimizer`; what it asks of a closure: `closure.py` |
| `in_scipy.py` | the same inside `scipy.optimize.minimize` |
| `result.py` | what a run leaves: `Minimum` and its log |
| **what is minimised** | |
| `functions.py` | a user's functions, of arrays or tensors |
| `problems.py` | log-sum-exp, logistic and softmax regression, powers and convex functions of residuals |
| `equations.py` | the residuals: linear, Rosenbrock's, Chebyshev's chain, a user's |
| `network.py` | the risk of an `nn.Module` |
| **the linear algebra** | |
| `forms.py` | how H is stored: dense, low rank, diagonal, zero, operator |
| `solvers.py` | (H + λB)⁻¹g for each form: Cholesky, eigenvectors, Woodbury, conjugate gradients |
| `metric.py` | B, in which steps and gradients are measured |
| `blas.py` | products and factorisations, from one library |
| **the theory** | |
| `gamma.py` | γ(x) measured, its calculus and its bounds |
"""

from lineament.optim.gns.accelerated import fast_gradient
from lineament.optim.gns.algorithm import minimize
from lineament.optim.gns.equations import Chebyshev, Equations, Linear, Rosenbrock
from lineament.optim.gns.forms import Dense, Diagonal, LowRank, Operator, Zero
from lineament.optim.gns.gamma import (
    harmonic,
    hoelder_hessian,
    lower_bound,
    nonconvex_iterations,
    self_concordant,
    smoothness,
    swap_smoothness,
)
from lineament.optim.gns.in_scipy import scipy_method
from lineament.optim.gns.network import Network
from lineament.optim.gns.optimizer import GNS
from lineament.optim.gns.problems import (
    Composite,
    Logistic,
    LogSumExp,
    PowerOfResiduals,
    Softmax,
    dense_curvature,
)
from lineament.optim.gns.result import Minimum
from lineament.optim.gns.rules import Backtracking, Cubic, Smoothness, SuperUniversal

__all__ = [
    "GNS",
    "Backtracking",
    "Chebyshev",
    "Composite",
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
    "dense_curvature",
    "fast_gradient",
    "harmonic",
    "hoelder_hessian",
    "lower_bound",
    "minimize",
    "nonconvex_iterations",
    "scipy_method",
    "self_concordant",
    "smoothness",
    "swap_smoothness",
]
