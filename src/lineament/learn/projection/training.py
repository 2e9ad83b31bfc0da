"""An encoder and everything it is trained through: views, a head that is thrown away, a loss with parameters of its own.

SimCLR (Chen et al. 2020) and SupCon compare two views of each sample, MoCo (He et al. 2020) a view with what a slowly following copy makes of another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.models import answered
from lineament.core.sites.hooks import tap
from lineament.core.sites.naming import resolve
from lineament.learn.projection.pooling import pooled
from lineament.losses.contrastive import NTXent, SupCon
from lineament.losses.info_nce import InfoNCE
from lineament.train.loop import Run


class EmbeddingTraining(nn.Module):
    """Called with inputs and labels it gives the batch's loss, so that one ``forward`` holds all that is trained.

    Args:
        encoder: any network. loss: a :class:`~lineament.losses.ClassHead`, :class:`~lineament.losses.UNPG`, :class:`~lineament.losses.SupCon`,
            :class:`~lineament.losses.NTXent` or :class:`~lineament.losses.InfoNCE` (with a queue the keys come from a following copy).
        head: what stands between the embedding and the loss; none by default.
        view: makes a view of a batch; the last three losses see two of each sample.
        site: where the embedding passes; the output by default. Maps are averaged over positions.
        momentum: of the following copy.

    Train it with ``fit(training, ({"inputs": x, "labels": y}, y), loss=training.mean, callbacks=[Following()])``.

    >>> from lineament.losses.class_head import ClassHead
    >>> training = EmbeddingTraining(nn.Linear(4, 8), ClassHead(3, 8))
    >>> training(torch.randn(6, 4), torch.arange(6) % 3).ndim
    0
    """

    def __init__(
        self,
        encoder: nn.Module,
        loss: nn.Module,
        *,
        head: nn.Module | None = None,
        view: Callable[[Tensor], Tensor] = lambda x: x,
        site: str | None = None,
        momentum: float = 0.99,
    ):
        super().__init__()
        self.encoder, self.loss = encoder, loss
        self.head = nn.Identity() if head is None else head
        self.view, self.site, self.momentum = view, site, momentum
        self.follower = None
        if isinstance(loss, InfoNCE) and loss.queue is not None:
            self.follower = copy.deepcopy(nn.ModuleList([encoder, self.head])).requires_grad_(False)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss: Any = self.loss
        if isinstance(loss, InfoNCE):
            query = F.normalize(self.head(self.embed(self.view(inputs))), dim=1)
            encoder, head = (self.encoder, self.head) if self.follower is None else self.follower
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.follower is None):
                key = F.normalize(head(embedded(encoder, self.view(inputs), self.site)), dim=1)
            return loss(query, key)
        if not isinstance(loss, (NTXent, SupCon)):
            return loss(self.head(self.embed(self.view(inputs))), labels)
        found = self.head(self.embed(torch.cat([self.view(inputs), self.view(inputs)])))
        return loss(found) if isinstance(loss, NTXent) else loss(found, labels)

    def embed(self, inputs: Tensor) -> Tensor:
        """The embeddings [n, d], before the head."""
        return embedded(self.encoder, inputs, self.site)

    @staticmethod
    def mean(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """What :func:`lineament.train.fit` takes for the loss: the outputs are it."""
        return outputs


class Following:
    """The callback that an :class:`EmbeddingTraining` needs with :class:`~lineament.losses.InfoNCE`: epochs are told, and the copy follows after each step.

    >>> callbacks = [Following()]
    """

    def on_epoch(self, run: Run) -> None:
        if isinstance(run.model.loss, InfoNCE):
            run.model.loss.set_epoch(run.epoch)

    @torch.no_grad()
    def on_step(self, run: Run) -> None:
        training: Any = run.model
        if training.follower is not None:
            trained = nn.ModuleList([training.encoder, training.head]).parameters()
            for own, new in zip(training.follower.parameters(), trained):
                own.lerp_(new, 1 - training.momentum)


def embedded(encoder: nn.Module, inputs: Tensor, site: str | None = None) -> Tensor:
    """What a network makes of inputs, [n, d]: its output, or what passes at a site.

    >>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
    >>> embedded(net, torch.ones(2, 1, 8, 8), "1").shape
    torch.Size([2, 3])
    """
    if site is None:
        return pooled(answered(encoder, inputs, "inputs"))
    place = next(iter(resolve(encoder, site)))
    found: list[Tensor] = []
    with tap(encoder, {place: lambda x: found.append(x)}):
        answered(encoder, inputs, "inputs")
    return pooled(found[-1])
