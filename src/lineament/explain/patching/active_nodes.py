"""Effects over the latents that are on: of a dictionary of tens of thousands, a few dozen a token differ between two runs, and only these have an effect.

No tensor (batch, positions, latents) is made: twelve sites of 24,576 latents, 32 prompts of 64 tokens would be 2.4 GB each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lineament.core.codes import Codes

# Rows of (active, width) atoms gathered at a time, in numbers.
_GATHERED = 2**24


def differences(f: Codes, f_to: Codes) -> Codes:
    """f_to - f, each latent once a row.

    >>> a, b = Codes.of_dense(torch.tensor([[1.0, 2.0, 0.0]])), Codes.of_dense(torch.tensor([[0.0, 5.0, 3.0]]))
    >>> differences(a, b).dense().tolist()
    [[-1.0, 3.0, 3.0]]
    """
    same = f.indices[..., :, None] == f_to.indices[..., None, :]
    same &= (f.values != 0)[..., :, None] & (f_to.values != 0)[..., None, :]
    gone = torch.where(same.any(-1), torch.zeros_like(f.values), -f.values)
    kept = f_to.values - (same * f.values[..., :, None]).sum(-2)
    return Codes(torch.cat([f.indices, f_to.indices], -1), torch.cat([gone, kept], -1), f.width)


def through_atoms(atoms: Tensor, indices: Tensor, g: Tensor) -> Tensor:
    """w_i·g for the latents in question of each row: (..., active)."""
    rows, flat = g.reshape(-1, g.shape[-1]).to(atoms.dtype), indices.reshape(-1, indices.shape[-1])
    size = max(1, _GATHERED // max(1, flat.shape[-1] * atoms.shape[-1]))
    found = [
        torch.bmm(atoms[flat[start : start + size]], rows[start : start + size, :, None])[..., 0]
        for start in range(0, len(flat), size)
    ]
    return (torch.cat(found) if found else rows.new_zeros(0, flat.shape[-1])).reshape(indices.shape)


def mean_over_batch(codes: Codes) -> Tensor:
    """(positions, latents): the mean of codes (batch, positions, active) over the batch.

    >>> mean_over_batch(Codes(torch.tensor([[[1]], [[1]]]), torch.tensor([[[2.0]], [[4.0]]]), 3)).tolist()
    [[0.0, 3.0, 0.0]]
    """
    batch, positions, _ = codes.values.shape
    out = codes.values.new_zeros(positions, codes.width)
    for row in range(batch):
        out.scatter_add_(1, codes.indices[row], codes.values[row])
    return out / max(1, batch)


def some_changed(
    dictionary: Any, difference: Codes, e_change: Tensor
) -> tuple[list[tuple[int, int | None]], Callable[..., Tensor]]:
    """The (position, latent) that differ in any example, with ``None`` for the error; and a function of one of them that gives its change of x, (batch, d)."""
    on = difference.values != 0
    found = {
        (t, latent)
        for t in range(on.shape[1])
        for latent in difference.indices[:, t][on[:, t]].unique().tolist()
    }
    changed: list[tuple[int, int | None]] = [*sorted(found), *((t, None) for t in range(on.shape[1]))]
    atoms = dictionary.atoms

    def change(t: int, latent: int | None) -> Tensor:
        if latent is None:
            return e_change[:, t]
        amount = (difference.values[:, t] * (difference.indices[:, t] == latent)).sum(-1)
        return amount[:, None] * atoms[latent].to(amount)

    return changed, change


def kept_or_mean(dictionary: Any, f: Codes, keep: Tensor, mean: Tensor) -> Tensor:
    """What the dictionary decodes with the latents of ``keep`` (positions, latents) as they are and the others at their mean, (batch, positions, d)."""
    inside = keep.expand(len(f), *keep.shape).gather(-1, f.indices)
    own = dictionary.decode(
        Codes(f.indices, torch.where(inside, f.values, torch.zeros_like(f.values)), f.width)
    )
    # Both hold the decoder's constant; the mean of what is outside is the same for all examples.
    outside = torch.where(keep, torch.zeros_like(mean), mean)
    nothing = torch.zeros_like(mean[:1])
    return own + (dictionary.decode(outside) - dictionary.decode(nothing))
