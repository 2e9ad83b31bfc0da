"""diffGrad's step compiled into one pass over memory: which tensors move together, and what is kept from step to step.

The arithmetic is :func:`~lineament.learn.optim.diffgrad.steps.update`. What is not obvious: the kernel runs at the speed of memory, so that what
is left to save is the calls; eight tensors share one, and their views as vectors are kept.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lineament.learn.optim.diffgrad.steps import Buffers, Coefficients, Rule, flattened, update

# Tensors in one compiled call.
TOGETHER = 8


def packed(c: Coefficients, like: Tensor) -> Tensor:
    """The numbers of a step as one tensor, for :class:`Passes`."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if any(isinstance(x, Tensor) for x in c):
        return torch.stack([torch.as_tensor(x, dtype=dtype, device=like.device) for x in c])
    return torch.tensor(c, dtype=dtype, device=like.device)


def _traced(bs: Sequence[Buffers], numbers: Tensor, rule: Rule) -> None:
    c = Coefficients(*numbers.unbind())
    for b in bs:
        update(b, c, rule)


@functools.cache
def _compiled(kind: Any) -> Callable[[Sequence[Buffers], Tensor, Rule], None]:
    # A code object for each kind: a compiler keeps few versions of one. Sizes are dynamic and numbers a tensor, so that neither another
    # shape nor another step compiles again.
    code = _traced.__code__.replace(co_name="diffgrad")
    # The guards have looked at each size; looking again at each tensor would cost a quarter of the call.
    return torch.compile(types.FunctionType(code, globals()), dynamic=True, options={"size_asserts": False})


class Passes:
    """:func:`update`, compiled: buffers gathered by kind, and moved ``TOGETHER`` at a call, which costs what three tensors alone do.

    After a pass over memory nothing of Python is left in the caches, so that each line here costs several times what it does in a test.
    """

    def __init__(self, rule: Rule, views: dict[Tensor, tuple[Buffers, int, Buffers]]):
        """``views``: of parameters, with their state, as vectors; kept from step to step."""
        self.rule, self.views = rule, views
        self._lanes: dict[Any, tuple[Tensor, list[Buffers]]] = {}
        self._moved: list[Tensor] = []

    def take(self, p: Tensor, b: Buffers, c: Coefficients) -> bool:
        """Move the buffers, now or with others; ``False`` where compiled code is not for them."""
        # One element would be a case of its own to the compiler.
        if b.p.numel() < 2:
            return False
        key = id(c), b.p.dtype, b.p.device
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = packed(c, b.p), []
        numbers, waiting = lane
        flat = self._flat(p, b)
        if flat is None:
            _compiled((self.rule, "shaped", b.p.dtype, b.p.device.type))([b], numbers, self.rule)
            return True
        self._moved.append(b.p)
        waiting.append(flat)
        if len(waiting) == TOGETHER:
            self._run(waiting, numbers)
            waiting.clear()
        return True

    def finish(self) -> None:
        """Move those that still wait."""
        for numbers, waiting in self._lanes.values():
            if len(waiting) >= TOGETHER // 2 and _kind(self.rule, TOGETHER, waiting[0]) in _primed:
                # A full call costs less than these do one by one: the rest of it is a few numbers that nobody reads.
                self._run([*waiting, *_examples(waiting[0], TOGETHER - len(waiting), 32)], numbers)
            else:
                for b in waiting:
                    self._run([b], numbers)
        torch.autograd.graph.increment_version(self._moved)

    def _flat(self, p: Tensor, b: Buffers) -> Buffers | None:
        g = b.g
        held = self.views.get(p)
        if held is not None and g.is_contiguous():
            known, at, flat = held
            _, _, m, v, q, top, mean, _ = b
            same = known[2] is m and known[3] is v and known[4] is q and known[5] is top and known[6] is mean
            if same and at == b.p.data_ptr() and flat[0].numel() == g.numel():
                return Buffers(flat[0], g.view(-1).data, *flat[2:])
        flat = flattened(b)
        if flat is None:
            return None
        # A view remembers the shape it is a view of, and each such shape would be compiled for: ``data`` forgets it, and the parameter's
        # version, by which autograd knows that it was changed.
        flat = Buffers(*(None if t is None else t.data for t in flat))  # pyright: ignore[reportArgumentType]
        if all(t is None or t.is_contiguous() for t in b):
            # Not the gradient itself, which would live as long as the optimizer.
            self.views[p] = b._replace(g=b.p), b.p.data_ptr(), flat._replace(g=flat.p)
        return flat

    def _run(self, bs: Sequence[Buffers], numbers: Tensor) -> None:
        kind = _kind(self.rule, len(bs), bs[0])
        move = _compiled(kind)
        if kind not in _primed:
            # Sizes that are equal at the first call would be compiled as always equal.
            move(_examples(bs[0], len(bs), 4096), numbers, self.rule)
            _primed.add(kind)
        move(bs, numbers, self.rule)


def _kind(rule: Rule, count: int, b: Buffers) -> Any:
    return rule, count, b.top is None, b.p.dtype, b.p.device.type


def _examples(like: Buffers, count: int, size: int) -> list[Buffers]:
    """Zeros of as many sizes as ``count``."""
    sizes = range(size, size + 32 * count, 32)
    return [Buffers(*(None if t is None else t.new_zeros(n) for t in like)) for n in sizes]  # pyright: ignore[reportArgumentType]


_primed: set[Any] = set()
