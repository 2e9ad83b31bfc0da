"""The losses that the recipe compares, by name, its controls, and what the filter drops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament.data.samples import Samples
from lineament.losses.class_head import ClassHead
from lineament.losses.margins import ArcFace, CosFace, Margin
from lineament.losses.unpg import UNPG, NegativePairs, negative_pairs
from lineament.recipes.kit.recognition import Recognised, recognise


class DetachedPairs(UNPG):
    """The pairs stand in the denominators, but no gradient passes through them."""

    def negatives(self, embeddings: Tensor, labels: Tensor) -> NegativePairs:
        return super().negatives(embeddings.detach(), labels)


class RandomPairs(UNPG):
    """Similarities of each embedding to random directions stand in the denominators instead of other samples'."""

    def negatives(self, embeddings: Tensor, labels: Tensor) -> NegativePairs:
        unit = nn.functional.normalize(embeddings, dim=1)
        drawn = torch.randn(unit.shape, generator=self.head.generator)
        found = unit @ nn.functional.normalize(drawn, dim=1).T
        kept = (labels[:, None] != labels).triu(1)
        none = found.new_zeros(())
        return NegativePairs(found, kept, (none, none), none, none)


def _cos(m: float = 0.35) -> Margin:
    return CosFace(m)


# name -> (the head's margin, what is put around the head)
LOSSES: dict[str, tuple[Callable[[], Margin], Callable[[ClassHead], nn.Module]]] = {
    "CosFace": (_cos, lambda head: head),
    "CosFace + UNPG": (_cos, UNPG),
    "CosFace + UNPG, no filter": (_cos, lambda head: UNPG(head, float("inf"))),
    "CosFace + contrastive": (_cos, lambda head: UNPG(head, aux="contrastive")),
    "CosFace + triplet": (_cos, lambda head: UNPG(head, aux="triplet")),
    "CosFace, margin 0.5": (lambda: _cos(0.5), lambda head: head),
    "pairs detached": (_cos, DetachedPairs),
    "random directions": (_cos, RandomPairs),
    "ArcFace": (ArcFace, lambda head: head),
    "ArcFace + UNPG": (ArcFace, UNPG),
    "circle": (_cos, lambda head: UNPG(head, aux="circle", weight=0.1)),
    "MixFace": (ArcFace, lambda head: UNPG(head, aux="sn-pair")),
}


@dataclass(frozen=True)
class Dropped:
    """Of the unlike pairs of training batches: how many, how many lie above the upper whisker, and of both how many are one person under two labels."""

    pairs: int
    above: int
    pairs_same: int
    above_same: int


@dataclass(frozen=True)
class Trained:
    """What a training came to, and what the filter drops of its batches at the end."""

    found: Recognised
    dropped: Dropped


def maker(name: str, scale: float) -> Callable[[int, int, int], nn.Module]:
    """Makes a loss of (classes, size, seed)."""
    margin, around = LOSSES[name]
    return lambda classes, size, seed: around(ClassHead(classes, size, margin(), scale, seed=seed))


def train(name: str, data: tuple[Samples, Samples], *, epochs: int, scale: float, seed: int) -> Trained:
    """One training by a loss of the table."""
    kept: list[Dropped] = []
    found = recognise(
        maker(name, scale), *data, epochs=epochs, seed=seed,
        after=lambda net: kept.append(dropped(net(data[0].inputs), data[0])),
    )  # fmt: skip
    return Trained(found, kept[0])


def dropped(embeddings: Tensor, samples: Samples, *, batch_size: int = 128, batches: int = 100) -> Dropped:
    """What lies above the upper whisker in random batches of a trained embedding."""
    generator, sums = torch.Generator().manual_seed(0), torch.zeros(4, dtype=torch.int64)
    for _ in range(batches):
        rows = torch.randperm(len(samples), generator=generator)[:batch_size]
        labels, true = samples.targets[rows], samples.extras["true"][rows]
        pairs = negative_pairs(embeddings[rows], labels)
        unlike = (labels[:, None] != labels).triu(1)
        above, same = unlike & (pairs.similarities > pairs.high), true[:, None] == true
        sums += torch.stack([unlike.sum(), above.sum(), (unlike & same).sum(), (above & same).sum()])
    return Dropped(*sums.tolist())
