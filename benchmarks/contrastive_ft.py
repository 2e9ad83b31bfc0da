"""MoCo's loss with a queue against lightly's, the cost of feature transformation, draws of Beta, and SupCon without a matrix.

Forward and backward in float32. lightly asks for torchvision, of which its loss needs nothing: an empty module stands in for it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.bench import Row, compare, quick
from lineament.losses.contrastive import SupCon
from lineament.losses.feature_transform import NegativeInterpolation, PositiveExtrapolation, drawn
from lineament.losses.info_nce import InfoNCE
from lineament.losses.queue import Queue

SLUG = "contrastive-ft"


def stepper(loss: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Callable[[], Any]:
    def step() -> None:
        x.grad = None
        loss(F.normalize(x, dim=1), *others).backward()

    return step


def lightly_loss(size: int, d: int) -> Any:
    class Stub(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock()

    try:
        import torchvision  # noqa: F401  # pyright: ignore
    except ImportError:
        for name in (
            "torchvision",
            "torchvision.transforms",
            "torchvision.transforms.functional",
            "torchvision.models",
            "torchvision.ops",
        ):
            stub = Stub(name)
            stub.__path__ = []
            sys.modules.setdefault(name, stub)
    try:
        from lightly.loss import NTXentLoss  # pyright: ignore

        return NTXentLoss(temperature=0.2, memory_bank_size=(size, d))
    except Exception:  # whatever an import without its dependency raises
        return None


def rows(repeats: int = 3) -> Iterator[Row]:
    size, n, d = (4096, 64, 128) if quick() else (65_536, 256, 128)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator).requires_grad_()
    key = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    plain = InfoNCE(0.2, queue=Queue(size, d))
    mixed = InfoNCE(0.2, queue=Queue(size, d), transform=[PositiveExtrapolation(), NegativeInterpolation()])
    stepper(plain, x, key)()
    theirs = lightly_loss(size, d)
    peer = theirs and stepper(theirs, x, key)
    yield compare(
        SLUG, f"MoCo, batch {n}, queue {size:,}, d {d}", stepper(plain, x, key), "lightly NTXentLoss with its memory bank", peer,
        target=2.0, repeats=repeats, note="two products of 2 BKd operations are the limit",
    )  # fmt: skip
    yield compare(
        SLUG, f"MoCo with feature transformation, batch {n}, queue {size:,}, d {d}", stepper(mixed, x, key),
        "lightly NTXentLoss without", peer, target=1.5, repeats=repeats,
    )  # fmt: skip
    yield compare(
        SLUG, f"MoCo with feature transformation, batch {n}, queue {size:,}, d {d}", stepper(mixed, x, key), "our plain MoCo",
        stepper(plain, x, key), target=1 / 1.25, repeats=repeats, note="mixing moves three times the queue",
    )  # fmt: skip
    shape = (size, d)
    numpy = np.random.default_rng(0)
    for name, other, target in (
        ("NumPy", lambda: numpy.beta(1.6, 1.6, shape), 3.0),
        ("two gammas", lambda: two_gammas(shape), 4.0),
    ):
        yield compare(
            SLUG, f"{size * d:,} draws of Beta(1.6, 1.6)", lambda: drawn(shape, 1.6, "dim", "beta", generator), name, other,
            target=target, repeats=repeats, note="two uniforms, a power, a root and a cosine",
        )  # fmt: skip
    n = 512 if quick() else 4096
    x = torch.randn(n, d, generator=generator).requires_grad_()
    y = torch.randint(n // 16, (n,), generator=generator)
    try:
        from pytorch_metric_learning.losses import SupConLoss

        peer = stepper(SupConLoss(temperature=0.1), x, y)
    except ImportError:
        peer = None
    yield compare(
        SLUG, f"SupCon, n {n:,}, d {d}", stepper(SupCon(0.1, "skip"), x, y), "pytorch-metric-learning SupConLoss", peer, target=6.0,
        repeats=repeats, note="no matrix of n x n is kept",
    )  # fmt: skip


def two_gammas(shape: tuple[int, int]) -> Tensor:
    concentration = torch.full(shape, 1.6)
    one, two = torch._standard_gamma(concentration), torch._standard_gamma(concentration)
    return one / (one + two)


if __name__ == "__main__":
    for row in rows():
        print(row)
