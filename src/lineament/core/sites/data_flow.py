"""What the last layer of a network reads, found by following the data of one forward and not by names.

Every function of PyTorch that is called with something computed from the input is one step, and so is every module, for what runs inside it out
of sight (scripted code, custom functions). The last layer is the last product of data with something that is no data: a weight, in
whatever form it is held.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lineament.core.models import called, frozen, takes_hooks
from lineament.core.sites.hooks import eagerly

_PRODUCTS = (
    "linear", "addmm", "mm", "matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "convolution",
)  # fmt: skip


class _Step:
    """One function or module that ran on data: what it took and gave, and the modules around it, the innermost last."""

    def __init__(
        self, taken: list[Tensor], given: list[Tensor], around: tuple[str, ...], head: Tensor | None
    ):
        self.taken, self.given, self.around, self.head = taken, given, around, head


class _Flow(TorchFunctionMode):
    def __init__(self, data: Any):
        super().__init__()
        # Everything stays alive, so that no memory and no identity is used twice.
        self.steps: list[_Step] = []
        self.known = {id(t): t for t in _tensors(data)}
        self.around: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        taken = _tensors((args, kwargs))
        data = [t for t in taken if id(t) in self.known]
        if data:
            name = getattr(func, "__name__", "").partition(".")[0]
            weighted = any(id(t) not in self.known and t.ndim >= 2 for t in taken)
            self.step(data, output, data[0] if name in _PRODUCTS and weighted else None)
        return output

    def step(self, data: list[Tensor], output: Any, head: Tensor | None = None) -> None:
        given = _tensors(output)
        self.known.update((id(t), t) for t in given)
        self.steps.append(_Step(data, given, tuple(self.around), head))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def last_features(model: nn.Module, example: Any) -> tuple[str, tuple[str, ...]] | None:
    """The site whose tensor the last layer reads, and the modules that layer runs in; ``None`` where no layer is seen.

    >>> last_features(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(1)), torch.zeros(2, 4))
    ('2:in', ('2',))
    """
    flow = _Flow(example)
    passed: dict[str, list[tuple[Tensor, ...]]] = {}

    def enter(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            flow.around.append(name)
            taken = [t for t in _tensors((args, kwargs)) if id(t) in flow.known]
            passed.setdefault(f"{name}:in", []).append(tuple(taken[:1]))

        return before

    def leave(name: str) -> Callable[..., None]:
        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            flow.around.pop()
            data = [t for t in _tensors((args, kwargs)) if id(t) in flow.known]
            given = _tensors(output)
            if data and any(id(t) not in flow.known for t in given):
                flow.step(data, output)
            passed.setdefault(name, []).append(tuple(given[:1]))

        return after

    with ExitStack() as stack, frozen(model), torch.no_grad(), eagerly():
        for name, module in model.named_modules():
            if name and takes_hooks(module):
                for hook in (module.register_forward_pre_hook(enter(name), with_kwargs=True), module.register_forward_hook(leave(name), with_kwargs=True)):  # fmt: skip
                    stack.callback(hook.remove)
        with flow:
            output = called(model, example)
    head = _last_product(flow, _tensors(output))
    if head is None or head.head is None:
        return None
    once = {site: calls[0][0] for site, calls in passed.items() if len(calls) == 1 and calls[0]}
    inner = head.around[-1] if head.around else ""
    site = _place(flow, once, head.head, inner)
    return None if site is None else (site, head.around)


def _last_product(flow: _Flow, output: list[Tensor]) -> _Step | None:
    """The last layer on the way to the output."""
    wanted = {id(t) for t in output}
    for step in reversed(flow.steps):
        if any(id(t) in wanted for t in step.given):
            if step.head is not None:
                return step
            wanted |= {id(t) for t in step.taken}
    return None


def _place(flow: _Flow, once: dict[str, Tensor], features: Tensor, inner: str) -> str | None:
    """The site with these features: the layer's own input, else the output of the last module before it."""
    if f"{inner}:in" in once and _same(once[f"{inner}:in"], features):
        return f"{inner}:in"
    outputs = {site: value for site, value in once.items() if not site.endswith(":in")}
    wanted = {id(features)}
    for site, value in reversed(outputs.items()):
        if _same(value, features):
            return site
    if f"{inner}:in" in once:
        return f"{inner}:in"
    for step in reversed(flow.steps):
        if any(id(t) in wanted for t in step.given):
            found = next((s for s, v in reversed(outputs.items()) if any(v is t for t in step.given)), None)
            if found is not None:
                return found
            wanted |= {id(t) for t in step.taken}
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values in the same memory, in whatever shape."""
    return a is b or (a.numel() == b.numel() > 0 and a.data_ptr() == b.data_ptr())
