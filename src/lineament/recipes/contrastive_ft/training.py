"""MoCo on small digits and photographs with transformed features: the variants, the training, and what its embedding is worth."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError
from lineament.core.readouts.logistic_readout import logistic
from lineament.data.digits import digit_images
from lineament.data.photographs import read_photographs
from lineament.data.samples import Samples
from lineament.losses.feature_transform import NegativeInterpolation, PositiveExtrapolation
from lineament.losses.info_nce import InfoNCE, MixedRows, ScoreLog
from lineament.losses.queue import Queue
from lineament.recipes.kit.threads import few_threads
from lineament.train.callbacks import Augment, Cosine
from lineament.train.loop import fit


class Watched(PositiveExtrapolation):
    """Positive extrapolation that compares its scores with S + 2 λ (1 - λ) (1 - S) in every step."""

    gap = 0.0

    def __call__(self, q: Tensor, k: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        one, two = super().__call__(q, k, lam)
        with torch.no_grad():
            s = (q * k).sum(1)
            self.gap = max(
                self.gap, float(((one * two).sum(1) - s - 2 * lam * (1 - lam) * (1 - s)).abs().max())
            )
        return one, two


class Fixed(Watched):
    """The mean factor in every step."""

    def draw(self, shape: tuple[int, int], generator: torch.Generator, like: Tensor | None = None) -> Tensor:
        return torch.tensor(1.5)


class Scored(InfoNCE):
    """MoCo's loss, which also keeps the variance of the negatives' scores before anything is transformed, in the steps that its log keeps.

    These and the identity's gap are in the state dict, as the log is.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.raw_variance: list[float] = []

    def compared(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor | MixedRows | None]:
        if self.log is not None and self.queue is not None and self.log.step % self.log.every == 0:
            with torch.no_grad():
                self.raw_variance.append(float((query @ self.queue.rows.T).var(1).mean()))
        return super().compared(query, key)

    @property
    def gap(self) -> float:
        """The largest of :class:`Watched`."""
        return max((each.gap for each in self.transform if isinstance(each, Watched)), default=0.0)

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "raw_variance": list(self.raw_variance), "gap": self.gap}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.raw_variance = list(state["raw_variance"])
        for each in self.transform:
            if isinstance(each, Watched):
                each.gap = state["gap"]


class Unpermuted(Scored):
    """Every past key is mixed with itself, which leaves it: the draws and the arithmetic of negative interpolation without its mixtures."""

    def compared(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor | MixedRows | None]:
        positive, query, rows = super().compared(query, key)
        same = replace(rows, order=torch.arange(len(rows))) if isinstance(rows, MixedRows) else rows
        return positive, query, same


class UntransformedQuery(Scored):
    """The extrapolated query meets its key, and the query as it was the negatives."""

    def compared(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor | MixedRows | None]:
        positive, _, rows = super().compared(query, key)
        return positive, query, rows


@dataclass(frozen=True)
class Variant:
    """The transforms of a start epoch, the loss, and factors of rate and temperature."""

    transforms: Callable[[int], list[Any]]
    loss: type[Scored] = Scored
    rate: float = 1.0
    temperature: float = 1.0


# 2.6 is how much positive extrapolation multiplies the gradient of the positive score, on the mean of λ ~ 1 + Beta(2, 2).
VARIANTS: dict[str, Variant] = {
    "MoCo": Variant(lambda late: []),
    "negatives": Variant(lambda late: [NegativeInterpolation(1.6)]),
    "positives": Variant(lambda late: [Watched(2.0)]),
    "both": Variant(lambda late: [Watched(2.0), NegativeInterpolation(1.6)]),
    "late positives": Variant(lambda late: [Watched(2.0, start=late)]),
    "both, late positives": Variant(lambda late: [Watched(2.0, start=late), NegativeInterpolation(1.6)]),
    "late positives, λ 1.5": Variant(lambda late: [Fixed(2.0, start=late)]),
    "late interpolation": Variant(lambda late: [Watched(2.0, interpolate=True, start=late)]),
    "MoCo, rate x 2.6": Variant(lambda late: [], rate=2.6),
    "MoCo, temperature / 2.6": Variant(lambda late: [], temperature=1 / 2.6),
    "positives, query untransformed": Variant(lambda late: [Watched(2.0)], UntransformedQuery),
    "negatives, each with itself": Variant(lambda late: [NegativeInterpolation(1.6)], Unpermuted),
    "both, by dimension": Variant(
        lambda late: [PositiveExtrapolation(2.0, "dim"), NegativeInterpolation(1.6, "dim")]
    ),
}


@dataclass(frozen=True)
class Trained:
    """A training: accuracy by a linear read-out (of small images from few labels) and by neighbours, the curves of its scores, and the identity's largest gap.

    ``raw_variance`` in the curves is the variance of the negatives' scores before they are transformed.
    """

    read_out: float
    neighbours: float
    curves: dict[str, list[float]]
    gap: float


def _perceptron(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()),
        nn.Linear(256, 128),
    )


def _convolutions(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]  # fmt: skip
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 128))


class MoCo(nn.Module):
    """An encoder with a head, a slowly following copy that makes the keys, and the loss with its queue. Takes both views, one after the other; returns the queries.

    Args:
        groups: batch norm sees a view in so many groups, one after the other, and keys are shuffled among theirs, so that no query meets the statistics that
            its key was made with: what shuffled batch norm does with a device a group.
    """

    def __init__(
        self, encoder: nn.Module, head: nn.Module, loss: InfoNCE, momentum: float, *, groups: int = 1
    ):
        super().__init__()
        self.encoder, self.head, self.loss = encoder, head, loss
        self.follower = copy.deepcopy(nn.Sequential(encoder, head)).requires_grad_(False)
        self.momentum, self.groups, self.key = momentum, groups, torch.empty(0)

    def forward(self, views: Tensor) -> Tensor:
        first, second = views.chunk(2)
        with torch.no_grad():
            order = torch.arange(len(second)) if self.groups == 1 else torch.randperm(len(second))
            found = self._by_groups(self.follower, second[order.to(second.device)])
            self.key = found[order.argsort().to(found.device)]
        return self._by_groups(nn.Sequential(self.encoder, self.head), first)

    def _by_groups(self, net: nn.Module, x: Tensor) -> Tensor:
        parts = x.tensor_split(max(1, min(self.groups, len(x) // 2)))
        return F.normalize(torch.cat([net(part) for part in parts]).float(), dim=1)

    def objective(self, queries: Tensor, targets: Tensor) -> Tensor:
        """What ``fit`` takes for the loss."""
        return self.loss(queries, self.key)

    def on_epoch(self, run: Any) -> None:
        self.loss.set_epoch(run.epoch)

    @torch.no_grad()
    def on_step(self, run: Any) -> None:
        trained = [*self.encoder.parameters(), *self.head.parameters()]
        for slow, fast in zip(self.follower.parameters(), trained):
            slow.lerp_(fast, 1 - self.momentum)


def data_of(config: Any) -> tuple[Samples, Samples]:
    """Training and test digits of 16 x 16 pixels (MNIST) or 8 x 8 (scikit-learn's)."""
    parts = []
    for split, count in (("train", config.samples), ("test", config.test_samples)):
        found = digit_images("auto", split, count=count, data_folder=config.data_folder)
        size = 16 if found.inputs.shape[-1] == 28 else 8
        parts.append(
            Samples(
                F.adaptive_avg_pool2d(found.inputs, size), found.targets, found.classes, source=found.source
            )
        )
    return parts[0], parts[1]


def photographs_of(config: Any) -> tuple[Samples, Samples] | None:
    """CIFAR-10 at 16 x 16 pixels, where it is there."""
    try:
        parts = [
            read_photographs("cifar10", split, data_folder=config.data_folder, count=count)
            for split, count in (("train", config.samples), ("test", config.test_samples))
        ]
    except InputError:
        return None
    small = (F.adaptive_avg_pool2d(found.inputs.float() / 255, 16) for found in parts)
    train, test = (replace(found, inputs=x, source="CIFAR-10") for found, x in zip(parts, small))
    return train, test


def views(x: Tensor, generator: torch.Generator) -> Tensor:
    """Two views of each image: turned, scaled, shifted, of another contrast, and noisy."""
    made = []
    for _ in range(2):
        n = len(x)
        turn = 0.6 * torch.rand(n, generator=generator) - 0.3
        scale = 1 / (0.65 + 0.5 * torch.rand(n, generator=generator))
        shift = 0.3 * torch.rand(n, 2, generator=generator) - 0.15
        rows = torch.stack(
            [
                turn.cos() * scale,
                -turn.sin() * scale,
                shift[:, 0],
                turn.sin() * scale,
                turn.cos() * scale,
                shift[:, 1],
            ],
            1,
        )
        grid = F.affine_grid(rows.view(n, 2, 3), list(x.shape), align_corners=False)
        view = F.grid_sample(x, grid, align_corners=False)
        view = view * (0.6 + 0.8 * torch.rand(n, 1, 1, 1, generator=generator))
        made.append(view + 0.1 * torch.randn(view.shape, generator=generator))
    return torch.cat(made)


def loss_of(name: str, config: Any, seed: int, *, epochs: int, steps: int, size: int) -> Scored:
    """The loss of a variant with a queue of rows of ``size``, whose scores are kept at about sixty of so many steps."""
    variant = VARIANTS[name]
    return variant.loss(
        config.temperature * variant.temperature, queue=Queue(config.queue, size, seed=seed), transform=variant.transforms(epochs // 2),
        log=ScoreLog(every=max(1, steps // 60)), seed=seed,
    )  # fmt: skip


def pretrained(net: MoCo, data: Any, config: Any, variant: str, seed: int, **options: Any) -> None:
    """Train it with SGD on both views of each sample."""
    rate = config.lr * VARIANTS[variant].rate
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the mean negative score")  # it is in the table
        fit(
            net, data, loss=net.objective, seed=seed, batch_size=config.batch_size,
            optimizer=lambda n: torch.optim.SGD(
                [p for p in n.parameters() if p.requires_grad], rate, momentum=0.9, weight_decay=1e-4
            ),
            **options,
        )  # fmt: skip


def curves_of(loss: Scored) -> dict[str, list[float]]:
    """The scores that were kept, by step."""
    return {**(loss.log.curves if loss.log is not None else {}), "raw_variance": loss.raw_variance}


def train(
    name: str, data: tuple[Samples, Samples], config: Any, seed: int, *, epochs: int, labels: int = 5
) -> Trained:
    """One training of a variant on small images; ``labels``: of each class, for the read-out from few."""
    samples, test = data
    steps, image = epochs * math.ceil(len(samples) / config.batch_size), samples.inputs[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _perceptron(image.numel()) if len(image) == 1 else _convolutions(len(image))
        head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    loss = loss_of(name, config, seed, epochs=epochs, steps=steps, size=64)
    net = MoCo(encoder, head, loss, config.momentum)
    with few_threads(samples.inputs, "cpu"):
        pairs = samples.inputs, torch.zeros(len(samples))
        pretrained(net, pairs, config, name, seed, epochs=epochs, callbacks=[Augment(views), Cosine(), net])
        net.eval()
        with torch.no_grad():
            x, y = net.encoder(samples.inputs), net.encoder(test.inputs)
    few = statistics.mean(
        from_few(x, samples.targets, y, test.targets, draw, each=labels) for draw in range(5)
    )
    near = neighbours(x, samples.targets, y, test.targets)
    return Trained(few, near, curves_of(loss), loss.gap)


def from_few(x: Tensor, labels: Tensor, x_test: Tensor, test: Tensor, draw: int, each: int = 5) -> float:
    """Test accuracy of a logistic read-out from so many labels of each class."""
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(len(labels), generator=generator)
    rows = torch.cat([order[labels[order] == c][:each] for c in labels.unique()])
    centre, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    classes = int(max(labels.max(), test.max())) + 1
    fit_ = logistic((x[rows] - centre) / spread, labels[rows], 1.0, classes=classes)
    return float((fit_.predict((x_test - centre) / spread)[:, 0] == test).double().mean())


def neighbours(x: Tensor, labels: Tensor, x_test: Tensor, test: Tensor) -> float:
    """Test accuracy of the 10 nearest training samples by cosine, some test samples at a time."""
    known, classes = F.normalize(x, dim=1), int(max(labels.max(), test.max())) + 1
    right = 0
    for part, goal in zip(F.normalize(x_test, dim=1).split(1024), test.split(1024)):
        near = (part @ known.T).topk(min(10, len(known)), 1).indices
        right += int((F.one_hot(labels[near], classes).sum(1).argmax(1) == goal).sum())
    return right / len(test)
