"""Is a saliency map about the class, and about what was learned? Rank correlation, class sensitivity, weight randomisation.

Rebuffi et al. 2020 (arXiv 2004.02866), Adebayo et al. 2018 (arXiv 1810.03292). Ranks are taken on the raw maps, so that small values do not
fall together; a constant map has no rank correlation: it is counted as undefined, never as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import device_of
from lineament.core.redrawing import copied, redraw, reset_of, weighted
from lineament.core.results import Readable, axes
from lineament.core.sites.naming import sites
from lineament.explain.saliency.aggregation import is_constant
from lineament.explain.saliency.maps import saliency
from lineament.explain.scores import class_scores, differentiable, prepared, scores_of

Explain = Callable[..., Any]


def spearman(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch"]:
    """Spearman's rank correlation of each pair of maps, ties at their average rank; NaN where a map is constant.

    Constant is a map whose range is rounding noise (:func:`lineament.explain.saliency.aggregation.is_constant`): resizing leaves
    such noise on it, and ranks would take it for a pattern.

    Args:
        a, b: pairs of maps of the same shape; each pair is flattened.

    Raises:
        InputError: different shapes, NaN or empty maps.

    >>> round(spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 2.0]])).item(), 12)
    -0.866025403784
    """
    for name, maps in (("a", a), ("b", b)):
        checks.tensor(name, maps, floating=True)
    checks.require(
        a.shape == b.shape and a.ndim > 1,
        f"maps: got {checks.show(a)} and {checks.show(b)}, expected the same shape (batch, ...)",
    )
    constant = _constant(a) | _constant(b)
    x, y = _ranks(a), _ranks(b)
    found = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    return torch.where(constant, torch.nan, found.clamp(-1.0, 1.0))


def _constant(maps: Tensor) -> Tensor:
    return is_constant(maps.detach().flatten(1)[:, None, None])


def _ranks(maps: Tensor) -> Float[Tensor, "batch cells"]:
    """Centred average ranks: a value's rank is the mean of the first and last place that it could have when sorted."""
    flat = maps.detach().double().flatten(1).contiguous()
    ordered = flat.sort(dim=1).values
    first = torch.searchsorted(ordered, flat, right=False)
    last = torch.searchsorted(ordered, flat, right=True)
    ranks = (first + last).double()
    return ranks - ranks.mean(1, keepdim=True)


@dataclass(frozen=True)
class Similarity(Readable):
    """Rank correlations of one comparison: one for each image, their mean where defined, and how many were not."""

    per_image: Float[Tensor, "batch"]
    mean: float
    undefined: int

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Similarity:
        """Compare two batches of maps.

        >>> Similarity.of(torch.rand(2, 1, 3, 3), torch.ones(2, 1, 3, 3)).undefined
        2
        """
        found = spearman(a, b)
        return cls(found, float(found.nanmean()), int(found.isnan().sum()))

    def to_dict(self) -> dict[str, Any]:
        each, mean = (
            [None if v != v else v for v in values] for values in (self.per_image.tolist(), [self.mean])
        )
        return {"per_image": each, "mean": mean[0], "undefined": self.undefined}

    def plot(self, ax: Any = None) -> Any:
        """How the correlations are spread over the images."""
        ax = axes(ax)
        ax.hist(self.per_image[~self.per_image.isnan()].cpu().numpy(), bins=20, range=(-1, 1))
        ax.set(xlabel="Spearman correlation", ylabel="images")
        return ax


@torch.inference_mode(False)
def class_sensitivity(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    *,
    explain: Explain = saliency,
    **options: Any,
) -> Similarity:
    """How alike the maps of the most and the least probable class are: 1 ignores the class, near 0 is specific to it.

    Args:
        explain: ``explain(model, images, targets, **options) -> maps``.
        options: as for :func:`~lineament.explain.saliency.maps.saliency`, one method and one site.

    Returns:
        Spearman's correlation for each image between maps of the images' size, and their mean; lower is better.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> round(class_sensitivity(net, torch.rand(3, 1, 8, 8), site="1").mean, 3)
    1.0
    """
    images = prepared(model, images)
    with differentiable(model), torch.no_grad():
        output = class_scores(scores_of(model, images, None)[0])
    checks.require(
        output.shape[1] > 1,
        "class_sensitivity: the model has one output, so that no two classes can be compared",
    )
    most, least = (
        _single(explain(model, images, each, **options)) for each in (output.argmax(1), output.argmin(1))
    )
    return Similarity.of(most, least)


@dataclass(frozen=True)
class Randomisation(Readable):
    """Similarity to the trained model's maps, stage by stage, from the output downwards.

    ``raw`` compares the maps, ``magnitude`` their absolute values. ``skipped`` are modules with weights that have no way to
    draw them anew; they keep the trained ones.
    """

    layers: list[str]
    raw: list[Similarity]
    magnitude: list[Similarity]
    skipped: list[str]

    def to_dict(self) -> dict[str, Any]:
        both = {name: [s.to_dict() for s in getattr(self, name)] for name in ("raw", "magnitude")}
        return {"layers": self.layers, **both, "skipped": self.skipped}

    def plot(self, ax: Any = None) -> Any:
        """Mean similarity against the layers, from the output downwards."""
        ax = axes(ax)
        places = range(len(self.layers))
        ax.plot(places, [s.mean for s in self.raw], marker="o", label="signed")
        ax.plot(places, [s.mean for s in self.magnitude], marker="s", label="magnitude")
        ax.set_xticks(list(places), self.layers, rotation=45, ha="right")
        ax.set(ylabel="Spearman correlation with the trained model's map", xlabel="randomised")
        ax.legend()
        return ax


@torch.inference_mode(False)
def randomisation(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    targets: Any = None,
    *,
    mode: str = "cascading",
    layers: str | Iterable[str] | None = None,
    retarget: bool = False,
    seed: int = 0,
    explain: Explain = saliency,
    **options: Any,
) -> Randomisation:
    """Do the maps change when the weights are drawn anew? Layer by layer from the output, on a copy of the model.

    Args:
        targets: kept through all stages (the trained model's prediction by default).
        mode: ``"cascading"`` (this layer and all behind it) or ``"independent"`` (this layer only).
        layers: names or globs of the layers at which to compare; all with weights by default.
        retarget: explain the randomised model's own prediction instead, as the official script does.
        seed: of the drawn weights; a layer gets the same ones in both modes.
        explain, options: as for :func:`class_sensitivity`.

    Raises:
        InputError: unknown mode or layers, or no layer that can be drawn anew.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> randomisation(net, torch.rand(3, 1, 8, 8), site="1").layers
    ['4', '0']
    """
    checks.one_of("mode", mode, ("cascading", "independent"))
    checks.number("seed", seed, integer=True)
    images = prepared(model, images)
    names = weighted(model)
    known = [name for name in names if reset_of(model.get_submodule(name)) is not None]
    checks.require(bool(known), "model: no module has reset_parameters(), so that nothing can be drawn anew")
    wanted = known
    if layers is not None:
        asked = [n for p in ([layers] if isinstance(layers, str) else layers) for n in sites(model, p)]
        wanted = [name for name in known if name in asked]
        checks.require(
            bool(wanted),
            f"layers: got {asked}, expected layers that can be drawn anew{checks.suggest(str(layers), known)}",
        )
    with differentiable(model), torch.no_grad():
        _, target = scores_of(model, images, targets)
    trained = _single(explain(model, images, target, **options))
    changed = copied(model)
    raw, magnitude = [], []
    for name in reversed(known):
        if mode == "independent":
            if name not in wanted:
                continue
            changed = copied(model)
        _redraw(changed.get_submodule(name), seed + known.index(name))
        if name not in wanted:
            continue
        maps = _single(explain(changed, images, None if retarget else target, **options))
        raw.append(Similarity.of(trained, maps))
        magnitude.append(Similarity.of(trained.abs(), maps.abs()))
    return Randomisation(wanted[::-1], raw, magnitude, [name for name in names if name not in known])


def _redraw(module: nn.Module, seed: int) -> None:
    device = device_of(module)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        redraw(module)


def _single(maps: Any) -> Tensor:
    checks.require(
        isinstance(maps, Tensor),
        "explain: it returned several maps for an image, expected one site and one method",
    )
    return maps
