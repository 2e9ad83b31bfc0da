"""What losses, heads, tables and measures cannot take is told in one line, before any arithmetic fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lineament.core.checks import InputError
from lineament.learn import WithHead
from lineament.losses import UNPG, ClassHead, InfoNCE, Queue, negative_pairs
from lineament.measure import fold_accuracy
from lineament.modules import multiplex

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2])
UNIT = F.normalize(X, dim=1)


def bag() -> nn.Module:
    net = nn.ModuleDict({"tags": nn.EmbeddingBag(9, 4)})
    multiplex(net)
    return net["tags"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ClassHead(3, 4)(X, Y, (Y, Y, Y)), "sample_weight: got a tuple"),
        (lambda: UNPG(ClassHead(3, 4))(X, Y, (Y, Y, Y)), "sample_weight: got a tuple"),
        (lambda: InfoNCE(0.1, queue=Queue(8, 5))(UNIT, UNIT), "query: .* rows of 5 numbers"),
        (lambda: negative_pairs(X, Y[:3]), "labels: .* expected one a row"),
        (lambda: negative_pairs(X, Y, -1.0), "whisker: got -1"),
        (lambda: WithHead(nn.Linear(4, 5), nn.Linear(6, 2))(X), "head: it takes 6 coordinates"),
        (lambda: bag()(Y, torch.tensor([0, 3, 2])), "offsets of 'tags' must start at 0 and not fall"),
        (lambda: bag()(Y, torch.tensor([1, 3])), "offsets of 'tags' must start at 0 and not fall"),
        (lambda: fold_accuracy(X.repeat(2, 1), torch.tensor([1, 0, 1, 1, 1, 0]), 3), "same: all pairs of fold 2 of 3 are of one kind"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(call, words):
    with pytest.raises(InputError, match=words):
        call()
