"""Recommenders that differ in their tables alone: separate or shared, one wide look-up or several narrow ones, and controls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.data.movielens import categorical_features, movielens
from lineament.data.samples import Samples
from lineament.modules.unified_embedding.table import Feature, UnifiedEmbedding
from lineament.recipes.kit.threads import few_threads
from lineament.train.loop import fit

WIDTH = 16


class OneSalt(UnifiedEmbedding):
    """Every feature is hashed alike: value 7 of one shares its rows with value 7 of another."""

    def _salt(self, feature: Feature, lookup: int) -> int:
        return super()._salt(replace(feature, named=0, number=0), lookup)


class Recommender(nn.Module):
    """Embeddings of width 16 of each feature, joined (or summed), and a perceptron 128-64."""

    def __init__(self, scheme: str, sizes: list[int], rows: int, seed: int):
        super().__init__()
        where, _, lookups = scheme.partition(" ")
        self.summed = lookups.endswith("summed")
        k = int(lookups[0]) if lookups else 1
        self.names = [str(t) for t in range(len(sizes))]
        options: dict[str, Any] = {"chunk": WIDTH // k, "tables": k, "seed": seed}
        self.tables: nn.ModuleList
        if where == "collisionless":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made = [nn.Embedding(size, WIDTH) for size in sizes]
            for table in made:
                nn.init.uniform_(table.weight, -0.05, 0.05, generator=torch.Generator().manual_seed(seed))
            self.tables = nn.ModuleList(made)
        elif where == "separate":
            shares = [max(1, round(rows * size / sum(sizes))) for size in sizes]
            self.tables = nn.ModuleList(UnifiedEmbedding(share, **options) for share in shares)
            for name, table in zip(self.names, self.tables):
                table.add(name, k)  # pyright: ignore
        else:
            kind = OneSalt if lookups.endswith("one salt") else UnifiedEmbedding
            table = kind(rows, assign="order", **options)
            for name in self.names:
                table.add(name, k)
            self.tables = nn.ModuleList([table])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            inputs = WIDTH * (1 if self.summed else len(sizes))
            self.reader = nn.Sequential(
                nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
            )

    def embedded(self, ids: Tensor) -> Tensor:
        """[batch, features * 16]."""
        columns = dict(zip(self.names, ids.unbind(1)))
        if isinstance(self.tables[0], nn.Embedding):
            return torch.cat([table(ids[:, t]) for t, table in enumerate(self.tables)], 1)
        if len(self.tables) == 1:
            return self.tables[0](columns)
        return torch.cat([table({n: columns[n]}) for n, table in zip(self.names, self.tables)], 1)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.embedded(ids)
        if self.summed:
            found = found.view(len(ids), -1, WIDTH).sum(1)
        return self.reader(found)[:, 0]


@dataclass(frozen=True)
class Score:
    """Area under the ROC curve and log-loss on the test samples."""

    auc: float
    loss: float


@dataclass(frozen=True)
class Angles:
    """Degrees between the features' readers: the mean of all pairs, and of the two largest features."""

    mean: float
    largest: float


def data_of(config: Any) -> Samples:
    """MovieLens where it is there, else generated features."""
    found = movielens(config.data_folder)
    return categorical_features(config.generated) if found is None else found


def sizes_of(data: Samples) -> list[int]:
    return (data.inputs.max(0).values + 1).tolist()


def train(
    scheme: str, fraction: float, data: Samples, config: Any, seed: int, *, how: str = "random"
) -> Score:
    """One recommender, trained on four fifths and judged on the rest: at random, or the latest (``"time"``); ``"shuffled"`` renumbers the ids."""
    sizes, inputs = sizes_of(data), data.inputs
    generator = torch.Generator().manual_seed(seed)
    if how == "shuffled":
        inputs = torch.stack(
            [torch.randperm(n, generator=generator)[c] for n, c in zip(sizes, inputs.unbind(1))], 1
        )
    order = (
        data.extras["time"].argsort(stable=True)
        if how == "time"
        else torch.randperm(len(data), generator=generator)
    )
    cut = len(data) * 4 // 5
    train, test = order[:cut], order[cut:]
    net = Recommender(scheme, sizes, round(fraction * sum(sizes)), seed)
    targets = data.targets.float()
    with few_threads(torch.zeros(1, 1), "cpu"):
        fit(
            net, (inputs[train], targets[train]), optimizer=lambda n: torch.optim.Adam(n.parameters(), 3e-3), epochs=config.epochs,
            batch_size=1024, loss=F.binary_cross_entropy_with_logits, seed=seed,
        )  # fmt: skip
        net.eval()
        with torch.no_grad():
            z = net(inputs[test])
    return Score(auc(z, data.targets[test]), float(F.binary_cross_entropy_with_logits(z, targets[test])))


def auc(scores: Tensor, labels: Tensor) -> float:
    """The share of pairs of unlike labels in the right order."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels.numpy(), scores.numpy()))


class Linear(nn.Module):
    """Σ_t <θ_t, E[h_t(x_t)]>, all θ_t equal at first."""

    starts: Tensor

    def __init__(self, sizes: list[int], rows: int | None, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = rows
        if rows is None:
            self.table: nn.Module = nn.Embedding(sum(sizes), WIDTH)
            with torch.no_grad():
                self.table.weight.uniform_(-0.05, 0.05, generator=generator)
            self.register_buffer("starts", torch.tensor([0, *sizes[:-1]]).cumsum(0))
        else:
            self.table = UnifiedEmbedding(rows, WIDTH, seed=seed)
            for t in range(len(sizes)):
                self.table.add(str(t), 1)
        first = torch.randn(WIDTH, generator=generator) / WIDTH**0.5
        self.theta = nn.Parameter(first.repeat(len(sizes), 1))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        if self.rows is None:
            found = self.table(ids + self.starts)
        else:
            found = self.table({str(t): c for t, c in enumerate(ids.unbind(1))}).view(len(ids), -1, WIDTH)
        return (found * self.theta).sum((1, 2)) + self.bias


def angles(rows: int | None, data: Samples, config: Any, seed: int) -> Angles:
    """Train the one-layer model, and measure the angles between its readers."""
    sizes = sizes_of(data)
    net = Linear(sizes, rows, seed)
    with few_threads(torch.zeros(1, 1), "cpu"):
        fit(
            net, (data.inputs, data.targets.float()), optimizer=lambda n: torch.optim.Adam(n.parameters(), 5e-3),
            epochs=config.angle_epochs, batch_size=1024, loss=F.binary_cross_entropy_with_logits, seed=seed,
        )  # fmt: skip
    unit = F.normalize(net.theta.detach().double(), dim=1)
    found = (unit @ unit.T).clamp(-1, 1).arccos().rad2deg()
    pairs = found[torch.ones_like(found, dtype=torch.bool).triu(1)]
    first, second = sorted(range(len(sizes)), key=lambda t: -sizes[t])[:2]
    return Angles(float(pairs.mean()), float(found[first, second]))


def measured_collisions(sizes: list[int], rows: int, seeds: int) -> list[float]:
    """Pairs of values in one row, of one feature and of several: means over hash seeds."""
    intra = inter = 0.0
    for seed in range(seeds):
        table, counts = UnifiedEmbedding(rows, 1, seed=seed), []
        for t, size in enumerate(sizes):
            table.add(str(t), 1)
            counts.append(
                torch.bincount(table.rows_of(str(t), torch.arange(size))[:, 0], minlength=rows).double()
            )
        each, whole = torch.stack(counts), torch.stack(counts).sum(0)
        own = float((each * (each - 1) / 2).sum())
        intra += own / seeds
        inter += (float((whole * (whole - 1) / 2).sum()) - own) / seeds
    return [intra, inter]
