"""Training an embedding on some people's samples, and what it is worth on people who were not among them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.data.samples import Samples
from lineament.measure.embeddings.pairs import recognition
from lineament.measure.embeddings.verification import fold_accuracy
from lineament.recipes.kit.threads import few_threads
from lineament.report.figures import picture
from lineament.train.callbacks import Cosine
from lineament.train.loop import fit


@dataclass(frozen=True)
class Recognised:
    """TAR at FAR 1e-2, 1e-3 and 1e-4 of all unseen pairs, ten-fold accuracy, R@1, mAP@R, the gap, and the losses of the epochs."""

    tar2: float
    tar3: float
    tar4: float
    folds: float
    recall: float
    precision: float
    gap: float
    losses: list[float]


class Embedder(nn.Module):
    """A perceptron inputs-256-256-64 with batch norm and PReLU, and the loss that it is trained with."""

    def __init__(self, inputs: int, loss: nn.Module, *, seed: int, size: int = 64):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Sequential(
                nn.Flatten(),
                *(nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.PReLU()),
                *(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.PReLU()),
                nn.Linear(256, size),
            )
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x)


def recognise(
    loss: Callable[[int, int, int], nn.Module],
    train: Samples,
    unseen: Samples,
    *,
    epochs: int,
    seed: int,
    lr: float = 0.1,
    batch_size: int = 128,
    after: Callable[[nn.Module], Any] = lambda net: None,
) -> Recognised:
    """Train with SGD along a cosine; ``loss(classes, size, seed)`` makes the loss, ``after`` is called with the trained network."""
    made = loss(int(train.targets.max()) + 1, 64, seed)
    net = Embedder(train.inputs[0].numel(), made, seed=seed)
    with few_threads(train.inputs, "cpu"):
        done = fit(
            net, train, optimizer=lambda net: torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4), epochs=epochs,
            batch_size=batch_size, loss=made, seed=seed, callbacks=[Cosine()],
        )  # fmt: skip
        net.eval()
        with torch.no_grad():
            after(net)
            return judged_on(net(unseen.inputs), unseen.targets, done.curve("loss"))


def judged_on(embeddings: Tensor, labels: Tensor, losses: list[float]) -> Recognised:
    """The numbers of some people's embeddings."""
    found = recognition(embeddings, labels, fars=(1e-2, 1e-3, 1e-4))
    pairs, same = verification_pairs(labels, 6000)
    folds = fold_accuracy(F.normalize(embeddings, dim=1)[pairs.flatten()], same)
    tar2, tar3, tar4 = found.tar
    return Recognised(tar2, tar3, tar4, folds.mean, found.recall, found.precision, found.gap, losses)


def verification_pairs(labels: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """At most ``count`` pairs [n, 2], every other one of one person; and which."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.ones(len(labels), len(labels), dtype=torch.bool).triu(1)
    like = labels[:, None] == labels
    kinds = [(upper & like).nonzero(), (upper & ~like).nonzero()]
    each = min(count // 2, *map(len, kinds))
    chosen = [kind[torch.randperm(len(kind), generator=generator)[:each]] for kind in kinds]
    return torch.stack(chosen, 1).flatten(0, 1), torch.arange(2 * each) % 2 == 0


def column(runs: Sequence[Any], what: str) -> list[float]:
    """One number of each run."""
    return [getattr(run, what) for run in runs]


def means(runs: Sequence[Any], what: Sequence[str]) -> list[float]:
    """The means over runs of some numbers."""
    return [statistics.mean(column(runs, name)) for name in what]


_SHOWN = {
    "TAR at FAR 1e-2": "tar2", "TAR at 1e-3": "tar3", "TAR at 1e-4": "tar4", "ten folds": "folds", "R@1": "recall", "mAP@R": "precision",
    "gap": "gap",
}  # fmt: skip


def summary(runs: Mapping[str, Sequence[Recognised]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table: means over seeds, and the deviation of TAR at 1e-3."""
    rows = []
    for name, each in runs.items():
        spread = statistics.stdev(column(each, "tar3")) if len(each) > 1 else None
        rows.append([name, *means(each, list(_SHOWN.values())), spread])
    return [*_SHOWN, "sd of TAR at 1e-3"], rows


def bars(groups: Mapping[str, Mapping[str, Sequence[Recognised]]], what: str, label: str, seeds: int) -> Any:
    """A picture: a panel for each group, a bar for each head with its seeds as dots."""
    tallest = max(len(runs) for runs in groups.values())

    def draw(axes: Any) -> None:
        panels = axes[0] if len(groups) > 1 else [axes]
        for ax, (title, runs) in zip(panels, groups.items()):
            names = list(runs)[::-1]
            values = [column(runs[name], what) for name in names]
            ax.barh(range(len(names)), [statistics.mean(v) for v in values], color="C0", alpha=0.35)
            for y, each in enumerate(values):
                ax.plot(each, [y] * len(each), "o", color="C0", markersize=3)
            low = min(min(v) for v in values)
            ax.set_xlim(left=max(0.0, low - 0.05))
            ax.set_yticks(range(len(names)), names, fontsize=7)
            ax.set(title=title, xlabel=label if ax is panels[0] else "")

    said = "; ".join(
        f"{title}: "
        + ", ".join(f"{name} {statistics.mean(column(each, what)):.3f}" for name, each in runs.items())
        for title, runs in groups.items()
    )
    return picture(
        draw, panels=(1, len(groups)), size=(3.4 * len(groups), 1.0 + 0.22 * tallest),
        caption=f"{label}; bars are means, dots the {seeds} seeds.", alt=f"Bars. {said}.",
    )  # fmt: skip
