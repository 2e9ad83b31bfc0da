"""UNPG against its base head, and against the form that concatenates the pairs to every row's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.bench import Row, compare, quick
from lineament.losses.class_head import ClassHead
from lineament.losses.margins import CosFace
from lineament.losses.unpg import UNPG, negative_pairs

SLUG = "unpg"


class Concatenated(nn.Module):
    """The released form: a row of all kept pairs beside each row of logits."""

    def __init__(self, head: ClassHead):
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = negative_pairs(x, y)
        logits = self.head.margin_logits(x, y)
        kept = self.head.scale * pairs.similarities[pairs.kept]
        return F.cross_entropy(torch.cat([logits, kept.expand(len(x), -1)], 1), y)


def stepper(loss: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    def step() -> None:
        x.grad = None
        loss.zero_grad(set_to_none=True)
        loss(x, y).backward()

    return step


def rows(repeats: int = 3) -> Iterator[Row]:
    many, few, d, n = (8000, 1000, 128, 128) if quick() else (85_742, 10_000, 512, 512)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator).requires_grad_()
    stepper(ClassHead(8, d), x, torch.arange(n) % 8)()  # what PyTorch loads at a first step
    y = torch.randint(many, (n,), generator=generator)
    head = ClassHead(many, d, CosFace())
    yield compare(
        SLUG, f"UNPG around CosFace, {many:,} classes, d {d}, batch {n}", stepper(UNPG(head), x, y), "its base head alone",
        stepper(head, x, y), target=1 / 1.03, repeats=repeats,
        note="the pairs cost 6 B²d operations beside the head's 6 BCd, and sorting",
    )  # fmt: skip
    y = torch.randint(few, (n,), generator=generator)
    head = ClassHead(few, d, CosFace())
    yield compare(
        SLUG, f"UNPG around CosFace, {few:,} classes, d {d}, batch {n}", stepper(UNPG(head), x, y), "pairs concatenated to the logits",
        stepper(Concatenated(head), x, y), target=15.0, repeats=repeats,
    )  # fmt: skip
    try:
        from pytorch_metric_learning import losses

        theirs: Any = losses.MultipleLosses(
            [losses.CosFaceLoss(few, d, margin=0.35, scale=64), losses.ContrastiveLoss()]
        )
        theirs = stepper(theirs, x, y)
    except ImportError:
        theirs = None
    yield compare(
        SLUG, f"CosFace and an added contrastive loss, {few:,} classes, batch {n}", stepper(UNPG(head, aux="contrastive"), x, y),
        "pytorch-metric-learning MultipleLosses", theirs, repeats=repeats,
    )  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print(row)
