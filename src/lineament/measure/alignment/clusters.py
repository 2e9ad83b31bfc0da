"""Which groups of units of several networks span the same small space? Spectral and hierarchical clusters of the joint unit set.

Li et al. (2015, arXiv 1511.07543): the similarity is |correlation|, over the units of all networks together (the sign of a unit does not
matter for the space that it spans). A cluster with members from every network is a subspace that they share, whatever basis each of them
holds it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable


@dataclass(frozen=True)
class UnitCluster(Readable):
    """One group of units.

    Attributes:
        members: the units of each network.
        within: the mean |correlation| between its members of one network, by network (``None`` under two members).
        across: between members of different networks.
        purity: the largest share that one network has of its members; 1 is a group of one network alone.
        cosines: of the principal angles between what the members of the first two networks span; 1 is a shared direction.
    """

    members: tuple[tuple[int, ...], ...]
    within: tuple[float | None, ...]
    across: float | None
    purity: float
    cosines: tuple[float, ...]

    @property
    def shared(self) -> bool:
        """Whether every network has a member."""
        return all(self.members)


@dataclass(frozen=True)
class UnitClusters(Readable):
    """Groups of the units of several networks.

    Attributes:
        labels: the group of each unit, the networks one after the other.
        order: the units in the order in which the joint matrix shows its blocks.
        method: ``"spectral"`` or ``"hierarchical"``.
        eigenvalues: of the normalised Laplacian, ascending (spectral).
        merges: the linkage matrix of SciPy (hierarchical), for a dendrogram.
    """

    labels: Int[Tensor, " units"]
    clusters: tuple[UnitCluster, ...]
    order: Int[Tensor, " units"]
    method: str
    eigenvalues: Float[Tensor, " units"] | None = None
    merges: Float[Tensor, "merges 4"] | None = None

    @property
    def shared(self) -> int:
        """How many groups have members from every network."""
        return sum(cluster.shared for cluster in self.clusters)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return results.plain(self)

    def plot(self, ax: Any = None) -> Any:
        """The dendrogram (hierarchical), or the eigenvalues of the Laplacian, whose first gap counts the groups."""
        ax = results.axes(ax)
        if self.merges is not None:
            from scipy.cluster.hierarchy import dendrogram

            dendrogram(self.merges.numpy(), ax=ax, no_labels=True, color_threshold=0)
            ax.set(ylabel="1 - |correlation|", xlabel="units")
        elif self.eigenvalues is not None:
            ax.plot(range(1, len(self.eigenvalues) + 1), self.eigenvalues.numpy(), "o-", ms=3)
            ax.axvline(len(self.clusters), color="C1", ls="--")
            ax.set(xlabel="eigenvalue", ylabel="of the normalised Laplacian")
        return ax


def unit_clusters(
    correlations: Float[Tensor, "units units"],
    sizes: Sequence[int],
    clusters: int,
    *,
    method: str = "spectral",
    linkage: str = "average",
    restarts: int = 20,
    seed: int = 0,
) -> UnitClusters:
    """Group the units of several networks by |correlation|.

    Args:
        correlations: of all units with all, the networks one after the other.
        sizes: how many units each network has.
        clusters: how many groups, at least 2.
        method: ``"spectral"``: k-means on the rows of the k lowest eigenvectors of I - D^-½ S D^-½, each row of length 1;
            ``"hierarchical"``: agglomerative on the distance 1 - S.
        linkage: of the hierarchical method, a linkage of SciPy: ``"average"``, ``"complete"``, ``"ward"`` ...
        restarts, seed: of k-means.

    Raises:
        InputError: sizes that do not make up the matrix, fewer than 2 groups or more than units.

    >>> block = torch.full((2, 2), 0.9).fill_diagonal_(1.0)
    >>> joint = torch.block_diag(block, block)
    >>> found = unit_clusters(joint, [1, 3], 2)
    >>> found.shared, found.clusters[int(found.labels[0])].members
    (1, ((0,), (0,)))
    """
    checks.one_of("method", method, ("spectral", "hierarchical"))
    joint = checks.tensor("correlations", correlations, shape=("units", "units"), floating=True)
    joint = joint.detach().double().cpu()
    require(
        joint.shape[0] == joint.shape[1] == sum(sizes),
        f"sizes: got {list(sizes)}, expected numbers of units that make up the {len(joint)} of correlations",
    )
    checks.number("clusters", clusters, low=2, high=len(joint), integer=True)
    similarity = joint.abs().fill_diagonal_(1.0)
    values = merges = None
    if method == "spectral":
        from sklearn.cluster import KMeans

        values, vectors = laplacian_eigenpairs(similarity)
        rows = row_normalised(vectors[:, :clusters])
        means = KMeans(clusters, n_init=restarts, random_state=seed % 2**32)  # pyright: ignore[reportArgumentType]
        labels = torch.from_numpy(means.fit_predict(rows.numpy())).long()
        order = labels.argsort(stable=True)
    else:
        merges = linkage_matrix(similarity, linkage)
        labels = cut(merges, clusters)
        from scipy.cluster.hierarchy import leaves_list

        order = torch.from_numpy(leaves_list(merges.numpy()).astype(np.int64))
    found = [_described(joint, sizes, labels == k) for k in range(int(labels.max()) + 1)]
    return UnitClusters(labels, tuple(found), order, method, values, merges)


def laplacian_eigenpairs(similarity: Float[Tensor, "units units"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of I - D^-½ S D^-½, D the row sums of S (Ng, Jordan and Weiss 2001)."""
    scale = similarity.sum(1).clamp_min(1e-300).rsqrt()
    eye = torch.eye(len(similarity), dtype=similarity.dtype)
    values, vectors = torch.linalg.eigh(eye - scale[:, None] * similarity * scale)
    return values, vectors


def row_normalised(rows: Float[Tensor, "units k"]) -> Float[Tensor, "units k"]:
    """Each row at length 1; a row of zeros stays."""
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-300)


def linkage_matrix(
    similarity: Float[Tensor, "units units"], linkage: str = "average"
) -> Float[Tensor, "merges 4"]:
    """SciPy's linkage matrix of the distance 1 - S with a diagonal of 0; its third column holds the heights of the merges."""
    from scipy.cluster.hierarchy import linkage as agglomerate
    from scipy.spatial.distance import squareform

    checks.one_of(
        "linkage", linkage, ("single", "complete", "average", "weighted", "centroid", "median", "ward")
    )
    distance = (1 - similarity).clamp_min(0).fill_diagonal_(0.0)
    distance = (distance + distance.T) / 2
    return torch.from_numpy(agglomerate(squareform(distance.numpy(), checks=False), linkage))


def cut(merges: Float[Tensor, "merges 4"], clusters: int) -> Int[Tensor, " units"]:
    """The labels, from 0, of a hierarchy cut into so many groups."""
    from scipy.cluster.hierarchy import fcluster

    return torch.from_numpy(fcluster(merges.numpy(), clusters, "maxclust").astype(np.int64)) - 1


def principal_cosines(
    within_a: Float[Tensor, "a a"], within_b: Float[Tensor, "b b"], between: Float[Tensor, "a b"]
) -> Float[Tensor, " angles"]:
    """The cosines of the principal angles between what two sets of units span, from their correlations: C_aa^-½ C_ab C_bb^-½'s singular values."""
    return torch.linalg.svdvals(_inverse_root(within_a) @ between @ _inverse_root(within_b)).clamp_max(1.0)


def _inverse_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > values[-1].clamp_min(0) * len(values) * 1e-12
    scale = torch.where(kept, values.clamp_min(1e-300).rsqrt(), torch.zeros_like(values))
    return (vectors * scale) @ vectors.T


def _described(joint: Tensor, sizes: Sequence[int], inside: Tensor) -> UnitCluster:
    parts = [part.nonzero().flatten() for part in inside.split(list(sizes))]
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
    places = [part + start for part, start in zip(parts, starts)]
    within = []
    for place in places:
        block = joint[place][:, place].abs()
        n = len(place)
        within.append(float((block.sum() - block.diagonal().sum()) / (n * (n - 1))) if n > 1 else None)
    pairs = [
        joint[a][:, b].abs().flatten()
        for i, a in enumerate(places)
        for b in places[i + 1 :]
        if len(a) * len(b)
    ]
    cosines: tuple[float, ...] = ()
    if len(places) > 1 and len(places[0]) and len(places[1]):
        a, b = places[:2]
        cosines = tuple(principal_cosines(joint[a][:, a], joint[b][:, b], joint[a][:, b]).tolist())
    return UnitCluster(
        tuple(tuple(part.tolist()) for part in parts),
        tuple(within),
        float(torch.cat(pairs).mean()) if pairs else None,
        max(map(len, parts)) / max(int(inside.sum()), 1),
        cosines,
    )
