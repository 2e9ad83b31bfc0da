"""What every margin and loss over embeddings keeps."""

from __future__ import annotations

import copy
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
    assert one(x, y).item() == two(x, y).item() and torch.equal(one.generator.get_state(), state)


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
    x.requires_grad_()
    losses = [each(x, same) for each in (UNPG(head), head)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in losses))
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


@pytest.mark.parametrize("also", [None, 3.0])
def test_a_head_in_chunks_equals_plain_autograd(margin, also):
    x, y = batch()
    y[3] = -1
    weights = torch.rand(12, generator=torch.Generator().manual_seed(1)).double() + 0.5
    found, start = [], copy.deepcopy(margin.state_dict())
    for chunk in (5, None):
        made = head_of(margin, chunk=chunk)
        made.load_class_weights(torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).double() * 3)
        margin.load_state_dict(start)
        extra = None if also is None else torch.tensor(also).double().requires_grad_()
        given = x.clone().requires_grad_()
        loss = 2 * made(given, y, sample_weight=weights, also=extra)
        leaves = [given, made.weight, *([] if extra is None else [extra])]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
        torch.testing.assert_close(first, again)
        found.append((loss, *first))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("chunk", ["auto", None])
def test_a_head_keeps_parameters_and_statistics_wide_under_autocast(margin, chunk):
    x, y = batch(dtype=torch.float32)
    start = copy.deepcopy(margin.state_dict())
    made = ClassHead(5, 6, margin, 16.0, chunk=chunk)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = made(x.bfloat16(), y)
    loss.backward()
    assert loss.dtype == made.weight.dtype == made.weight.grad.dtype == torch.float32
    margin.load_state_dict(start)
    fresh = ClassHead(5, 6, margin, 16.0, chunk=chunk)
    assert loss.item() == pytest.approx(fresh(x, y).item(), rel=0.1, abs=0.3)


def test_a_sparse_gradient_holds_the_steps_classes_alone():
    x, y = batch(classes=3)
    gradients = []
    for sparse in (True, False):
        head = head_of(CosFace(), classes=50, sample=0.1, sparse=sparse)
        head(x, y).backward()
        assert head.weight.grad.is_sparse == sparse
        gradients.append(head.weight.grad)
    torch.testing.assert_close(gradients[0].to_dense(), gradients[1])
    assert gradients[0].coalesce().indices().shape[1] == 5


def test_a_head_halves_its_chunk_when_memory_runs_out(monkeypatch):
    x, y = batch()
    expected = head_of(CosFace())(x, y)
    original, sizes = torch.Tensor.amax, []

    def small(self, *arguments):
        sizes.append(len(self))
        if len(self) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "amax", small)
    torch.testing.assert_close(head_of(CosFace())(x, y), expected)
    assert max(sizes) == 12 and sizes[-1] == 3


@pytest.mark.parametrize("make", [lambda h: h, UNPG], ids=["head", "unpg"])
def test_a_batch_without_labels_is_zero_and_bad_rows_are_named(make):
    x, y = batch()
    head = head_of(CosFace())
    loss = make(head)
    none = loss(x.requires_grad_(), torch.full((12,), -1))
    none.backward()
    assert none.item() == 0 and not x.grad.any()
    with pytest.raises(InputError, match="indices_tuple"):
        loss(x, y, sample_weight=(y, y, y))
    with pytest.raises(InputError, match=r"indices_tuple: .* sample_weight"):
        loss(x, y, indices_tuple=(y, y, y))
    for given, layout, words in (
        ({"W": head.weight}, "columns", r"source: got .*state\['W'\]"),
        (head.weight, "column", "layout: got 'column'.*nearest: 'columns'"),
    ):
        with pytest.raises(InputError, match=words):
            head.load_class_weights(given, layout)
    with torch.no_grad():
        head.weight[1] = 0
    with pytest.raises(InputError, match="class centre"):
        loss(x, y)


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.03, 0.1, 2.0])
def test_others_logsumexp_is_that_of_the_matrix_at_any_temperature(temperature, monkeypatch):
    monkeypatch.setattr("lineament.losses.contrastive._ENTRIES", 40)  # several chunks
    x = nn.functional.normalize(batch()[0], dim=1)
    # Opposite rows and equal ones: the smallest and largest cosines there are.
    x = torch.cat([x, -x[:1], x[:2]])
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(3)).double()
    dense, given = (x.double().clone().requires_grad_() for _ in range(2))
    none = torch.eye(len(x), dtype=torch.bool)
    expected = (dense @ dense.T / temperature).masked_fill(none, -torch.inf).logsumexp(1)
    torch.testing.assert_close(others_logsumexp(given, temperature), expected)
    single = x.float().requires_grad_()
    for leaf in (given, single):
        (others_logsumexp(leaf, temperature) * weights.to(leaf)).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(given.grad, dense.grad)
    torch.testing.assert_close(single.grad.double(), dense.grad, rtol=1e-4, atol=1e-4 / temperature * 1e-1)
