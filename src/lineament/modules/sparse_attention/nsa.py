"""NSA's attention: compressed, selected and windowed attention, each with a gate; the baseline of the paper's tables.

Yuan et al. 2025, arXiv 2502.11089, with means for its compression as in the released code; Shen et al. 2026, arXiv 2511.20102, section 1.5.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lineament.core.checks import number, one_of, require, show
from lineament.modules.sparse_attention.attend import attend, check_values, full_output
from lineament.modules.sparse_attention.backends import dense
from lineament.modules.sparse_attention.blocks import Blocks
from lineament.modules.sparse_attention.selection import Selection, select

BRANCHES = ("compressed", "selected", "window")


def nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    selection: Selection | None = None,
    *,
    block_size: int = 16,
    blocks: int = 16,
    window: int = 128,
    full: Collection[str] = (),
    scale: float | None = None,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """g₁ · attention over the mean key and value of each complete block + g₂ · attention over the best blocks + g₃ · attention within a window.

    Args:
        q, k, v: as for :func:`attend`. gates: [batch, query heads, queries, 3].
        selection: the best blocks, from :func:`select`; then these options of choosing (all but ``scale``) are not read.
        window: how many tokens the third branch sees, the query's own included.
        full: the branches (``"compressed"``, ``"selected"``, ``"window"``) that full attention replaces.

    Returns:
        [batch, query heads, queries, size].

    >>> x = torch.randn(1, 2, 9, 4)
    >>> gates = torch.tensor([0.0, 0.0, 1.0]).expand(1, 2, 9, 3)
    >>> bool(torch.allclose(nsa(x, x, x, gates, window=1), x))
    True
    """
    check_values(q, k, v)
    number("window", window, low=1, integer=True)
    for name in full:
        one_of("full", name, BRANCHES)
    require(
        gates.shape == (*q.shape[:3], 3),
        f"gates: got {show(gates)}, expected {(*q.shape[:3], 3)}: three for each head and query",
    )
    if selection is None:
        past = {"offset": offset, "documents": documents, "padding": padding}
        selection = select(q, k, block_size=block_size, blocks=blocks, scale=scale, **past)
    chosen, layout, factor = selection, selection.layout, q.shape[3] ** -0.5 if scale is None else scale
    whole = full_output(q, k, v, layout, scale=scale) if full else q
    k, v = k[:, :, : layout.keys], v[:, :, : layout.keys]
    parts = {
        "selected": lambda: attend(q, k, v, chosen, scale=scale).output,
        "compressed": lambda: _compressed(q, k, v, layout, factor),
        "window": lambda: _windowed(q, k, v, layout, window, factor),
    }
    out = torch.zeros_like(q)
    for name, make in parts.items():
        gate = gates[..., BRANCHES.index(name), None]
        out = out + gate * (whole if name in full else make())
    return out


def _compressed(q: Tensor, k: Tensor, v: Tensor, layout: Blocks, scale: float) -> Tensor:
    number_of = torch.arange(layout.count, device=q.device)
    own = (number_of == layout.own[..., None]) & (layout.within == layout.size - 1)[..., None]
    seen = (layout.past() | own)[:, None]
    means = layout.means(k).to(q.dtype), layout.means(v).to(q.dtype)
    return dense.attended(q, *means, seen, scale, lse=False)[0]


def _windowed(q: Tensor, k: Tensor, v: Tensor, layout: Blocks, window: int, scale: float) -> Tensor:
    position, found = torch.arange(layout.keys, device=q.device), []
    # A tile of queries sees little more than its window.
    for start in range(0, q.shape[2], max(window, 64)):
        part = slice(start, min(start + max(window, 64), q.shape[2]))
        at = position[layout.offset :][part, None]
        keys = slice(max(0, int(at[0]) - window + 1), int(at[-1]) + 1)
        seen = (position[keys] <= at) & (position[keys] > at - window)
        seen = seen & (position[keys] >= layout.begins[:, part, None]) & (layout.own[:, part] >= 0)[..., None]
        found.append(
            dense.attended(q[:, :, part], k[:, :, keys], v[:, :, keys], seen[:, None], scale, lse=False)[0]
        )
    return torch.cat(found, 2)
