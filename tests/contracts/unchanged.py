"""Whether a model is left as it was: `with unchanged(model): ...` around any call that may not leave a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as internals


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        # Bits, not values: NaN stays NaN, and -0.0 is no 0.0.
        old, new = old.detach(), new.detach()
        return (
            old.shape == new.shape
            and old.dtype == new.dtype
            and old.device == new.device
            and torch.equal(_bits(old), _bits(new))
        )
    return old is new


def _bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def _hooks(holder: Mapping[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    return {
        name: list(value.items())
        for name, value in holder.items()
        if "hook" in name and isinstance(value, dict)
    }


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything that a method could leave behind, by a name that says what it is."""
    state: dict[str, Any] = {"global hooks": _hooks(vars(internals))}
    for name, module in model.named_modules():
        where = name or "model"
        state[f"{where}: hooks"] = _hooks(vars(module))
        state[f"{where}: training"] = module.training
        state[f"{where}: class"] = type(module)
        state[f"{where}: children"] = list(module._modules.items())
        state[f"{where}: attributes"] = {
            key: value
            for key, value in vars(module).items()
            if key not in {"training", "_modules", "_parameters", "_buffers"} and "hook" not in key
        }
        tensors = [*module._parameters.items(), *module._buffers.items()]
        for key, tensor in tensors:
            state[f"{where}.{key}: object"] = tensor
            if tensor is None:
                continue
            state[f"{where}.{key}: value"] = _copy(tensor)
            state[f"{where}.{key}: requires_grad"] = tensor.requires_grad
            state[f"{where}.{key}: grad object"] = tensor.grad if tensor.is_leaf else None
            state[f"{where}.{key}: grad"] = _copy(tensor.grad) if tensor.is_leaf else None
            state[f"{where}.{key}: tensor hooks"] = dict(tensor._backward_hooks or {})
    state["grad mode"] = torch.is_grad_enabled()
    state["inference mode"] = torch.is_inference_mode_enabled()
    state["autocast"] = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    state["default dtype"] = torch.get_default_dtype()
    return state


def _differs(key: str, old: Any, new: Any) -> bool:
    if key.endswith((": object", ": grad object")):
        return old is not new
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return not _same(old, new)
    if key.endswith(": attributes"):
        return list(old) != list(new) or any(old[k] is not new[k] and old[k] != new[k] for k in old)
    return bool(old != new)


@contextmanager
def unchanged(model: nn.Module, *, generator: bool = True) -> Iterator[None]:
    """Assert that the block leaves the model (and PyTorch's global state) as it was, also when it raises.

    Compared are the hooks of every kind on every module and the global ones, training modes, the modules themselves and
    their plain attributes (a patched ``forward``), every parameter and buffer (the object, its bits, ``requires_grad``, ``.grad``,
    its own hooks), grad and autocast modes, and with ``generator`` the state of PyTorch's global random generator.
    """
    before = _state(model)
    random = torch.get_rng_state() if generator else None
    try:
        yield
    finally:
        after = _state(model)
        wrong = [key for key in before.keys() | after.keys() if key not in before or key not in after]
        wrong += [key for key in before if key in after and _differs(key, before[key], after[key])]
        if random is not None and not torch.equal(random, torch.get_rng_state()):
            wrong.append("the global random generator")
        assert not wrong, f"left behind: {', '.join(sorted(wrong))}"
