"""Judge maps without retraining: infidelity, sensitivity, and one table of several methods beside a random map.

Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, "On the (in)fidelity and sensitivity of explanations", arXiv 1901.09392; deletion and insertion from
:mod:`lineament.explain.faithfulness.deletion`. These ask the model about inputs it never learned from, which is what DiffROAR's retraining avoids;
they cost seconds instead of dozens of trainings, so both stand in the same table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import chunked
from lineament.core.results import Readable, axes
from lineament.explain.faithfulness.deletion import Baseline, deletion_insertion, removed
from lineament.explain.faithfulness.retraining import DiffROAR
from lineament.explain.inputs import takes_all
from lineament.explain.scores import class_scores, differentiable, prepared, scores_of

Explain = Callable[[Tensor], Tensor]
PERTURBATIONS = ("removal", "noise")
_AT_ONCE = 256


@dataclass(frozen=True)
class Infidelity(Readable):
    """For each image: ``value`` E[(I·φ - Δf)²], and ``relative``, the same over E[Δf²] with φ scaled at best.

    ``relative`` is 1 for a map that tells nothing of what a change does to the score and 0 for one that tells all of it.
    """

    value: Float[Tensor, "batch"]
    relative: Float[Tensor, "batch"]

    def to_dict(self) -> dict[str, Any]:
        return {"value": float(self.value.mean()), "relative": float(self.relative.nanmean())}

    def plot(self, ax: Any = None) -> Any:
        """How the relative infidelity is spread over images."""
        ax = axes(ax)
        ax.hist(self.relative[self.relative.isfinite()].tolist(), bins=20)
        ax.set(xlabel="relative infidelity", ylabel="images")
        return ax


@takes_all
@torch.inference_mode(False)
def infidelity(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    maps: Float[Tensor, "batch maps height width"],
    targets: Any = None,
    *,
    perturb: str = "removal",
    samples: int = 50,
    scale: float = 0.1,
    baseline: Baseline | Tensor = "blur",
    normalise: bool = False,
    seed: int = 0,
    batch_size: int | str = "auto",
) -> Infidelity:
    """How far a map's account of a change I of the input is from what the score f really loses: E_I[(I·φ - (f(x) - f(x - I)))²].

    Args:
        maps: one map (batch, 1, height, width), or the images' shape.
        targets: the class whose logit f is: one an image, one for all, or ``None`` for the predicted.
        perturb: ``"removal"``: random squares are replaced by the baseline, and I is 1 there and 0 elsewhere, so that the map's sum over
            them is its account (maps of importance); ``"noise"``: I is Gaussian noise, so that I·φ is a linear account (gradients).
        samples: draws of I for each image.
        scale: the standard deviation of the noise, in units of the images; for squares, their side over the image's.
        baseline: what stands in the squares, as for :func:`lineament.explain.faithfulness.deletion.deletion_insertion`.
        normalise: scale each map by the β that makes its infidelity least (β = E[I·φ Δf] / E[(I·φ)²]), as maps of arbitrary scale want.
        seed: of the draws; the same for every method, so that methods are compared on the same changes.

    Raises:
        InputError: images, maps, targets or settings that cannot be used.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)); x = torch.rand(2, 1, 4, 4)
    >>> gradient = net[1].weight.data[0].reshape(1, 1, 4, 4).expand(2, 1, 4, 4)
    >>> bool(infidelity(net, x, gradient, 0, perturb="noise").value.max() < 1e-10)
    True
    """
    images = prepared(model, images)
    checks.tensor("maps", maps, shape=(len(images), "maps", *images.shape[-2:]), floating=True)
    checks.require(
        maps.shape[1] in (1, images.shape[1]),
        f"maps: got {checks.show(maps)}, expected one map or {images.shape[1]} channels an image",
    )
    checks.one_of("perturb", perturb, PERTURBATIONS)
    checks.number("samples", samples, low=1, integer=True)
    checks.number("scale", scale, low=0, open_low=True)
    maps = maps.detach().to(images)
    empty = removed(images, baseline)
    generator = torch.Generator().manual_seed(checks.number("seed", seed, integer=True))
    said, lost = [], []
    with differentiable(model), torch.no_grad():
        z, target = scores_of(model, images, targets)
        start = class_scores(z).gather(1, target[:, None])[:, 0]

        def score(x: Tensor, label: Tensor) -> Tensor:
            return class_scores(scores_of(model, x, label)[0]).gather(1, label[:, None])[:, 0]

        size = min(len(images), _AT_ONCE) if batch_size == "auto" else batch_size
        for _ in range(samples):
            if perturb == "noise":
                change = scale * torch.randn(images.shape, generator=generator).to(images)
                altered = images - change
            else:
                change = _squares(images, scale, generator)
                altered = torch.where(change > 0, empty, images)
            said.append(
                (change * maps).flatten(1).sum(1)
                if maps.shape[1] > 1 or perturb == "removal" or images.shape[1] == 1
                else (change.sum(1, keepdim=True) * maps).flatten(1).sum(1)
            )
            lost.append(start - chunked(score, altered, target, batch_size=size))
    account, fact = torch.stack(said, 1).double(), torch.stack(lost, 1).double()
    square = account.square().mean(1)
    best = torch.where(square > 0, (account * fact).mean(1) / square.clamp_min(1e-300), 0.0)
    least = (best[:, None] * account - fact).square().mean(1)
    value = least if normalise else (account - fact).square().mean(1)
    power = fact.square().mean(1)
    relative = torch.where(power > 0, least / power.clamp_min(1e-300), math.nan)
    return Infidelity(value, relative)


@dataclass(frozen=True)
class Sensitivity(Readable):
    """For each image, the largest and the mean ‖φ(x + δ) - φ(x)‖ / ‖φ(x)‖ over small δ."""

    largest: Float[Tensor, "batch"]
    mean: Float[Tensor, "batch"]

    def to_dict(self) -> dict[str, Any]:
        return {"largest": float(self.largest.nanmean()), "mean": float(self.mean.nanmean())}

    def plot(self, ax: Any = None) -> Any:
        """How the largest change of the map is spread over images."""
        ax = axes(ax)
        ax.hist(self.largest[self.largest.isfinite()].tolist(), bins=20)
        ax.set(xlabel="largest relative change of the map", ylabel="images")
        return ax


def sensitivity(
    explain: Explain,
    images: Float[Tensor, "batch channels height width"],
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> Sensitivity:
    """How much an explanation changes when the input hardly does: max over \\|δ\\|∞ ≤ radius of ‖φ(x + δ) - φ(x)‖ / ‖φ(x)‖.

    Args:
        explain: ``images -> maps``; it should hold the explained class fixed, since another class has another map.
        radius: in units of the images. samples: draws of δ, uniform.

    Returns:
        A :class:`Sensitivity`; NaN where the map is zero.

    Raises:
        InputError: images or settings that cannot be used, or maps for another number of images.

    >>> sensitivity(lambda x: 2 * x, torch.ones(1, 1, 2, 2), radius=0.1).largest.item() <= 0.1 + 1e-6
    True
    """
    checks.tensor("images", images, floating=True)
    checks.require(images.ndim > 1, f"images: got {checks.show(images)}, expected (batch, ...)")
    checks.number("radius", radius, low=0, open_low=True)
    checks.number("samples", samples, low=1, integer=True)
    generator = torch.Generator().manual_seed(checks.number("seed", seed, integer=True))

    def maps(x: Tensor) -> Tensor:
        found = explain(x).detach()
        checks.require(
            len(found) == len(images),
            f"explain: it returned {checks.show(found)} for {len(images)} images, expected as many",
        )
        return found.flatten(1).double()

    start = maps(images)
    length = start.norm(dim=1)
    changes = []
    for _ in range(samples):
        delta = radius * (2 * torch.rand(images.shape, generator=generator, dtype=torch.float64) - 1)
        changes.append((maps(images + delta.to(images)) - start).norm(dim=1))
    ratio = torch.where(length > 0, torch.stack(changes) / length.clamp_min(1e-300), math.nan)
    return Sensitivity(ratio.amax(0), ratio.mean(0))


@dataclass(frozen=True)
class MapScores(Readable):
    """One row a method, the last one ``"random"``; each value is {score: one number an image}. ``retrained`` adds DiffROAR."""

    rows: Mapping[str, Mapping[str, Float[Tensor, "batch"]]]
    retrained: Mapping[str, DiffROAR]

    #: Each score, in words; whether more of it is better.
    COLUMNS = {  # noqa: RUF012
        "gain": ("deletion and insertion, gain over random", True),
        "deletion": ("deletion area", False),
        "insertion": ("insertion area", True),
        "infidelity": ("relative infidelity", False),
        "sensitivity": ("largest change of the map", False),
    }

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and rows of means; ``None`` where a score needs what was not given."""
        names = ["method", *(words for words, _ in self.COLUMNS.values())]
        least = {m: min(found.fractions) for m, found in self.retrained.items()}
        if self.retrained:
            names.append(f"DiffROAR at {100 * min(least.values()):g} % kept")
        lines: list[list[Any]] = []
        for method, row in self.rows.items():
            line: list[Any] = [method]
            for name in self.COLUMNS:
                values = row.get(name)
                line.append(None if values is None or values.isnan().all() else float(values.nanmean()))
            if self.retrained:
                line.append(self.retrained[method].at(least[method]) if method in self.retrained else None)
            lines.append(line)
        return names, lines

    def to_dict(self) -> dict[str, Any]:
        columns = list(self.COLUMNS)
        means = {line[0]: dict(zip(columns, line[1:])) for line in self.table()[1]}
        return {"scores": means, "diffroar": {m: found.to_dict() for m, found in self.retrained.items()}}

    def plot(self, ax: Any = None) -> Any:
        """The gain of each method over a random order."""
        ax = axes(ax)
        ax.barh(list(self.rows), [float(row["gain"].mean()) for row in self.rows.values()])
        ax.axvline(0, color="C7", linewidth=0.8)
        ax.invert_yaxis()
        ax.set(xlabel=self.COLUMNS["gain"][0])
        return ax


@takes_all
def score_maps(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    methods: Mapping[str, Tensor | Explain],
    targets: Any = None,
    *,
    steps: int = 20,
    samples: int = 30,
    scale: float = 0.25,
    radius: float = 0.02,
    perturbations: int = 5,
    baseline: Baseline | Tensor = "blur",
    retrained: Mapping[str, DiffROAR] | None = None,
    seed: int = 0,
    batch_size: int | str = "auto",
) -> MapScores:
    """Several methods' maps judged by the same scores on the same images, with a random map beside them.

    Args:
        methods: {name: maps (batch, 1, height, width)}, or {name: ``explain(images) -> maps``}, which sensitivity needs. Signs count:
            what speaks against the class is taken away last. Pass absolute values where a sign means nothing.
        targets: the explained class: one an image, one for all, or ``None`` for the predicted.
        steps: of deletion and insertion. samples, scale: of infidelity by removed squares. radius, perturbations: of sensitivity.
        retrained: DiffROAR of some of the methods (and of ``"random"``), to stand in the same table.

    Raises:
        InputError: images, maps or settings that cannot be used; a method called ``"random"``.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)); x = torch.rand(4, 1, 8, 8)
    >>> truth = net[1].weight.data[0].reshape(1, 1, 8, 8) * x
    >>> found = score_maps(net, x, {"gradient x input": truth}, 0, baseline="zero")
    >>> [row[0] for row in found.table()[1]], round(found.rows["gradient x input"]["infidelity"].max().item(), 4)
    (['gradient x input', 'random'], 0.0)
    """
    images = prepared(model, images)
    checks.require(len(methods) > 0, "methods: got none, expected {name: maps or function}")
    checks.require(
        "random" not in methods, "methods: 'random' is the row that is added; name yours otherwise"
    )
    with differentiable(model), torch.no_grad():
        target = scores_of(model, images, targets)[1]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((len(images), 1, *images.shape[-2:]), generator=generator).to(images)
    every: dict[str, Any] = {**methods, "random": _fresh_noise(noise, generator)}
    rows: dict[str, dict[str, Tensor]] = {}
    for name, method in every.items():
        given = noise if name == "random" else method if isinstance(method, Tensor) else method(images)
        maps = checks.tensor(f"methods: {name}", given, floating=True).detach()
        one = maps.sum(1, keepdim=True) if maps.ndim == 4 else maps
        curves = deletion_insertion(
            model, images, one, target, steps=steps, baseline=baseline, seed=seed, batch_size=batch_size
        )
        told = infidelity(
            model, images, maps, target, samples=samples, scale=scale, baseline=baseline, seed=seed,
            batch_size=batch_size,
        )  # fmt: skip
        rows[name] = {
            "gain": curves.gains,
            "deletion": curves.deletion_area,
            "insertion": curves.insertion_area,
            "infidelity": told.relative,
        }
        if not isinstance(method, Tensor):
            rows[name]["sensitivity"] = sensitivity(
                method, images, radius=radius, samples=perturbations, seed=seed
            ).largest
    return MapScores(rows, dict(retrained or {}))


def _fresh_noise(noise: Tensor, generator: torch.Generator) -> Explain:
    """A random map asked again is another one: its sensitivity is that of a method that ignores the input."""

    def explain(x: Tensor) -> Tensor:
        return torch.rand(noise.shape, generator=generator).to(noise)

    return explain


def _squares(images: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """(batch, 1, height, width) of ones in one random square each."""
    height, width = images.shape[-2:]
    tall, wide = (max(1, min(side, round(scale * side))) for side in (height, width))
    top = torch.randint(height - tall + 1, (len(images), 1), generator=generator)
    left = torch.randint(width - wide + 1, (len(images), 1), generator=generator)
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows >= top) & (rows < top + tall))[:, :, None] & (
        (columns >= left) & (columns < left + wide)
    )[:, None]
    return inside[:, None].to(images)
