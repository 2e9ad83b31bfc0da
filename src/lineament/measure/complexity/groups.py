"""Are features local or spread over units, and which of them belong together?

Fel et al. (NeurIPS 2024, arXiv 2407.06076, sections 3 and 5): the Hoyer score of an atom tells one unit (1) from all alike (0); k-means on the atoms and
a tree over them give meta-features, with the mean complexity and importance of each. MACO (Fel et al. 2023, arXiv 2306.06805), which
draws what a feature responds to by fixing the magnitude of an image's spectrum, takes :func:`feature_objective` (package ``horama``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable
from lineament.measure.complexity.features import Features, feature_function


def hoyer(atoms: Float[Tensor, "features width"]) -> Float[Tensor, " features"]:
    """(√d - ‖v‖₁/‖v‖₂) / (√d - 1) of each atom: 1 for a single unit, 0 for all alike; NaN for an atom of zeros.

    >>> hoyer(torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])).tolist()
    [1.0, 0.0]
    """
    checks.tensor("atoms", atoms, shape=("features", "width"), floating=True)
    d = atoms.shape[1]
    require(d >= 2, f"atoms: got {checks.show(atoms)}, expected at least 2 numbers an atom")
    wide = atoms.detach().double()
    root = math.sqrt(d)
    return (root - wide.abs().sum(1) / torch.linalg.vector_norm(wide, dim=1)) / (root - 1)


@dataclass(frozen=True)
class MetaFeatures(Readable):
    """Groups of features.

    Attributes:
        labels: the group of each feature; centres: the mean atom of each group; sizes: how many features.
        complexity, importance: mean of each group over the features where it is known; ``None`` where none was given.
        tree: SciPy's linkage of the atoms (Ward), a row a merger.
        plane: (features x 2), by UMAP where it is installed, else the first two principal components.
        projection: which of the two.
    """

    labels: Int[Tensor, " features"]
    centres: Float[Tensor, "groups width"]
    sizes: Int[Tensor, " groups"]
    complexity: Float[Tensor, " groups"] | None
    importance: Float[Tensor, " groups"] | None
    tree: Float[Tensor, "mergers four"]
    plane: Float[Tensor, "features two"]
    projection: str

    def level(self, count: int) -> Int[Tensor, " features"]:
        """The groups of the tree's level with (at most) ``count`` of them."""
        from scipy.cluster.hierarchy import fcluster

        checks.number("count", count, low=1, high=len(self.labels), integer=True)
        return torch.from_numpy(fcluster(self.tree.numpy(), count, "maxclust")).long() - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {name: results.plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """The plane, coloured by the complexity of the groups where it is known, else by group."""
        ax = results.axes(ax)
        colour = self.labels if self.complexity is None else self.complexity[self.labels]
        image = ax.scatter(*self.plane.T, c=colour, cmap="viridis", s=12)
        ax.figure.colorbar(
            image, ax=ax, label="group" if self.complexity is None else "mean complexity of the group"
        )
        ax.set(xticks=[], yticks=[], xlabel=self.projection)
        return ax


def mean_by_group(
    values: Float[Tensor, " features"], labels: Int[Tensor, " features"]
) -> Float[Tensor, " groups"]:
    """The mean of each group over its values that are not NaN; NaN for a group without.

    >>> mean_by_group(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([0, 0, 1])).tolist()
    [2.0, nan]
    """
    known = ~values.isnan()
    count = int(labels.max()) + 1
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, labels[known], values[known].double())
    return total / torch.bincount(labels[known], minlength=count)


def meta_features(
    atoms: Float[Tensor, "features width"],
    *,
    complexity: Float[Tensor, " features"] | None = None,
    importance: Float[Tensor, " features"] | None = None,
    groups: int | None = None,
    seed: int = 0,
) -> MetaFeatures:
    """Groups of similar features by k-means on the atoms, with a tree over all of them and a plane to draw them on.

    Args:
        atoms: the dictionary's directions.
        complexity, importance: of each feature, averaged over each group.
        groups: how many; by default the square root of the number of features, at most 150.
        seed: of k-means and the plane.

    Raises:
        InputError: more groups than features, NaN.

    >>> found = meta_features(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), groups=2)
    >>> bool(found.labels[0] == found.labels[1]), sorted(found.sizes.tolist())
    (True, [1, 2])
    """
    from scipy.cluster.hierarchy import linkage
    from sklearn.cluster import KMeans

    checks.tensor("atoms", atoms, shape=("features", "width"), floating=True)
    k = len(atoms)
    require(k >= 2, f"atoms: got {k}, expected at least 2")
    groups = min(150, max(1, round(math.sqrt(k)))) if groups is None else groups
    checks.number("groups", groups, low=1, high=k, integer=True)
    checks.seed("seed", seed)
    x = atoms.detach().double().cpu()
    fitted = KMeans(groups, random_state=seed % 2**32).fit(x.numpy())
    labels = torch.from_numpy(fitted.labels_).long()

    def mean_of(name: str, values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        checks.tensor(name, values, shape=(k,), finite=False)
        return mean_by_group(values.detach().cpu(), labels)

    plane, projection = _plane(x, seed)
    return MetaFeatures(
        labels=labels,
        centres=torch.from_numpy(fitted.cluster_centers_),
        sizes=torch.bincount(labels, minlength=groups),
        complexity=mean_of("complexity", complexity),
        importance=mean_of("importance", importance),
        tree=torch.from_numpy(linkage(x.numpy(), "ward")),
        plane=plane,
        projection=projection,
    )


def _plane(x: Tensor, seed: int) -> tuple[Tensor, str]:
    try:
        from umap import UMAP  # pyright: ignore[reportMissingImports]
    except ImportError:
        u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        flat = u[:, :2] * s[:2]
        return torch.cat([flat, flat.new_zeros(len(flat), 2 - flat.shape[1])], 1), "principal components"
    near = min(15, len(x) - 1)
    return torch.from_numpy(
        UMAP(n_neighbors=near, random_state=seed % 2**32).fit_transform(x.numpy())
    ), "UMAP"


def feature_objective(model: nn.Module, features: Features, feature: int) -> Any:
    """The mean value of one feature over a batch of images, as a differentiable function of them: what feature visualisation maximises.

    ``horama.maco(feature_objective(model, dictionary, 7), total_steps=1000, image_size=512, model_input_size=224)`` draws it by MACO.

    Args:
        features: a dictionary, a site or a function of the images. feature: which of them.

    Raises:
        InputError: when called, a feature that does not exist.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    >>> feature_objective(net, "1", 2)(torch.ones(1, 3, 8, 8, requires_grad=True)).requires_grad
    True
    """
    function = feature_function(model, features, gradients=True)

    def objective(images: Tensor) -> Tensor:
        z = function(images)
        checks.number("feature", feature, low=0, high=z.shape[1] - 1, integer=True)
        return z[:, feature].mean()

    return objective
