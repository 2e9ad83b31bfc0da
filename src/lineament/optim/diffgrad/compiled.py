"""diffGrad's step compiled into one pass over memory: which tensors move together, and what is kept from step to step.

The arithmetic is :func:`~lineament.optim.diffgrad.steps.update`. What is not obvious: the kernel runs at the speed of memory, so that what
is left to save is the calls. Eight tensors share one, and it is kept, all but the gradients, for as long as the same tensors move.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lineament.optim.diffgrad.steps import (
    Buffers,
    Coefficients,
    Rule,
    memory_order,
    update,
    vector,
)

# Tensors in one compiled call.
TOGETHER = 8
# A parameter, what moves with it, and the numbers of its step.
Found = tuple[Tensor, Buffers, Coefficients]


def packed(c: Coefficients, like: Tensor) -> Tensor:
    """The numbers of a step as one tensor, for :class:`Passes`."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if any(isinstance(x, Tensor) for x in c):
        return torch.stack([torch.as_tensor(x, dtype=dtype, device=like.device) for x in c])
    return torch.tensor(c, dtype=dtype, device=like.device)


def _traced(gradients: Sequence[Tensor], others: Sequence[Tensor], numbers: Tensor, rule: Rule) -> None:
    """``others``: each parameter and its state, one after the other: lists in a list would cost the call more."""
    c = Coefficients(*numbers.unbind())
    width = len(others) // len(gradients)
    for at, g in enumerate(gradients):
        p, m, v, q, *more = others[at * width : (at + 1) * width]
        # The greatest v is one more; the mean and the spread are two.
        top = more.pop(0) if len(more) % 2 else None
        update(Buffers(p, g, m, v, q, top, *more), c, rule)


@functools.cache
def _compiled(kind: Any) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor, Rule], None]:
    # A code object for each kind: a compiler keeps few versions of one. Sizes are dynamic and numbers a tensor, so that neither another
    # shape nor another step compiles again.
    code = _traced.__code__.replace(co_name="diffgrad")
    # The guards look at each tensor; that nobody has changed this module and the rule need not be asked at each call, nor the sizes asked twice.
    options = {"size_asserts": False, "guard_filter_fn": _about_tensors}
    return torch.compile(types.FunctionType(code, globals()), dynamic=True, options=options)


def _about_tensors(guards: Sequence[Any]) -> list[bool]:
    return [not (guard.is_global or guard.name.startswith("rule")) for guard in guards]


class Passes:
    """:func:`update`, compiled, for the parameters of one group: ``TOGETHER`` at a call, which costs what three tensors alone do.

    After a pass over memory nothing of Python is left in the caches, so that each line of a step costs several times what it does in a test.
    """

    def __init__(self, rule: Rule):
        self.rule = rule
        self._seen: list[tuple[Tensor, Sequence[Tensor | None], list[int], int]] = []
        self._calls: list[_Call] = []
        self._moved: list[Tensor] = []
        self._left: list[int] = []

    def move(self, found: Sequence[Found]) -> list[Found]:
        """One step; those parameters that compiled code is not for are handed back."""
        if not self._known(found):
            self._arrange(found)
        numbers: dict[int, Tensor] = {}
        for call in self._calls:
            if call.lead not in numbers:
                _, b, c = found[call.lead]
                numbers[call.lead] = packed(c, b.p)
            gradients = [found[at][1].g for at in call.places]
            if call.orders is not None:
                gradients = [vector(g, order).data for g, order in zip(gradients, call.orders)]
            call.run([*gradients, *call.padding], call.others, numbers[call.lead], self.rule)
        torch.autograd.graph.increment_version(self._moved)
        return [found[at] for at in self._left]

    def _known(self, found: Sequence[Found]) -> bool:
        """Whether the calls of the last step serve: the same tensors and memory, and the same step for those that share a call."""
        if len(found) != len(self._seen):
            return False
        for (p, state, places, lead), (q, b, c) in zip(self._seen, found):
            same = p is q and found[lead][2] is c and all(map(is_, b[2:], state))
            if not same or _places(b) != places:
                return False
        return True

    def _arrange(self, found: Sequence[Found]) -> None:
        self._seen, self._calls, self._moved, self._left = [], [], [], []
        leads: dict[Any, int] = {}
        lanes: dict[int, list[_Member]] = {}
        for at, (p, b, c) in enumerate(found):
            lead = leads.setdefault((id(c), b.p.dtype, b.p.device), at)
            self._seen.append((p, b[2:], _places(b), lead))
            others = [t for t in (b.p, *b[2:]) if t is not None]
            order = memory_order(b)
            if b.p.numel() < 2:  # one element would be a case of its own to the compiler
                self._left.append(at)
            elif order is None:
                move = _compiled((self.rule, "shaped", b.p.dtype, b.p.device.type))
                self._calls.append(_Call(move, lead, [at], None, others, []))
            else:
                # A view remembers the shape it is a view of, and each such shape would be compiled for: ``data`` forgets it, and the
                # parameter's version, by which autograd knows that it was changed.
                flat = [vector(t, order).data for t in others]
                lanes.setdefault(lead, []).append(_Member(at, order, flat))
                self._moved.append(b.p)
        for lead, members in lanes.items():
            self._share(lead, members)

    def _share(self, lead: int, members: list[_Member]) -> None:
        """The calls of those that take the same step."""
        for start in range(0, len(members), TOGETHER):
            part = members[start : start + TOGETHER]
            # A full call costs less than half as many alone do: the rest of it is a few numbers that nobody reads.
            filled = len(part) >= TOGETHER // 2 and len(members) >= TOGETHER
            for together in [part] if filled else [[one] for one in part]:
                missing = TOGETHER - len(together) if filled else 0
                like = together[0].flat
                padding, more = _examples(like, missing, 32)
                others = [t for member in together for t in member.flat]
                self._calls.append(
                    _Call(
                        self._ready(len(together) + missing, like),
                        lead,
                        [member.at for member in together],
                        [member.order for member in together],
                        [*others, *more],
                        padding,
                    )
                )

    def _ready(self, count: int, like: list[Tensor]) -> Callable[..., None]:
        """The compiled function for so many tensors."""
        p = like[0]
        kind = self.rule, count, len(like), p.dtype, p.device.type
        move = _compiled(kind)
        if kind not in _primed:
            # Sizes that are equal at the first call would be compiled as always equal.
            move(*_examples(like, count, 4096), p.new_zeros(len(Coefficients._fields)), self.rule)
            _primed.add(kind)
        return move


class _Member(NamedTuple):
    at: int  # its place among the group's
    order: Sequence[int]  # of its axes in memory
    flat: list[Tensor]  # the parameter and its state, as vectors


class _Call(NamedTuple):
    run: Callable[..., None]
    lead: int  # the place of the first that takes this step
    places: list[int]
    orders: list[Sequence[int]] | None  # None: as shaped
    others: list[Tensor]
    padding: list[Tensor]  # gradients that fill the call


def _places(b: Buffers) -> list[int]:
    """Where a parameter and its state lie in memory."""
    return [t.data_ptr() for t in (b.p, *b[2:]) if t is not None]


def _examples(like: list[Tensor], count: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients, and all that moves with them: zeros of as many sizes as ``count``."""
    sizes = range(size, size + 32 * count, 32)
    return [like[0].new_zeros(n) for n in sizes], [t.new_zeros(n) for n in sizes for t in like]


_primed: set[Any] = set()
