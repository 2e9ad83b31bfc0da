"""Scoring all pairs against bare forwards, what pruned sizes are worth in time, and accuracy without labels or tuning against norms alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lineament.bench import AnyRow, Rate, compare, quick
from lineament.core.models import frozen
from lineament.core.norms import recalibrate
from lineament.core.statistics.shares import wilson
from lineament.data.samples import Samples
from lineament.edit import fidelity, prune, saliency
from lineament.recipes.kit.image_sets import image_sets
from lineament.recipes.kit.networks import network
from lineament.recipes.modhifi import Config
from lineament.recipes.modhifi.networks import images, trained

SLUG = "modhifi"


def forward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with frozen(model), torch.no_grad():
            model(x)

    return run


def rows(repeats: int = 5) -> Iterator[AnyRow]:
    net = network("vgg19", (3, 32, 32), 10, seed=0, widths=8 if quick() else 64).eval()
    many = torch.randn(16 if quick() else 64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    yield compare(
        SLUG, f"saliency of all pairs of a VGG-19, {len(many)} pictures", lambda: saliency(net, many), "the bare forward", forward(net, many),
        target=1 / 2.5, repeats=repeats, note="one forward and one weight gradient: the limit is 1/2",
    )  # fmt: skip
    x = many[:16]
    inner = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    maps = torch.randn(16 if quick() else 256, 64, 8 if quick() else 16, 8 if quick() else 16)
    yield compare(
        SLUG, f"second moments of two 3x3 convolutions of 64 channels, {len(maps)} maps", lambda: fidelity(inner, maps), "the bare forward", forward(inner, maps),
        target=1 / 5, repeats=repeats, note="81 pairs of taps are 13 distances: the limit is 1/3.4",
    )  # fmt: skip
    small = prune(net, x, keep=0.5)
    less = small.flops[0] / small.flops[1]
    yield compare(
        SLUG, f"forward of a VGG-19 with half of its channels ({less:.1f} times fewer operations)", forward(small.model, x), "the whole network",
        forward(net, x), target=0.6 * less, repeats=repeats, note=f"the limit is {less:.1f}",
    )  # fmt: skip
    yield compare(
        SLUG, "pruning a VGG-19 to half of its channels", lambda: prune(net, x, keep=0.5), "torch-pruning, L2 of groups, 1 step", _peer(net, x),
        repeats=1, note="the peer measures no activations and repairs nothing",
    )  # fmt: skip
    yield from _accuracies()


def _accuracies() -> Iterator[AnyRow]:
    """At 25, 50 and 75 % of the parameters gone: saliency with both repairs, against the peer's norms (its batch norms measured again too)."""
    config = Config(width=16 if quick() else 64, epochs=3 if quick() else 12)
    train, test = image_sets("digits")
    net = trained(config, train, "cnn", 0)
    drawn = images(config, train, "generated", 0)
    for left in (0.75, 0.5, 0.25):
        ours = prune(net, drawn, params=1 / left).model
        norms = prune(net, drawn, params=1 / left, criterion="magnitude", compensate=None).model
        floor = _right(norms, test)
        hits = _right(ours, test)
        low, high = wilson(hits, len(test))
        yield Rate(
            SLUG, f"digits right at {left:g} of the parameters: saliency and both repairs, against norms that are measured again ({floor} of {len(test)})",
            hits, len(test), low, high, floor / len(test), False, hits > floor, note="no labels, no tuning",
        )  # fmt: skip
        peers = {name: _right(model, test) for name, model in _peers(net, drawn, 1 / left).items()}
        if peers:
            best = max(peers, key=lambda name: peers[name])
            yield Rate(
                SLUG, f"digits right at {left:g} of the parameters, against torch-pruning's best importance, norms measured again ({best}, {peers[best]} of {len(test)})",
                hits, len(test), low, high, peers[best] / len(test), False, hits > peers[best],
                note=f"chosen on these images in the peer's favour from {', '.join(f'{name} {right}' for name, right in peers.items())}",
            )  # fmt: skip


def _right(model: nn.Module, test: Samples) -> int:
    with frozen(model), torch.no_grad():
        return int((model(test.inputs).argmax(1) == test.targets).sum())


def _peers(net: nn.Module, drawn: Tensor, times: float) -> dict[str, nn.Module]:
    """What torch-pruning leaves at ``times`` fewer parameters by each importance that needs no labels, its batch norms measured again; none without it."""
    try:
        import torch_pruning as tp  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    before = sum(p.numel() for p in net.parameters())
    found = {}
    for name, importance in (
        ("L1", tp.importance.GroupMagnitudeImportance(p=1)),
        ("L2", tp.importance.GroupMagnitudeImportance(p=2)),
        ("LAMP", tp.importance.LAMPImportance()),
        ("batch-norm scale", tp.importance.BNScaleImportance()),
        ("FPGM", tp.importance.FPGMImportance()),
    ):
        low, high, best = 0.0, 0.99, None
        for _ in range(8):
            middle = (low + high) / 2
            model = copy.deepcopy(net).eval()
            head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
            tp.pruner.BasePruner(
                model, drawn[:2], importance=importance, pruning_ratio=middle, ignored_layers=head
            ).step()
            if before / sum(p.numel() for p in model.parameters()) >= times:
                high, best = middle, model
            else:
                low = middle
        if best is not None:
            recalibrate(best, drawn.split(64))
            found[name] = best
    return found


def _peer(net: nn.Module, x: Tensor) -> Callable[[], Any] | None:
    try:
        import torch_pruning as tp  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None

    def run() -> None:
        model = copy.deepcopy(net)
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        tp.pruner.BasePruner(
            model,
            x[:1],
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=head,
        ).step()

    return run


if __name__ == "__main__":
    for row in rows():
        print(row)
