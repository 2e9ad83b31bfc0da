"""A dictionary whose features lie with several processes: DTensors of encoder, bias and atoms, a part of the rows in each.

Every process passes the same rows and finds the k best of its own latents; the k best of all are among those, so that indices, values and scores of
count x k latents a row are what processes tell each other, beside the sum of their parts of a reconstruction. Codes are the same in all, and so
are losses; each process has the gradients of its own features. No product with the encoder, no gradient and no moment of Adam is held twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import require
from lineament.core.codes import Codes
from lineament.core.shards import joined, place_in_training, totals
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.topk.select import dots, select

DIVIDED = ("W_enc", "b_enc", "W_dec")


def divided(weight: Any) -> bool:
    """Whether a tensor's rows lie with several processes.

    >>> divided(torch.zeros(2, 2))
    False
    """
    return hasattr(weight, "to_local")


def local(weight: Any) -> Tensor:
    """The rows of a tensor that lie here: all of an ordinary one."""
    return weight.to_local() if divided(weight) else weight


def bounds(width: int) -> tuple[int, int]:
    """The first of this process's latents and the one behind its last, as ``torch.chunk`` divides them."""
    rank, count = place_in_training()
    size = -(-width // count)
    return min(rank * size, width), min((rank + 1) * size, width)


@torch.no_grad()
def divide(dictionary: Any, mesh: Any = None) -> None:
    """Make the parameters of a TopK dictionary DTensors whose rows lie with the processes of a mesh, as the first process has them.

    Raises:
        InputError: no process group, a mesh of some of the processes only, fewer features than that each process gets some.
    """
    require(
        place_in_training()[1] > 1 or mesh is not None,
        "mesh: there is no process group; start the processes by torchrun and call torch.distributed.init_process_group() first",
    )
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    rank, count = place_in_training()
    mesh = init_device_mesh(dictionary.W_enc.device.type, (count,)) if mesh is None else mesh
    require(
        mesh.ndim == 1 and mesh.size() == count,
        f"mesh: got {mesh}, expected one dimension with all {count} processes",
    )
    width = dictionary.width
    require(
        (count - 1) * -(-width // count) < width,
        f"mesh: {count} processes for {width} features leave one without any; expected fewer processes, or a width that they divide",
    )
    score = dictionary.selection.score
    require(
        score != "topk_of_l1",
        "selection: score 'topk_of_l1' divides by sums over all latents, and these lie with several processes; expected 'sum', 'product' or 'signed'",
    )
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device(mesh.device_type)  # fmt: skip
    for name in DIVIDED:
        whole: Any = getattr(dictionary, name)
        if divided(whole):
            continue
        own = torch.empty(0)
        # One part after the other: no device holds more than its own and one other.
        for owner, part in enumerate(whole.detach().chunk(count)):
            here = part.to(device, copy=True).contiguous()
            dist.broadcast(here, 0)
            own = here if owner == rank else own
        made = DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        setattr(dictionary, name, nn.Parameter(made, requires_grad=whole.requires_grad))
    for value in (dictionary.b_dec, *dictionary.buffers()):
        value.data = value.data.to(device)
        dist.broadcast(value.data, 0)


@torch.no_grad()
def whole(weight: Any) -> Tensor:
    """A tensor as ordinary one on the CPU; of a divided one every process must ask for it, and no device holds it."""
    if not divided(weight):
        return weight.detach().cpu()
    own = weight.to_local()
    found = torch.empty(weight.shape, dtype=own.dtype)
    rank, count = place_in_training()
    for owner, part in enumerate(found.chunk(count)):
        here = own.clone() if owner == rank else torch.empty(part.shape, dtype=own.dtype, device=own.device)
        torch.distributed.broadcast(here, owner)
        part.copy_(here)
    return found


def chosen(
    dictionary: Any, h: Tensor, *, selection: Selection | None, gradient: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """Indices and values of the best latents of all processes, the same in each; arguments as for :func:`.select.select`."""
    encoder, bias, atoms = (local(getattr(dictionary, name)).detach() for name in DIVIDED)
    pool = "row" if selection is None else selection.pool
    k = min(dictionary.k, len(encoder)) if pool == "row" else dictionary.k
    indices, values = select(h, encoder, bias, k, selection=selection, gradient=gradient, atoms=atoms, precision=precision)  # fmt: skip
    scores = values
    if gradient is not None and selection is not None:
        scores = selection.scores(values, dots(indices, atoms, gradient))
    size = {"row": 1, "batch": len(h)}.get(pool, pool) if isinstance(pool, str) else pool
    return best(indices + bounds(dictionary.width)[0], values, scores, dictionary.k, max(1, int(size)))


def best(indices: Tensor, values: Tensor, scores: Tensor, k: int, size: int = 1) -> tuple[Tensor, Tensor]:
    """The k latents a row with the largest scores (k times ``size`` of each ``size`` rows together), of those that the processes pass.

    >>> best(torch.tensor([[4, 2]]), torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 3.0]]), 1)
    (tensor([[2]]), tensor([[3.]]))
    """
    scores = torch.where(values > 0, scores, -torch.inf)  # what is off is never in the way of what is on
    indices, values, scores = (joined(each.T.contiguous()).T for each in (indices, values, scores))
    if size == 1:
        places = scores.topk(min(k, scores.shape[1]), -1, sorted=False).indices
    else:
        for rows, their in zip(scores.split(size), values.split(size)):
            keep = min(k * len(rows), rows.numel())
            off = torch.ones(rows.numel(), dtype=torch.bool, device=rows.device)
            off[rows.flatten().topk(keep, sorted=False).indices] = False
            their.masked_fill_(off.view_as(their), 0)
        places = _on_first(values > 0)
    return indices.gather(1, places), values.gather(1, places)


def product(codes: Tensor, atoms: Tensor) -> Tensor:
    """Dense codes times atoms, wherever these lie.

    >>> product(torch.tensor([[1.0, 2.0]]), torch.eye(2)).tolist()
    [[1.0, 2.0]]
    """
    if not divided(atoms):
        return codes @ atoms
    first, stop = bounds(len(atoms))
    return totals(codes[..., first:stop] @ local(atoms))


def all_columns(z: Tensor, encoder: Tensor) -> Tensor:
    """(rows, width): what each process has of its own latents, side by side."""
    return joined(z.detach().T.contiguous()).T if divided(encoder) else z


def all_codes(codes: Codes, width: int) -> Codes:
    """The codes of all processes' latents, of those that each finds among its own."""
    indices, values = (
        joined(each.T.contiguous()).T for each in (codes.indices + bounds(width)[0], codes.values)
    )
    places = _on_first(values != 0)
    return Codes(indices.gather(1, places), values.gather(1, places), width)


def own(indices: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Of codes, what lies here, counted from this process's first latent and filled up with zeros; differentiable in the values."""
    first, stop = bounds(width)
    mine = (indices >= first) & (indices < stop)
    places = _on_first(mine)
    there = mine.gather(1, places)
    return (indices.gather(1, places) - first) * there, values.gather(1, places) * there


def _on_first(on: Tensor) -> Tensor:
    """The places of each row in which something is on, and as many others as the fullest row needs."""
    most = int(on.sum(1).max()) if on.numel() else 0
    return on.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]


def copied(x: Tensor) -> Tensor:
    """x, whose gradient is the sum of what the processes find for it: each has a part of what hangs on it."""
    found: Any = _Copied.apply(x)
    return found


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total
