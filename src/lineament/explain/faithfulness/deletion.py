"""Is an explanation true? Take away what it calls important, or give only that, and watch the score.

Deletion and insertion (Petsiuk, Das, Saenko 2018, arXiv 1806.07421): pixels are removed, or brought back, in the order of the map. A map that
tells the truth makes the deletion curve fall at once and the insertion curve rise at once. Neither number means anything alone, since it
depends on what stands for "removed" and on the model: so every result holds the same curves for random maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import chunked
from lineament.core.results import Readable, axes
from lineament.explain.inputs import takes_all
from lineament.explain.saliency.aggregation import resized, smoothed
from lineament.explain.scores import (
    check_targets,
    class_scores,
    differentiable,
    prepared,
    scores_of,
)

Baseline = Literal["blur", "mean", "zero"]
BASELINES = ("blur", "mean", "zero")
_AT_ONCE = 256
_CURVES = ("deletion", "insertion", "random_deletion", "random_insertion")


@dataclass(frozen=True)
class DeletionInsertion(Readable):
    """Deletion and insertion curves of maps, and of random maps beside them.

    Curves are (batch, steps + 1): the target's probability (or logit) after each share of the pixels, ``fractions`` from 0 to
    1. Areas are under those curves; ``gain`` is how much better the maps are than chance: (insertion - random insertion) +
    (random deletion - deletion), averaged over images; 0 is chance.
    """

    fractions: Float[Tensor, "points"]
    deletion: Float[Tensor, "batch points"]
    insertion: Float[Tensor, "batch points"]
    random_deletion: Float[Tensor, "batch points"]
    random_insertion: Float[Tensor, "batch points"]
    output: str

    @property
    def deletion_area(self) -> Float[Tensor, "batch"]:
        return self._area("deletion")

    @property
    def insertion_area(self) -> Float[Tensor, "batch"]:
        return self._area("insertion")

    @property
    def gains(self) -> Float[Tensor, "batch"]:
        """How much better than chance each image's map is."""
        gained = self.insertion_area - self._area("random_insertion")
        return gained + self._area("random_deletion") - self.deletion_area

    @property
    def gain(self) -> float:
        return float(self.gains.mean())

    @property
    def better_than_random(self) -> float:
        """The share of images whose insertion area less deletion area beats the random map's."""
        return float((self.gains > 0).double().mean())

    def _area(self, curve: str) -> Tensor:
        return torch.trapezoid(getattr(self, curve), self.fractions, dim=1)

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"output": self.output, "fractions": self.fractions.tolist()}
        for name in _CURVES:
            found[name] = getattr(self, name).mean(0).tolist()
            found[f"{name}_area"] = float(self._area(name).mean())
        return {**found, "gain": self.gain, "better_than_random": self.better_than_random}

    def plot(self, ax: Any = None) -> Any:
        """The mean curves; dashed for random maps."""
        ax = axes(ax)
        x = 100 * self.fractions.cpu()
        for color, name in (("C0", "insertion"), ("C1", "deletion")):
            ax.plot(x, getattr(self, name).mean(0).cpu(), color=color, label=name)
            chance = getattr(self, f"random_{name}").mean(0).cpu()
            ax.plot(x, chance, color=color, linestyle="--", linewidth=1, label=f"{name}, random order")
        ax.set(xlabel="pixels, most important first, %", ylabel=f"mean {self.output} of the class")
        ax.legend()
        return ax


@takes_all
@torch.inference_mode(False)
def deletion_insertion(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    maps: Float[Tensor, "batch 1 h w"],
    targets: Any = None,
    *,
    steps: int = 20,
    baseline: Baseline | Tensor = "blur",
    output: Literal["probability", "logit"] = "probability",
    random_maps: int = 1,
    seed: int = 0,
    batch_size: int | str = "auto",
) -> DeletionInsertion:
    """Deletion and insertion curves of some maps, against random maps on the same images.

    Args:
        images: a batch, as the model takes it; also signals (batch, channels, steps) and rows (batch, features), with maps (batch, 1, steps), and
            tuples or dicts of what the model takes, of which the first batch of real numbers is changed.
        maps: one for each image, of any size; brought to the images' size.
        targets: the explained class: one for each image, one for all, or ``None`` for what the model predicts.
        steps: how many equal shares of the pixels are taken one after the other.
        baseline: what stands for a removed pixel: ``"blur"`` (a Gaussian blur of the image), ``"mean"`` (the image's mean
            colour), ``"zero"``, or a tensor that broadcasts to the images.
        output: follow the softmax ``"probability"`` of the class, or its ``"logit"``.
        random_maps: how many random orders to average.
        seed: of the random orders and of how ties are broken, which is at random: reading order would favour the top.
        batch_size: masked images that run at once; ``"auto"`` is at most 256, halved when memory runs out.

    Returns:
        A :class:`DeletionInsertion`.

    Raises:
        InputError: images, maps, targets or baseline of the wrong form.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    >>> _ = nn.init.zeros_(net[1].weight); net[1].weight.data[0, 0] = 5.0
    >>> truth = torch.zeros(1, 1, 4, 4); truth[..., 0, 0] = 1.0
    >>> found = deletion_insertion(net, torch.ones(1, 1, 4, 4), truth, 0, steps=16, baseline="zero", output="logit")
    >>> round(found.deletion_area.item(), 4), round(found.insertion_area.item(), 4)
    (0.1562, 4.8438)
    """
    images = prepared(model, images)
    checks.tensor("maps", maps, shape=(len(images), 1, "height", "width"), floating=True)
    check_targets(targets, len(images), every=False)
    checks.number("steps", steps, low=1, high=images.shape[-2] * images.shape[-1], integer=True)
    checks.number("random_maps", random_maps, low=1, integer=True)
    checks.number("seed", seed, integer=True)
    checks.one_of("output", output, ("probability", "logit"))
    empty = removed(images, baseline)
    generator = torch.Generator().manual_seed(seed)
    with differentiable(model), torch.no_grad():
        scores, target = scores_of(model, images, targets)
        checks.require(
            output == "logit" or scores.shape[1] > 1,
            "output: a single output has no probability over classes; pass output='logit'",
        )
        judge = _Judge(model, images, empty, target, steps, output, batch_size)
        size = (images.shape[-2], images.shape[-1])
        ours = judge.curves(_order(resized(maps.to(images.device), size), generator))
        chance = [
            judge.curves(_order(torch.zeros(len(images), 1, *size), generator)) for _ in range(random_maps)
        ]
    random = [torch.stack(c).mean(0) for c in zip(*chance)]
    fractions = torch.linspace(0, 1, steps + 1, dtype=images.dtype, device=images.device)
    return DeletionInsertion(fractions, ours[0], ours[1], random[0], random[1], output)


def removed(
    images: Float[Tensor, "batch channels height width"], baseline: str | Tensor
) -> Float[Tensor, "batch channels height width"]:
    """The images with everything removed, as ``baseline`` says.

    >>> removed(torch.tensor([[[[1.0, 3.0]]]]), "mean").tolist()
    [[[[2.0, 2.0]]]]
    """
    if isinstance(baseline, Tensor):
        checks.tensor("baseline", baseline)
        fits = baseline.ndim <= 4 and all(
            a in (1, b) for a, b in zip(baseline.shape[::-1], images.shape[::-1])
        )
        checks.require(
            fits,
            f"baseline: got {checks.show(baseline)}, expected one that broadcasts to {tuple(images.shape)}",
        )
        return baseline.to(images).expand_as(images)
    checks.one_of("baseline", baseline, BASELINES)
    if baseline == "zero":
        return torch.zeros_like(images)
    if baseline == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    # A tenth of the image: shapes are gone, the large-scale brightness stays.
    return smoothed(images.flatten(0, 1)[:, None], 0.1).reshape(images.shape)


@dataclass(frozen=True)
class _Judge:
    """The score of partly removed images, for many images and steps in the same batches."""

    model: nn.Module
    images: Tensor
    empty: Tensor
    target: Tensor
    steps: int
    output: str
    batch_size: int | str

    def curves(self, rank: Tensor) -> tuple[Tensor, Tensor]:
        """(deletion, insertion), each (batch, steps + 1), for the rank of each pixel (0 is the most important)."""
        rank = rank.to(self.images.device)
        counts = torch.linspace(0, rank.shape[1], self.steps + 1).round().to(rank)
        points = torch.arange(len(self.images) * len(counts), device=rank.device)
        scores = torch.empty(2, len(points), dtype=self.images.dtype, device=self.images.device)
        # Deletion's last point and insertion's first are the same empty image, and the other way round: each runs once.
        step = points % len(counts)
        inner = points[(step > 0) & (step < self.steps)]
        scores[0] = self._scores(points, rank, counts, False)
        scores[1, inner] = self._scores(inner, rank, counts, True)
        deletion, insertion = scores.reshape(2, len(self.images), -1)
        insertion[:, 0], insertion[:, -1] = deletion[:, -1], deletion[:, 0]
        return deletion, insertion

    def _scores(self, points: Tensor, rank: Tensor, counts: Tensor, keep: bool) -> Tensor:
        def some(points: Tensor) -> Tensor:
            image, step = points // len(counts), points % len(counts)
            first = (rank[image] < counts[step, None]).reshape(-1, 1, *self.images.shape[-2:])
            mixed, target = (
                torch.where(first == keep, self.images[image], self.empty[image]),
                self.target[image],
            )
            scores = class_scores(scores_of(self.model, mixed, target)[0])
            scores = F.softmax(scores, 1) if self.output == "probability" else scores
            return scores.gather(1, target[:, None])[:, 0]

        if len(points) == 0:
            return points.to(self.images)
        return chunked(some, points, batch_size=self.batch_size, most=_AT_ONCE)


def _order(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Each pixel's rank by falling value, (batch, pixels), ties at random."""
    flat = maps.flatten(1)
    shuffle = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in range(len(flat))])
    shuffle = shuffle.to(flat.device)
    best_first = flat.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    return torch.argsort(shuffle.gather(1, best_first), dim=1)
