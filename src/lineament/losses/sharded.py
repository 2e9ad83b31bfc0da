"""A class head divided among the processes of a training: each holds a part of the classes, and computes their logits for the samples of all.

As in partial FC (An et al. 2021): embeddings and labels are gathered, and what the processes tell each other beyond that are three vectors of the batch's length. The loss is that of one
process in each of them, and so are its gradients, as DistributedDataParallel averages those of the network before the head; those of the head's own rows are no average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import require
from lineament.core.shards import introduce, joined, place_in_training, totals
from lineament.core.whole_files import part_of
from lineament.losses.fused import class_lengths

if TYPE_CHECKING:
    from lineament.losses.class_head import ClassHead


def shard(head: ClassHead, mesh: Any = None) -> None:
    """Make the class directions a DTensor whose rows lie with the processes of a mesh, as the first process has them.

    Raises:
        InputError: no process group, a mesh of some of the processes only, a head that cannot be divided.
    """
    require(
        place_in_training()[1] > 1 or mesh is not None,
        "mesh: there is no process group; start the processes by torchrun and call torch.distributed.init_process_group() first",
    )
    require(
        not head.sparse,
        "sparse: rows that lie with several processes have dense gradients; make the head with sparse=False",
    )
    require(
        head.reduction != "none",
        "reduction: 'none' has no loss in common; make the head with 'mean' or 'sum'",
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    count = place_in_training()[1]
    mesh = init_device_mesh(head.weight.device.type, (count,)) if mesh is None else mesh
    require(
        mesh.ndim == 1 and mesh.size() == count,
        f"mesh: got {mesh}, expected one dimension with all {count} processes",
    )
    introduce()
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))


def parts(
    head: ClassHead,
    embeddings: Tensor,
    labels: Tensor,
    margins: Tensor | None,
    kept: Tensor | None,
    also: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(lse, target logit) of the samples of all processes; those given are this process's labelled ones."""
    weight: Any = head.weight
    rank, count = place_in_training()
    x, y = joined(embeddings), joined(labels)
    margins = None if margins is None else joined(margins)
    norms = x.norm(dim=1)
    if kept is None and head.training and head.sample < 1:
        kept = head.sampled(y)
    held, own = part_of(len(weight), rank, count), weight.to_local()
    start, stop = held.start, held.stop
    if kept is not None:
        mine = kept[(kept >= start) & (kept < stop)]
        own, at = own[mine - start], torch.searchsorted(mine, y.contiguous())
    else:
        at = y - start
    class_lengths(own)
    # Every process finds its classes' share of the gradient, and what is averaged later is their sum. A margin's own term is the same in all.
    extra = head.margin.extra(norms) if head.training else None
    unit, norms = (_summed(each, count) for each in (F.normalize(x, dim=1), norms))
    cosines = (unit @ F.normalize(own, dim=1).T).clamp(-1, 1)
    here = ((y >= start) & (y < stop)).nonzero()[:, 0]
    found = torch.zeros_like(norms).index_put((here,), cosines[here, at[here]])
    whole = totals(found)
    target = head._target(whole, norms, margins, torch.arange(len(y), device=y.device))
    others = head.margin.others(cosines, whole[:, None]) if head.training else cosines
    logits = others.index_put((here, at[here]), target[here]) * (
        norms[:, None] if head.margin.by_norm else head.scale
    )
    target = target * (norms if head.margin.by_norm else head.scale)
    target = target.detach().index_put((here,), target[here])  # a share, too: of whom the class lies with
    each = logits.logsumexp(1)
    highest = totals(each.detach(), largest=True)
    lse = highest + totals((each - highest).exp()).log()
    lse = lse if also is None else torch.logaddexp(lse, also)
    return lse if extra is None else lse + extra, target


def _summed(x: Tensor, count: int) -> Tensor:
    """The same numbers, whose gradient is ``count`` times as large, so that an average over the processes is their sum."""
    if x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient * count)
    return x
