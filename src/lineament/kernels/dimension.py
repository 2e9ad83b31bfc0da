"""How many dimensions does the manifold have that data lie on? Two estimates from the distances to the nearest neighbours.

TwoNN (Facco, d'Errico, Rodriguez, Laio 2017): the ratio of the second to the first distance is Pareto with exponent d. Maximum likelihood (Levina and
Bickel 2004, averaged as by MacKay and Ghahramani). A singular kernel must match it: arXiv 2204.14126, section 2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from sklearn.neighbors import NearestNeighbors

from lineament.core.checks import number, require
from lineament.core.results import Readable
from lineament.kernels.sphere import rows_of

Array = np.ndarray


@dataclass(frozen=True)
class IntrinsicDimension(Readable):
    """Two estimates, each with its standard error, from so many points."""

    two_nn: float
    two_nn_error: float
    maximum_likelihood: float
    maximum_likelihood_error: float
    samples: int

    @property
    def both(self) -> float:
        """Their geometric mean."""
        return math.sqrt(self.two_nn * self.maximum_likelihood)


def intrinsic_dimension(
    X: Array, *, neighbours: int = 10, samples: int = 2000, seed: int = 0
) -> IntrinsicDimension:
    """The dimension of the manifold that rows of X lie on.

    Args:
        X: [n, features]; equal rows count once.
        neighbours: of the maximum-likelihood estimate.
        samples: rows whose neighbours are looked up among all, drawn from ``seed``.

    Raises:
        InputError: fewer than three different rows.

    >>> rng = np.random.default_rng(0)
    >>> found = intrinsic_dimension(rng.normal(size=(500, 3)) @ rng.normal(size=(3, 20)))
    >>> 2.5 < found.two_nn < 3.5, 2.5 < found.maximum_likelihood < 3.5
    (True, True)
    """
    number("neighbours", neighbours, low=2, integer=True)
    number("samples", samples, low=3, integer=True)
    X = rows_of("X", X)
    X = np.unique(X, axis=0)
    require(len(X) >= 3, f"X: got {len(X)} different rows, expected at least 3")
    rows = np.random.default_rng(seed).permutation(len(X))[:samples]
    k = min(neighbours, len(X) - 1)
    distances = NearestNeighbors(n_neighbors=k + 1).fit(X).kneighbors(X[rows])[0][:, 1:]
    distances = np.maximum(distances, 1e-300)
    # The largest tenth is left out, as the authors do: they see the edge of the data. What is left is a censored sample of the exponential ln μ.
    ratios = np.sort(np.log(distances[:, 1] / distances[:, 0]))
    kept = max(2, int(0.9 * len(ratios)))
    exposure = ratios[:kept].sum() + (len(ratios) - kept) * ratios[kept - 1]
    two = kept / max(exposure, 1e-12)
    each = np.log(distances[:, -1:] / distances[:, :-1]).sum(1) / max(k - 1, 1)
    likely = 1 / max(each.mean(), 1e-12)
    error = likely * each.std() / max(each.mean(), 1e-12) / math.sqrt(len(rows))
    return IntrinsicDimension(
        float(two), float(two / math.sqrt(kept)), float(likely), float(error), len(rows)
    )
