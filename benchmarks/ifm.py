"""Iterative feature merging against the reference's procedure, and what the merged network's size is worth in time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lineament.bench import Row, compare, quick
from lineament.core.models import frozen
from lineament.measure.merging.merge import merge
from lineament.measure.merging.plan import Plan, prepare
from lineament.recipes.kit.networks import network

SLUG = "ifm"


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


class Reference:
    """The published procedure: each layer's distances anew at each merge, then a merge by concatenation."""

    def __init__(self, net: nn.Sequential):
        layers = [layer for layer in net if isinstance(layer, nn.Linear)]
        self.weights: list[Tensor] = [layer.weight.detach().clone() for layer in layers]
        self.biases: list[Tensor] = [layer.bias.detach().clone() for layer in layers]
        self.counts = [torch.ones(len(w), dtype=torch.float64) for w in self.weights[:-1]]

    def round(self) -> None:
        """One merge a layer."""
        for k in range(len(self.counts)):
            apart = torch.zeros(len(self.counts[k]), len(self.counts[k]), dtype=torch.float64)
            for rows in (self.weights[k], self.weights[k + 1].T):
                gram = rows @ rows.T
                square = gram.diagonal()
                apart += square[:, None] + square[None] - 2 * gram
            apart.max()
            apart.fill_diagonal_(torch.inf)
            i, j = divmod(int(apart.argmin()), len(apart))
            rest = torch.tensor([r for r in range(len(apart)) if r not in (i, j)])
            a, b = self.counts[k][i], self.counts[k][j]
            w, v = self.weights[k], self.weights[k + 1]
            self.weights[k] = torch.cat([w[rest], (w[i] + w[j])[None]])
            self.biases[k] = torch.cat([self.biases[k][rest], (self.biases[k][i] + self.biases[k][j])[None]])
            self.weights[k + 1] = torch.cat([v[:, rest], ((a * v[:, i] + b * v[:, j]) / (a + b))[:, None]], 1)
            self.counts[k] = torch.cat([self.counts[k][rest], (a + b)[None]])


def plan_of(net: nn.Module, inputs: int) -> Plan:
    x = torch.zeros(1, inputs, dtype=torch.float64)
    return prepare(net, x, None, rule="sum_mean", norms="paper", distance="paper", rescale=False)


def merges(plan: Plan, rounds: int) -> None:
    """So many rounds of one merge a layer; each goes on where the last ended."""
    for _ in range(rounds):
        for block in plan.blocks:
            pairs, distance, far = plan.nearest(block)
            plan.merge_block(block, pairs, distance / far)


def rows(repeats: int = 5) -> Iterator[Row]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = 256 if quick() else 1024
        net, wide = mlp(width, width, width, width, 10), mlp(width, 4 * width, width)
    plan, reference = plan_of(net, width), Reference(net)
    merges(plan, 1)
    yield compare(
        SLUG,
        f"10 merges of each of three layers of {width}, float64",
        lambda: merges(plan, 10),
        "the reference's procedure, the same merges",
        reference.round,
        target=20.0,
        repeats=repeats,
        scale=10.0,
        note="a neighbour's merge is an update of rank two of a Gram matrix; the limit is reading both once",
    )

    alone, other = plan_of(wide, width), Reference(wide)
    merges(alone, 1)
    yield compare(
        SLUG,
        f"100 merges of a layer of {4 * width} between two of {width}, float64",
        lambda: merges(alone, 100),
        "the reference's procedure, the same merges",
        other.round,
        target=300.0,
        repeats=2,
        scale=100.0,
        note="sums and means are linear in the Gram matrix: O(n) a merge and no product",
    )

    w, v = wide[0].weight.detach(), wide[2].weight.detach()

    def half() -> None:
        merges(plan_of(wide, width), 2 * width)

    yield compare(
        SLUG,
        f"half of a layer of {4 * width} merged, its distances included",
        half,
        "its two Gram matrices",
        lambda: (w @ w.T, v.T @ v),
        target=1 / 3,
        repeats=1,
        note="the limit is 1: the Gram matrices are needed once",
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vgg = network("vgg19", (3, 32, 32), 10, seed=0, widths=16 if quick() else 64).eval()
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = merge(vgg, example=x[:1], keep=0.5)
    share = found.flops[1] / found.flops[0]

    def forward(model: nn.Module) -> None:
        with frozen(model), torch.no_grad():
            model(x)

    yield compare(
        SLUG,
        f"forward of a VGG-19 with half of its channels ({share:.2f} of the operations)",
        lambda: forward(found.model),
        "the whole network",
        lambda: forward(vgg),
        target=0.6 / share,
        repeats=repeats,
        note=f"the limit is its share of the operations, {1 / share:.1f}",
    )


if __name__ == "__main__":
    for row in rows():
        print(row)
