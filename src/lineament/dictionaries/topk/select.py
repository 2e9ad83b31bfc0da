"""The k best latents of each row, exactly, without a tensor of all rows by all latents.

Rows go in chunks under a byte budget. In a row the k best lie in the k groups of 64 with the largest maxima (each of those groups holds a
value at least as large as everything in the groups left out), so that only k * 64 values are sorted (of many, groups are smaller). On CUDA :mod:`.triton` does the same.

With a gradient the scores of all latents take a second product of the encoder's size. With ``Selection(candidates=C)`` only the C k latents of largest z
are scored, and a row is done where no other can be among its best: z (1 + beta |g| |w| / scale) <= the k-th score, with the largest z left out. Other rows are scored in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineament.core.batching import auto_batch
from lineament.dictionaries.selection import Selection

GROUPS = (64, 32, 16, 8)
_DOTS = torch.ops.aten._embedding_bag_per_sample_weights_backward
BYTES = 64 * 2**20  # of one chunk's pre-activations: they are read again right after they are written


def kernels(*tensors: Tensor) -> Any:
    """The module of Triton kernels, where all tensors lie on one CUDA device, in a dtype that they are for, and run there; otherwise ``None``.

    >>> kernels(torch.zeros(1)) is None
    True
    """
    if not all(each.is_cuda for each in tensors):
        return None
    from lineament.dictionaries.topk import triton

    return triton if _same(tensors, triton.DTYPES) and triton.works(tensors[0].device) else None


def _same(tensors: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    first = tensors[0]
    return all(each.device == first.device and each.dtype in dtypes for each in tensors)


def largest(scores: Tensor, k: int) -> Tensor:
    """(rows, k): the places of each row's k largest values, in no particular order.

    >>> largest(torch.tensor([[1.0, 5.0, 3.0]]), 2).sort().values.tolist()
    [[1, 2]]
    """
    rows, width = scores.shape
    # Of many, smaller groups: their maxima and what is in the best of them are about equally many.
    size = next((each for each in GROUPS if width >= 8 * k * each), GROUPS[-1])
    groups = width // size
    if groups < 2 * k or rows == 0:
        return scores.topk(k, -1, sorted=False).indices
    whole = scores[:, : groups * size].view(rows, groups, size)
    best = whole.amax(-1).topk(k, -1, sorted=False).indices
    found = whole.gather(1, best[..., None].expand(-1, -1, size)).flatten(1)
    rest = scores[:, groups * size :]
    places = torch.cat([found, rest], 1).topk(k, -1, sorted=False).indices
    inside = places.clamp_max(k * size - 1)
    chosen = best.gather(1, inside // size) * size + inside % size
    return torch.where(places < k * size, chosen, places - k * size + groups * size)


def dots(indices: Tensor, atoms: Tensor, rows: Tensor) -> Tensor:
    """(rows, k): the inner products of each row with the atoms that its indices name.

    It is the gradient of ``embedding_bag`` with respect to its weights, which PyTorch computes without gathering the atoms, and here without the forward.

    >>> dots(torch.tensor([[1]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 3.0]])).tolist()
    [[6.0]]
    """
    if not indices.numel():
        return rows.new_zeros(indices.shape)
    if fast := kernels(atoms, rows):
        return fast.dots(indices, atoms.detach(), rows.detach())
    k = indices.shape[1]
    starts = torch.arange(0, indices.numel(), k, device=indices.device)
    row = torch.arange(len(indices), device=indices.device).repeat_interleave(k)
    flat = indices.reshape(-1)
    return _DOTS(rows.detach().contiguous(), atoms.detach(), flat, starts, row, 0, -1).view(indices.shape)


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
    precision: str = "full",
) -> tuple[Tensor, Tensor]:
    """The kept latents of each row and their values relu(z), z = h @ encoder.T + bias.

    Args:
        h: (rows, d), centred inputs. encoder: (width, d). bias: (width).
        k: latents a row, or on average a row where ``selection.pool`` lets rows share them.
        selection: how latents are ranked and pooled; ``None``: by z, k in each row.
        gradient: (rows, d), the loss's gradient, which ``selection`` ranks with; without it the rank is that of z.
        atoms: (width, d), the decoder, needed with ``gradient``.
        precision: ``"bfloat16"`` ranks by products in bfloat16; the kept values are those of full precision.

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
    longest = bias.new_zeros(())
    fast = kernels(h, encoder)
    signed = gradient is not None and selection is not None and selection.score == "signed"

    def product(x: Tensor, weights: Tensor) -> Tensor:
        return (x.bfloat16() @ weights.bfloat16().T).to(x) if precision == "bfloat16" else x @ weights.T

    def scored(x: Tensor) -> Tensor:
        return torch.addmm(bias, x, transposed) if precision == "full" else product(x, encoder) + bias

    def ranked(start: int, stop: int) -> tuple[Tensor, Tensor]:
        z = scored(h[start:stop])
        if gradient is None or selection is None:
            return z, z
        assert atoms is not None
        return z, selection.scores(z, product(gradient[start:stop], atoms))

    def exact(z: Tensor, start: int, stop: int, indices: Tensor) -> Tensor:
        """The values of some latents of each row."""
        if precision == "full":
            return z.gather(1, indices).relu_()
        return (dots(indices, encoder, h[start:stop]) + bias[indices]).relu_()

    def by_kernel(start: int, stop: int) -> tuple[Tensor, Tensor]:
        along = None
        if gradient is not None and selection is not None:
            assert atoms is not None
            along = product(gradient[start:stop], atoms)
        found = fast.best(scored(h[start:stop]), k, selection, along)
        if found is None:
            return by_row(start, stop)
        indices, values = found
        if precision == "full":
            return indices, values
        again = exact(values, start, stop, indices)
        return indices, again * (values > 0) if signed else again

    def by_row(start: int, stop: int) -> tuple[Tensor, Tensor]:
        z, scores = ranked(start, stop)
        indices = largest(scores, k)
        values = exact(z, start, stop, indices)
        return indices, values * (scores.gather(1, indices) > 0) if signed else values

    def by_candidates(start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert gradient is not None and selection is not None and atoms is not None
        z, g = scored(h[start:stop]), gradient[start:stop]
        indices = largest(z, selection.candidates * k)
        kept = z.gather(1, indices)
        scores = selection.scores(kept, dots(indices, atoms, g))
        best, places = scores.topk(k, -1, sorted=False)
        indices = indices.gather(1, places)
        least = kept.amin(1)
        most = least * (1 + selection.beta * g.norm(dim=1) * longest / selection.influence_scale)
        unsure = (torch.maximum(least, most) > best.amin(1)).nonzero().flatten()
        if len(unsure):
            full = selection.scores(z[unsure], product(g[unsure], atoms))
            indices[unsure] = largest(full, k)
        return indices, exact(z, start, stop, indices)

    def by_pool(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        z, scores = ranked(start, stop)
        keep = min(k * size, scores.numel())
        best, flat = scores.flatten().topk(keep, sorted=False)
        values = z.flatten()[flat].relu_()
        return best, flat + start * width, values * (best > 0) if signed else values

    few = gradient is not None and selection is not None and 0 < selection.candidates * k < width
    most = rows_at_once(width, h.element_size(), 1 if gradient is None or few else 4)
    if pool == "row":
        some = by_kernel if fast else by_row
        if few:
            assert atoms is not None
            some, longest = by_candidates, atoms.norm(dim=1).max()
        parts = list(auto_batch(some, rows, most=most, memory=(select, (width, h.shape[-1]))))
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
