"""diffGrad's options: what they may be, and what those in the state dicts of other libraries' diffGrad and of Adam mean.

The others differ in the names and defaults of options, and in where the step is counted: ``pytorch_optimizer`` counts it for the group, so
each of its parameters gets the group's count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import number, one_of, require, show
from lineament.optim.frictions import check_version

_OURS = "eps_mode"
# pytorch_optimizer's options that change the step and have no equal here, with the values at which they do nothing.
_UNKNOWN = {"adanorm": False, "adam_debias": False, "fixed_decay": False, "n_sma_threshold": 5}


def check(options: dict[str, Any]) -> None:
    """Every option of one group, and those that exclude each other."""
    lr = options["lr"]
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, f"lr: got {show(lr)}, expected a number or a tensor of one element")
        lr = 0 if options["capturable"] else lr.item()
    betas = options["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    require(pair, f"betas: got {show(betas)}, expected a pair of numbers")
    for beta in betas:
        number("betas", beta, low=0, high=1, open_high=True)
    number("lr", lr, low=0)
    for name in ("eps", "weight_decay", "fixed_friction"):
        if options[name] is not None:
            number(name, options[name], low=0)
    check_version(options["version"])
    one_of("eps_mode", options["eps_mode"], ("paper", "code"))
    one_of("nonfinite", options["nonfinite"], ("propagate", "skip", "raise"))
    one_of("rectify", options["rectify"], (None, "momentum", "skip"))  # pyright: ignore[reportArgumentType]
    on = {name for name, value in options.items() if value is True or (name == "rectify" and value)}
    if options["nonfinite"] != "propagate":
        on.add("nonfinite")
    excluded = {
        "foreach": ("compiled", "alias_previous_grad"),
        "capturable": ("rectify", "nonfinite", "track_friction"),
        "alias_previous_grad": ("compiled", "maximize", "decoupled_weight_decay", "capturable"),
    }
    for name, others in excluded.items():
        for other in others:
            require(
                not {name, other} <= on,
                f"{name} and {other}: got both, but they exclude each other; leave one at its default",
            )


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
    for name in ("foreach", "compiled", "capturable"):
        made[name] = here[name]  # how to run is this optimizer's, not the file's
    return made
