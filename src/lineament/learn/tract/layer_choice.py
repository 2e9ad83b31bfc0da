"""Which layer of a model is the first: found by registration order or by name, refused where the ridge problem is not that layer's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lineament.core.checks import InputError, require, show, suggest
from lineament.learn.tract.weight_use import USED_BY


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The linear, convolution and embedding layers by name, in the order of registration.

    >>> list(candidates(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
    ['1', '3']
    """
    # Attention's output projection is a linear layer by class, but its weight is used from outside.
    unused = nn.modules.linear.NonDynamicallyQuantizableLinear
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, tuple(USED_BY)) and not isinstance(module, unused)
    }


def choose_layer(model: nn.Module, layer: str | None) -> tuple[str, nn.Module]:
    """The layer by its name, or the first one.

    Raises:
        InputError: no such layer or none at all, one of another kind, a shared or frozen one, or one with options that change its
            weight or gradient otherwise; the message names the layers there are.
    """
    require(isinstance(model, nn.Module), f"model: got {show(model)}, expected a torch.nn.Module")
    found = candidates(model)
    require(
        bool(found) or layer is not None,
        f"model: {type(model).__name__} has no linear, convolution or embedding layer, which tract could train",
    )
    layer = next(iter(found)) if layer is None else layer
    require(isinstance(layer, str), f"layer: got {show(layer)}, expected the name of a layer")
    there = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in list(found.items())[:5])
    there += f" and {len(found) - 5} more" if len(found) > 5 else ""
    if layer not in found:
        other = dict(model.named_modules()).get(layer)
        what = "which is no module of the model" if other is None else f"which is a {type(other).__name__}"
        near = suggest(layer, found) if other is None else f"; candidates: {there}"
        raise InputError(
            f"layer: got {layer!r}, {what}, expected a linear, convolution or embedding layer{near}"
        )
    reason = _why_not(model, layer, found[layer])
    require(not reason, f"layer {layer!r}: {reason} (candidates: {there})")
    return layer, found[layer]


def _why_not(model: nn.Module, layer: str, module: Any) -> str:
    """What keeps this layer from training its pre-activations, or nothing."""
    names = [name for name, other in model.named_modules(remove_duplicate=False) if other is module]
    if len(names) > 1:
        return (
            f"the same module is used as {', '.join(map(repr, names))}; TrAct needs a first layer of its own"
        )
    own = {id(parameter) for parameter in module.parameters()}
    tied = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in own and name.rpartition(".")[0] != layer and not name.startswith(f"{layer}.")
    ]
    if tied:
        return (
            f"its weight is shared with {', '.join(map(repr, tied))}, whose gradient would not be that of a first layer; untie them or "
            "choose another layer"
        )
    weight = module.weight
    if is_lazy(weight):
        return "its shape is not known yet; run the model once before tract"
    if not weight.is_floating_point():
        return f"its weight is {show(weight)}, expected real floating-point numbers"
    # The spectral norm of torch.nn.utils computes the weight from this one, and not before the first forward.
    if not (weight.requires_grad or getattr(module, "weight_orig", weight).requires_grad):
        return "its weight is frozen (requires_grad=False), so there is no gradient to change; unfreeze it or choose another layer"
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option, None):
            return f"has {option}={getattr(module, option)!r}, which rescales what tract rescales; make the embedding without it"
    return ""


def check_accumulation(optimizer: Any, name: str, module: nn.Module, stochastic: bool) -> None:
    """Refuse an optimizer whose step could not correct this layer's summed gradient."""
    require(
        isinstance(optimizer, torch.optim.Optimizer),
        f"accumulate: got {show(optimizer)}, expected the optimizer whose step ends each round",
    )
    require(not stochastic, "accumulate: gathers every row; leave samples, every and momentum out")
    require(
        isinstance(module.weight, nn.Parameter),
        f"accumulate: the weight of layer {name!r} is parametrized, so its gradient cannot be corrected afterwards",
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    require(
        id(module.weight) in held, f"accumulate: the optimizer does not hold the weight of layer {name!r}"
    )
