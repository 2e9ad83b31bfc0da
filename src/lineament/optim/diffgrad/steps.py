"""One step of diffGrad on tensors: block by block, or many tensors at a time.

:func:`update` holds the mathematics for all but the foreach form. On a CPU a large tensor is walked in blocks that stay in the cache, which
halves the time of the eager form; compiled, the same function reads and writes each buffer once. The bias corrections are folded into
step size and eps, so that the paper's form and the released code's differ in one number.
"""

# PyTorch's foreach functions are public by use, not by name; tuples of buffers are made from loops.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lineament.optim.diffgrad.frictions import STATISTICAL, friction_

# Elements of each buffer in a block, for each thread: short enough for the caches, long enough that the calls cost little (measured).
BLOCK = 2**17
_LOW = (torch.float16, torch.bfloat16)
# The kernels over lists of tensors have no public names and no types.
_lists: Any = torch


class Buffers(NamedTuple):
    """A parameter, its gradient and its state; the last three only where the rule needs them."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    q: Tensor  # the previous gradient
    top: Tensor | None = None  # the greatest v so far (AMSGrad)
    mean: Tensor | None = None  # of the gradients before this step
    spread: Tensor | None = None  # the sum of their squared distances to the mean


class Rule(NamedTuple):
    """What is decided once for a parameter group."""

    version: int
    fixed: float | None
    maximize: bool
    l2: bool
    decoupled: bool
    alias: bool
    rectified: bool


class Coefficients(NamedTuple):
    """The numbers of one step: floats, or 0-dimensional tensors where the host must not know them."""

    w1: Any  # 1 - beta1
    w2: Any  # 1 - beta2
    step: Any  # of the adapted update; 0 where rectification forbids it
    plain: Any  # of the momentum step that is taken instead
    eps: Any
    decay: Any
    shrink: Any  # 1 - lr * decay
    before: Any  # 1 / (t - 1), 0 at the first step
    after: Any  # 1 / t


def coefficients(group: dict[str, Any], t: float | Tensor, lr: float | Tensor) -> Coefficients:
    """The numbers of step ``t``; tensors when ``t`` is one."""
    beta1, beta2 = group["betas"]
    if isinstance(t, Tensor) and t.device.type != "mps":  # which has no float64
        t = t.double()
    bc1, bc2 = 1 - beta1**t, 1 - beta2**t
    root = bc2**0.5
    step, plain = lr * root / bc1, 0.0
    if group["rectify"] is not None and not isinstance(t, Tensor):
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / bc2
        if length >= 5:
            ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step = step * ratio**0.5
        else:
            step, plain = 0.0, lr / bc1 if group["rectify"] == "momentum" else 0.0
    eps = group["eps"] * root if group["eps_mode"] == "paper" else group["eps"]
    before = torch.where(t > 1, 1 / (t - 1), 0) if isinstance(t, Tensor) else 1 / (t - 1) if t > 1 else 0.0
    decay = group["weight_decay"]
    return Coefficients(1 - beta1, 1 - beta2, step, plain, eps, decay, 1 - lr * decay, before, 1 / t)


def coefficients_of_all(group: dict[str, Any], counters: Sequence[Tensor]) -> list[Coefficients]:
    """The numbers of each parameter's step where the counters are on its device: those of a device in one computation."""
    found: list[Any] = [None] * len(counters)
    for device in {t.device for t in counters}:
        here = [k for k, t in enumerate(counters) if t.device == device]
        together = coefficients(group, torch.stack([counters[k] for k in here]), group["lr"])
        columns = [x.unbind() if isinstance(x, Tensor) and x.ndim else [x] * len(here) for x in together]
        for k, each in zip(here, zip(*columns)):
            found[k] = Coefficients(*each)
    return found


def update(b: Buffers, c: Coefficients, rule: Rule, scratch: Tensor | None = None) -> None:
    """One step, in place, of tensors of one shape.

    ``scratch`` (at least as long as ``b.p``, which is then flat) saves the allocation of the one temporary.
    """
    if b.p.dtype in _LOW:
        wide = Buffers(*(None if t is None else t.float() for t in b))
        update(wide, c, rule, scratch)
        for narrow, result in zip(b, wide):
            if narrow is not None and narrow is not b.g:
                narrow.copy_(cast(Tensor, result))
        return
    p, m, v = b.p, b.m, b.v
    g = -b.g if rule.maximize else b.g
    if rule.l2:
        g = g + p * c.decay if isinstance(c.decay, Tensor) else torch.add(g, p, alpha=c.decay)
    if rule.decoupled:
        p.mul_(c.shrink)
    if isinstance(c.w1, Tensor):
        m.add_((g - m) * c.w1)  # lerp_ with a tensor computes both of its formulas and chooses
        v.add_((g * g - v) * c.w2)
    else:
        m.lerp_(g, c.w1)
        v.mul_(1 - c.w2).addcmul_(g, g, value=c.w2)
    if b.top is not None:
        torch.maximum(b.top, v, out=b.top)
    if isinstance(c.step, Tensor) and rule.version == 0 and rule.fixed is None and not rule.alias:
        # 1 / xi joins the denominator: one division of the two, which is what a fused pass waits for.
        drag = b.q.sub_(g).abs_().neg_().exp_().add_(1)
        root = (v if b.top is None else b.top).sqrt().add_(c.eps)
        p.sub_(_taken(m * c.step / (drag * root), m, c, rule))
        b.q.copy_(g)
        return
    change = b.q - g if rule.alias else b.q.sub_(g)
    xi = frictions(change, b, c, rule)
    if b.mean is not None and b.spread is not None:
        off = g - b.mean
        b.mean.add_(off * c.after)
        b.spread.addcmul_(off, g - b.mean)
    _move(p, m, xi, v if b.top is None else b.top, c, rule, scratch)
    if not rule.alias:
        b.q.copy_(g)


def frictions(change: Tensor, b: Buffers, c: Coefficients, rule: Rule) -> Tensor:
    """The friction of each coordinate, in the memory of ``change``."""
    if rule.fixed is not None:
        return change.fill_(rule.fixed)
    deviation = None if b.spread is None else (b.spread * c.before).sqrt()
    return friction_(change, rule.version, b.mean, deviation)


def _move(
    p: Tensor, m: Tensor, xi: Tensor, v: Tensor, c: Coefficients, rule: Rule, scratch: Tensor | None
) -> None:
    if isinstance(c.step, Tensor):
        p.sub_(_taken(xi.mul_(m).div_(v.sqrt().add_(c.eps)).mul_(c.step), m, c, rule))
        return
    if c.step:
        root = v.sqrt() if scratch is None else torch.sqrt(v, out=scratch[: v.numel()])
        p.addcdiv_(xi.mul_(m), root.add_(c.eps), value=-c.step)
    if c.plain:
        p.add_(m, alpha=-c.plain)


def _taken(adapted: Tensor, m: Tensor, c: Coefficients, rule: Rule) -> Tensor:
    """The step where the numbers are tensors: the momentum's where rectification forbids the adapted one."""
    return torch.where(c.step > 0, adapted, m * c.plain) if rule.rectified else adapted


def in_blocks(b: Buffers, c: Coefficients, rule: Rule, scratch: Callable[[Tensor, int], Tensor]) -> None:
    """:func:`update`, on a CPU block by block."""
    size = BLOCK * torch.get_num_threads()
    small = b.p.numel() <= size or b.p.device.type != "cpu"
    flat = None if small else flattened(b)
    if flat is None:
        update(b, c, rule)
        return
    room = scratch(flat.p, size)
    parts = (repeat(None) if t is None else t.split(size) for t in flat)
    for block in map(Buffers, *parts):
        update(block, c, rule, room)


def scratches() -> Callable[[Tensor, int], Tensor]:
    """A block of memory for each device and dtype, allocated at its first use."""
    rooms: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def room(like: Tensor, size: int) -> Tensor:
        dtype = torch.float32 if like.dtype in _LOW else like.dtype
        key = like.device, dtype
        if key not in rooms:
            rooms[key] = torch.empty(size, device=like.device, dtype=dtype)
        return rooms[key]

    return room


def memory_order(b: Buffers) -> Sequence[int] | None:
    """The axes as a parameter and its state have them in memory, or ``None`` where they have no common order."""
    p = b.p
    if type(p) not in (Tensor, nn.Parameter):  # a distributed tensor has its own ideas of memory
        return None
    kept = [t for t in (p, *b[2:]) if t is not None]
    if all(t.is_contiguous() for t in kept):
        return ()
    order = sorted(range(p.ndim), key=p.stride, reverse=True)
    return order if all(t.permute(*order).is_contiguous() for t in kept) else None


def vector(t: Tensor, order: Sequence[int]) -> Tensor:
    """A tensor as a vector in the order of memory: a view where it lies so, else a copy.

    >>> vector(torch.tensor([[1, 2], [3, 4]]), (1, 0))
    tensor([1, 3, 2, 4])
    """
    return (t.permute(*order) if order else t).reshape(-1)


def flattened(b: Buffers) -> Buffers | None:
    """The buffers as vectors in the order of memory, or ``None`` where they have no common one."""
    order = memory_order(b)
    return None if order is None else Buffers(*(t if t is None else vector(t, order) for t in b))


def in_lists(bs: Sequence[Buffers], cs: Sequence[Coefficients], rule: Rule) -> None:
    """:func:`update` by foreach kernels, for tensors of one device and dtype that take the same kind of step."""
    if bs[0].p.dtype in _LOW:
        wides = [Buffers(*(None if t is None else t.float() for t in b)) for b in bs]
        in_lists(wides, cs, rule)
        kept = [
            (n, w) for b, wide in zip(bs, wides) for n, w in zip(b, wide) if n is not None and n is not b.g
        ]
        _lists._foreach_copy_([n for n, _ in kept], [w for _, w in kept])
        return
    p, g, m, v, q, top, mean, spread = (list(column) for column in zip(*bs))
    c = cs[0]
    if rule.maximize:
        g = list(_lists._foreach_neg(g))
    if rule.l2:
        g = list(_lists._foreach_add(g, p, alpha=c.decay))
    if rule.decoupled:
        _lists._foreach_mul_(p, [each.shrink for each in cs])
    _lists._foreach_lerp_(m, g, c.w1)
    _lists._foreach_mul_(v, 1 - c.w2)
    _lists._foreach_addcmul_(v, g, g, value=c.w2)
    if top[0] is not None:
        _lists._foreach_maximum_(top, v)
        v = top
    _lists._foreach_sub_(q, g)
    if rule.fixed is None and rule.version not in STATISTICAL:
        _friction_lists(q, rule.version)
    else:
        for change, b, each in zip(q, bs, cs):
            frictions(change, b, each, rule)
    if mean[0] is not None:
        off = _lists._foreach_sub(g, mean)
        _lists._foreach_add_(mean, _lists._foreach_mul(off, [each.after for each in cs]))
        _lists._foreach_addcmul_(spread, off, _lists._foreach_sub(g, mean))
    if isinstance(c.step, Tensor) or c.step:
        _lists._foreach_mul_(q, m)
        root = _lists._foreach_sqrt(v)
        _lists._foreach_add_(root, [each.eps for each in cs])
        if isinstance(c.step, Tensor):
            _lists._foreach_div_(q, root)
            _lists._foreach_mul_(q, [each.step for each in cs])
            _lists._foreach_sub_(p, q)
        else:
            _lists._foreach_addcdiv_(p, q, root, [-each.step for each in cs])
    if c.plain:
        _lists._foreach_sub_(p, _lists._foreach_mul(m, [each.plain for each in cs]))
    _lists._foreach_copy_(q, g)


def _friction_lists(changes: list[Tensor], version: int) -> None:
    if version != 1:
        _lists._foreach_abs_(changes)
    if version == 2:
        _lists._foreach_mul_(changes, 0.5)
    _lists._foreach_sigmoid_(changes)
    if version == 2:
        _lists._foreach_mul_(changes, 9.0)
        _lists._foreach_sub_(changes, 4.0)
