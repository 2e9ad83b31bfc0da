"""State dicts of other libraries' diffGrad and Adam, in the form of ours.

They differ in the names and defaults of options, and in where the step is counted: ``pytorch_optimizer`` counts it for the group, so each of its parameters
gets the group's count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import require, show

_OURS = "eps_mode"
# pytorch_optimizer's options that change the step and have no equal here, with the values at which they do nothing.
_UNKNOWN = {"adanorm": False, "adam_debias": False, "fixed_decay": False, "n_sma_threshold": 5}


def translated(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], defaults: dict[str, Any]
) -> dict[str, Any]:
    """``state_dict`` with the options and counters of :class:`DiffGrad`; ours is given back as it is."""
    theirs = state_dict["param_groups"]
    if all(_OURS in group for group in theirs) or len(theirs) != len(groups):
        return state_dict
    state = {key: dict(value) for key, value in state_dict["state"].items()}
    made = []
    for group, here in zip(theirs, groups):
        made.append(_group(group, {**defaults, **{k: here[k] for k in defaults if k in here}}))
        for key in group["params"]:
            if key in state:
                count = group.get("step", state[key].get("step", 0))
                count = count if isinstance(count, Tensor) else torch.tensor(float(count))
                state[key]["step"] = count.clone().float()
    return {"state": state, "param_groups": made}


def _group(theirs: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    for name, idle in _UNKNOWN.items():
        value = theirs.get(name, idle)
        require(
            value == idle or (name == "fixed_decay" and not theirs["weight_decay"]),
            f"state_dict: its option {name} is {show(value)}, which has no equal here; expected {idle}",
        )
    made = {
        **here,
        **{k: v for k, v in theirs.items() if k in here or k in ("params", "param_names", "initial_lr")},
    }
    foreign = "weight_decouple" in theirs
    # torch.optim.Adam writes the paper's form; every other code that stores diffGrad's state the released one.
    made["eps_mode"] = "paper" if "amsgrad" in theirs else "code"
    if foreign:
        made["decoupled_weight_decay"] = theirs["weight_decouple"]
        made["amsgrad"] = theirs.get("ams_bound", False)
        # What they do until rectification applies is not stored.
        made["rectify"] = (here["rectify"] or "momentum") if theirs.get("rectify") else None
    for name in ("foreach", "compiled", "capturable", "differentiable"):
        made[name] = here[name]  # how to run is this optimizer's, not the file's
    return made
