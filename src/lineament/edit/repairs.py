"""What must the weights that stay do for those that go? Factors of components, or weights, refitted in closed form.

Kashyap et al., NeurIPS 2025, arXiv 2511.19566: each kept contribution gets one factor δ. Of a linear layer all outputs' factors are one least-squares problem,
W_kept' = W M_{:,kept} M_kept⁻¹. Every form is a ridge around the weights as they are, so that it never makes the layer's own error larger.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lineament.core.checks import one_of, require

WAYS = ("delta", "refit", "taps")
_NUMBERS = 2**24


def compensated(
    weight: Float[Tensor, "outputs inputs taps"],
    moment: Float[Tensor, "columns columns"],
    kept: Bool[Tensor, " inputs"],
    how: str | None = "delta",
    *,
    lam: float = 1e-4,
) -> Float[Tensor, "outputs inputs taps"]:
    """The weights of the kept inputs with which the output stays closest to what it was; zero for the others.

    Args:
        moment: of what the weights multiply, [inputs * taps, inputs * taps].
        how: ``"delta"``: a factor for each (output, input), as in the paper; ``"refit"``: the weights of linear layers, whose taps are one, by least squares,
            convolutions as ``"delta"``; ``"taps"``: all weights by least squares; ``None``: as they are.
        lam: added to the diagonal, relative to its mean.

    >>> compensated(torch.ones(1, 2, 1), torch.ones(2, 2), torch.tensor([True, False]), lam=0.0).flatten().tolist()
    [2.0, 0.0]
    """
    if how is not None:
        one_of("compensate", how, WAYS)
    require(bool(kept.any()), "kept: no input would be left; keep at least one")
    found = torch.where(kept[:, None], weight, 0)
    if how is None or bool(kept.all()):
        return found
    taps = weight.shape[2]
    columns = kept.repeat_interleave(taps)
    inner, gone = moment[columns][:, columns], torch.where(kept[:, None], 0, weight).flatten(1) @ moment
    if how == "taps" or (how == "refit" and taps == 1):
        some = weight[:, kept].flatten(1) + _solved(inner, gone[:, columns].T, lam).T
        found[:, kept] = some.view(len(weight), -1, taps)
        return found
    count = int(kept.sum())
    blocks = inner.view(count, taps, count, taps)
    right = (weight * gone.view_as(weight)).sum(2)[:, kept]
    part = max(1, _NUMBERS // max(1, count * count * taps))
    for at in range(0, len(weight), part):
        some = weight[at : at + part, kept]
        half = torch.einsum("itju,oju->oitj", blocks, some)
        Q = torch.einsum("oit,oitj->oij", some, half)
        found[at : at + part, kept] = some * (1 + _solved(Q, right[at : at + part, :, None], lam))
    return found


def left_over(weight: Tensor, new: Tensor, moment: Tensor) -> Tensor:
    """E |Y - Y'|² of each output when the weights become others, [outputs].

    >>> left_over(torch.ones(1, 2, 1), torch.tensor([[[2.0], [0.0]]]), torch.ones(2, 2)).tolist()
    [0.0]
    """
    gap = (weight - new).flatten(1)
    return ((gap @ moment) * gap).sum(1).clamp_min(0)


def _solved(matrix: Tensor, right: Tensor, lam: float) -> Tensor:
    """(matrix + λ mean(diagonal))⁻¹ right; of minimum norm where that is singular."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix + (lam * diagonal + 1e-30) * eye)
    if bool(failed.any()) or not lam:
        return torch.linalg.pinv(matrix + lam * diagonal * eye, hermitian=True) @ right
    return torch.cholesky_solve(right, factor)
