"""What losses, heads, tables and measures cannot take is told in one line, before any arithmetic fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lineament.core.checks import InputError
from lineament.learn import WithHead
from lineament.losses import (
    UNPG,
    ArcFace,
    ClassHead,
    Elastic,
    InfoNCE,
    Queue,
    Spectral,
    SupCon,
    negative_pairs,
    pair_loss,
)  # fmt: skip
from lineament.measure import (
    borda_count,
    equal_error_rate,
    fold_accuracy,
    recognition,
    roc,
    separation,
    tar_at_far,
    template_features,
    val_at_far,
    verification,
)  # fmt: skip
from lineament.modules import UnifiedEmbedding, multiplex

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2])
UNIT = F.normalize(X, dim=1)


def table(inputs: Any) -> torch.Tensor:
    made = UnifiedEmbedding(10, 4)
    made.add("user")
    made.add("item")
    made.add("tags", padding=0)
    return made(inputs)


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
        (lambda: separation(torch.ones(3), torch.ones(0)), "negatives: got no similarity"),
        (lambda: fold_accuracy(X.repeat(2, 1) / 0, torch.tensor([1, 0, 1, 0, 1, 0]), 3), "embeddings: NaN or infinity"),
        (lambda: ClassHead(3, 5)(X, Y), "embeddings: .* expected rows of 5 numbers"),
        (lambda: ClassHead(3, 4)(X, Y, torch.zeros(6)), "sample_weight: the labelled rows' sum is 0"),
        (lambda: ClassHead(3, 4, chunk=None)(X, Y, torch.zeros(6)), "sample_weight: the labelled rows' sum is 0"),
        (lambda: ClassHead(3, 4, ArcFace())(X, Y, margins=torch.ones(2)), "margins: .* expected one a row"),
        (lambda: SupCon()(X, Y.float()), "labels: .* expected whole numbers"),
        (lambda: Spectral()(X, X / 0), "NaN or infinity in a row"),
        (lambda: InfoNCE()(X, UNIT), "query: expected rows of length 1"),
        (lambda: InfoNCE()(UNIT, UNIT / 0), "key: expected rows of length 1"),
        (lambda: ClassHead(3, 4, 0.5), "margin: got .* expected one of lineament.losses"),
        (lambda: ClassHead(3, 4)(X, Y, X[:, 0] / 0), "sample_weight: NaN or infinity"),
        (lambda: ClassHead(3, 4, ArcFace())(X, Y, margins=X[:, 0] / 0), "margins: NaN or infinity"),
        (lambda: Elastic(clip_sigma=-1), "clip_sigma: got -1"),
        (lambda: pair_loss("circle")(X, Y[:3]), "labels: .* expected one whole number a row"),
        (lambda: pair_loss("triplet")(X, Y.float()), "labels: .* expected one whole number a row"),
        (lambda: tar_at_far(X[:, 0], Y[:3], [0.1]), "same: .* expected one number a pair of both"),
        (lambda: equal_error_rate(X[:, 0] / 0, Y > 0), "scores: NaN or infinity"),
        (lambda: roc(X[:, 0], Y < 3), "same: got 6 genuine and 0 impostor pairs"),
        (lambda: val_at_far(X.repeat(2, 1) / 0, torch.tensor([1, 0, 1, 0, 1, 0]), folds=3), "embeddings: NaN or infinity"),
        (lambda: verification(X * 0, Y[:3] > 0), "embeddings: a row is zero, NaN or infinite"),
        (lambda: template_features(X, Y[:3], Y), "templates, media: "),
        (lambda: recognition(X, Y, []), "fars: got none"),
        (lambda: recognition(X / 0, Y), "a row is zero or NaN, or infinite"),
        (lambda: separation(X[:, 0] / 0, X[:, 0]), "positives: NaN or infinity"),
        (lambda: borda_count({"a": (1,), "b": (1, 2)}), "table: got rows of"),
        (lambda: table({"user": (Y, torch.tensor([0, 9]))}), "offsets of 'user' go to 9, and there are 6 ids"),
        (lambda: table({"user": (Y, torch.tensor([0.0, 3.0]))}), "as offsets of 'user', expected whole numbers"),
        (lambda: table({"user": Y.view(1, 2, 3)}), "for 'user', expected ids"),
        (lambda: table({"user": Y[0]}), "for 'user', expected ids"),
        (lambda: table({"user": None}), "for 'user', expected ids"),
        (lambda: table({"user": Y, "item": Y[:3]}), "'item' has 3 samples and 'user' 6"),
        (lambda: table({"user": Y, "tags": Y[:3]}), "'tags' has 3 samples and 'user' 6"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_thresholds_reach_up_to_the_stop():
    x = torch.nn.functional.normalize(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    same = torch.tensor([1, 0] * 4)
    for stop, step, count in ((4.0, 0.01, 400), (3.0, 0.4, 8), (1.0, 0.3, 4), (0.9, 0.3, 3)):
        assert len(fold_accuracy(x, same, 2, stop=stop, step=step).thresholds) == count


def test_a_batch_of_one_without_negatives_is_no_loss_and_unlabelled_rows_are_left_out():
    one = UNIT[:1].clone().requires_grad_()
    loss = InfoNCE(0.2)(one, UNIT[:1])
    loss.backward()
    assert loss.item() == 0 and not one.grad.any()
    x, y = torch.cat([X, X[:2] + 1]), torch.cat([Y, torch.tensor([-1, -1])])
    assert SupCon()(x, y) == SupCon()(X, Y)
    assert SupCon()(x, torch.full((8,), -1)).item() == 0
