"""Copies of a model, and layers drawn anew, whatever their weights are computed from.

Weight norm, spectral norm, pruning masks and parametrizations keep other tensors than the weight that a layer's forward uses; what
``reset_parameters`` draws into that weight is written back into them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lineament.core.checks import InputError

# As many as PyTorch itself makes for a new spectral norm.
_ITERATIONS = 15


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model; a weight that a forward has computed (by ``torch.nn.utils.weight_norm``, say) is copied without its graph.

    >>> layer = nn.utils.weight_norm(nn.Linear(1, 1)); _ = layer(torch.ones(1, 1))
    >>> type(copied(layer)).__name__
    'Linear'
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def reset_of(module: Any) -> Callable[[], Any] | None:
    """What draws a module's weights anew, or ``None``."""
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


def weighted(model: nn.Module) -> list[str]:
    """The names of the modules that have parameters of their own, or compute a weight from some."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, parametrize.ParametrizationList)
        and (parametrize.is_parametrized(module) or any(True for _ in module.parameters(recurse=False)))
    ]


def redraw(module: nn.Module) -> None:
    """Draw a module's own weights anew by its ``reset_parameters``, also where they are computed from others.

    Raises:
        InputError: a parametrization that says no way back from a weight to what it is computed from.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    >>> before = layer.weight.detach().clone(); redraw(layer)
    >>> bool((layer.weight != before).all())
    True
    """
    reset = reset_of(module)
    assert reset is not None
    with torch.no_grad(), parametrize.cached():
        # Computed once: what reset_parameters writes into a computed weight stays in it as long as it is cached.
        computed = _computed(module)
        reset()
        drawn = {name: getattr(module, name).detach().clone() for name in computed}
    with torch.no_grad():
        for name, value in drawn.items():
            _write(module, name, value)
        if drawn:
            _settle(module, drawn)


def _computed(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module that are computed, by name: parametrizations, and the hooks that came before them."""
    lists: Any = getattr(module, "parametrizations", {}) if parametrize.is_parametrized(module) else {}
    names = set(lists)
    own = [name for name, _ in module.named_parameters(recurse=False)]
    for ending in ("_orig", "_v"):
        names |= {name.removesuffix(ending) for name in own if name.endswith(ending)}
    return {name: getattr(module, name) for name in names if isinstance(getattr(module, name, None), Tensor)}


def _write(module: nn.Module, name: str, value: Tensor) -> None:
    own = dict(module.named_parameters(recurse=False))
    if f"{name}_orig" in own:
        own[f"{name}_orig"].copy_(value)
    elif f"{name}_v" in own:
        length = own[f"{name}_g"]
        over = [dim for dim in range(value.ndim) if length.ndim == 0 or length.shape[dim] == 1]
        own[f"{name}_v"].copy_(value)
        length.copy_(torch.linalg.vector_norm(value, dim=over, keepdim=length.ndim > 0))
    else:
        try:
            setattr(module, name, value)
        except (NotImplementedError, RuntimeError):
            raise InputError(
                f"model: {name} of {type(module).__name__} cannot be drawn anew, since its parametrization has no right_inverse; "
                "pass a factory that makes the network"
            ) from None


def _settle(module: nn.Module, names: Iterable[str]) -> None:
    """Compute the weights as a training would, whose power iterations find the norm of the new ones; and for good where a hook does it."""
    modes = {inner: inner.training for inner in module.modules()}
    module.train()
    for _ in range(_ITERATIONS):
        for hook in module._forward_pre_hooks.values():
            if hasattr(hook, "compute_weight") or hasattr(hook, "apply_mask"):
                hook(module, ())
        for name in names:
            getattr(module, name)
    for inner, training in modes.items():
        inner.training = training
