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
from lineament.core.batching import is_out_of_memory
from lineament.explain.pixels.aggregation import resized, smoothed
from lineament.explain.scores import check_targets, class_scores, differentiable, prepared, scores_of

Baseline = Literal["blur", "mean", "zero"]
BASELINES = ("blur", "mean", "zero")
_AT_ONCE = 256


@dataclass(frozen=True)
class DeletionInsertion:
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
        return _area(self.deletion, self.fractions)

    @property
    def insertion_area(self) -> Float[Tensor, "batch"]:
        return _area(self.insertion, self.fractions)

    @property
    def random_deletion_area(self) -> Float[Tensor, "batch"]:
        return _area(self.random_deletion, self.fractions)

    @property
    def random_insertion_area(self) -> Float[Tensor, "batch"]:
        return _area(self.random_insertion, self.fractions)

    @property
    def gain(self) -> float:
        gains = self.insertion_area - self.random_insertion_area
        return float((gains + self.random_deletion_area - self.deletion_area).mean())

    @property
    def better_than_random(self) -> float:
        """The share of images whose insertion area less deletion area beats the random map's."""
        ours = self.insertion_area - self.deletion_area
        return float((ours > self.random_insertion_area - self.random_deletion_area).double().mean())

    def to_dict(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "fractions": self.fractions.tolist(),
            **{
                name: getattr(self, name).mean(0).tolist()
                for name in ("deletion", "insertion", "random_deletion", "random_insertion")
            },
            "deletion_area": float(self.deletion_area.mean()),
            "insertion_area": float(self.insertion_area.mean()),
            "random_deletion_area": float(self.random_deletion_area.mean()),
            "random_insertion_area": float(self.random_insertion_area.mean()),
            "gain": self.gain,
            "better_than_random": self.better_than_random,
        }

    def plot(self, ax: Any = None) -> Any:
        """The mean curves; dashed for random maps."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        x = 100 * self.fractions.cpu()
        for color, name in (("C0", "insertion"), ("C1", "deletion")):
            ax.plot(x, getattr(self, name).mean(0).cpu(), color=color, label=name)
            chance = getattr(self, f"random_{name}").mean(0).cpu()
            ax.plot(x, chance, color=color, linestyle="--", linewidth=1, label=f"{name}, random order")
        ax.set(xlabel="pixels, most important first, %", ylabel=f"mean {self.output} of the class")
        ax.legend()
        return ax


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
        images: a batch, as the model takes it.
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
        curves = _Curves(model, images, empty, target, steps, output, batch_size)
        size = (images.shape[-2], images.shape[-1])
        order = _order(resized(maps.to(images.device), size), generator)
        ours = curves.of(order)
        chance = [
            curves.of(_order(torch.zeros(len(images), 1, *size), generator)) for _ in range(random_maps)
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


class _Curves:
    """The score of partly removed images, for many images and steps in the same batches."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        empty: Tensor,
        target: Tensor,
        steps: int,
        output: str,
        batch_size: int | str,
    ):
        self.model, self.images, self.empty, self.target = model, images, empty, target
        self.steps, self.output = steps, output
        if batch_size != "auto":
            checks.number("batch_size", batch_size, low=1, integer=True)
        self.fixed = batch_size != "auto"
        self.at_once = int(batch_size) if self.fixed else _AT_ONCE

    def of(self, rank: Tensor) -> tuple[Tensor, Tensor]:
        """(deletion, insertion), each (batch, steps + 1), for the rank of each pixel (0 is the most important)."""
        rank = rank.to(self.images.device)
        pixels = rank.shape[1]
        counts = torch.linspace(0, pixels, self.steps + 1).round().to(rank)
        # Deletion's last point and insertion's first are the same empty image, and the other way round: each runs once.
        points = len(self.images) * (self.steps + 1)
        scores = torch.empty(2, points, dtype=self.images.dtype, device=self.images.device)
        for keep in (False, True):
            inner = (
                range(points) if not keep else [i for i in range(points) if 0 < i % len(counts) < self.steps]
            )
            self._fill(scores[int(keep)], torch.tensor(list(inner)), rank, counts, keep)
        deletion, insertion = scores.reshape(2, len(self.images), -1)
        insertion[:, 0], insertion[:, -1] = deletion[:, -1], deletion[:, 0]
        return deletion, insertion

    def _fill(self, scores: Tensor, points: Tensor, rank: Tensor, counts: Tensor, keep: bool) -> None:
        start = 0
        while start < len(points):
            chunk = points[start : start + self.at_once].to(rank.device)
            image, step = chunk // len(counts), chunk % len(counts)
            try:
                first = (rank[image] < counts[step, None]).reshape(-1, 1, *self.images.shape[-2:])
                mixed = torch.where(first == keep, self.images[image], self.empty[image])
                scores[chunk] = self._score(mixed, self.target[image])
            except Exception as error:
                if self.fixed or self.at_once == 1 or not is_out_of_memory(error):
                    raise
                self.at_once = max(1, self.at_once // 2)
                continue
            start += len(chunk)

    def _score(self, images: Tensor, target: Tensor) -> Tensor:
        scores = class_scores(scores_of(self.model, images, target)[0])
        if self.output == "probability":
            scores = F.softmax(scores, 1)
        return scores.gather(1, target[:, None])[:, 0]


def _order(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Each pixel's rank by falling value, (batch, pixels), ties at random."""
    flat = maps.flatten(1)
    shuffle = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in range(len(flat))])
    shuffle = shuffle.to(flat.device)
    best_first = flat.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    return torch.argsort(shuffle.gather(1, best_first), dim=1)


def _area(curves: Tensor, fractions: Tensor) -> Tensor:
    return torch.trapezoid(curves, fractions, dim=1)
