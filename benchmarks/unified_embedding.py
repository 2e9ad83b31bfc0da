"""One table for 26 features against 26 ``nn.EmbeddingBag``s: the forward, and a training step.

The features' vocabularies are Criteo's, repeated to 5.6 million values; ids are drawn as often as their rank's inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lineament.bench import Row, compare, quick
from lineament.modules.unified_embedding.hashing import bucket, mix64
from lineament.modules.unified_embedding.table import UnifiedEmbedding
from lineament.optim.rows import RowAdagrad

SLUG = "unified-embedding"
SIZES = (676, 533, 17447, 19995, 180, 13, 9693, 337, 3, 14637, 4378, 17795, 3067, 26, 6504, 18679, 10, 3102, 1557, 3, 18230, 10, 14, 13079, 56, 10581)  # fmt: skip


class Separate(nn.Module):
    """A table for each feature, and their joined outputs."""

    def __init__(self, sizes: list[int], width: int, sparse: bool = False):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(size, width, mode="sum", sparse=sparse) for size in sizes)

    def forward(self, ids: dict[str, Tensor]) -> Tensor:
        return torch.cat([table(column[:, None]) for table, column in zip(self.tables, ids.values())], 1)


def unified(rows: int, chunk: int, features: int, lookups: int, sparse: bool = False) -> UnifiedEmbedding:
    table = UnifiedEmbedding(rows, chunk, sparse=sparse)
    for t in range(features):
        table.add(str(t), lookups)
    return table


def trained(net: nn.Module, optimizer: Any, ids: dict[str, Tensor]) -> Callable[[], Any]:
    goal = torch.randn(net(ids).shape, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (net(ids) * goal).sum().backward()
        optimizer.step()

    return step


def rows(repeats: int = 5) -> Iterator[Row]:
    batch, share = (1024, 1) if quick() else (8192, 35)
    sizes = [size * share for size in SIZES]
    generator = torch.Generator().manual_seed(0)
    # Zipf-like: the exponential of a uniform logarithm.
    ids = {
        str(t): (
            (torch.rand(batch, generator=generator) * torch.tensor(float(size)).log()).exp().long() - 1
        ).clamp(0, size - 1)
        for t, size in enumerate(sizes)
    }
    count = 50_000 if quick() else 500_000
    separate = Separate(sizes, 32)
    wide, narrow = unified(count, 32, 26, 1), unified(2 * count, 16, 26, 2)
    for what, ours, target in (
        (f"{count:,} rows of 32", wide, 1.5),
        (f"{2 * count:,} rows of 16, two look-ups", narrow, 1.2),
    ):
        yield compare(
            SLUG, f"forward, batch {batch:,}, 26 features, {what}", lambda net=ours: net(ids), "26 nn.EmbeddingBag(32) and cat",
            lambda: separate(ids), target=target, repeats=repeats, note="the output is written once; hashing is twelve integer operations a look-up",
        )  # fmt: skip
    values = torch.randint(2**62, (1_000_000,), generator=generator)
    yield compare(
        SLUG, "hashes of 1,000,000 ids to rows", lambda: bucket(mix64(values, 1), count), "a remainder by multiplication in int64",
        lambda: (values * 2654435761 + 97) % count, repeats=repeats,
    )  # fmt: skip
    ours = unified(count, 32, 26, 1, sparse=True)
    step = trained(ours, RowAdagrad(ours.parameters(), 0.01), ids)
    for name, make, target in (
        ("Adagrad", torch.optim.Adagrad, 2.0),
        ("SparseAdam", torch.optim.SparseAdam, 2.5),
    ):
        theirs = Separate(sizes, 32, sparse=True)
        yield compare(
            SLUG, f"training step with RowAdagrad, {count:,} rows of 32", step, f"26 nn.EmbeddingBag(32, sparse=True), {name}",
            trained(theirs, make(list(theirs.parameters()), 0.01), ids), target=target, repeats=repeats,
        )  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print(row)
