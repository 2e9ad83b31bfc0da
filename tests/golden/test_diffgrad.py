"""diffGrad's trajectories against the corrected reference code, the authors' notebook, and the released bug."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor, nn

from lineament.optim.diffgrad import DiffGrad

OPTIONS = {"friction_version": "version"}  # the others have the library's names
WAYS: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"capturable": True}]
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
    """The friction of every step and coordinate: each coordinate is a parameter."""
    ws = [(str(k), nn.Parameter(value.clone())) for k, value in enumerate(start)]
    optimizer = DiffGrad(ws, track_friction=True, **made)
    for _, w in ws:
        w.grad = torch.empty_like(w)
    rows = []
    for raw in gradients.to(start):
        for (_, w), value in zip(ws, raw):
            w.grad.copy_(value)
        optimizer.step()
        rows.append([optimizer.friction_summary().by_parameter[name] for name, _ in ws])
    return torch.tensor(rows, dtype=torch.float64)


def check_trajectory(file: File) -> None:
    start, gradients = file.input("p0"), file.input("grads")
    for case in file.cases:
        made, at = options(case), f"{case.name}__"
        ways = WAYS[:1] if made["alias_previous_grad"] else WAYS
        for dtype, way in itertools.product(case.dtypes, ways):
            begin = start.to(dtype)
            for key, found in trajectory(begin, gradients, **made, **way).items():
                case.compare(at + key, found, dtype)
            if case.has(at + "xi") and "capturable" not in way:
                case.compare(at + "xi", frictions(begin, gradients, **made, **way), dtype)
        if made["alias_previous_grad"]:
            right = trajectory(start, gradients, **{**made, "alias_previous_grad": False})
            case.differs(at + "p", right["p"])


def check_functions(file: File) -> None:
    """All runs side by side, each a parameter group."""
    starts = {case.name: nn.Parameter(torch.tensor(case["x0"], dtype=torch.float64)) for case in file.cases}
    groups = [{"params": [(case.name, starts[case.name])], **options(case)} for case in file.cases]
    optimizer = DiffGrad(groups, track_friction=True)
    seen = {case.name: ([case["x0"]], [0.0]) for case in file.cases}
    for _ in range(1, max(case["T"] for case in file.cases)):
        for case in file.cases:
            w = starts[case.name]
            w.grad = torch.tensor(GRADIENTS[case["function"]](w.item()), dtype=w.dtype)
        optimizer.step()
        xis = optimizer.friction_summary().by_parameter
        for name, (xs, frictions) in seen.items():
            xs.append(starts[name].item())
            frictions.append(xis[name])
    for case in file.cases:
        for key, values in zip(("x", "xi"), seen[case.name]):
            case.compare(f"{case.name}__{key}", torch.tensor(values[: case["T"]], dtype=torch.float64))


test_golden, test_a_wrong_number_is_noticed = golden(
    "diffgrad", {"trajectory": check_trajectory, "functions_1d": check_functions}
)
