"""Networks trained from nothing on pictures of a set, and tested: the protocol of arXiv 2202.02916, section 2.

SGD with momentum, a rate that falls once, the accuracy of the last epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.checkpoint import Checkpoint
from lineament.core.models import frozen
from lineament.core.norms import batchnorms
from lineament.learn.condensation.condensed import Condensed
from lineament.learn.condensation.learning import drawn_from
from lineament.learn.condensation.siamese import DSA, Strategy

OLD = "crop_noise"  # with which networks with batch norm were always judged
PLAIN_EPOCHS, AUGMENTED_EPOCHS = 300, 1000


@dataclass(frozen=True)
class Protocol:
    """How networks are trained to judge a set.

    Attributes:
        networks: trained from different beginnings. epochs: one more than so many; by default 300, and 1000 with augmentation.
        rate, momentum, weight_decay, batch: of SGD; the rate falls to a tenth once more than half is over, with a new optimizer.
        strategy: the augmentation of ``"augmented"`` trainings. old: of the others, of every network (the paper's for MNIST: ``"crop_scale_rotate"``), or ``None``: of those
            with batch norm alone, ``"crop_noise"``; see mode ``"old"`` of :class:`~lineament.learn.condensation.siamese.Strategy`.
        full_epochs: of the training on all pictures; 0 leaves it out.

    >>> Protocol(epochs=10).epochs_of(True)
    10
    """

    networks: int = 20
    epochs: int | None = None
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 256
    strategy: str = DSA
    old: str | None = None
    full_epochs: int = 30

    def __post_init__(self) -> None:
        checks.number("networks", self.networks, low=1, integer=True)
        checks.number("batch", self.batch, low=1, integer=True)
        checks.number("full_epochs", self.full_epochs, low=0, integer=True)
        if self.epochs is not None:
            checks.number("epochs", self.epochs, low=1, integer=True)
        checks.number("rate", self.rate, low=0, open_low=True)
        Strategy(self.strategy)
        if self.old is not None:
            Strategy(self.old, "old")

    def epochs_of(self, augmented: bool) -> int:
        return self.epochs or (AUGMENTED_EPOCHS if augmented else PLAIN_EPOCHS)


@dataclass(frozen=True)
class TestData:
    """Pictures that networks are tested on, normalised as the set is."""

    condensed: Condensed
    images: Tensor
    labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        right = 0
        with torch.no_grad(), frozen(model):
            for x, y in zip(self.images.split(512), self.labels.split(512)):
                x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
                right += int((model(self.condensed.normalised(x)).argmax(1) == y).sum())
        return right / len(self.labels)


def accuracies(
    condensed: Condensed,
    images: Tensor,
    labels: Tensor,
    test: TestData,
    make: Callable[[int], nn.Module],
    protocol: Protocol,
    *,
    epochs: int | None = None,
    checkpoint: Checkpoint | None = None,
    seed: int = 0,
) -> Tensor:
    """Test accuracy of networks that were trained on pictures of the set's scale, [networks]."""
    trial = Trial(images, labels, make, epochs=epochs)
    found: list[float] = []
    steps: Iterable[int] = range(protocol.networks)
    if checkpoint is not None:
        steps = checkpoint.loop("networks", protocol.networks, {"found": found})
    for k in progress(steps, "training networks", protocol.networks, before=int):
        found.append(trial.accuracy(k, condensed, test, protocol, seed))
    return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class Trial:
    """What one kind of network is trained on, and how: with which augmentation, for how many epochs where not the protocol's."""

    images: Tensor
    labels: Tensor
    make: Callable[[int], nn.Module]
    strategy: str | None = None
    epochs: int | None = None

    def accuracy(self, k: int, condensed: Condensed, test: TestData, protocol: Protocol, seed: int) -> float:
        """Train the network of number ``k``, and test it."""
        generator = drawn_from(seed, 7, k)
        with torch.random.fork_rng(devices=[]):
            model, change, total = self._begun(k, condensed, protocol, generator)
            _train(model, condensed, self.images, self.labels, protocol, change, total, generator)
        return test.accuracy(model)

    def seconds(self, condensed: Condensed, tested: int, protocol: Protocol, *, most: int = 32) -> float:
        """About how long one training and its test will take, from two steps on at most so many pictures."""
        generator = drawn_from(0)
        few = slice(min(most, protocol.batch, len(self.labels)))
        pictures, labels = self.images[few], self.labels[few]
        step = 0.0
        with torch.random.fork_rng(devices=[]):
            model, change, total = self._begun(0, condensed, protocol, generator)
            for _ in range(2):  # the first prepares what all later ones find ready
                begun = time.perf_counter()
                _train(model, condensed, pictures, labels, protocol, change, 1, generator)
                step = (time.perf_counter() - begun) / 2
        batch = min(protocol.batch, len(self.labels))
        steps = (total + 1) * math.ceil(len(self.labels) / batch)
        # A test is the first of a step's three passes.
        return step * (steps * batch / len(labels) + tested / len(labels) / 3)

    def _begun(
        self, k: int, condensed: Condensed, protocol: Protocol, generator: torch.Generator
    ) -> tuple[nn.Module, Strategy | None, int]:
        """The network of a number, its augmentation and its epochs; sets the global random state."""
        torch.manual_seed(generator.initial_seed())
        model = self.make(k).to(condensed.pictures.device)
        change = None if self.strategy is None else Strategy(self.strategy)
        if change is None and (protocol.old or batchnorms(model)):
            change = Strategy(protocol.old or OLD, "old")
        return model, change, protocol.epochs_of(change is not None) if self.epochs is None else self.epochs


def _train(
    model: nn.Module,
    condensed: Condensed,
    images: Tensor,
    labels: Tensor,
    protocol: Protocol,
    change: Strategy | None,
    epochs: int,
    generator: torch.Generator,
) -> None:
    def optimizer(rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(), lr=rate, momentum=protocol.momentum, weight_decay=protocol.weight_decay
        )

    steps = optimizer(protocol.rate)
    whole = (
        condensed.normalised(images.float()) if len(images) <= 5000 and images.dtype != torch.uint8 else None
    )
    model.train()
    for epoch in range(epochs + 1):
        for rows in torch.randperm(len(labels), generator=generator).split(protocol.batch):
            rows = rows.to(labels.device)
            if whole is not None:
                x = whole[rows]
            else:
                raw = images[rows]
                x = condensed.normalised(raw.float() / 255 if raw.dtype == torch.uint8 else raw.float())
            if change is not None:
                x = change(x, generator, each=True)
            steps.zero_grad()
            F.cross_entropy(model(x), labels[rows]).backward()
            steps.step()
        if epoch == epochs // 2 + 1:
            steps = optimizer(protocol.rate / 10)
