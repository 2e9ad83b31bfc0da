"""What every margin and loss over embeddings keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.losses.class_head import ClassHead
from lineament.losses.contrastive import NTXent, Spectral, SupCon, others_logsumexp
from lineament.losses.margins import (
    AdaFace,
    ArcFace,
    Combined,
    CosFace,
    Cosine,
    CurricularFace,
    Elastic,
    MagFace,
    SphereFace,
)
from lineament.losses.queue import Queue
from lineament.losses.unpg import UNPG, negative_pairs

MARGINS = {
    "cosine": Cosine,
    "sphereface": SphereFace,
    "sphereface, m1": lambda: SphereFace(1.35),
    "cosface": CosFace,
    "arcface": ArcFace,
    "arcface, guarded": lambda: ArcFace(guard="taylor"),
    "combined": Combined,
    "elastic arc": Elastic,
    "elastic cos, by rank": lambda: Elastic("cos", match="rank"),
    "magface": MagFace,
    "curricularface": CurricularFace,
    "adaface": AdaFace,
}


@pytest.fixture(params=MARGINS)
def margin(request):
    return MARGINS[request.param]()


def batch(n=12, d=6, classes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=dtype) * 3
    return x, torch.arange(n) % classes


def head_of(margin, classes=5, d=6, **options):
    return ClassHead(classes, d, margin, 16.0, **options).double()


def test_a_class_head_takes_a_batch_of_one_and_ignores_label_minus_one(margin):
    x, y = batch()
    y[3] = -1
    head = head_of(margin, reduction="none")
    assert head(x, y).shape == (11,)
    assert head(x[:1], y[:1]).shape == (1,)
    assert head_of(margin)(x, torch.full((12,), -1)).item() == 0


def test_gradients_are_finite_where_a_sample_lies_on_its_class_and_opposite(margin):
    head = head_of(margin)
    x = torch.cat([head.weight[:2].detach(), -head.weight[:2].detach()]).requires_grad_()
    head(x, torch.tensor([0, 1, 0, 1])).backward()
    assert x.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_scaling_classes_changes_nothing_and_gradients_are_across(margin):
    x, y = batch()
    x.requires_grad_()
    head = head_of(margin)
    head.eval()
    before = head(x, y)
    (gradient,) = torch.autograd.grad(before, x)
    with torch.no_grad():
        head.weight.mul_(torch.rand(5, 1) + 0.5)
    torch.testing.assert_close(head(x, y), before, rtol=1e-6, atol=1e-9)
    if not head.margin.by_norm:
        torch.testing.assert_close((gradient * x).sum(1), torch.zeros(12).double(), rtol=0, atol=1e-9)


def test_evaluation_is_plain_and_draws_nothing(margin):
    x, y = batch()
    head = head_of(margin).eval()
    state = head.generator.get_state()
    expected = nn.functional.cross_entropy(head.logits(x), y)
    torch.testing.assert_close(head(x, y), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(head.generator.get_state(), state)


def test_a_larger_margin_is_a_larger_loss():
    x, y = batch()
    for kind in (ArcFace, CosFace):
        losses = []
        for m in (0.0, 0.1, 0.3):
            head = head_of(kind(m))
            losses.append(head(x, y).item())
        assert losses == sorted(losses) and losses[0] < losses[2]


def test_elastic_without_spread_is_the_fixed_margin_and_draws_nothing():
    x, y = batch()
    one, two = head_of(Elastic("arc", 0.5, 0.0)), head_of(ArcFace(0.5))
    state = one.generator.get_state()
    assert float(one(x, y)) == float(two(x, y)) and torch.equal(one.generator.get_state(), state)


def test_sampled_classes_move_alone():
    x, y = batch(classes=3)
    head = head_of(CosFace(), classes=50, sample=0.1)
    head(x, y).backward()
    moved = head.weight.grad.abs().sum(1) > 0
    assert int(moved.sum()) <= 5 and moved[:3].all()


@pytest.mark.parametrize("labels", [[7], [-2], [0.5]])
def test_a_class_head_names_labels_it_cannot_take(labels):
    with pytest.raises(InputError, match="labels"):
        head_of(Cosine())(torch.ones(1, 6).double(), torch.tensor(labels))
    with pytest.raises(InputError, match="no direction"):
        head_of(Cosine())(torch.zeros(1, 6).double(), torch.tensor([0]))


def test_negative_pairs_change_nothing_where_there_are_none():
    x, _ = batch()
    head = head_of(CosFace())
    same = torch.zeros(12, dtype=torch.long)
    assert float(UNPG(head)(x, same)) == pytest.approx(float(head(x, same)), abs=1e-12)
    assert negative_pairs(x, same).logsumexp(16.0).item() == -math.inf


def test_contrastive_losses_equal_the_matrix_they_do_not_build(monkeypatch):
    x, y = batch(classes=4)
    x.requires_grad_()
    unit = nn.functional.normalize(x, dim=1)
    s = (unit @ unit.T / 0.2).masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    like = (y[:, None] == y) & ~torch.eye(12, dtype=torch.bool)
    expected = (s.logsumexp(1) - s.masked_fill(~like, 0).sum(1) / like.sum(1)).mean()
    monkeypatch.setattr("lineament.losses.contrastive._ENTRIES", 40)  # several chunks
    loss = SupCon(0.2)(x, y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, x)[0] for each in (loss, expected)))
    assert torch.autograd.gradcheck(lambda z: others_logsumexp(z, 0.5), (unit.detach().requires_grad_(),))
    with pytest.raises(InputError, match="no other sample"):
        SupCon()(x, torch.arange(12))
    torch.testing.assert_close(NTXent(0.2)(x), SupCon(0.2)(x, torch.arange(6)))


def test_the_unbiased_spectral_loss_leaves_own_pairs_out():
    a, b = batch()[0], batch(d=6)[0].flip(0)
    products = a @ b.T
    off = products[~torch.eye(12, dtype=torch.bool)].square().mean()
    expected = off - 2 * products.diagonal().mean()
    torch.testing.assert_close(Spectral(unbiased=True)(a, b), expected)


def test_a_queue_wraps_keeps_unit_rows_and_travels_in_the_state_dict():
    queue, seen = Queue(7, 4), []
    for k in range(5):
        keys = nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(k)), dim=1)
        seen += list(keys)
        queue.enqueue(keys)
    held = {tuple(row.tolist()) for row in queue.rows}
    assert held == {tuple(row.tolist()) for row in seen[-7:]}
    other = Queue(7, 4, seed=1)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.rows, queue.rows) and int(other.pointer) == int(queue.pointer) == 15 % 7
    with pytest.raises(InputError, match="length 1"):
        queue.enqueue(torch.ones(2, 4))
