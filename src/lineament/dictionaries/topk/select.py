"""The k best latents of each row, exactly, without a tensor of all rows by all latents.

Rows go in chunks under a byte budget. In a row the k best lie in the k groups of 64 with the largest maxima (each of those groups holds a
value at least as large as everything in the groups left out), so that only k * 64 values are sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineament.core.batching import auto_batch
from lineament.dictionaries.selection import Selection

GROUP = 64
BYTES = 64 * 2**20  # of one chunk's pre-activations: they are read again right after they are written


def largest(scores: Tensor, k: int) -> Tensor:
    """(rows, k): the places of each row's k largest values, in no particular order.

    >>> largest(torch.tensor([[1.0, 5.0, 3.0]]), 2).sort().values.tolist()
    [[1, 2]]
    """
    rows, width = scores.shape
    groups = width // GROUP
    if groups < 2 * k or rows == 0:
        return scores.topk(k, -1, sorted=False).indices
    whole = scores[:, : groups * GROUP].view(rows, groups, GROUP)
    best = whole.amax(-1).topk(k, -1, sorted=False).indices
    found = whole.gather(1, best[..., None].expand(-1, -1, GROUP)).flatten(1)
    rest = scores[:, groups * GROUP :]
    places = torch.cat([found, rest], 1).topk(k, -1, sorted=False).indices
    inside = places.clamp_max(k * GROUP - 1)
    chosen = best.gather(1, inside // GROUP) * GROUP + inside % GROUP
    return torch.where(places < k * GROUP, chosen, places - k * GROUP + groups * GROUP)


def rows_at_once(width: int, itemsize: int, tensors: int = 1) -> int:
    """How many rows of so many tensors of ``width`` columns fit the byte budget."""
    return max(1, BYTES // max(1, width * itemsize * tensors))


@torch.no_grad()
def select(
    h: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    *,
    selection: Selection | None = None,
    gradient: Tensor | None = None,
    atoms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kept latents of each row and their values relu(z), z = h @ encoder.T + bias.

    Args:
        h: (rows, d), centred inputs. encoder: (width, d). bias: (width).
        k: latents a row, or on average a row where ``selection.pool`` lets rows share them.
        selection: how latents are ranked and pooled; ``None``: by z, k in each row.
        gradient: (rows, d), the loss's gradient, which ``selection`` ranks with; without it the rank is that of z.
        atoms: (width, d), the decoder, needed with ``gradient``.

    Returns:
        indices and values, (rows, k); with a pool (rows, most), filled up with zeros.

    >>> w = torch.eye(3)
    >>> indices, values = select(torch.tensor([[1.0, 3.0, -2.0]]), w, torch.zeros(3), 1)
    >>> indices.tolist(), values.tolist()
    ([[1]], [[3.0]])
    """
    rows, width = len(h), len(encoder)
    pool = "row" if selection is None else selection.pool
    transposed = encoder.T
    signed = gradient is not None and selection is not None and selection.score == "signed"

    def ranked(start: int, stop: int) -> tuple[Tensor, Tensor]:
        z = torch.addmm(bias, h[start:stop], transposed)
        if gradient is None or selection is None:
            return z, z
        assert atoms is not None
        return z, selection.scores(z, gradient[start:stop] @ atoms.T)

    def by_row(start: int, stop: int) -> tuple[Tensor, Tensor]:
        z, scores = ranked(start, stop)
        indices = largest(scores, k)
        values = z.gather(1, indices).relu_()
        return indices, values * (scores.gather(1, indices) > 0) if signed else values

    def by_pool(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        z, scores = ranked(start, stop)
        keep = min(k * size, scores.numel())
        best, flat = scores.flatten().topk(keep, sorted=False)
        values = z.flatten()[flat].relu_()
        return best, flat + start * width, values * (best > 0) if signed else values

    most = rows_at_once(width, h.element_size(), 1 if gradient is None else 4)
    if pool == "row":
        parts = list(auto_batch(by_row, rows, most=most, memory=(select, (width, h.shape[-1]))))
        if not parts:
            return h.new_zeros(0, k, dtype=torch.long), h.new_zeros(0, k)
        return torch.cat([i for i, _ in parts]), torch.cat([v for _, v in parts])
    size = rows if pool == "batch" else int(pool)
    chosen: list[tuple[Tensor, Tensor]] = []
    for first in range(0, rows, max(size, 1)):
        last = min(first + size, rows)
        budget = k * (last - first)
        best, flat, values = h.new_zeros(0), h.new_zeros(0, dtype=torch.long), h.new_zeros(0)
        for a in range(first, last, most):
            new = by_pool(a, min(a + most, last))
            best, flat, values = (torch.cat(pair) for pair in zip((best, flat, values), new))
            if len(best) > budget:
                best, places = best.topk(budget, sorted=False)
                flat, values = flat[places], values[places]
        chosen.append((flat, values))
    return rows_of_flat(
        torch.cat([f for f, _ in chosen] or [h.new_zeros(0, dtype=torch.long)]),
        torch.cat([v for _, v in chosen] or [h.new_zeros(0)]),
        rows,
        width,
    )


def rows_of_flat(flat: Tensor, values: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Positive values at flat places (row * width + latent), as indices and values of each row.

    >>> rows_of_flat(torch.tensor([5, 0, 1]), torch.tensor([3.0, 1.0, 2.0]), 2, 3)[1].tolist()
    [[1.0, 2.0], [3.0, 0.0]]
    """
    on = values > 0
    flat, order = flat[on].sort()
    values = values[on][order]
    row = flat // width
    counts = torch.bincount(row, minlength=rows)
    place = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[row]
    most = int(counts.max()) if rows else 0
    indices = flat.new_zeros(rows, most).index_put((row, place), flat % width)
    return indices, values.new_zeros(rows, most).index_put((row, place), values)
