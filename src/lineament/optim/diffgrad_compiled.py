"""diffGrad's step compiled into one pass over memory: which tensors move together, and what is kept from step to step.

The kernel runs at the speed of memory, so what is left to save is the calls:
eight tensors share one (where a group has so many), and its arguments are kept, all but the gradients, for as long as the same tensors move. (After a pass over memory
nothing of Python is left in the caches, so each line of a step costs several times what it does in a test.)
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lineament.optim.diffgrad import Coefficients, Row, Rule, in_memory, memory_order
from lineament.optim.frictions import statistical_

# Tensors in one compiled call.
SHARED = 8


class Passes:
    """The compiled step for the parameters of one group: ``SHARED`` tensors at a call, which costs what three tensors alone do."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self._seen: list[Any] = []
        self._calls: list[_Call] = []
        self._moved: list[Tensor] = []
        self._left: list[int] = []

    def move(self, rows: Sequence[Row]) -> list[Row]:
        """One step; those rows that the compiled code is not for are handed back."""
        seen = [_identity(row) for row in rows]
        leads: dict[int, int] = {}
        shared = [leads.setdefault(id(row.c), at) for at, row in enumerate(rows)]  # who takes the same step
        if [seen, shared] != self._seen:
            self._seen = [seen, shared]
            self._arrange(rows, shared)
        numbers: dict[int, Tensor] = {}
        for call in self._calls:
            row = rows[call.places[0]]
            lead = shared[call.places[0]]
            if lead not in numbers:
                numbers[lead] = _packed(row.c, row.p)
            gradients = [in_memory(rows[at].g, order).data for at, order in zip(call.places, call.orders)]
            call.run([*gradients, *call.padding], call.others, numbers[lead], self.rule)
        torch.autograd.graph.increment_version(self._moved)
        return [rows[at] for at in self._left]

    def _arrange(self, rows: Sequence[Row], shared: Sequence[int]) -> None:
        """Distribute the rows over calls."""
        self._calls, self._moved, self._left = [], [], []
        lanes: dict[Any, list[tuple[int, Sequence[int]]]] = {}
        for at, row in enumerate(rows):
            order = memory_order(row)
            if order is None or row.p.numel() < 2:  # one element would be a case of its own to the compiler
                self._left.append(at)
            else:
                lanes.setdefault((shared[at], row.p.dtype, row.p.device), []).append((at, order))
                self._moved.append(row.p)
        for lane in lanes.values():
            # A kernel for one tensor compiles faster than one for eight, and few tensors have no calls to save.
            count = SHARED if len(lane) >= SHARED else 1
            for start in range(0, len(lane), count):
                places, orders = zip(*lane[start : start + count])
                # A view remembers the shape it is a view of, and each such shape would be compiled for: ``data`` forgets it, and the
                # parameter's version, by which autograd knows that it was changed.
                flat = [
                    [in_memory(t, order).data for t in _tensors(rows[at])]
                    for at, order in zip(places, orders)
                ]
                padding, more = _examples(flat[0], count - len(places), 32)
                others = [t for tensors in flat for t in tensors]
                run = _compiled(self.rule, count, len(flat[0]), flat[0][0].dtype, flat[0][0].device)
                self._calls.append(_Call(run, places, orders, [*others, *more], padding))


class _Call(NamedTuple):
    run: Callable[..., None]
    places: Sequence[int]  # of its rows in the group
    orders: Sequence[Sequence[int]]  # of their axes in memory
    others: list[Tensor]  # each parameter with its state, as vectors, one after the other
    padding: list[Tensor]  # gradients that fill the call: a few numbers that nobody reads


def _tensors(row: Row) -> list[Tensor]:
    """The parameter and its state."""
    return [t for t in (row.p, *row[2:8]) if t is not None]


def _identity(row: Row) -> list[Any]:
    """What must be the same for the arguments of the last step to serve again: the tensors and where they lie in memory."""
    return [(id(t), t.data_ptr()) for t in _tensors(row)]


def _packed(c: Coefficients, like: Tensor) -> Tensor:
    """The numbers of a step as one tensor: other numbers compile nothing anew."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if any(isinstance(x, Tensor) for x in c):
        return torch.stack([torch.as_tensor(x, dtype=dtype, device=like.device) for x in c])
    return torch.tensor(c, dtype=dtype, device=like.device)


def _traced(gradients: Sequence[Tensor], others: Sequence[Tensor], numbers: Tensor, rule: Rule) -> None:
    """One step; ``others`` in one list, for lists in a list would cost the call more."""
    c = Coefficients(*numbers.unbind())
    width = len(others) // len(gradients)
    for at, g in enumerate(gradients):
        _step(g, *others[at * width : (at + 1) * width], c=c, rule=rule)


def _step(
    g: Tensor, p: Tensor, m: Tensor, v: Tensor, q: Tensor, *more: Tensor, c: Coefficients, rule: Rule
) -> None:
    """:func:`~lineament.optim.diffgrad.update` for one tensor, as one expression: what a compiler makes one loop of."""
    top = more[0] if len(more) % 2 else None  # the mean and the spread are two
    mean, spread = more[-2:] if len(more) > 1 else (None, None)
    if rule.maximize:
        g = -g
    if rule.l2:
        g = g + p * c.decay
    if rule.decoupled:
        p.mul_(c.shrink)
    m.add_((g - m) * c.w1)
    v.add_((g * g - v) * c.w2)
    if top is not None:
        torch.maximum(top, v, out=top)
    root = (v if top is None else top).sqrt() + c.eps
    change = q - g
    if rule.version == 0 and rule.fixed is None:
        # The sigmoid's division and the step's are one: what the loop waits for.
        adapted = m * c.step / ((1 + (-change.abs()).exp()) * root)
    else:
        deviation = None if spread is None else (spread * c.before).sqrt()
        adapted = _friction(change, rule, mean, deviation) * m / root * c.step
    if mean is not None and spread is not None:
        off = g - mean
        mean.add_(off * c.after)
        spread.addcmul_(off, g - mean)
    p.sub_(torch.where(c.step > 0, adapted, m * c.plain) if rule.rectified else adapted)
    q.copy_(g)


def _friction(change: Tensor, rule: Rule, mean: Tensor | None, deviation: Tensor | None) -> Tensor:
    if rule.fixed is not None:
        return torch.full_like(change, rule.fixed)
    if mean is not None and deviation is not None:
        return statistical_(change, rule.version, mean, deviation)
    change = change if rule.version == 1 else change.abs()
    return 9 * torch.sigmoid(0.5 * change) - 4 if rule.version == 2 else torch.sigmoid(change)


@functools.cache
def _compiled(
    rule: Rule, count: int, width: int, dtype: torch.dtype, device: torch.device
) -> Callable[..., None]:
    # A code object for each kind: a compiler keeps few versions of one. Sizes are dynamic, so that another shape compiles nothing.
    code = _traced.__code__.replace(co_name="diffgrad")
    # The guards look at each tensor; that nobody has changed this module and the rule need not be asked at each call, nor the sizes asked twice.
    options = {"size_asserts": False, "guard_filter_fn": _about_tensors}
    run = torch.compile(types.FunctionType(code, globals()), dynamic=True, options=options)
    # Sizes that are equal at the first call would be compiled as always equal.
    like = [torch.empty(0, dtype=dtype, device=device)] * width
    run(*_examples(like, count, 4096), like[0].new_zeros(len(Coefficients._fields)), rule)
    return run


def _about_tensors(guards: Sequence[Any]) -> list[bool]:
    return [not (guard.is_global or guard.name.startswith("rule")) for guard in guards]


def _examples(like: list[Tensor], count: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients, and all that moves with them: zeros of ``count`` different sizes."""
    sizes = range(size, size + 32 * count, 32)
    return [like[0].new_zeros(n) for n in sizes], [t.new_zeros(n) for n in sizes for t in like]
