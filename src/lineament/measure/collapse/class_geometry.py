"""The geometry of class means and of the scatter around them: the formulas behind the neural-collapse metrics.

Papyan, Han, Donoho (2020, arXiv 2008.08186); Tirer, Huang, Niles-Weed (2022, arXiv 2210.16658). Everything here works on
class means ``M`` (classes x features, float64) and on sums, never on samples. With Mc the means minus the global mean,

    S_W = (1/N) Σ (h - h_k)(h - h_k)ᵀ        S_B = (1/K) Σ_k (h_k - h_G)(h_k - h_G)ᵀ

and h_G the unweighted mean of the class means (``weighting="class"``), or S_B = Σ_k (n_k/N) (...) with h_G the mean of all
samples (``weighting="sample"``). The two agree when the classes are of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable
from lineament.core.statistics.class_scatter import ClassScatter

_ROWS = 2048


@dataclass(frozen=True)
class Between(Readable):
    """The thin singular value decomposition of the centred, weighted class means: S_B = V diag(s²) Vᵀ.

    ``means`` is Mc (classes x features), ``center`` h_G; ``directions`` V (features x rank, rank < classes) and
    ``scales`` s keep the singular values above ``rcond`` times the largest one; ``trace`` is tr S_B.
    """

    means: Tensor
    center: Tensor
    directions: Tensor
    scales: Tensor
    trace: float


def between(scatter: ClassScatter, *, weighting: str = "class", rcond: float | None = None) -> Between:
    """The between-class geometry of ``scatter``.

    Args:
        scatter: what was gathered; every class must have a sample.
        weighting: ``"class"`` (each class counts the same) or ``"sample"``.
        rcond: singular values of Mc/√K below this fraction of the largest are dropped; by default 1e-5 for
            features in float32 or less, 1e-10 in float64.

    >>> s = ClassScatter(); s.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1]))
    >>> between(s).directions.shape, round(between(s).trace, 9)
    (torch.Size([2, 1]), 1.0)
    """
    checks.one_of("weighting", weighting, ["class", "sample"])
    scatter.complete()
    classes = len(scatter.counts)
    share = scatter.counts.double() / scatter.counts.sum()
    if weighting == "class":
        share = torch.full_like(share, 1 / classes)
    center = share @ scatter.means
    means = scatter.means - center
    weighted = means * share.sqrt()[:, None]
    trace = float(weighted.square().sum())
    if rcond is None:
        rcond = 1e-5 if scatter.resolution > 1e-10 else 1e-10
    # Means that differ by less than the features' own rounding do not differ.
    size = float((scatter.means.square().sum(1) * share).sum())
    if trace <= (4 * scatter.resolution) ** 2 * size:
        empty = means.new_zeros(means.shape[1], 0)
        return Between(means, center, empty, means.new_zeros(0), 0.0)
    _, scales, directions = torch.linalg.svd(weighted, full_matrices=False)
    # The centred means have rank at most K - 1: what comes after is rounding, whatever rcond says.
    keep = (scales > rcond * scales[0])[: classes - 1]
    rank = int(keep.sum())
    return Between(means, center, directions[:rank].T.contiguous(), scales[:rank], trace)


def nc1_from_variances(variances: Float[Tensor, " rank"], between: Between, classes: int) -> float:
    """NC1 = (1/K) tr(S_W S_B⁺) = (1/K) Σ_r v_rᵀ S_W v_r / s_r², from the within-class variances along V alone.

    No pseudo-inverse and no features-by-features matrix is needed.
    """
    return float((variances / between.scales.square()).sum()) / classes


def simplex_distance(matrix: Float[Tensor, "classes classes"]) -> float:
    """‖A/‖A‖_F - (I - 11ᵀ/K)/√(K-1)‖_F: how far A is from the Gram matrix of a simplex equiangular tight frame.

    With A the Gram matrix of the centred means this is NC2, with A = W Mcᵀ it is NC3. NaN for A = 0.

    >>> simplex_distance(torch.eye(3).double() - 1 / 3) < 1e-15
    True
    """
    k = len(matrix)
    simplex = (torch.eye(k, dtype=matrix.dtype, device=matrix.device) - 1 / k) / (k - 1) ** 0.5
    norm = torch.linalg.matrix_norm(matrix)
    return float(torch.linalg.matrix_norm(matrix / norm - simplex)) if norm > 0 else float("nan")


def equinorm(means: Float[Tensor, "classes features"]) -> float:
    """The standard deviation of the centred means' norms over their mean; 0 when they are equally long.

    >>> round(equinorm(torch.tensor([[3.0, 0.0], [0.0, 1.0]])), 3)
    0.5
    """
    norms = torch.linalg.vector_norm(means, dim=1)
    return float(norms.std(correction=0) / norms.mean())


def cosines(means: Float[Tensor, "classes features"]) -> Float[Tensor, "classes classes"]:
    """Cosines between the centred class means; at collapse -1/(K-1) off the diagonal. NaN for a mean at the center."""
    unit = means / torch.linalg.vector_norm(means, dim=1, keepdim=True)
    return unit @ unit.T


def equiangle(means: Float[Tensor, "classes features"]) -> float:
    """The mean of |cos + 1/(K-1)| over pairs of centred class means; 0 for the maximal angle of a simplex.

    >>> round(equiangle(torch.eye(3).double() - 1 / 3), 12)
    0.0
    """
    k = len(means)
    apart = (cosines(means) + 1 / (k - 1)).abs()
    return float((apart.sum() - apart.diagonal().sum()) / (k * (k - 1)))


def self_duality(
    weight: Float[Tensor, "classes features"], means: Float[Tensor, "classes features"]
) -> float:
    """‖W/‖W‖_F - Mc/‖Mc‖_F‖²_F: how far the head's rows are from the centred means.

    Bias-free squared loss does not bring it to 0, because its W is orthogonal and Mc a simplex: at collapse it
    is 2 - 2 √((K-1)/K), 0.268 for K = 4.
    """
    difference = weight / torch.linalg.matrix_norm(weight) - means / torch.linalg.matrix_norm(means)
    return float(difference.square().sum())


def cdnv(scatter: ClassScatter) -> Float[Tensor, "classes classes"]:
    """Class-distance normalised variance (v_k + v_l) / (2 ‖h_k - h_l‖²) of each pair of classes; 0 on the diagonal.

    v_k is the mean of ‖h - h_k‖² in class k (Galanti, György, Hutter 2021). Infinite where two means coincide.
    """
    variance = scatter.squares / scatter.counts
    centred = scatter.means - scatter.means.mean(0)
    # Distances by differences, a row at a time: the expansion of the square cancels for means that lie close.
    apart = torch.stack([(centred - row).square().sum(1) for row in centred])
    pairs = (variance[:, None] + variance[None]) / (2 * apart)
    return pairs.fill_diagonal_(0)


def project(features: Float[Tensor, "batch features"], between: Between) -> Float[Tensor, "batch rank"]:
    """(h - h_G)ᵀ V: each sample in the span of the centred class means, where all that concerns them happens.

    Centred before it is multiplied: a projection of large numbers would round away what lies close to the means.
    """
    center, directions = between.center.to(features.dtype), between.directions.to(features.dtype)
    return torch.cat([(part - center) @ directions for part in features.split(_ROWS)])


def nearest_mean(projected: Float[Tensor, "batch rank"], between: Between) -> Int[Tensor, " batch"]:
    """The class whose mean is nearest to each sample, from :func:`project`: what lies across the span adds the same to all."""
    inside = between.means @ between.directions
    half = inside.square().sum(1).to(projected.dtype) / 2
    return torch.addmm(-half, projected, inside.to(projected.dtype).T).argmax(1)
