"""Kernels for GPUs, block by block, for any number of query heads a key head: every tile holds queries that chose the same block.

The (query, slot) pairs are sorted by block and cut into tiles of equal size; a tile is multiplied with its block, and the shares of a query are merged by
their log-sum-exp. One program a block sums the gradients of its keys and values, so that they come out the same in every run. Half precision is
multiplied as it is and summed in float32. With ``TRITON_INTERPRET=1``, set before this file is imported, the same kernels run on a CPU, slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lineament.core.checks import require
from lineament.modules.sparse_attention.blocks import Blocks

if TYPE_CHECKING:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
else:
    triton = tl = None
    with suppress(ImportError):
        import triton
        import triton.language as tl

# Half precision is not widened before the kernels.
WIDE = False
# Rows of a tile, tokens of a block multiplied at once, and elements of the shares held at once.
ROWS, TOKENS, SHARES = 64, 64, 2**27


def usable(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    if triton is None or device.type == "cuda":
        return triton is not None
    return not isinstance(_share, triton.JITFunction)  # pyright: ignore[reportAttributeAccessIssue]


def forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    q, k, v = _alike(q, k, v)
    plan = _Plan(q, k, v, indices, layout, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)
    for part, queue in plan.parts(indices):
        # By selecting head, query, query head of the group and place of the share.
        lines = indices[:, :, part].shape[:3]
        sums = q.new_full((*lines, plan.group, plan.shares), -torch.inf, dtype=wide)
        shares = q.new_zeros(*sums.shape, v.shape[3])
        plan.launch(_share, (len(queue.tile), plan.chunks), queue, shares, sums)
        total = sums.logsumexp(-1, keepdim=True)
        weights = (sums - torch.where(total.isinf(), 0, total)).exp()
        merged = torch.matmul(weights.to(v.dtype)[..., None, :], shares)[..., 0, :]
        out[:, :, part] = merged.transpose(2, 3).flatten(1, 2)
        lse[:, :, part] = total[..., 0].transpose(2, 3).flatten(1, 2)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float,
    lse: Tensor, d_out: Tensor, delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    q, k, v, d_out = _alike(q, k, v, d_out)
    lse, delta = lse.contiguous(), delta.contiguous()
    plan = _Plan(q, k, v, indices, layout, scale)
    heads = indices.shape[1]
    # Heads that share keys but choose by themselves each have their own sum.
    d_q = torch.empty_like(q)
    d_k, d_v = (lse.new_zeros(len(x), heads, *x.shape[2:]) for x in (k, v))
    for part, queue in plan.parts(indices):
        lines = indices[:, :, part].shape[:3]
        shares = q.new_zeros(*lines, plan.group, plan.shares, q.shape[3])
        plan.launch(_gradients, (len(queue.start), plan.chunks), queue, lse, d_out, delta, shares, d_k, d_v)
        d_q[:, :, part] = shares.sum(4, dtype=lse.dtype).transpose(2, 3).flatten(1, 2).to(q.dtype)
    d_k, d_v = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (d_k, d_v))
    return d_q, d_k, d_v


def _alike(*tensors: Tensor) -> list[Tensor]:
    require(
        usable(tensors[0].device),
        f"backend: 'triton' does not run on {tensors[0].device} here, expected CUDA tensors and an installed triton; "
        "'auto' runs anywhere",
    )
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype).contiguous() for x in tensors]


@dataclass(frozen=True)
class _Queue:
    """Some of the queries' (query, slot) pairs, sorted by block.

    ``order``: the pairs; ``last``: of each pair, unsorted, the last place of its block that the query sees; by block ``start`` and ``stop``, its tokens,
    and ``begin``, its first place in the order; by tile ``tile``, its block, -1 where there is none, and ``first``, its first place in the order.
    """

    order: Tensor
    last: Tensor
    start: Tensor
    stop: Tensor
    begin: Tensor
    tile: Tensor
    first: Tensor
    queries: int
    offset: int

    @staticmethod
    def of(indices: Tensor, layout: Blocks, part: slice, places: int) -> _Queue:
        asked = indices[:, :, part]
        rows, heads, queries, _ = asked.shape
        last = torch.where(asked < 0, -1, layout.size - 1)
        # Of its own block, the first, a query sees what is not behind it.
        last[..., 0] = torch.where(asked[..., 0] < 0, -1, layout.within[:, None, part])
        segments = rows * heads * layout.count
        line = torch.arange(rows * heads, device=asked.device).view(rows, heads, 1, 1)
        block, order = (
            torch.where(asked < 0, segments, line * layout.count + asked).flatten().sort(stable=True)
        )
        begin = torch.searchsorted(block, torch.arange(segments + 1, device=asked.device))
        needed = (begin.diff() + places - 1) // places
        behind = needed.cumsum(0)
        # As many tiles as there can be, so that nothing waits for their number.
        number = torch.arange(min(len(block), len(block) // places + segments), device=asked.device)
        tile = torch.searchsorted(behind, number, right=True)
        known = tile.clamp(max=segments - 1)
        first = begin[known] + (number - behind[known] + needed[known]) * places
        start, stop = (
            x[:, None].expand(rows, heads, -1).flatten().contiguous() for x in (layout.starts, layout.stops)
        )
        tile = torch.where(tile < segments, tile, -1)
        return _Queue(order, last.flatten(), start, stop, begin, tile, first, queries, part.start)


class _Plan:
    """What all launches of one call have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float):
        self.inputs, self.layout, self.scale = (q, k, v), layout, scale
        self.heads, self.slots = indices.shape[1], indices.shape[3]
        self.group = q.shape[1] // self.heads
        # Wide heads in smaller tiles, so that they fit into a processor's own memory; float32 also takes its parts.
        width = max(q.shape[3], v.shape[3]) * (2 if q.element_size() == 2 else 8)
        smaller = 1 if width <= 256 else 2 if width <= 512 else 4
        self.rows = max(ROWS // smaller, _power(self.group))
        self.tokens = min(TOKENS // smaller, _power(layout.size))
        self.warps = 4 if width <= 128 else 8
        self.chunks = -(-layout.size // self.tokens)
        self.shares = self.slots * self.chunks

    def parts(self, indices: Tensor) -> Iterator[tuple[slice, _Queue]]:
        q, _, v = self.inputs
        row = len(q) * q.shape[1] * self.shares * max(q.shape[3], v.shape[3])
        step = max(1, SHARES // row)
        for start in range(0, q.shape[2], step):
            part = slice(start, min(start + step, q.shape[2]))
            yield part, _Queue.of(indices, self.layout, part, self.rows // self.group)

    def launch(self, kernel: Any, grid: tuple[int, int], queue: _Queue, *tensors: Tensor) -> None:
        q, k, v = self.inputs
        # Three products of a float32 number's parts are as exact as one of all of it, and quicker.
        exact = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            kernel[grid](
                q, k, v, *tensors, queue.order, queue.last, queue.start, queue.stop, queue.begin, queue.tile, queue.first,
                self.scale, self.heads, self.layout.count, q.shape[2], k.shape[2], queue.queries, queue.offset,
                GROUP=self.group, SHARED=self.heads // k.shape[1], SLOTS=self.slots, CHUNKS=self.chunks, SIZE=self.layout.size,
                K=q.shape[3], V=v.shape[3], K_2=_power(q.shape[3]), V_2=_power(v.shape[3]), ROWS=self.rows, TOKENS=self.tokens,
                PRECISION=exact if q.dtype == torch.float32 else "ieee", num_warps=self.warps, num_stages=1,
            )  # fmt: skip


def _power(count: int) -> int:
    """The power of two that holds so many; matrix products want at least 16."""
    return max(16, 1 << (count - 1).bit_length())


def _compiled(function: Callable[..., None]) -> Any:
    return function if triton is None else triton.jit(function)  # pyright: ignore[reportAttributeAccessIssue]


@_compiled
def _share(
    q, k, v, shares, sums, order, last, start, stop, begin, tile, first,
    scale, heads, count, queries, keys, asked, offset,
    GROUP: tl.constexpr, SHARED: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, SIZE: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, K_2: tl.constexpr, V_2: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a tile's queries to a chunk of their block alone, and its log-sum-exp."""
    segment = tl.load(tile + tl.program_id(0))
    if segment >= 0:
        chunk = tl.program_id(1)
        line = segment // count
        row = tl.arange(0, ROWS)
        at = tl.load(first + tl.program_id(0)) + row // GROUP
        there = (row < ROWS // GROUP * GROUP) & (at < tl.load(begin + segment + 1))
        pair = tl.load(order + at, mask=there, other=0)
        end = tl.load(last + pair, mask=there, other=-1)
        query = (line * GROUP + row % GROUP) * queries + offset + pair // SLOTS % asked
        share = ((pair // SLOTS * GROUP + row % GROUP) * SLOTS + pair % SLOTS) * CHUNKS + chunk
        place = chunk * TOKENS + tl.arange(0, TOKENS)
        token = tl.load(start + segment) + place
        held = (place < SIZE) & (token < tl.load(stop + segment))
        token += (line // heads * (heads // SHARED) + line % heads // SHARED) * keys
        i, j = tl.arange(0, K_2), tl.arange(0, V_2)
        rows = tl.load(q + query[:, None] * K + i[None, :], mask=there[:, None] & (i < K)[None, :], other=0)
        columns = tl.load(k + token[None, :] * K + i[:, None], mask=held[None, :] & (i < K)[:, None], other=0)
        logits = tl.dot(rows, columns, input_precision=PRECISION) * scale
        logits = tl.where(place[None, :] <= end[:, None], logits, float("-inf"))
        top = tl.max(logits, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(logits - base[:, None])
        total = tl.sum(weights, 1)
        values = tl.load(v + token[:, None] * V + j[None, :], mask=held[:, None] & (j < V)[None, :], other=0)
        out = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        empty = total == 0
        total = tl.where(empty, 1.0, total)
        tl.store(
            shares + share[:, None] * V + j[None, :],
            (out / total[:, None]).to(shares.dtype.element_ty),
            mask=there[:, None] & (j < V)[None, :],
        )
        tl.store(sums + share, tl.where(empty, float("-inf"), base + tl.log(total)), mask=there)


@_compiled
def _gradients(
    q, k, v, lse, d_out, delta, shares, d_k, d_v, order, last, start, stop, begin, tile, first,
    scale, heads, count, queries, keys, asked, offset,
    GROUP: tl.constexpr, SHARED: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, SIZE: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, K_2: tl.constexpr, V_2: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk of a block: the gradients of its keys and values, and what it gives to those of the queries that chose it."""
    segment = tl.program_id(0).to(tl.int64)
    opened, closed = tl.load(begin + segment), tl.load(begin + segment + 1)
    if closed > opened:
        chunk = tl.program_id(1)
        line = segment // count
        place = chunk * TOKENS + tl.arange(0, TOKENS)
        token = tl.load(start + segment) + place
        held = (place < SIZE) & (token < tl.load(stop + segment))
        own = line * keys + token
        token += (line // heads * (heads // SHARED) + line % heads // SHARED) * keys
        i, j = tl.arange(0, K_2), tl.arange(0, V_2)
        of_keys, of_values = held[:, None] & (i < K)[None, :], held[:, None] & (j < V)[None, :]
        columns = tl.load(k + token[:, None] * K + i[None, :], mask=of_keys, other=0)
        values = tl.load(v + token[:, None] * V + j[None, :], mask=of_values, other=0)
        at_keys, at_values = (
            d_k + own[:, None] * K + i[None, :],
            d_v + own[:, None] * V + j[None, :],
        )
        sum_k = tl.load(at_keys, mask=of_keys, other=0)
        sum_v = tl.load(at_values, mask=of_values, other=0)
        row = tl.arange(0, ROWS)
        for place_of_tile in range(opened, closed, ROWS // GROUP):
            at = place_of_tile + row // GROUP
            there = (row < ROWS // GROUP * GROUP) & (at < closed)
            pair = tl.load(order + at, mask=there, other=0)
            end = tl.load(last + pair, mask=there, other=-1)
            query = (line * GROUP + row % GROUP) * queries + offset + pair // SLOTS % asked
            share = ((pair // SLOTS * GROUP + row % GROUP) * SLOTS + pair % SLOTS) * CHUNKS + chunk
            of_rows = there[:, None] & (i < K)[None, :]
            rows = tl.load(q + query[:, None] * K + i[None, :], mask=of_rows, other=0)
            d_rows = tl.load(
                d_out + query[:, None] * V + j[None, :], mask=there[:, None] & (j < V)[None, :], other=0
            )
            logits = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * scale
            logits -= tl.load(lse + query, mask=there, other=0)[:, None]
            weights = tl.where(place[None, :] <= end[:, None], tl.exp(logits), 0.0)
            sum_v += tl.dot(tl.trans(weights.to(d_rows.dtype)), d_rows, input_precision=PRECISION)
            d_weights = tl.dot(d_rows, tl.trans(values), input_precision=PRECISION)
            d_weights -= tl.load(delta + query, mask=there, other=0)[:, None]
            d_logits = (weights * d_weights * scale).to(rows.dtype)
            sum_k += tl.dot(tl.trans(d_logits), rows, input_precision=PRECISION)
            moved = tl.dot(d_logits, columns, input_precision=PRECISION)
            tl.store(
                shares + share[:, None] * K + i[None, :], moved.to(shares.dtype.element_ty), mask=of_rows
            )
        tl.store(at_keys, sum_k, mask=of_keys)
        tl.store(at_values, sum_v, mask=of_values)
