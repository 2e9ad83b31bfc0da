"""What the selection costs beside the training it serves, and the SAM step beside a plain implementation of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lineament.bench import Row, compare
from lineament.data.pixel_digits import pixel_digits
from lineament.learn.useful.slow_examples import select_slow
from lineament.optim import ASAM, SAM
from lineament.recipes.kit.networks import network
from lineament.train.loop import fit

SLUG = "useful"


class PlainSAM:
    """The two passes parameter by parameter, as implementations in circulation have them."""

    def __init__(self, params: list[nn.Parameter], base: torch.optim.Optimizer, rho: float, adaptive: bool):
        self.params, self.base, self.rho, self.adaptive = params, base, rho, adaptive

    @torch.no_grad()
    def step(self, closure: Any) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        lengths = [
            ((p.abs() if self.adaptive else 1.0) * p.grad).norm(p=2)
            for p in self.params
            if p.grad is not None
        ]
        scale = self.rho / (torch.stack(lengths).norm(p=2) + 1e-12)
        old = {}
        for p in self.params:
            if p.grad is not None:
                old[p] = p.data.clone()
                p.add_((p.square() if self.adaptive else 1.0) * p.grad * scale.to(p))
        self.base.zero_grad()
        with torch.enable_grad():
            closure()
        for p, value in old.items():
            p.data = value
        self.base.step()
        return loss


def _peer(params: list[nn.Parameter], adaptive: bool) -> Any:
    try:
        from pytorch_optimizer import SAM as Peer
    except ImportError:
        return None
    return Peer(params, torch.optim.SGD, rho=0.05, adaptive=adaptive, lr=1e-4, momentum=0.9, foreach=True)


def _outputs(samples: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits like those of an early epoch: most examples of a class answered with some confidence, others not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % classes
    sure = torch.where(torch.rand(samples, generator=generator) < 0.65, 4.0, 1.0)
    scores = torch.randn(samples, classes, generator=generator)
    scores[torch.arange(samples), labels] += sure
    return scores, labels


def rows(repeats: int = 7) -> Iterator[Row]:
    digits = pixel_digits()
    x, y = digits.inputs, digits.targets
    model = network("tiny-cnn", x.shape[1:], 10, seed=0)
    sgd = lambda net: torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)  # noqa: E731
    scores, labels = _outputs(len(y), 10)
    yield compare(
        SLUG,
        "clustering and resampling, 900 digits",
        lambda: select_slow(scores, labels).indices(2),
        "their 30 epochs of training, timed on one",
        lambda: fit(model, (x, y), optimizer=sgd, batch_size=32),
        target=50.0,
        scale=30,
        repeats=repeats,
        note="the target is 2 % of the training's time",
    )
    images, targets = torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    large = network("resnet18", (3, 32, 32), 10, seed=0)
    many, answers = _outputs(50_000, 10)
    yield compare(
        SLUG,
        "clustering and resampling, 50,000 outputs of 10 classes",
        lambda: select_slow(many, answers).indices(2),
        "200 epochs of ResNet-18, timed on one batch of 64",
        lambda: fit(large, (images, targets), optimizer=sgd),
        target=50.0,
        scale=200 * 50_000 / 64,
        repeats=min(repeats, 3),
        note="the target is 2 % of the training's time",
    )
    for kind, name, adaptive in ((SAM, "SAM", False), (ASAM, "ASAM", True)):
        sides = {}
        for side in ("ours", "plain", "pytorch_optimizer"):
            net = network("resnet18", (3, 32, 32), 10, seed=0)
            params = list(net.parameters())
            grads = [1e-3 * torch.randn_like(p) for p in params]
            base = torch.optim.SGD(params, lr=1e-4, momentum=0.9, foreach=True)
            if side == "pytorch_optimizer":
                optimizer = _peer(params, adaptive)
            else:
                optimizer = kind(base, rho=0.05) if side == "ours" else PlainSAM(params, base, 0.05, adaptive)

            def closure(params: list[nn.Parameter] = params, grads: list[Tensor] = grads) -> Tensor:
                for p, g in zip(params, grads):
                    p.grad = g.clone()
                return grads[0].sum()

            def run(
                optimizer: Any = optimizer, closure: Any = closure, first: bool = side == "pytorch_optimizer"
            ) -> None:
                if first:  # it wants the first pass to be behind
                    closure()
                optimizer.step(closure)

            sides[side] = None if optimizer is None else run
        for peer, theirs in (
            ("the same, parameter by parameter (checks no gradient for NaN)", sides["plain"]),
            ("pytorch_optimizer, foreach", sides["pytorch_optimizer"]),
        ):
            yield compare(
                SLUG,
                f"one {name} step without its passes, 11 M parameters in 62 tensors",
                sides["ours"],
                peer,
                theirs,
                target=1.0,
                repeats=repeats,
                note="ours also restores bit by bit and checks both gradients",
            )


if __name__ == "__main__":
    for row in rows():
        print(row)
