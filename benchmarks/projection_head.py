"""What every layer is worth against bare forwards; SupCon against pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from lineament.bench import Row, compare, quick
from lineament.core.sites.activations import record
from lineament.learn.projection.layers import layers_worth
from lineament.learn.projection.pooling import pooled
from lineament.losses.contrastive import SupCon
from lineament.recipes.kit.networks import network

SLUG = "projection-head"


def rows(repeats: int = 3) -> Iterator[Row]:
    samples, size = (64, 16) if quick() else (512, 32)
    net = network("resnet14", (3, size, size), 10, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(samples, 3, size, size, generator=generator)
    y = torch.arange(samples) % 10
    sites = [f"features.{k}" for k in range(len(net.features))][:8]

    def bare() -> None:
        with torch.no_grad():
            for part in x.split(256):
                net(part)

    def kept() -> None:
        for part in x.split(256):
            for value in record(net, part, sites).values():
                pooled(value)

    yield compare(
        SLUG, f"features of {len(sites)} sites, ResNet-14, {samples} images of {size} x {size}", kept, "forwards alone", bare,
        target=1 / 1.3, repeats=repeats,
    )  # fmt: skip
    yield compare(
        SLUG, f"what {len(sites)} sites are worth (six read-outs each), {samples} images", lambda: layers_worth(net, (x, y), (x, y), sites=sites),
        "forwards of training and test images alone", lambda: (bare(), bare()), repeats=1,
        note="the read-outs' cost does not grow with the network",
    )  # fmt: skip
    n = 256 if quick() else 2048
    z = torch.randn(n, 128, generator=generator).requires_grad_()
    labels = torch.randint(10, (n,), generator=generator)
    ours = SupCon(0.5)

    def step(loss: nn.Module) -> None:
        z.grad = None
        loss(F.normalize(z, dim=1), labels).backward()

    try:
        from pytorch_metric_learning.losses import SupConLoss

        theirs: nn.Module | None = SupConLoss(temperature=0.5)
    except ImportError:
        theirs = None
    yield compare(
        SLUG, f"SupCon, n {n:,}, d 128, ten classes", lambda: step(ours), "pytorch-metric-learning SupConLoss",
        None if theirs is None else lambda: step(theirs), repeats=repeats,
    )  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print(row)
