"""Gradient flow on the central path: what happens to features that are moved to lower the loss with the best head.

Tirer, Huang, Niles-Weed (2022, arXiv 2210.16658), section 4: with the head always at its minimiser W*(H),

    dH/dt = -Kn ∇L(H),   H(0) = H0,   t ~ 1/β

makes NC1~ = tr S_W / tr S_B fall strictly, e^{2 λ_H t} tr S_W fall and e^{2 λ_H t} tr S_B rise, whatever H0. The
within-class part R obeys dR/dt = -(W*ᵀW* + λ_H I) R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable
from lineament.measure.collapse.ufm import UFM

_SMALL = 20_000  # numbers in H up to which the adaptive integrator (in scipy, on the CPU) is the default


@dataclass(frozen=True)
class CentralPath(Readable):
    """The flow at given times: features, traces, NC1~ and loss L; ``scaled_*`` are the traces times e^{2 λ_H t}."""

    times: Float[Tensor, " times"]
    features: Float[Tensor, "times d columns"]
    nc1_tilde: Float[Tensor, " times"]
    trace_within: Float[Tensor, " times"]
    trace_between: Float[Tensor, " times"]
    scaled_within: Float[Tensor, " times"]
    scaled_between: Float[Tensor, " times"]
    loss: Float[Tensor, " times"]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists (the features too)."""
        return {name: value.tolist() for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """NC1~ and the two scaled traces, each relative to its start: the first two fall, the last rises."""
        ax = results.axes(ax)
        curves = {
            "NC1~": self.nc1_tilde,
            "exp(2 lambda_H t) tr S_W": self.scaled_within,
            "exp(2 lambda_H t) tr S_B": self.scaled_between,
        }
        for (name, curve), style in zip(curves.items(), ("o-", "s--", "^:")):
            ax.semilogy(self.times, curve / curve[0], style, label=name, markersize=3)
        ax.set_xlabel("time of the flow")
        ax.set_ylabel("relative to the start")
        ax.legend()
        return ax


def central_path(
    problem: UFM,
    H0: Float[Tensor, "d columns"],
    times: Sequence[float] | Float[Tensor, " times"],
    *,
    method: str = "auto",
    rtol: float = 1e-10,
    atol: float = 1e-12,
) -> CentralPath:
    """Integrate dH/dt = -Kn ∇L(H) from H0.

    Args:
        problem: the model (squared loss).
        H0: features at time 0, d x Kn, class by class.
        times: increasing times ≥ 0 at which to report.
        method: ``"dop853"`` (8th order, adaptive), ``"rk45"`` (5(4), adaptive), ``"rk4"`` (in torch, for large H; steps of
            a tenth of the fastest decay, so that the theorem's monotone quantities stay monotone), or ``"auto"``.
        rtol, atol: tolerances of the adaptive methods.

    Returns:
        :class:`CentralPath`.

    Raises:
        InputError: cross-entropy, times that do not increase, NaN in H0, an integration that fails.

    >>> problem = UFM(2, 2, lambda_w=0.5, lambda_h=0.1)
    >>> H0 = torch.tensor([[1.0, 0.5, -1.0, -0.4], [0.2, 0.1, 0.3, -0.2]], dtype=torch.float64)
    >>> path = central_path(problem, H0, [0.0, 1.0, 2.0])
    >>> [round(v, 3) for v in path.nc1_tilde.tolist()]
    [0.206, 0.079, 0.026]
    """
    problem._squared("central_path")
    H0 = problem.check("H0", H0)
    grid = torch.as_tensor(times, dtype=torch.float64).flatten()
    checks.tensor("times", grid)
    require(
        bool((grid >= 0).all() and (grid.diff() > 0).all()),
        f"times: got {checks.show(grid.tolist())}, expected increasing times from 0 on",
    )
    checks.one_of("method", method, ["auto", "dop853", "rk45", "rk4"])
    if method == "auto":
        method = "dop853" if H0.numel() <= _SMALL else "rk4"
    if method == "rk4":
        features = _rk4(problem, H0, grid)
    else:
        features = _adaptive(problem, H0, grid, method.upper(), rtol, atol)
    traces = torch.tensor([problem.traces(H) for H in features], dtype=torch.float64)
    growth = torch.exp(2 * problem.lambda_h * grid)
    within, between = traces[:, 0], traces[:, 1]
    loss = torch.tensor([problem.reduced(H) for H in features], dtype=torch.float64)
    ratio = within / between
    return CentralPath(grid, features, ratio, within, between, within * growth, between * growth, loss)


def _adaptive(problem: UFM, H0: Tensor, times: Tensor, method: str, rtol: float, atol: float) -> Tensor:
    from scipy.integrate import solve_ivp

    columns = H0.shape[1]

    def velocity(_: float, flat: np.ndarray) -> np.ndarray:
        H = torch.from_numpy(flat).view(H0.shape)
        return (-columns * problem.gradient(H)).flatten().numpy()

    end = float(times[-1])
    if end == 0:
        return H0[None].clone()
    start = H0.double().cpu().flatten().numpy()
    solution = solve_ivp(
        velocity, (0.0, end), start, method=method, t_eval=times.numpy(), rtol=rtol, atol=atol
    )
    require(solution.success, f"central_path: the integrator stopped: {solution.message}")
    return torch.from_numpy(solution.y.T.copy()).view(-1, *H0.shape).to(H0)


def _rk4(problem: UFM, H0: Tensor, times: Tensor) -> Tensor:
    columns = H0.shape[1]

    def velocity(H: Tensor) -> Tensor:
        return -columns * problem.gradient(H)

    H, now, found = H0.clone(), 0.0, []
    for goal in times.tolist():
        while now < goal:
            W = problem.best_weight(H)
            fastest = float(torch.linalg.matrix_norm(W, ord=2)) ** 2 + problem.lambda_h
            step = min(0.1 / max(fastest, 1e-12), goal - now)
            a = velocity(H)
            b = velocity(H + step / 2 * a)
            c = velocity(H + step / 2 * b)
            d = velocity(H + step * c)
            H = H + step / 6 * (a + 2 * b + 2 * c + d)
            # The last step ends on the goal itself: a sum of steps may fall short of it by a rounding for ever.
            now = goal if now + step >= goal else now + step
        found.append(H)
    return torch.stack(found)
