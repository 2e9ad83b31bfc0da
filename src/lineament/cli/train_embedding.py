"""An embedding trained by `lineament train`: what is trained, which classes are held out, and how well those are recognised."""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.cli.train_options import Options
from lineament.cli.train_result import RECOGNITION
from lineament.core.checks import InputError, require
from lineament.core.models import dtype_of, frozen
from lineament.core.sites.naming import resolve
from lineament.learn.projection.training import EmbeddingTraining, embedded
from lineament.learn.projection.views import view
from lineament.measure.embeddings.pairs import recognition
from lineament.train.batches import moved
from lineament.train.loop import Run
from lineament.train.processes import randomness


def made(model: nn.Module, some: Any, targets: Int[Tensor, "samples"], options: Options) -> EmbeddingTraining:
    """The network with its loss, a head and views, as the options say; ``some`` are a few inputs.

    Raises:
        InputError: inputs that have no views, an embedding of a single coordinate, an unknown site.
    """
    o = options.embedding
    assert o is not None
    require(
        isinstance(some, Tensor), f"loss: {o.loss} trains networks of one input, and this one takes several"
    )
    if o.embedding is not None:
        places = list(resolve(model, o.embedding))
        require(
            len(places) == 1,
            f"embedding: {o.embedding!r} names {len(places)} sites ({', '.join(map(repr, places[:4]))}), expected one",
        )
    names = o.views_of(some.ndim == 4)
    x = moved(some, next(model.parameters()).device, dtype_of(model))
    with frozen(model), torch.no_grad(), randomness(options.seed):
        width = embedded(model, view(x, names), o.embedding).shape[1]
    require(
        width > 1,
        "embedding: it has one coordinate, which leaves two directions; expected more",
    )
    with randomness(options.seed):
        head = o.projection(width)
        loss = o.made(len(targets.unique()), width, options.seed)
    return EmbeddingTraining(
        model, loss, head=head, view=functools.partial(view, names=names), site=o.embedding
    )


class Recognised:
    """How well the classes held out are recognised after each epoch; ``None`` where an embedding has no direction."""

    def __init__(self, inputs: Any, targets: Int[Tensor, "samples"]):
        self.inputs, self.targets = inputs, targets

    def on_epoch_end(self, run: Run) -> dict[str, Any]:
        return self.of(run.model, run.batch_size, run.device)

    def of(self, training: Any, batch_size: int, device: torch.device) -> dict[str, Any]:
        """How well they are recognised as the network is now."""
        rows = torch.arange(len(self.targets)).split(batch_size)
        with frozen(training), torch.no_grad():
            found = torch.cat(
                [
                    training.embed(moved(self.inputs[part], device, dtype_of(training.encoder))).cpu()
                    for part in rows
                ]
            )
        try:
            worth = recognition(found, self.targets)
        except InputError:
            return dict.fromkeys(RECOGNITION)
        unlike = _unlike(found, self.targets)
        values = (*worth.tar, worth.recall, worth.precision, worth.gap, worth.impostors, unlike)
        return dict(zip(RECOGNITION, values))


def _unlike(embeddings: Tensor, targets: Int[Tensor, "samples"]) -> float:
    """The mean cosine of all pairs of two classes: the square of the sum of all directions less those of the classes' sums, each pair counted twice.

    >>> _unlike(torch.eye(3).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1, 2, 2]))
    0.0
    """
    unit = F.normalize(embeddings.double(), dim=1)
    classes, counts = targets.cpu().unique(return_inverse=True, return_counts=True)[1:]
    sums = unit.new_zeros(len(counts), unit.shape[1]).index_add_(0, classes, unit)
    pairs = len(unit) ** 2 - int((counts**2).sum())
    return float((sums.sum(0).square().sum() - sums.square().sum()) / pairs)


def split_classes(targets: Int[Tensor, "samples"], share: float | None, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of classes to train on, and of the random classes that are held out; ``None`` is 0.2, or 2 classes where that is more.

    >>> train, held = split_classes(torch.arange(10).repeat(3), 0.2, seed=0)
    >>> len(train), len(torch.arange(10).repeat(3)[held].unique())
    (24, 2)
    """
    if share == 0:
        return torch.arange(len(targets)), torch.arange(0)
    classes = targets.unique()
    count = max(2, round(0.2 * len(classes))) if share is None else round(share * len(classes))
    require(
        share is not None or len(classes) >= 4,
        f"validation_classes: {len(classes)} classes are too few to hold 2 out and train on 2; give 0 to hold none out",
    )
    require(
        2 <= count <= len(classes) - 2,
        f"validation_classes: a share of {share} of {len(classes)} classes holds {count} out, expected at least 2 and at least 2 left to "
        "train on; give another share, or 0",
    )
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    held = torch.isin(targets, classes[order[:count]])
    require(
        bool((targets[held].unique(return_counts=True)[1] > 1).any()),
        "validation_classes: none of the classes held out has two samples, so that nobody can be recognised; give a larger share, or 0",
    )
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]
