"""How much of a layer's output can some of its inputs rebuild? Subset fidelity, and the weights that do it.

Kashyap et al., "ModHiFi: Identifying High Fidelity predictive components for Model Modification", NeurIPS 2025, arXiv 2511.19566. Output channel c is a
sum of contributions A_ci of the input channels i; everything follows from Q_c = E <A_ci, A_cj>, which second moments of the inputs give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, require, show
from lineament.core.results import Readable


def component_similarity(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    center: bool = False,
) -> Tensor:
    """Q [outputs, inputs, inputs]: mean over samples of the inner products of contributions, summed over positions.

    Args:
        x: inputs [n, inputs] of a linear layer, or [n, inputs, height, width] of a convolution.
        weight: [outputs, inputs], or [outputs, inputs, rows, columns] (no groups). The bias is left out.
        stride, padding: of the convolution; the border is zeros.
        center: take each contribution's mean over samples and positions out, as a batch norm after the layer does.

    Returns:
        float64, whatever the inputs are: weights that stand in for others amplify the rounding of Q by its condition number.

    Raises:
        InputError: shapes that do not match, no sample.

    >>> component_similarity(torch.eye(2), torch.tensor([[2.0, 3.0]])).tolist()
    [[[2.0, 0.0], [0.0, 4.5]]]
    """
    require(
        x.ndim == weight.ndim and x.ndim in (2, 4) and x.shape[1] == weight.shape[1] and len(x) > 0,
        f"x: got {show(x)} beside weights {show(weight)}, expected the inputs of that layer",
    )
    x, weight = x.double(), weight.double()
    if x.ndim == 2:
        patches, places = x[:, :, None], 1
    else:
        columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)
        places = columns.shape[2]
        patches = columns.mT.reshape(-1, weight.shape[1], weight.shape[2] * weight.shape[3])
    return similarity_from_moments(
        *_moments(patches), weight.flatten(2) if x.ndim == 4 else weight[..., None], places, center
    )


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments [inputs, taps, inputs, taps] and means [inputs, taps] over all rows."""
    rows, inputs, taps = patches.shape
    flat = patches.reshape(rows, -1)
    return (flat.T @ flat / rows).view(inputs, taps, inputs, taps), patches.mean(0)


def similarity_from_moments(
    moment: Tensor, mean: Tensor, weight: Tensor, places: int = 1, center: bool = False
) -> Tensor:
    """Q from second moments of what the taps read.

    Args:
        moment: [inputs, taps, inputs, taps], mean over samples and positions. mean: [inputs, taps].
        weight: [outputs, inputs, taps]. places: positions a sample.

    >>> similarity_from_moments(torch.ones(1, 1, 1, 1), torch.ones(1, 1), torch.ones(1, 1, 1), 3).item()
    3.0
    """
    found = torch.einsum("oiu,iujv,ojv->oij", weight, moment, weight)
    if center:
        means = torch.einsum("oiu,iu->oi", weight, mean)
        found = found - means[:, :, None] * means[:, None]
    return found * places


@dataclass(frozen=True)
class ComponentScores(Readable):
    """Of each output and input, [outputs, inputs]; 0 where an input contributes nothing.

    ``alpha``: the factor with which it alone explains the output best; ``fidelity``: the share of the output's energy that it explains so;
    ``saliency``: E <Y, A>; ``energy``: E |A|². ``total`` [outputs]: E |Y|².
    """

    alpha: Tensor
    fidelity: Tensor
    saliency: Tensor
    energy: Tensor
    total: Tensor


def component_scores(Q: Tensor) -> ComponentScores:
    """Scores of single components from their similarity [outputs, inputs, inputs].

    >>> component_scores(torch.diag(torch.tensor([1.0, 3.0]))[None]).fidelity.tolist()
    [[0.25, 0.75]]
    """
    energy, row = Q.diagonal(dim1=1, dim2=2), Q.sum(2)
    total = row.sum(1)
    alive = energy > 0
    safe = torch.where(alive, energy, 1)
    saliency = torch.where(alive, row, 0)
    # A sum that is rounding beside its terms is zero: the contributions cancel.
    some = total > energy.sum(1) * Q.shape[1] * torch.finfo(Q.dtype).eps
    whole = torch.where(some, total, 1)[:, None]
    fidelity = torch.where(alive & some[:, None], row.square() / (safe * whole), 0)
    return ComponentScores(
        torch.where(alive, row / safe, 0), fidelity, saliency, energy, torch.where(some, total, 0)
    )


def subset_fidelity(Q: Tensor, kept: Tensor, *, lam: float = 0.0) -> Tensor:
    """max over weights δ of 1 - E |Y - Σ_{i in kept} δ_i A_i|² / E |Y|², of each output, [outputs].

    Args:
        kept: [inputs] booleans. lam: added to the diagonal; without it singular matrices get the solution of minimum norm.

    >>> subset_fidelity(torch.diag(torch.tensor([1.0, 3.0]))[None], torch.tensor([False, True])).tolist()
    [0.75]
    """
    total = component_scores(Q).total
    if not bool(kept.any()):
        return torch.zeros_like(total)
    inner, row = Q[:, kept][:, :, kept], Q[:, kept].sum(2)
    explained = (row * _solved(inner, row, lam)).sum(1)
    return torch.where(total > 0, explained / torch.where(total > 0, total, 1), 0)


def compensation(Q: Tensor, kept: Tensor, *, lam: float = 1e-4) -> Tensor:
    """The weights δ [outputs, inputs] with which the kept inputs stand in for the others: 1 + Q_kk⁻¹ Q_k,rest 1, 0 outside.

    Args:
        lam: added to the diagonal of Q_kk, absolute.

    >>> compensation(torch.ones(1, 2, 2), torch.tensor([True, False]), lam=0.0).tolist()
    [[2.0, 0.0]]
    """
    require(
        kept.dtype == torch.bool and kept.shape == Q.shape[1:2],
        f"kept: got {show(kept)}, expected {Q.shape[1]} booleans",
    )
    number("lam", lam, low=0)
    found = torch.zeros(Q.shape[:2], dtype=Q.dtype, device=Q.device)
    if bool(kept.any()):
        rest = Q[:, kept][:, :, ~kept].sum(2)
        found[:, kept] = 1 + _solved(Q[:, kept][:, :, kept], rest, lam)
    return found


def squared_error(Q: Tensor, delta: Tensor) -> Tensor:
    """E |Y - Σ δ_i A_i|² of each output, [outputs].

    >>> squared_error(torch.ones(1, 2, 2), torch.tensor([[2.0, 0.0]])).tolist()
    [0.0]
    """
    gap = 1 - delta
    return torch.einsum("oi,oij,oj->o", gap, Q, gap)


def best_subsets(Q: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The most faithful subset of each size by trying all: fidelity [outputs, sizes] and masks [outputs, sizes, inputs].

    The first in lexicographic order of equals. Exponential: for a dozen inputs.

    >>> best_subsets(torch.diag(torch.tensor([1.0, 3.0]))[None], [1])[1].tolist()
    [[[False, True]]]
    """
    inputs = Q.shape[1]
    values = torch.full((len(Q), len(sizes)), -1.0, dtype=Q.dtype)
    masks = torch.zeros(len(Q), len(sizes), inputs, dtype=torch.bool)
    for at, size in enumerate(sizes):
        number("sizes", size, low=0, high=inputs, integer=True)
        for chosen in combinations(range(inputs), size):
            mask = torch.zeros(inputs, dtype=torch.bool)
            mask[list(chosen)] = True
            found = subset_fidelity(Q, mask)
            better = found > values[:, at]
            values[better, at] = found[better]
            masks[better, at] = mask
    return values, masks


def union_kept(scores: Sequence[Tensor], removed: float) -> Tensor:
    """Inputs that any output of any coupled layer wants: each keeps its inputs - ⌊removed * inputs⌋ best, the first of equals.

    Args:
        scores: [outputs, inputs] of each layer that reads these inputs. removed: the share that each output gives up.

    >>> union_kept([torch.tensor([[3.0, 2.0, 1.0]])], 0.5).tolist()
    [True, True, False]
    """
    number("removed", removed, low=0, high=1)
    inputs = scores[0].shape[1]
    count = kept_per_output(inputs, removed)
    kept = torch.zeros(inputs, dtype=torch.bool)
    for each in scores:
        best = each.argsort(dim=1, descending=True, stable=True)[:, :count]
        kept[best.flatten()] = True
    return kept


def kept_per_output(inputs: int, removed: float) -> int:
    """inputs - ⌊removed * inputs⌋."""
    return inputs - int(removed * inputs + 1e-9)


def _solved(matrix: Tensor, right: Tensor, lam: float) -> Tensor:
    """(matrix + lam)⁻¹ right for each output; of minimum norm where lam is 0."""
    if lam:
        eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve(matrix + lam * eye, right)
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.abs().amax(1, keepdim=True) * matrix.shape[1] * torch.finfo(matrix.dtype).eps
    inverse = torch.where(values > floor, 1 / torch.where(values > floor, values, 1), 0)
    return torch.einsum("oij,oj,okj,ok->oi", vectors, inverse, vectors, right)
