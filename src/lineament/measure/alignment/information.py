"""Do two units share information that a correlation misses? Mutual information from histograms with quantile bins.

Li et al. (2015, arXiv 1511.07543) check matching by correlations with it. Their bins call every value under 1e-6 zero, so that a
signed unit loses its negative half; here the most frequent value is the point mass (the zeros of a ReLU), whatever it is, and the
other bins are quantiles of the rest. ``bins="official"`` keeps theirs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import InputError, require, show

Bins = int | str
_CELLS = 2**26  # cells of the joint histograms that are held at once


def mutual_information(
    x: Float[Tensor, "samples units_a"],
    y: Float[Tensor, "samples units_b"],
    *,
    bins: Bins = 10,
    bias: str = "miller_madow",
) -> Float[Tensor, "units_a units_b"]:
    """I(x_i; y_j) in nats for every pair of units, Σ p_ij log(p_ij / (p_i. p_.j)) over a histogram of ``bins`` x ``bins``.

    All histograms are one product of one-hot matrices: 2 N (units_a bins) (units_b bins) operations, so give it some ten thousand samples.

    Args:
        bins: their number; ``"official"`` (or ``"official:6"`` for six) for the paper's percentile bins.
        bias: ``"miller_madow"`` subtracts (K_xy - K_x - K_y + 1) / 2N, K the non-empty cells, rows and columns; ``"official"`` the paper's
            B² / (2 N ln 2), which takes bits from nats; or ``"none"``.

    Raises:
        InputError: other lengths, NaN, or (official bins) a unit that is active on too few samples for them.

    >>> x = torch.arange(1000.0)[:, None]
    >>> round(mutual_information(x, x**3, bins=4, bias="none").item(), 4), round(math.log(4), 4)
    (1.3863, 1.3863)
    """
    a, b = labels(x, bins), labels(y, bins)
    require(len(a) == len(b), f"y: got {show(y)}, expected {len(a)} samples, as many as x has")
    number, _ = _rule(bins)
    right = _one_hot(b, number)
    width = max(1, _CELLS // (number * right.shape[1]))
    found = []
    for part in a.split(width, dim=1):
        joint = _one_hot(part, number).T @ right
        joint = joint.view(part.shape[1], number, b.shape[1], number).permute(0, 2, 1, 3).double()
        found.append(histogram_information(joint, bias=bias, samples=len(a)))
    return torch.cat(found)


def histogram_information(
    histogram: Float[Tensor, "*units bins_x bins_y"],
    *,
    bias: str = "miller_madow",
    samples: int | None = None,
) -> Tensor:
    """Mutual information in nats of joint histograms (counts) in the last two dimensions; ``bias`` as in :func:`mutual_information`.

    >>> histogram_information(torch.tensor([[2.0, 2.0], [2.0, 2.0]]), bias="none").item()
    0.0
    """
    checks.one_of("bias", bias, ("none", "miller_madow", "official"))
    counts = checks.tensor("histogram", histogram, floating=True).double()
    total = counts.sum((-2, -1))
    p = counts / total[..., None, None]
    rows, columns = p.sum(-1, keepdim=True), p.sum(-2, keepdim=True)
    found = (torch.xlogy(p, p) - torch.xlogy(p, rows * columns)).sum((-2, -1))
    number = total if samples is None else samples
    if bias == "official":
        return found - counts.shape[-1] * counts.shape[-2] / (2 * number * math.log(2))
    if bias == "miller_madow":
        cells = (counts > 0).sum((-2, -1)) - (rows[..., 0] > 0).sum(-1) - (columns[..., 0, :] > 0).sum(-1) + 1
        return found - cells.double() / (2 * number)
    return found


def labels(x: Float[Tensor, "samples units"], bins: Bins = 10) -> Int[Tensor, "samples units"]:
    """The bin of each value, from 0: the most frequent value (where it fills a bin) has its own, the rest is cut at quantiles.

    Any strictly increasing change of a unit leaves its labels as they are. Fewer bins are used where quantiles coincide.
    """
    x = checks.tensor("x", x, shape=("samples", "units"), floating=True).detach().cpu()
    number, official = _rule(bins)
    if official:
        edges = [torch.from_numpy(official_edges(column, number)) for column in x.T.contiguous()]
        found = [
            # As in a histogram, the last edge belongs to the last bin.
            (torch.searchsorted(e, column.double(), right=True) - 1).clamp(0, number - 1)
            for column, e in zip(x.T.contiguous(), edges)
        ]
        return torch.stack(found, 1)
    return torch.stack([_quantile_labels(column, number) for column in x.T.contiguous()], 1)


def official_edges(
    x: Float[Tensor, " samples"], bins: int, *, margin: float = 0.01, zero: float = 1e-6
) -> np.ndarray:
    """The paper's B + 1 edges: the minimum less a margin, then the percentiles at linspace(100.1 z, 100, B), z the share of values under ``zero``.

    Raises:
        InputError: nearly every value is a zero, so that 100.1 z passes 100.
    """
    values = x.double().numpy()
    first = 100.1 * float((values < zero).mean())
    require(
        first <= 100,
        f"bins='official': a unit is above {zero:g} on {(values >= zero).mean():.2%} of the samples, too rarely for these percentiles; use bins={bins}",
    )
    return np.concatenate([[values.min() - margin], np.percentile(values, np.linspace(first, 100, bins))])


def official_histogram(
    x: Float[Tensor, " samples"], y: Float[Tensor, " samples"], edges_x: np.ndarray, edges_y: np.ndarray
) -> Float[Tensor, "bins bins"]:
    """Counts of pairs between edges."""
    counts, _, _ = np.histogram2d(x.double().numpy(), y.double().numpy(), bins=[edges_x, edges_y])
    return torch.from_numpy(counts)


def _rule(bins: Bins) -> tuple[int, bool]:
    if isinstance(bins, str):
        name, _, number = bins.partition(":")
        if name != "official" or not (number.isdigit() or not number):
            raise InputError(f"bins: got {show(bins)}, expected a number, 'official' or 'official:10'")
        return checks.number("bins", int(number or 10), low=2, integer=True), True
    return checks.number("bins", bins, low=2, integer=True), False


def _quantile_labels(column: Tensor, bins: int) -> Tensor:
    values, counts = column.unique(return_counts=True)
    most = int(counts.argmax())
    mass = values[most] if int(counts[most]) * bins >= len(column) else None
    rest = column if mass is None else column[column != mass]
    if not len(rest):
        return torch.zeros(len(column), dtype=torch.long)
    first = 0 if mass is None else 1
    ordered, parts = rest.sort().values, bins - first
    edges = ordered[torch.arange(1, parts) * len(ordered) // parts].unique()
    found = torch.searchsorted(edges, column.contiguous(), right=True) + first
    return found if mass is None else torch.where(column == mass, torch.zeros_like(found), found)


def _one_hot(found: Tensor, bins: int) -> Tensor:
    # Counts up to 2^24 are exact in float32.
    return torch.nn.functional.one_hot(found, bins).flatten(1).float()
