"""Hooks at sites: :func:`tap` sees what passes, :func:`replace` changes it, in an order that is kept, and gone after the block.

Everything that hooks a model stands on these two: :mod:`lineament.core.sites.activations`, patching, relevance.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show
from lineament.core.sites import main_tensor
from lineament.core.sites.heads import attention_pattern
from lineament.core.sites.naming import Site, resolve

# What a hook does at a site, by its rank: hooks of one module run in this order, and those of one rank as they were set.
CHANGE = 0  # puts another tensor in the place of what passes; also the rank of every hook of others
RECORD = 1  # sees what goes on after all changes
BEHIND = 2  # changes only the gradient, behind what was recorded

Function = Callable[[Tensor], "Tensor | None"]
Functions = Mapping[str, Function] | Mapping[Site, Function]


@contextmanager
def tap(model: nn.Module, functions: Functions, *, rank: int = RECORD) -> Iterator[None]:
    """Call a function with what passes at each site while the block runs, after all changes, and without a copy.

    What a function returns goes on instead (the same values with a graph of their own, say); ``None`` changes nothing.

    Args:
        functions: by site, glob or :class:`Site`. Later in-place operations change the tensor that it gets: keep a clone.
        rank: ``RECORD``, or ``BEHIND`` for what must come after all recording, so that only the gradient of what is
            recorded differs.

    Raises:
        InputError: an unknown site; during the forward, a site that no tensor passes.

    The second moment of what a layer takes, and the gradient of its weight times the inverse, in a few lines:

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> x, seen = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), []
    >>> with tap(layer, {":in": seen.append}):
    ...     layer(x).sum().backward()
    >>> moment = seen[0].T @ seen[0] / len(x)
    >>> (layer.weight.grad @ moment.inverse()).tolist()
    [[2.0, 1.0]]
    """
    with _hooked(model, functions, rank):
        yield


@contextmanager
def replace(model: nn.Module, functions: Functions) -> Iterator[None]:
    """Let what a function returns pass at each site, in the place of the tensor that it gets, while the block runs.

    No copy, no check and no conversion, as :func:`lineament.core.sites.activations.patch` makes them; ``None`` changes nothing.

    >>> net = nn.Sequential(nn.Identity())
    >>> with replace(net, {"0": lambda x: x + 1}):
    ...     net(torch.zeros(1)).item()
    1.0
    """
    with _hooked(model, functions, CHANGE):
        yield


@contextmanager
def _hooked(model: nn.Module, functions: Functions, rank: int) -> Iterator[None]:
    with ExitStack() as stack:
        for where, function in functions.items():
            places = [where] if isinstance(where, Site) else resolve(model, where).values()
            for site in places:
                require(
                    rank == RECORD or site.side != "pattern",
                    f"site {site.name!r}: the probabilities are mixed already when the block returns them; they can be recorded, and ':z' changed",
                )
                attach(site, function, stack, rank)
        stack.enter_context(eagerly())
        yield


def attach(
    site: Site,
    function: Function,
    stack: ExitStack,
    rank: int,
    otherwise: Callable[[Any], object] | None = None,
) -> None:
    """Set the hook of :func:`tap` or :func:`replace` at one site until ``stack`` closes.

    Args:
        otherwise: called with what passes where that holds no tensor; by default an error.
    """

    def see(value: Any) -> Any:
        if site.side == "pattern":
            pattern = attention_pattern(value)
            if pattern is None:
                raise InputError(
                    f"site {site.name!r}: {type(site.module).__name__} returned no attention probabilities; fused attention computes none, so call "
                    "model.set_attn_implementation('eager') first"
                )
            function(pattern)
            return None
        found = main_tensor.find(value)
        if found is None:
            if otherwise is None:
                raise InputError(f"site {site.name!r}: {show(value)} passed, which holds no tensor")
            otherwise(value)
            return None
        path, passed = found
        tensor = main_tensor.padded(passed)
        if site.view is None:
            new = function(tensor)
        else:
            new = function(site.view.read(tensor))
            new = None if new is None else site.view.write(tensor, new)
        return None if new is None else main_tensor.put(value, path, main_tensor.as_ragged_as(passed, new))

    watch(site, see, stack, rank)


def watch(site: Site, see: Callable[[Any], Any], stack: ExitStack, rank: int) -> None:
    """Call ``see`` with all that passes at a site, (args, kwargs) or the output, until ``stack`` closes.

    What it returns goes on instead; ``None`` changes nothing.
    """
    module = site.module
    hooks: Any
    if site.side == "in":
        hooks, hook = module._forward_pre_hooks, _before(module, see)
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        hooks, hook = module._forward_hooks, _after(see)
        handle = module.register_forward_hook(hook)
    stack.callback(handle.remove)
    hook.lineament_rank = rank
    for key, _ in sorted(hooks.items(), key=lambda item: getattr(item[1], "lineament_rank", CHANGE)):
        hooks.move_to_end(key)


def _before(module: nn.Module, see: Callable[[Any], Any]) -> Any:
    order: dict[str, int] = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = kwargs
        if len(kwargs) > 1 and not args:
            # In the order of the signature: hidden states come before masks, however the caller sorts them.
            if not order:
                names = inspect.signature(module.forward).parameters
                order.update((name, place) for place, name in enumerate(names))
            named = dict(sorted(kwargs.items(), key=lambda item: order.get(item[0], len(order))))
        changed = see((args, named))
        return None if changed is None else (changed[0], {**kwargs, **changed[1]})

    return before


def _after(see: Callable[[Any], Any]) -> Any:
    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return see(output)

    return after


class Listener(Protocol):
    """Who wants to know when a forward of the model begins and ends."""

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def satisfied(self) -> bool: ...


class Stop(BaseException):
    """Ends a forward; no ``Exception``, so that no model's ``except Exception`` swallows it."""

    def __init__(self, listener: Listener):
        self.listener = listener


_now = threading.local()


def stop_if_all_agree(listener: Listener) -> None:
    """End the forward that is running, unless another block, around or inside, still waits for a part of it."""
    if all(call.listener.satisfied() for call in getattr(_now, "calls", ())):
        raise Stop(listener)


class RootCall:
    """Stands before a model's call while a block is open: tells its listener, and lets a stopped forward return ``None``.

    A forward hook cannot end a forward, and another ``forward`` would show to the model's own hooks; PyTorch keeps a
    place for another call, ``_compiled_call_impl``, which ``Module.compile`` fills.
    """

    def __init__(self, model: nn.Module, listener: Listener):
        self.model, self.listener = model, listener
        self.before: Any = None

    def __enter__(self) -> RootCall:
        self.before = vars(self.model).get("_compiled_call_impl")
        vars(self.model)["_compiled_call_impl"] = self
        return self

    def __exit__(self, *_: object) -> None:
        current = vars(self.model)["_compiled_call_impl"]
        if current is self:
            current = self.before
        else:
            # Closed before a block that was opened later: take this one out from between.
            inner = current
            while inner.before is not self:
                inner = inner.before
            inner.before = self.before
        if current is None:
            del vars(self.model)["_compiled_call_impl"]
        else:
            vars(self.model)["_compiled_call_impl"] = current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = _now.__dict__.setdefault("calls", [])
        nested = self in calls  # a model that calls itself
        calls.append(self)
        if not nested:
            self.listener.begin()
        try:
            return (self.before or self.model._call_impl)(*args, **kwargs)
        except Stop as stop:
            if stop.listener is not self.listener or nested:
                raise
            return None
        finally:
            calls.pop()
            if not nested:
                self.listener.end()


_eager_lock = threading.Lock()
_eager_blocks = 0
_eager_undo: Callable[[], object] | None = None


@contextmanager
def eagerly() -> Iterator[None]:
    """Run what ``torch.compile`` made as it was written: compiled code neither sees nor looks for new hooks.

    The compiler's stance is global; it comes back when the last open block ends, in whichever order they end.
    """
    global _eager_blocks, _eager_undo
    with _eager_lock:
        if not _eager_blocks:
            _eager_undo = _stop_compiled_code()
        _eager_blocks += 1
    try:
        yield
    finally:
        with _eager_lock:
            _eager_blocks -= 1
            if not _eager_blocks and _eager_undo is not None:
                _eager_undo()


def _stop_compiled_code() -> Callable[[], object]:
    """Switch the compiler off and return what switches it on again."""
    # The first block of a process may wait a second here for the compiler's import: without it, a model
    # compiled inside the block would run past its hooks.
    frames: Any = importlib.import_module("torch._C._dynamo.eval_frame")
    callback = frames.get_eval_frame_callback()
    if callback is None or callback is False:
        stance = torch.compiler.set_stance("force_eager")
        return lambda: stance.__exit__(None, None, None)
    # Called by a function that is itself being compiled, where the stance cannot be changed.
    frames.set_eval_frame(None)
    return lambda: frames.set_eval_frame(callback)
