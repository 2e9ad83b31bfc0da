"""The hooks of the LRP rules: one function for each place where a rule acts, and the record of which module got which rule.

Rules between a module's input and output come before whatever records the output; rules that change only the gradient behind a value come after it, so that
the record is the coefficient which the value itself receives (see the ranks in :mod:`lineament.core.sites.hooks`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require
from lineament.core.models import unwrapped, weight_of
from lineament.core.results import Readable
from lineament.core.sites.hooks import BEHIND, CHANGE, attach
from lineament.core.sites.naming import Site, resolve
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
class Coverage(Readable):
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
    site = Site(name, module)
    if rule in ("ln", "identity"):
        if rule == "ln":
            backward = norm_rule(module, name)
        else:
            factor = factor_of(module, name)
            backward = None if factor is None else identity(factor)
        _between(site, backward, called, stack, overwrites=bool(getattr(module, "inplace", False)))
    elif rule == "half":
        _with_gradient(site.input, lambda x: Scaled.apply(x, 0.5), called, stack, CHANGE)
    elif rule == "epsilon":
        share = stabilised(eps)
        _with_gradient(site, lambda y: Ruled.apply(y, y.detach().clone(), share), called, stack, CHANGE)
    elif rule == "gamma":
        require(
            linear_map(module) is not None,
            f"rule 'gamma': {name!r} ({type(module).__name__}) is no linear map or convolution",
        )
        _between(site, favoured(module, gamma), called, stack)
    else:
        _with_gradient(site, Tensor.detach, called, stack, BEHIND)


def _set_attention(
    model: nn.Module, name: str, module: nn.Module, rule: str, coverage: Coverage, stack: ExitStack
) -> None:
    factors = {"q": 0.0, "k": 0.0} if rule == "ah" else {"q": 0.25, "k": 0.25, "v": 0.5}
    called = coverage.add(rule, name, module)
    scales: dict[tuple[int, str], tuple[Site, Tensor]] = {}
    for part, factor in factors.items():
        site = resolve(model, f"{name}:{part}")[f"{name}:{part}"]
        view: Any = site.view
        weight = weight_of(site.module)
        width = weight.shape[0 if hasattr(site.module, "out_features") else 1]
        _, scale = scales.setdefault(site.key, (site.whole, weight.new_ones(width)))
        scale[view.columns(scale.device)] = factor
    for k, (site, scale) in enumerate(scales.values()):
        constant = not bool(scale.any())
        change: Any = Tensor.detach if constant else lambda y, scale=scale: Scaled.apply(y, scale)
        _with_gradient(site, change, called if k == 0 else lambda: None, stack, BEHIND)


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

    def keep(z: Tensor) -> None:
        before[:] = [z]

    def after(logits: Tensor) -> Any:
        if not before or not torch.is_grad_enabled() or not before[0].requires_grad:
            return None
        called()
        return Ruled.apply(before.pop(), logits.detach(), identity(factor))

    # Behind whatever is recorded there, so that the record is on the way.
    attach(Site("the head", head), keep, stack, BEHIND)
    attach(Site("the model", unwrapped(model)), after, stack, CHANGE)


def _between(
    site: Site, backward: Any, called: Callable[[], None], stack: ExitStack, *, overwrites: bool = False
) -> None:
    """The rule between a module's input and its output. ``overwrites``: the module writes into its input, which is copied before."""
    kept: list[Tensor] = []

    def before(x: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled() or not x.requires_grad:
            return None
        kept.append(x)
        return x.clone() if overwrites else None

    def after(output: Tensor) -> Any:
        if not torch.is_grad_enabled() or not kept:
            return None
        x = kept.pop()
        called()
        return None if backward is None else Ruled.apply(x, output.detach(), backward)

    attach(site.input, before, stack, BEHIND, _ignore)
    attach(site, after, stack, CHANGE, _ignore)
    # A forward that failed leaves its input here, and with it the graph.
    stack.callback(kept.clear)


def _with_gradient(
    site: Site, change: Callable[[Tensor], Any], called: Callable[[], None], stack: ExitStack, rank: int
) -> None:
    """The same value with another gradient; of rank ``BEHIND`` it comes behind what is recorded there, so that the record is before the change."""

    def see(tensor: Tensor) -> Any:
        if not torch.is_grad_enabled() or not tensor.requires_grad:
            return None
        called()
        return change(tensor)

    attach(site, see, stack, rank, _ignore)


def _ignore(value: Any) -> None:
    """A module that passes no tensor has no gradient to change."""


def softcap_of(model: nn.Module) -> tuple[float, nn.Module] | None:
    model = unwrapped(model)
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    return (float(cap), head) if cap and head is not None else None
