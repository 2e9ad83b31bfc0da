"""A table that lies with several processes: the exchange of rows is here, since DTensor's own ``embedding`` reduces whole outputs and gives each process the gradient of the whole table.

Each process asks for the different rows of its batch, once for all features. Divided by rows (Coleman et al. 2023, arXiv 2305.12102, describe the web scale), the owners are asked by one all_to_all of row
numbers and answer by one of rows; the backward is its mirror image, and each owner sums what comes. Of U different rows of c numbers, U (8 + 8c) bytes travel at most: a number there, a row back, its gradient there.
Divided by columns, every process is asked for its columns of every row; replicated, row numbers and gradients go to all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lineament.core.checks import one_of, require
from lineament.core.shards import introduce, place_in_training, told
from lineament.core.whole_files import dimension, local, part_of

if TYPE_CHECKING:
    from lineament.modules.unified_embedding.table import UnifiedEmbedding

LAYOUTS = ("row", "table", "column", "replicate")


def shard(table: UnifiedEmbedding, mesh: Any, by: str) -> None:
    """Make the rows a DTensor of a mesh's processes, as the first process has them."""
    count = place_in_training()[1]
    one_of("by", by, LAYOUTS)
    require(
        count > 1 or mesh is not None,
        "mesh: there is no process group; start the processes by torchrun and call torch.distributed.init_process_group() first",
    )
    require(not table.sharded, "mesh: the table lies with several processes already")
    if by == "table":
        whole = table.tables % count == 0
        require(
            whole and len(table.weight) == table.tables * table.rows,
            f"by: {table.tables} sub-tables{'' if not whole else ' and rows of their own'} do not divide among {count} processes, expected a multiple of {count} and none of collisionless_below, reserve; divide by 'row'",
        )
    require(
        by != "column" or table.chunk >= count,
        f"by: {table.chunk} columns do not divide among {count} processes; divide by 'row'",
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if mesh is None:
        kind = table.weight.device.type
        if kind == "meta":  # where the processes' messages lie
            kind = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        mesh = init_device_mesh(kind, (count,))
    require(
        mesh.ndim == 1 and mesh.size() == count,
        f"mesh: got {mesh}, expected one dimension with all {count} processes",
    )
    introduce()
    place = {"column": Shard(1), "replicate": Replicate()}.get(by, Shard(0))
    if table.weight.is_meta:
        table.weight = nn.Parameter(_drawn(table, mesh, place))
    else:
        table.weight = nn.Parameter(distribute_tensor(table.weight.detach(), mesh, [place]))


def _drawn(table: UnifiedEmbedding, mesh: Any, place: Any) -> Any:
    """The weights that a table begins with; each process keeps its part of what is drawn."""
    from torch.distributed.tensor import empty

    made: Any = empty(*table.weight.shape, dtype=table.weight.dtype, device_mesh=mesh, placements=[place])
    along, own = dimension(made), local(made)
    part = slice(0, len(made)) if along is None else part_of(made.shape[along], *place_in_training())
    for start, rows in table.drawn():
        if along == 1:
            own[start : start + len(rows)] = rows[:, part]
            continue
        first, last = max(start, part.start), min(start + len(rows), part.stop)
        if first < last:
            own[first - part.start : last - part.start] = rows[first - start : last - start]
    return made


def exchanged(table: UnifiedEmbedding, at: Tensor) -> tuple[Tensor, Tensor]:
    """(the different rows of ``at`` [U, chunk], with gradients; their numbers in ``at``'s place)."""
    rows, where = at.unique(return_inverse=True)
    found: Any = _Exchanged.apply(table.weight, rows, table.sparse)
    return found, where


class _Exchanged(torch.autograd.Function):
    """Rows of a table that lies with several processes; the gradient is the mean over them, as DistributedDataParallel makes it of the network behind."""

    @staticmethod
    def forward(ctx: Any, weight: Any, rows: Tensor, sparse: bool) -> Tensor:
        ctx.weight, ctx.sparse = weight, sparse
        own, along = local(weight), dimension(weight)
        if along is None:
            ctx.asked = rows
            return own.index_select(0, rows)
        count = place_in_training()[1]
        if along == 0:
            parts = [part_of(len(weight), rank, count) for rank in range(count)]
            starts = torch.tensor([part.start for part in parts], device=rows.device)
            bounds = torch.cat([torch.searchsorted(rows, starts), starts.new_tensor([len(rows)])])
            ctx.sent = bounds.diff().tolist()
            ctx.got = _counts(ctx.sent, weight)
            asked = _swapped(rows, ctx.sent, ctx.got, weight) - parts[place_in_training()[0]].start
            ctx.asked = asked
            return _swapped(own.index_select(0, asked), ctx.got, ctx.sent, weight)
        ctx.asked, ctx.got = _of_all(rows, weight)
        ctx.widths = _widths(weight, count)
        back = [len(rows) * width for width in ctx.widths]
        answer = own.index_select(0, ctx.asked).flatten()
        found = _swapped(answer, [n * own.shape[1] for n in ctx.got], back, weight)
        columns = zip(found.split(back), ctx.widths)
        return torch.cat([part.view(len(rows), width) for part, width in columns], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, gradient = ctx.weight, grads[0].contiguous()
        own, along, asked = local(weight), dimension(weight), ctx.asked
        count = place_in_training()[1]
        if along == 0:
            values = _swapped(gradient, ctx.sent, ctx.got, weight)
        elif along is None:
            (asked, got), sent = _of_all(asked, weight), [len(asked)] * count
            values = _swapped(gradient.repeat(count, 1), sent, got, weight)
        else:
            parts = [part.reshape(-1) for part in gradient.split(ctx.widths, 1)]
            back = [n * own.shape[1] for n in ctx.got]
            values = _swapped(torch.cat(parts), [len(part) for part in parts], back, weight)
            values = values.view(len(asked), own.shape[1])
        values = values / count
        if not ctx.sparse:
            return _as_divided(torch.zeros_like(own).index_add_(0, asked, values), weight), None, None
        made = torch.sparse_coo_tensor(asked[None], values, own.shape, check_invariants=False)
        _leave(weight, made)
        return None, None, None


def _leave(weight: Any, gradient: Tensor) -> None:
    """Add to ``weight.grad`` a DTensor whose parts are sparse, which autograd itself cannot add (torch 2.13)."""
    held = weight.grad
    if held is not None:
        before = local(held)
        gradient = before + gradient if before.is_sparse else before.add(gradient)
    weight.grad = _as_divided(gradient, weight)


def _as_divided(part: Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor(part, like._spec, requires_grad=False)  # pyright: ignore[reportCallIssue]


def _counts(sent: list[int], weight: Any) -> list[int]:
    """How much each process sends here, where ``sent`` says what this one sends to each."""
    import torch.distributed as dist

    given = torch.tensor(sent, device=local(weight).device)
    found = torch.empty_like(given)
    told(lambda: dist.all_to_all_single(found, given, group=weight.device_mesh.get_group()))
    return found.tolist()


def _of_all(rows: Tensor, weight: Any) -> tuple[Tensor, list[int]]:
    """The row numbers of all processes, by rank, and how many each has."""
    sent = [len(rows)] * place_in_training()[1]
    got = _counts(sent, weight)
    return _swapped(rows.repeat(len(sent)), sent, got, weight), got


def _swapped(given: Tensor, sent: list[int], got: list[int], weight: Any) -> Tensor:
    """Parts of ``given``, ``sent`` long, to each process; what comes from each, ``got`` long."""
    import torch.distributed as dist

    found = given.new_empty(sum(got), *given.shape[1:])
    group = weight.device_mesh.get_group()
    told(lambda: dist.all_to_all_single(found, given.contiguous(), got, sent, group=group))
    return found


def _widths(weight: Any, count: int) -> list[int]:
    parts = [part_of(weight.shape[1], rank, count) for rank in range(count)]
    return [part.stop - part.start for part in parts]
