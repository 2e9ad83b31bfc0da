"""Is a saliency map about the class, and does it point at the object? Class sensitivity, randomisation, pointing game.

Rebuffi et al. 2020 (arXiv 2004.02866), Adebayo et al. 2018 (1810.03292), Zhang et al. 2016 (1608.00507). Rank correlations are taken on raw maps in float64; a constant
map has none: it is counted as undefined, never as zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import device_of, frozen
from lineament.explain.saliency import saliency, scores_of


def spearman(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch"]:
    """Spearman's rank correlation of each pair of maps, ties at their average rank; NaN where a map is constant.

    A map counts as constant when its range is below 1e-10 of its largest magnitude: resizing leaves such noise on it.

    >>> spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 2.0]])).item()
    -0.8660254037844387
    """
    checks.require(
        a.shape == b.shape, f"maps: got {checks.show(a)} and {checks.show(b)}, expected the same shape"
    )
    ranks = []
    constant = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for maps in (a, b):
        flat = maps.detach().double().flatten(1)
        ordered = flat.sort(dim=1).values.contiguous()
        left = torch.searchsorted(ordered, flat.contiguous(), right=False)
        right = torch.searchsorted(ordered, flat.contiguous(), right=True)
        centred = (left + right).double()
        ranks.append(centred - centred.mean(1, keepdim=True))
        spread = ordered[:, -1] - ordered[:, 0]
        constant |= spread <= 1e-10 * flat.abs().amax(1)
    x, y = ranks
    found = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    return torch.where(constant, torch.nan, found)


@dataclass(frozen=True)
class Similarity:
    """Rank correlations of one comparison: one for each image, their mean, and how many were undefined."""

    per_image: Float[Tensor, "batch"]
    mean: float
    undefined: int

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Similarity:
        found = spearman(a, b)
        return cls(found, float(found.nanmean()), int(found.isnan().sum()))

    def to_dict(self) -> dict[str, Any]:
        values = [None if v != v else v for v in self.per_image.tolist()]
        return {
            "per_image": values,
            "mean": None if self.mean != self.mean else self.mean,
            "undefined": self.undefined,
        }


def class_sensitivity(
    model: nn.Module, images: Tensor, *, explain: Callable[..., Tensor] = saliency, **options: Any
) -> Similarity:
    """How alike the maps of the most and the least probable class are: 1 ignores the class, near 0 is specific to it.

    Args:
        explain: ``explain(model, images, targets, **options) -> maps``.
        options: as for :func:`~lineament.explain.saliency.saliency`.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> round(class_sensitivity(net, torch.rand(3, 1, 8, 8), site="1").mean, 6)
    1.0
    """
    with frozen(model), torch.no_grad():
        output, most = scores_of(model, images.to(device_of(model)), None)
    least = output.argmin(1)
    return Similarity.of(explain(model, images, most, **options), explain(model, images, least, **options))


@dataclass(frozen=True)
class Randomisation:
    """Similarity to the trained model's maps, stage by stage: the layer that was randomised last, raw and on magnitudes."""

    layers: list[str]
    raw: list[Similarity]
    magnitude: list[Similarity]

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "raw": [s.to_dict() for s in self.raw],
            "magnitude": [s.to_dict() for s in self.magnitude],
        }

    def plot(self, ax: Any = None) -> Any:
        """Mean similarity against the layers, from the output downwards."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.plot(self.layers, [s.mean for s in self.raw], marker="o", label="signed")
        ax.plot(self.layers, [s.mean for s in self.magnitude], marker="s", label="magnitude")
        ax.set(ylabel="Spearman correlation with the trained model's map", xlabel="randomised down to")
        ax.legend()
        return ax


def randomisation(
    model: nn.Module,
    images: Tensor,
    targets: Any = None,
    *,
    mode: str = "cascading",
    retarget: bool = False,
    seed: int = 0,
    explain: Callable[..., Tensor] = saliency,
    **options: Any,
) -> Randomisation:
    """Do the maps change when the weights are drawn anew? Layer by layer from the output, on a copy of the model.

    Args:
        targets: kept through all stages (the trained model's prediction by default).
        mode: ``"cascading"`` (this layer and all behind it) or ``"independent"`` (this layer only).
        retarget: explain the randomised model's own prediction instead, as the official script does.
        explain, options: as for :func:`class_sensitivity`.
    """
    checks.one_of("mode", mode, ("cascading", "independent"))
    with frozen(model), torch.no_grad():
        _, target = scores_of(model, images.to(device_of(model)), targets)
    trained = explain(model, images, target, **options)
    layers = [
        name
        for name, m in model.named_modules()
        if hasattr(m, "reset_parameters") and list(m.parameters(False))
    ]
    checks.require(
        len(layers) > 0, "model: no module has reset_parameters(), so that nothing can be drawn anew"
    )
    changed = copy.deepcopy(model)
    raw, magnitude = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in reversed(layers):
            if mode == "independent":
                changed = copy.deepcopy(model)
            module: Any = changed.get_submodule(name)
            module.reset_parameters()
            maps = explain(changed, images, None if retarget else target, **options)
            raw.append(Similarity.of(trained, maps))
            magnitude.append(Similarity.of(trained.abs(), maps.abs()))
    return Randomisation(layers[::-1], raw, magnitude)


def point_of(map_: Float[Tensor, "height width"]) -> tuple[int, int]:
    """The (column, row) of a map's maximum.

    >>> point_of(torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 0.0]]))
    (2, 0)
    """
    index = int(map_.argmax())
    return index % map_.shape[1], index // map_.shape[1]


def points_at(
    point: tuple[float, float], mask: Bool[Tensor, "height width"], tolerance: float = 15.0
) -> bool:
    """Whether a (column, row) point lies within ``tolerance`` pixels of the mask, strictly.

    >>> points_at((3, 0), torch.tensor([[True, False, False, False]]), tolerance=3)
    False
    """
    rows, columns = mask.nonzero().double().unbind(1)
    return bool(((columns - point[0]) ** 2 + (rows - point[1]) ** 2 < tolerance**2).any())


class PointingGame:
    """Hits and misses by class, over batches; the mean counts the classes that occurred.

    >>> game = PointingGame(3)
    >>> game.add(0, True); game.add(0, False); game.add(2, True)
    >>> game.accuracies(), game.mean()
    ([0.5, None, 1.0], 0.75)
    """

    def __init__(self, classes: int):
        checks.number("classes", classes, low=1, integer=True)
        self.hits = torch.zeros(classes, dtype=torch.int64)
        self.misses = torch.zeros(classes, dtype=torch.int64)

    def add(self, label: int, hit: bool) -> None:
        """One image's outcome."""
        (self.hits if hit else self.misses)[label] += 1

    def accuracies(self) -> list[float | None]:
        """Hits over all, for each class; ``None`` for a class that did not occur."""
        total = self.hits + self.misses
        return [int(h) / int(n) if n else None for h, n in zip(self.hits, total)]

    def mean(self, *, unseen_as_zero: bool = False) -> float:
        """The mean over classes; ``unseen_as_zero`` counts classes without any case as 0, as the official code does."""
        values = [a for a in self.accuracies() if a is not None]
        count = len(self.hits) if unseen_as_zero else len(values)
        checks.require(count > 0, "pointing game: no case was added")
        return sum(values) / count


def difficult(mask: Bool[Tensor, "height width"], others: bool) -> bool:
    """The hard subset of the pointing game: the object covers less than a quarter and another class is in the image."""
    return others and float(mask.double().mean()) < 0.25
