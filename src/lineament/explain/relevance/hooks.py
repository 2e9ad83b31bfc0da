"""The hooks of the LRP rules: one function for each place where a rule acts, and the record of which module got which rule.

Hooks run by rank (:func:`lineament.core.sites.hooks.in_order`): rules between a module's input and output come before whatever records the output, rules that
change only the gradient behind a value come after it, so that the record is the coefficient which the value itself receives.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require
from lineament.core.sites import main_tensor
from lineament.core.sites.heads import plain
from lineament.core.sites.hooks import in_order
from lineament.core.sites.naming import resolve
from lineament.explain.relevance.functions import (
    Ruled,
    Scaled,
    factor_of,
    favoured,
    identity,
    linear_map,
    norm_rule,
    stabilised,
)


@dataclass
class Coverage:
    """Which module got which rule, and how often each rule acted.

    Attributes:
        modules: {rule: {module's name: its class}}; under ``"identity"`` also activations whose plain gradient is the rule (ReLU).
        calls: {rule: {module's name: forwards with gradients in which the rule acted}}.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, rule: str, name: str, module: nn.Module) -> Callable[[], None]:
        self.modules.setdefault(rule, {})[name] = type(module).__name__
        count = self.calls.setdefault(rule, {})
        count[name] = 0

        def called() -> None:
            count[name] += 1

        return called

    def idle(self) -> list[str]:
        """The rules none of whose modules ran with gradients."""
        return [rule for rule, count in self.calls.items() if not any(count.values())]

    def active(self) -> dict[str, int]:
        """For each rule, the modules in which it acted."""
        return {rule: sum(n > 0 for n in count.values()) for rule, count in self.calls.items()}

    def to_dict(self) -> dict[str, Any]:
        return {"modules": self.modules, "calls": self.calls}


def set_rule(
    model: nn.Module,
    name: str,
    module: nn.Module,
    rule: str,
    coverage: Coverage,
    stack: ExitStack,
    *,
    eps: float,
    gamma: float,
) -> None:
    """Hook one rule to one module."""
    if rule in ("ah", "uniform"):
        _set_attention(model, name, module, rule, coverage, stack)
        return
    if rule == "softcap":
        _set_softcap(model, name, module, coverage, stack)
        return
    called = coverage.add(rule, name, module)
    if rule in ("ln", "identity"):
        if rule == "ln":
            backward = norm_rule(module, name)
        else:
            factor = factor_of(module, name)
            backward = None if factor is None else identity(factor)
        _hook_output(module, backward, called, stack, fresh=bool(getattr(module, "inplace", False)))
    elif rule == "half":
        _hook_input(module, lambda x: Scaled.apply(x, 0.5), called, stack)
    elif rule == "epsilon":
        share = stabilised(eps)
        _hook_gradient(module, lambda y: Ruled.apply(y, y.detach().clone(), share), called, stack, rank=0)
    elif rule == "gamma":
        require(
            linear_map(module) is not None,
            f"rule 'gamma': {name!r} ({type(module).__name__}) is no linear map or convolution",
        )
        _hook_output(module, favoured(module, gamma), called, stack)
    else:
        _hook_gradient(module, Tensor.detach, called, stack, rank=2)


def _set_attention(
    model: nn.Module, name: str, module: nn.Module, rule: str, coverage: Coverage, stack: ExitStack
) -> None:
    factors = {"q": 0.0, "k": 0.0} if rule == "ah" else {"q": 0.25, "k": 0.25, "v": 0.5}
    called = coverage.add(rule, name, module)
    wide_factors: dict[int, tuple[nn.Module, Tensor]] = {}
    for part, factor in factors.items():
        view: Any = resolve(model, [f"{name}:{part}"])[f"{name}:{part}"].view
        weight = view.module.weight
        width = weight.shape[0 if hasattr(view.module, "out_features") else 1]
        _, scale = wide_factors.setdefault(
            id(view.module), (view.module, torch.ones(width, dtype=weight.dtype, device=weight.device))
        )
        scale[view._columns(scale.device)] = factor
    for k, (projection, scale) in enumerate(wide_factors.values()):
        constant = not bool(scale.any())
        change: Any = Tensor.detach if constant else lambda y, scale=scale: Scaled.apply(y, scale)
        _hook_gradient(projection, change, called if k == 0 else lambda: None, stack, rank=2)


def _set_softcap(
    model: nn.Module, name: str, module: nn.Module, coverage: Coverage, stack: ExitStack
) -> None:
    found = softcap_of(model)
    if found is None:
        raise InputError(
            f"rule 'softcap': {type(module).__name__} has no final_logit_softcapping in its configuration"
        )
    cap, head = found
    called = coverage.add("softcap", name, module)
    before: list[Tensor] = []

    def factor(z: Tensor) -> Tensor:
        u = z / cap
        return torch.where(u == 0, 1.0, torch.tanh(u) / torch.where(u == 0, 1.0, u))

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        before[:] = [output]

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        seen = main_tensor.find(output)
        if seen is None or not before or not torch.is_grad_enabled() or not before[0].requires_grad:
            return None
        called()
        return main_tensor.replace(
            output, seen[0], Ruled.apply(before.pop(), seen[1].detach(), identity(factor))
        )

    # Behind whatever is recorded there, so that the record is on the way.
    _register(head, head._forward_hooks, keep, stack, 2)
    _register(plain(model), plain(model)._forward_hooks, after, stack, 0)


def _register(
    module: nn.Module, hooks: Any, hook: Any, stack: ExitStack, rank: int, *, pre: bool = False
) -> None:
    hook.lineament_rank = rank
    if pre:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        handle = module.register_forward_hook(hook)
    stack.callback(handle.remove)
    in_order(hooks)


def _hook_output(
    module: nn.Module, backward: Any, called: Callable[[], None], stack: ExitStack, *, fresh: bool = False
) -> None:
    """The rule between a module's input and its output. ``fresh``: the module overwrites its input, which is copied before."""
    kept: list[Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        seen = main_tensor.find((args, kwargs))
        if seen is None or not torch.is_grad_enabled() or not seen[1].requires_grad:
            return None
        kept.append(seen[1])
        return main_tensor.replace((args, kwargs), seen[0], seen[1].clone()) if fresh else None

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if not torch.is_grad_enabled() or not kept:
            return None
        x = kept.pop()
        called()
        return None if backward is None else Ruled.apply(x, output.detach(), backward)

    _register(module, module._forward_pre_hooks, before, stack, 2, pre=True)
    _register(module, module._forward_hooks, after, stack, 0)
    # A forward that failed leaves its input here, and with it the graph.
    stack.callback(kept.clear)


def _hook_input(
    module: nn.Module, change: Callable[[Tensor], Any], called: Callable[[], None], stack: ExitStack
) -> None:
    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        seen = main_tensor.find((args, kwargs))
        if seen is None or not torch.is_grad_enabled() or not seen[1].requires_grad:
            return None
        called()
        return main_tensor.replace((args, kwargs), seen[0], change(seen[1]))

    _register(module, module._forward_pre_hooks, before, stack, 0, pre=True)


def _hook_gradient(
    module: nn.Module,
    change: Callable[[Tensor], Any],
    called: Callable[[], None],
    stack: ExitStack,
    *,
    rank: int,
) -> None:
    """Another gradient behind a module's output; rank 2 comes behind what is recorded there, so that the record is before the change."""

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        seen = main_tensor.find(output)
        if seen is None or not torch.is_grad_enabled() or not seen[1].requires_grad:
            return None
        called()
        return main_tensor.replace(output, seen[0], change(seen[1]))

    _register(module, module._forward_hooks, after, stack, rank)


def softcap_of(model: nn.Module) -> tuple[float, nn.Module] | None:
    model = plain(model)
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    return (float(cap), head) if cap and head is not None else None
