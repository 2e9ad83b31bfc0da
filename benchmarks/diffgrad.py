"""diffGrad's step against pytorch_optimizer, torch-optimizer, the reference's loop and PyTorch's fused Adam.

The parameters are those of a ResNet-18 for small images: 11 million in 53 tensors, float32. A step is bound by memory traffic: fused,
diffGrad moves 36 bytes for each parameter and Adam 28, so that 28 / 36 of Adam's speed is the limit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lineament.bench import Row, compare
from lineament.optim import DiffGrad

SLUG = "diffgrad"


def shapes() -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        for _ in range(2):
            for first in (inputs, outputs):
                found += [(outputs, first, 3, 3), (outputs,), (outputs,)]
            inputs = outputs
    return [*found, (10, 512), (10,)]


def stepper(make: Callable[[list[nn.Parameter]], Any]) -> Callable[[], Any]:
    """The step of an optimizer over parameters of its own, with the same gradients for each optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes()]
    for p in params:
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)
    return make(params).step


class Loop:
    """The published formula as the reference runs it: parameter by parameter, one operation after the other."""

    def __init__(self, params: list[nn.Parameter]):
        self.params, self.t = params, 0
        self.state = [[torch.zeros_like(p, requires_grad=False) for _ in range(3)] for p in params]

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        size = 1e-3 * (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
        for p, (m, v, previous) in zip(self.params, self.state):
            g = p.grad
            assert g is not None
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            friction = 1.0 / (1.0 + torch.exp(-torch.abs(previous - g)))
            previous.copy_(g)
            p.addcdiv_(m * friction, v.sqrt().add_(1e-8), value=-size)


def rows(repeats: int = 15) -> Iterator[Row]:
    warnings.filterwarnings("ignore")
    eager = stepper(DiffGrad)
    peers: list[tuple[str, float | None, Callable[[], Any] | None]] = []
    try:
        from pytorch_optimizer import DiffGrad as Peer

        peers.append(
            (
                "pytorch_optimizer, foreach",
                1.5,
                stepper(lambda p: Peer(p, weight_decouple=False, foreach=True)),
            )
        )
    except ImportError:
        peers.append(("pytorch_optimizer, foreach", 1.5, None))
    peers.append(("the reference's loop", 2.5, stepper(Loop)))
    try:
        from torch_optimizer import DiffGrad as Older

        peers.append(("torch-optimizer", None, stepper(lambda p: Older(p))))
    except ImportError:
        peers.append(("torch-optimizer", None, None))
    peers.append(("torch.optim.Adam, foreach", None, stepper(lambda p: torch.optim.Adam(p, foreach=True))))
    for name, target, theirs in peers:
        yield compare(
            SLUG,
            "eager step, 11 M parameters in 53 tensors",
            eager,
            name,
            theirs,
            target=target,
            repeats=repeats,
            note="blocks that stay in the cache; the limit is one pass over memory, see the compiled step",
        )
    try:
        compiled = stepper(lambda p: DiffGrad(p, compiled=True))
        compiled()
    except Exception as error:  # no C++ compiler: whatever PyTorch raises for it
        warnings.warn(f"the compiled step could not be built: {error}", stacklevel=1)
        return
    for name, target, make in (
        ("torch.optim.Adam, fused", 1 / 1.5, lambda p: torch.optim.Adam(p, fused=True)),
        ("our eager step", None, DiffGrad),
    ):
        yield compare(
            SLUG,
            "compiled step, 11 M parameters in 53 tensors",
            compiled,
            name,
            stepper(make),
            target=target,
            repeats=2 * repeats,
            note="the limit against Adam is 28 / 36 = 0.78, the ratio of the bytes moved",
        )


if __name__ == "__main__":
    for row in rows(7):
        print(row)
