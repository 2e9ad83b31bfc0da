"""Causal attention over the blocks that a query chose, over its whole past, or both from one call.

Shen et al. 2026, arXiv 2511.20102, sections 1.1 to 1.3. Left padding and packed documents are read by both branches in the same way. Full attention is
PyTorch's own, called row by row and document by document where their pasts differ, so that no mask over all pairs of tokens is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import one_of, require, show
from lineament.core.results import Readable
from lineament.modules.sparse_attention.backends import block_major, dense, flex, gather
from lineament.modules.sparse_attention.backends.recomputed import Kernel, Recomputed
from lineament.modules.sparse_attention.blocks import Blocks, lay_out
from lineament.modules.sparse_attention.selection import Choosing, Selection, check_heads, select

if TYPE_CHECKING:
    from typing_extensions import Unpack

Backend = Literal["auto", "dense", "gather", "block_major", "triton", "flex"]
BACKENDS = ("auto", "dense", "gather", "block_major", "triton", "flex")
# Below these sizes a mask over all pairs is the fastest: pairs of tokens, and rows times heads times pairs.
PAIRS, MASKED = 2**18, 2**25


@dataclass(frozen=True)
class Attended(Readable):
    """``output``: [batch, query heads, queries, size]; ``lse``: log Σ exp of the logits that each query saw, [batch, query heads, queries]."""

    output: Tensor
    lse: Tensor
    selection: Selection


@dataclass(frozen=True)
class Both(Readable):
    """``full`` and ``sparse``: [batch, query heads, queries, size]."""

    full: Tensor
    sparse: Tensor
    selection: Selection


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | Literal["exact", "released"] = "exact",
    *,
    scale: float | None = None,
    backend: Backend = "auto",
    **options: Unpack[Choosing],
) -> Attended:
    """Soft-max attention over the tokens of the chosen blocks; padded queries give zeros.

    Args:
        q: [batch, query heads, queries, size]. k, v: [batch, key heads, keys, size].
        selection: from :func:`select`; or how to choose, with the options of :func:`select`.
        backend: ``"dense"`` holds all pairs, ``"gather"`` copies each query's blocks, ``"block_major"`` reads them in place, ``"triton"`` does so with
            kernels of its own on CUDA, ``"flex"`` is PyTorch's FlexAttention (without gradients but on CUDA); ``"auto"`` picks the fastest.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> whole = attend(x, x, x, block_size=4, blocks=3).output
    >>> bool(torch.allclose(whole, attend(x, x, x, block_size=9, blocks=1).output, atol=1e-6))
    True
    """
    selection = _chosen(q, k, v, selection, scale, options)
    output, lse = sparse_output(q, k, v, selection, scale=scale, backend=backend, lse=True)
    assert lse is not None
    return Attended(output, lse, selection)


def attend_both(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | Literal["exact", "released"] = "exact",
    *,
    scale: float | None = None,
    backend: Backend = "auto",
    **options: Unpack[Choosing],
) -> Both:
    """Full attention and attention over the chosen blocks; the options are those of :func:`attend`.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> both = attend_both(x, x, x, block_size=4, blocks=3)
    >>> bool(torch.allclose(both.full, both.sparse, atol=1e-6))
    True
    """
    selection = _chosen(q, k, v, selection, scale, options)
    sparse, _ = sparse_output(q, k, v, selection, scale=scale, backend=backend, lse=False)
    return Both(full_output(q, k, v, selection.layout, scale=scale), sparse, selection)


def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | Literal["exact", "released"],
    scale: float | None,
    options: Choosing,
) -> Selection:
    check_values(q, k, v)
    if not isinstance(selection, Selection):
        return select(q, k, scale=scale, selection=selection, **options)
    name = next(iter(options), "")
    require(
        not name, f"{name}: the blocks are chosen already, expected a selection without options of choosing"
    )
    return selection


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Soft-max attention over the whole past of a query in its document, [batch, query heads, queries, size]; padded queries give zeros.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> bool(torch.allclose(full_attention(x, x, x)[:, :, 0], x[:, :, 0]))
    True
    """
    check_values(q, k, v)
    layout = lay_out(q, k, 1, offset=offset, documents=documents, padding=padding)
    return full_output(q, k, v, layout, scale=scale)


def sparse_output(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None, backend: str, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output, and log-sum-exp where asked for."""
    one_of("backend", backend, BACKENDS)
    layout, factor = selection.layout, q.shape[3] ** -0.5 if scale is None else scale
    expected = (q.shape[0], q.shape[2], layout.offset + q.shape[2])
    require(
        (selection.indices.shape[0], selection.indices.shape[2], layout.keys) == expected
        and k.shape[2] >= layout.keys
        and selection.indices.shape[1] in (q.shape[1], k.shape[1]),
        f"selection: its indices {show(selection.indices)} are of other queries than q, {show(q)}, and k, {show(k)}",
    )
    k, v = k[:, :, : layout.keys], v[:, :, : layout.keys]
    if backend == "auto":
        backend = fastest(q, k, selection, lse=lse)
    if backend == "dense":
        return dense.attended(q, k, v, selection.tokens(), factor, lse=lse)
    if backend == "flex":
        return flex.attended(q, k, v, selection, factor)
    return Recomputed.apply(q, k, v, selection.indices, layout, factor, _kernel(backend))  # pyright: ignore[reportReturnType]


def _kernel(backend: str) -> Kernel:
    if backend != "triton":
        return gather if backend == "gather" else block_major
    # Triton takes a while to import.
    from lineament.modules.sparse_attention.backends import triton

    return triton


def fastest(q: Tensor, k: Tensor, selection: Selection, *, lse: bool = False) -> str:
    """The backend for these shapes; with the log-sum-exp a mask costs several times what PyTorch's own attention takes."""
    pairs, slots = q.shape[2] * k.shape[2] * (4 if lse else 1), selection.indices.shape[3]
    group, size = q.shape[1] // selection.indices.shape[1], selection.layout.size
    if q.shape[2] > 32 and pairs <= PAIRS and pairs * q.shape[0] * q.shape[1] <= MASKED:
        return "dense"
    if q.is_cuda and q.shape[2] > 32 and q.dtype != torch.float64 and _on_gpu(q.device):
        return "triton"
    small = q.shape[2] <= 32 or (group >= 16 and size <= 16) or slots * size <= 64
    return "gather" if small else "block_major"


def _on_gpu(device: torch.device) -> bool:
    from lineament.modules.sparse_attention.backends import triton

    return triton.usable(device)


def full_output(q: Tensor, k: Tensor, v: Tensor, layout: Blocks, *, scale: float | None = None) -> Tensor:
    """Full attention of queries placed by a layout."""
    k, v = k[:, :, : layout.keys], v[:, :, : layout.keys]
    if layout.regular:
        return _span(q, k, v, layout.offset, scale)
    position = torch.arange(layout.keys, device=q.device)
    begins = layout.begins
    if q.shape[2] <= 32 or q.shape[2] * layout.keys <= 2**14:
        seen = (position >= begins[..., None]) & (position <= position[layout.offset :, None])
        factor = q.shape[3] ** -0.5 if scale is None else scale
        return dense.attended(q, k, v, (seen & (layout.own >= 0)[..., None])[:, None], factor, lse=False)[0]
    # Runs of queries with one beginning, row by row or for all rows.
    rows = [slice(row, row + 1) for row in range(len(begins))] if len(begins) > 1 else [slice(None)]
    found = []
    for number, row in enumerate(rows):
        start = torch.where(layout.own[number] < 0, -1, begins[number])
        values, lengths = start.unique_consecutive(return_counts=True)
        pieces, at = [], 0
        for begin, length in zip(values.tolist(), lengths.tolist()):
            asked = q[row, :, at : at + length]
            if begin < 0:
                pieces.append(asked.new_zeros(*asked.shape[:3], v.shape[3]))
            else:
                part = slice(begin, layout.offset + at + length)
                pieces.append(
                    _span(asked, k[row, :, part], v[row, :, part], layout.offset + at - begin, scale)
                )
            at += length
        found.append(torch.cat(pieces, 2))
    return torch.cat(found)


def _span(q: Tensor, k: Tensor, v: Tensor, offset: int, scale: float | None) -> Tensor:
    if offset == 0 or q.shape[2] == 1:
        # A lone query sees all keys up to its own place.
        causal = q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    position = torch.arange(k.shape[2], device=q.device)
    # Few queries at a time, so that the mask stays small.
    tile = max(1, 2**24 // k.shape[2])
    found = []
    for start in range(0, q.shape[2], tile):
        part = q[:, :, start : start + tile]
        stop = offset + start + part.shape[2]
        seen = position[:stop] <= position[offset + start : stop, None]
        keys, values = k[:, :, :stop], v[:, :, :stop]
        found.append(
            F.scaled_dot_product_attention(part, keys, values, attn_mask=seen, scale=scale, enable_gqa=True)
        )
    return torch.cat(found, 2)


def check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries, keys and values fit together."""
    check_heads(q, k)
    require(
        v.ndim == 4 and v.shape[:3] == k.shape[:3],
        f"v: got {show(v)} beside keys {show(k)}, expected as many rows, heads and tokens",
    )
