"""What a choice of blocks leaves out of full attention: the reference form, which builds the weights.

Shen et al. 2026, arXiv 2511.20102, section 1.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.core.results import Readable
from lineament.modules.sparse_attention.attend import attend, check_values
from lineament.modules.sparse_attention.selection import Selection


@dataclass(frozen=True)
class SparsityReport(Readable):
    """Of each query head and token, [batch, heads, queries].

    ``kept``: the full weight on chosen blocks; ``entropy``: of the full weights, in nats; ``first``: the full weight on token 0;
    ``error``: |full - sparse|; ``bound``: (1 - kept) (max |v| of what is left out + |sparse|), which it never exceeds.
    """

    kept: Tensor
    entropy: Tensor
    first: Tensor
    error: Tensor
    bound: Tensor


def sparsity_report(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None = None
) -> SparsityReport:
    """What the choice of blocks leaves out, and what it costs at most.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> from lineament.modules.sparse_attention.selection import select
    >>> found = sparsity_report(x, x, x, select(x, x, block_size=2, blocks=2))
    >>> bool((found.error <= found.bound + 1e-6).all())
    True
    """
    check_values(q, k, v)
    groups, layout = q.shape[1] // k.shape[1], selection.layout
    position = torch.arange(layout.keys, device=q.device)
    seen = (position >= layout.begins[..., None]) & (position <= position[layout.offset :, None])
    seen = (seen & (layout.own >= 0)[..., None])[:, None]
    factor = q.shape[3] ** -0.5 if scale is None else scale
    logits = torch.matmul(q, k.repeat_interleave(groups, 1).mT) * factor
    full = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    chosen = selection.tokens().repeat_interleave(q.shape[1] // selection.indices.shape[1], 1)
    dropped = seen & ~chosen
    sparse = attend(q, k, v, selection, scale=scale, backend="dense").output
    lost = (full * dropped).sum(-1)
    norms = v.norm(dim=3).repeat_interleave(groups, 1)[:, :, None]
    bound = lost * (torch.where(dropped, norms, 0).amax(-1) + sparse.norm(dim=3))
    whole = torch.matmul(full, v.repeat_interleave(groups, 1))
    return SparsityReport(
        (full * chosen).sum(-1),
        torch.special.entr(full).sum(-1),
        full[..., 0],
        (whole - sparse).norm(dim=3),
        torch.where(dropped.any(-1), bound, 0),
    )
