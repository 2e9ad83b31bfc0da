"""diffGrad's trajectories against the corrected reference code, the authors' notebook, and the released bug."""

from __future__ import annotations

import math
from typing import Any

import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor, nn

from lineament.optim.diffgrad import DiffGrad

OPTIONS = {"friction_version": "version"}  # the others have the library's names
WAYS: dict[str, dict[str, Any]] = {
    "blocks": {"foreach": False},
    "lists": {"foreach": True},
    "capturable": {"capturable": True},
}
GRADIENTS = {
    "F1": lambda x: 2 * x + 0.6 if x <= 0 else 2 * x - 0.4,
    "F2true": lambda x: -40.0 if x <= -0.9 else 8 * x * math.cos(8 * x) + math.sin(8 * x) + 3 * x**2,
    "F2rel": lambda x: -40.0 if x <= -0.9 else x * math.cos(8 * x) + math.sin(8 * x) + 3 * x**2,
    "F3": lambda x: next((v for end, v in ((-0.5, 2 * x), (-0.4, 1.0), (0, -0.875), (0.4, 0.875), (0.5, -1.0)) if x <= end), 2 * x),
}  # fmt: skip


def options(case: Scope) -> dict[str, Any]:
    beside = {"function", "x0", "T", "tolerance"}
    return {OPTIONS.get(key, key): case[key] for key in case.values if key not in beside}


def trajectory(start: Tensor, gradients: Tensor, **made: Any) -> dict[str, Tensor]:
    """Parameters and both moments after every step; the gradient is refilled in place, which uncovers the released bug."""
    w = nn.Parameter(start.clone())
    optimizer = DiffGrad([w], **made)
    w.grad = torch.empty_like(w)
    seen: dict[str, list[Tensor]] = {"p": [], "m": [], "v": []}
    for raw in gradients.to(start):
        w.grad.copy_(raw)
        optimizer.step()
        state = optimizer.state[w]
        for key, value in zip("pmv", (w.detach(), state["exp_avg"], state["exp_avg_sq"])):
            seen[key].append(value.clone())
    return {key: torch.stack(values) for key, values in seen.items()}


def frictions(start: Tensor, gradients: Tensor, **made: Any) -> Tensor:
    """The friction of every step and coordinate: each coordinate has an optimizer of its own."""
    columns = []
    for value, raws in zip(start, gradients.to(start).T):
        w = nn.Parameter(value.clone())
        optimizer = DiffGrad([w], track_friction=True, **made)
        w.grad = torch.empty_like(w)
        columns.append([])
        for raw in raws:
            w.grad.copy_(raw)
            optimizer.step()
            columns[-1].append(optimizer.friction_summary().mean)
    return torch.tensor(columns, dtype=torch.float64).T


def check_trajectory(file: File) -> None:
    start, gradients = file.input("p0"), file.input("grads")
    for case in file.cases:
        made = options(case)
        aliased = made["alias_previous_grad"]
        for dtype in case.dtypes:
            for way in [WAYS["blocks"]] if aliased else WAYS.values():
                for key, found in trajectory(start.to(dtype), gradients, **made, **way).items():
                    case.compare(f"{case.name}__{key}", found, dtype)
            for way in (WAYS["blocks"],) if aliased else (WAYS["blocks"], WAYS["lists"]):
                case.compare(
                    f"{case.name}__xi",
                    lambda w=way: frictions(start.to(dtype), gradients, **made, **w),
                    dtype,
                )
        if aliased:
            right = trajectory(start, gradients, **{**made, "alias_previous_grad": False})
            case.differs(f"{case.name}__p", right["p"])


def check_functions(file: File) -> None:
    for case in file.cases:
        w = nn.Parameter(torch.tensor(case["x0"], dtype=torch.float64))
        optimizer = DiffGrad([w], track_friction=True, **options(case))
        xs, xis = [w.item()], [0.0]
        for _ in range(case["T"] - 1):
            w.grad = torch.tensor(GRADIENTS[case["function"]](w.item()), dtype=w.dtype)
            optimizer.step()
            xs.append(w.item())
            xis.append(optimizer.friction_summary().mean)
        case.compare(f"{case.name}__x", torch.tensor(xs, dtype=torch.float64))
        case.compare(f"{case.name}__xi", torch.tensor(xis, dtype=torch.float64))


test_golden, test_a_wrong_number_is_noticed = golden(
    "diffgrad", {"trajectory": check_trajectory, "functions_1d": check_functions}
)
