"""What analyses make of unequally represented features: RSA, principal components, and read-outs that could use either of two.

Lampinen, Chan, Hermann (TMLR 2024, arXiv 2405.05847). Two networks that compute different hard features and the same easy one look alike to RSA; the top principal components keep
the easy feature first; and a read-out trained where both are right follows the easy one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import kendalltau
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable

METRICS = ("correlation", "euclidean")


@dataclass(frozen=True)
class Rsa(Readable):
    """Correlations between the upper triangles of two dissimilarity matrices; ``kendall`` (tau-b) is ``None`` beyond 2,000 patterns unless asked for."""

    pearson: float
    spearman: float
    kendall: float | None

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def rdm(
    patterns: Float[Tensor, "samples units"], metric: str = "correlation"
) -> Float[Tensor, "samples samples"]:
    """Dissimilarities between patterns: 1 - Pearson's r across units, or Euclidean distances.

    Raises:
        InputError: a constant pattern, which has no correlation, by its number.

    >>> rdm(torch.tensor([[0.0, 3.0], [4.0, 0.0]]), "euclidean").tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """
    checks.one_of("metric", metric, METRICS)
    x = checks.tensor("patterns", patterns, shape=("samples", "units"), floating=True)
    require(len(x) >= 2, f"patterns: got {len(x)}, expected at least 2")
    if metric == "correlation":
        x = x - x.mean(1, keepdim=True)
        norms = torch.linalg.vector_norm(x, dim=1)
        flat = (norms <= 1e-12 * patterns.abs().amax(1).clamp_min(1e-300)).nonzero().flatten()
        require(
            not len(flat),
            f"patterns: number {int(flat[0]) if len(flat) else 0} is constant over its units, so that it correlates with nothing; leave it out or use 'euclidean'",
        )
        x = x / norms[:, None]
        return (1 - x @ x.T).fill_diagonal_(0)
    squares = x.square().sum(1)
    far = squares[:, None] + squares - 2 * (x @ x.T)
    return far.clamp_min_(0).sqrt_().fill_diagonal_(0)


def rsa(
    x: Float[Tensor, "samples units_x"],
    y: Float[Tensor, "samples units_y"],
    *,
    metric: str = "correlation",
    kendall: bool | None = None,
) -> Rsa:
    """Representational similarity: how the dissimilarities of the same samples in two networks correlate.

    Args:
        metric: as for :func:`rdm`.
        kendall: whether to compute Kendall's tau-b, which sorts all pairs of pairs; by default up to 2,000 samples.

    >>> x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    >>> [round(v, 6) for v in vars(rsa(x, 2 * x + 1)).values()]
    [1.0, 1.0, 1.0]
    """
    require(len(x) == len(y), f"y: got {len(y)} samples, expected {len(x)}, as many as x has")
    require(len(x) >= 3, f"x: got {len(x)} samples, expected at least 3")
    a, b = (_upper(rdm(v, metric)) for v in (x, y))
    small = len(x) <= 2000 if kendall is None else kendall
    tau = float(kendalltau(a.numpy(), b.numpy())[0]) if small else None  # pyright: ignore
    return Rsa(_pearson(a, b), _pearson(_ranks(a), _ranks(b)), tau)


@dataclass(frozen=True)
class ReadoutReliance(Readable):
    """A linear read-out that was fitted where two features agree: ``weights``, and on the ``samples`` where they disagree the share that follows the first."""

    value: float
    weights: Float[Tensor, " units"]
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return results.plain(self)


def readout_reliance(
    representation: Float[Tensor, "samples units"], first: Tensor, second: Tensor, *, ridge: float = 1.0
) -> ReadoutReliance:
    """Which of two binary features a new read-out uses, fitted where both are right and asked where they disagree.

    Args:
        first, second: 0 or 1 a sample.
        ridge: λ: Σ (w·(φ - mean) - (y - mean))² + λ‖w‖².

    Raises:
        InputError: features that are not 0 and 1, or never (or always) agree.

    >>> f, g = torch.tensor([0, 1, 0, 1] * 5), torch.tensor([0, 1, 1, 0] * 5)
    >>> readout_reliance(torch.stack([3.0 * f, 1.0 * g], 1), f, g).value
    1.0
    """
    phi = checks.tensor("representation", representation, shape=("samples", "units"), floating=True).double()
    checks.number("ridge", ridge, low=0)
    f, g = (_binary(name, v, len(phi)) for name, v in (("first", first), ("second", second)))
    same = f == g
    require(
        bool(same.any()) and not bool(same.all()),
        f"first, second: they agree on {int(same.sum())} of {len(f)} samples, expected some of either kind",
    )
    require(
        len(f[same].unique()) == 2,
        "first, second: where they agree they have one value, so that there is nothing to fit",
    )
    mean, goal = phi[same].mean(0), 2.0 * f[same].double() - 1
    X, t = phi[same] - mean, goal - goal.mean()
    if ridge > 0:
        eye = torch.eye(X.shape[1], dtype=X.dtype)
        w = torch.linalg.solve(X.T @ X + ridge * eye, X.T @ t)
    else:
        w = torch.linalg.lstsq(X, t[:, None], driver="gelsd").solution[:, 0]
    said = (phi[~same] - mean) @ w + goal.mean() > 0
    return ReadoutReliance(float((said == f[~same].bool()).double().mean()), w, int((~same).sum()))


@dataclass(frozen=True)
class PcaDecoding(Readable):
    """``explained``: each component's share of the variance; ``accuracy[k, f]``: of feature f read from the top ``ks[k]`` components, on samples not fitted to."""

    explained: Float[Tensor, " components"]
    ks: tuple[int, ...]
    accuracy: Float[Tensor, "ks features"]

    def components_for(self, level: float = 0.95) -> list[int | None]:
        """The smallest of ``ks`` that reaches an accuracy, of each feature."""
        found = []
        for column in (self.accuracy >= level).T:
            hits = column.nonzero().flatten()
            found.append(self.ks[int(hits[0])] if len(hits) else None)
        return found

    def to_dict(self) -> dict[str, Any]:
        return results.plain(self)


def pca_decoding(
    representation: Float[Tensor, "samples units"],
    features: Sequence[Tensor],
    ks: Sequence[int],
    *,
    test: Tensor | None = None,
) -> PcaDecoding:
    """How well binary features are read from the top principal components of a representation.

    Args:
        features: 0 or 1 a sample, each.
        ks: how many components.
        test: samples that are judged and not fitted to; ``None`` for all, fitted and judged.

    >>> f = torch.tensor([0, 1] * 10); g = torch.tensor([0, 0, 1, 1] * 5)
    >>> pca_decoding(torch.stack([3.0 * f, 1.0 * g], 1), [f, g], [1, 2]).components_for(0.9)
    [1, 2]
    """
    phi = checks.tensor("representation", representation, shape=("samples", "units"), floating=True).double()
    mask = torch.ones(len(phi), dtype=torch.bool) if test is None else test.bool()
    rows = mask if test is None else ~mask
    centred = phi - phi.mean(0)
    _, s, V = torch.linalg.svd(centred, full_matrices=False)
    total = s.square().sum()
    require(float(total) > 0, "representation: it never varies, so that it has no components")
    found = torch.zeros(len(ks), len(features), dtype=torch.float64)
    for i, k in enumerate(ks):
        checks.number("ks", int(k), low=1, high=phi.shape[1], integer=True)
        scores = centred @ V[: int(k)].T
        for j, f in enumerate(features):
            goal = 2.0 * _binary(f"features[{j}]", f, len(phi)).double() - 1
            w = least_squares(scores[rows], goal[rows])
            said = w[0] + scores[mask] @ w[1:] > 0
            found[i, j] = (said == (goal[mask] > 0)).double().mean()
    return PcaDecoding(s.square() / total, tuple(int(k) for k in ks), found)


def least_squares(
    x: Float[Tensor, "samples units"], goal: Float[Tensor, " samples"]
) -> Float[Tensor, " weights"]:
    """The read-out of least norm among those of least squares, its intercept first.

    >>> least_squares(torch.tensor([[0.0], [1.0], [2.0]]).double(), torch.tensor([1.0, 3.0, 5.0]).double()).round(decimals=6).tolist()
    [1.0, 2.0]
    """
    A = torch.cat([torch.ones(len(x), 1, dtype=x.dtype, device=x.device), x], 1)
    return torch.linalg.lstsq(A, goal[:, None], driver="gelsd").solution[:, 0]


def _binary(name: str, values: Tensor, count: int) -> Tensor:
    found = checks.tensor(name, torch.as_tensor(values), shape=(count,)).long()
    require(
        bool(((found == 0) | (found == 1)).all()) and len(found.unique()) == 2,
        f"{name}: got values {found.unique().tolist()[:5]}, expected both 0 and 1",
    )
    return found


def _upper(matrix: Tensor) -> Tensor:
    return torch.cat([row[i + 1 :] for i, row in enumerate(matrix.cpu())])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values sharing the mean of theirs.

    A float32 and its place share one integer of 64 bits, so that a plain sort, several times as fast as one that carries places, gives both.
    """
    if values.dtype == torch.float32:
        bits = (values.numpy() + np.float32(0)).view(np.uint32)  # -0 becomes 0
        packed = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
        packed <<= np.uint64(32)
        packed |= np.arange(len(bits), dtype=np.uint64)
        del bits
        packed.sort()
        order = packed.astype(np.uint32)  # the lower half
        packed >>= np.uint64(32)
        ordered = packed
        del packed
    else:
        order = values.numpy().argsort()
        ordered = values.numpy()[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    del ordered  # hundreds of MB of the pairs of 4,096 samples
    ranks = np.empty(len(order))
    if len(first) < len(order):
        sizes = np.diff(first, append=len(order))
        first = np.repeat(first + (sizes - 1) / 2, sizes)
    ranks[order] = first
    return torch.from_numpy(ranks)


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = (v.double() - v.mean(dtype=torch.float64) for v in (a, b))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else float("nan")
