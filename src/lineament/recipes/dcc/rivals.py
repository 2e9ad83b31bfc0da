"""Rivals that only the recipe needs: sets whose mean features are those of the data (distribution matching), and pictures by how often a training forgets them.

Zhao, Bilen, "Dataset Condensation with Distribution Matching", WACV 2023, arXiv 2110.04181; Toneva et al., ICLR 2019, arXiv 1812.05159.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lineament.learn.condensation.condensed import Condensed
from lineament.learn.condensation.learning import drawn_from
from lineament.train.batches import Batch
from lineament.train.loop import Run, fit

_STEP = 0.05


def mean_matched(
    start: Condensed, data: tuple[Tensor, Tensor], make: Callable[[], nn.Module], *, steps: int, rate: float, batch: int, seed: int
) -> Condensed:  # fmt: skip
    """The pictures of a set moved until, in fresh networks, the mean features of each class are those of as many as ``batch`` real pictures of it.

    Features are what the network's last layer reads. Their scale, and with it the gradient's, differs from network to network: each step adds ``rate`` times 0.05 of the pixels'
    deviation to what a picture moves by.
    """
    x, y = data
    z, labels = start.normalised().clone(), start.labels
    velocity = torch.zeros_like(z)
    members = [(y == c).nonzero()[:, 0] for c in range(int(y.max()) + 1)]
    for step in range(steps):
        generator = drawn_from(seed, step, 6)
        rows = [r[torch.randperm(len(r), generator=generator)[:batch]] for r in members]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            features = nn.Sequential(*list(make().children())[:-1]).eval()
        with torch.no_grad():
            goal = torch.stack([features(start.normalised(x[r])).mean(0) for r in rows])
        leaf = z.clone().requires_grad_()
        found = features(leaf)
        mean = torch.stack([found[labels == c].mean(0) for c in range(len(members))])
        gradient = torch.autograd.grad((mean - goal).square().sum(), leaf)[0]
        size = gradient.flatten(1).square().mean(1).sqrt().clamp(min=1e-12)[:, None, None, None]
        velocity = 0.5 * velocity + gradient / size
        z -= rate * _STEP * velocity
    mean, std = (v[:, None, None] for v in (start.mean, start.std))
    return start.with_pictures(z * std + mean)


def often_forgotten(
    data: tuple[Tensor, Tensor], inputs: Tensor, make: Callable[[], nn.Module], *, per_class: int, seed: int, epochs: int = 10
) -> Tensor:  # fmt: skip
    """Rows, class by class, of the pictures that one training most often got right in an epoch and wrong in the next; of those that it ever got right."""
    _, y = data
    generator = drawn_from(seed, 7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        model = make()
    seen = _Forgetting(y)
    fit(
        model, (inputs, y), optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
        epochs=epochs, batch_size=128, callbacks=[seen], seed=generator.initial_seed() % 2**32,
    )  # fmt: skip
    score = seen.forgotten - (~seen.ever).float()
    chosen = [(y == c).nonzero()[:, 0] for c in range(int(y.max()) + 1)]
    return torch.cat([r[score[r].argsort(descending=True, stable=True)[:per_class]] for r in chosen])


class _Forgetting:
    """Which pictures a training has ever got right, and how often it got one right in an epoch and wrong in the next."""

    def __init__(self, targets: Tensor):
        self.before = torch.zeros(len(targets), dtype=torch.bool)
        self.ever, self.forgotten = self.before.clone(), torch.zeros(len(targets))
        self.batch = Batch(targets, targets)

    def on_batch(self, run: Run, batch: Batch) -> None:
        self.batch = batch

    def on_step(self, run: Run) -> None:
        rows, now = self.batch.rows, (run.outputs.argmax(1) == self.batch.targets).cpu()
        self.forgotten[rows] += (self.before[rows] & ~now).float()
        self.ever[rows] |= now
        self.before[rows] = now
