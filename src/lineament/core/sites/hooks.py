"""The hooks behind the with-blocks of :mod:`lineament.core.sites.activations`: set, in the right order, and gone afterwards."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from lineament.core.sites.naming import Site

# What passes at the site comes in; what goes on instead comes out, or None where that is the same.
Seen = Callable[[Any], Any]


def watch(site: Site, see: Seen, stack: ExitStack, *, last: bool) -> None:
    """Call ``see`` with what passes at a site until ``stack`` closes.

    Args:
        last: come after all the hooks that are not ``last``, in whichever order they are set: what is recorded is what
            goes on after all changes.
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
    hook.lineament_rank = int(last)
    in_order(hooks)


def in_order(hooks: Any) -> None:
    """Let a module's hooks run by their ``lineament_rank``, and those of one rank as they were set.

    0 (and every hook of others) changes what passes, 1 records what goes on, 2 changes only the gradient behind what was recorded.
    """
    for key, _ in sorted(hooks.items(), key=lambda item: getattr(item[1], "lineament_rank", 0)):
        hooks.move_to_end(key)


def _before(module: nn.Module, see: Seen) -> Any:
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


def _after(see: Seen) -> Any:
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
