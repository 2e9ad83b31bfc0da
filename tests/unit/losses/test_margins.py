"""Margins by their closed forms, and pair losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lineament.core.checks import InputError
from lineament.losses import (
    UNPG,
    ArcFace,
    CircleLoss,
    ClassHead,
    Combined,
    ContrastiveLoss,
    CosFace,
    Cosine,
    CurricularFace,
    Elastic,
    MagFace,
    SNPairLoss,
    SphereFace,
    TripletLoss,
    negative_pairs,
    pair_loss,
)
from lineament.losses.margins import matched
from lineament.losses.pair_losses import PAIR_LOSSES

COSINES = torch.linspace(-0.8, 0.99, 9, dtype=torch.float64)
NORMS = torch.ones(9).double()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Combined(1.0, 0.4, 0.0), ArcFace(0.4)),
        (Combined(1.0, 0.0, 0.3), CosFace(0.3)),
        (ArcFace(0.0), Cosine()),
        (Elastic("cos", 0.3, 0.0), CosFace(0.3)),
        (MagFace(margins=(0.4, 0.4), weight=0.0), ArcFace(0.4, guard="easy")),
        (CurricularFace(0.4), ArcFace(0.4, guard="taylor")),
    ],
)
def test_margins_that_are_the_same(one, other):
    torch.testing.assert_close(one(COSINES, NORMS), other(COSINES, NORMS))


def test_the_mean_over_draws_is_the_closed_form():
    generator, n = torch.Generator().manual_seed(0), 200_000
    cosine = torch.full((n,), 0.3).double()
    arc, cos = Elastic("arc", 0.5, 0.2), Elastic("cos", 0.35, 0.2)
    for margin, expected in (
        (arc, math.exp(-0.02) * math.cos(math.acos(0.3) + 0.5)),
        (cos, 0.3 - 0.35),
    ):
        found = margin(cosine, cosine, margin.draw(cosine, generator))
        assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / math.sqrt(n)


def test_sphereface_at_a_fixed_scale():
    """With a scale of its own a head's logits are those of any margin: scale (ψ at the target, cos elsewhere)."""
    x, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(5) % 3
    head = ClassHead(3, 4, SphereFace(3, by_norm=False), 8.0).double()
    cosines = head.cosines(x)
    theta = cosines.gather(1, y[:, None]).arccos()
    k = (3 * theta / math.pi).floor()
    expected = cosines.scatter(1, y[:, None], (-1) ** k * (3 * theta).cos() - 2 * k)
    torch.testing.assert_close(head.margin_logits(x, y), 8 * expected)


def test_matching_by_rank_gives_near_samples_small_margins():
    generator = torch.Generator().manual_seed(0)
    cosine, drawn = torch.rand(64, generator=generator), torch.rand(64, generator=generator)
    found = matched(cosine, drawn, "rank")
    assert torch.equal(found.sort().values, drawn.sort().values)
    assert torch.equal(cosine.argsort(), found.argsort(descending=True))
    order = torch.randperm(64, generator=generator)
    assert torch.equal(matched(cosine[order], drawn, "rank"), found[order])


def test_the_hard_limit_of_unified_pairs():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 5, generator=generator).double(), torch.arange(8) % 4
    head = ClassHead(6, 5, CosFace(0.2), 4000.0).double()
    loss = UNPG(head, float("inf"))(x, y) / 4000
    cosines = head.cosines(x)
    target = cosines.gather(1, y[:, None])[:, 0] - 0.2
    others = cosines.scatter(1, y[:, None], -2).amax(1)
    pairs = negative_pairs(x, y, float("inf"))
    largest = pairs.similarities[pairs.kept].max()
    expected = (torch.maximum(others, largest) - target).clamp(min=0).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-3)


def test_the_filter_takes_quartiles_without_interpolation_and_keeps_its_bounds():
    x = torch.randn(15, 3, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(15) % 5
    unit = x / x.norm(dim=1, keepdim=True)
    values = sorted(float(unit[i] @ unit[j]) for i in range(15) for j in range(i + 1, 15) if y[i] != y[j])
    first, third = values[len(values) // 4], values[len(values) * 3 // 4]
    for whisker in (0.0, 0.1, 0.5):
        low, high = first - whisker * (third - first), third + whisker * (third - first)
        found = negative_pairs(x, y, whisker)
        assert int(found.kept.sum()) == sum(low - 1e-12 <= v <= high + 1e-12 for v in values)
        assert [float(q) for q in found.quartiles] == pytest.approx([first, third])


def test_dropped_pairs_get_no_gradient_and_a_larger_whisker_never_lowers_the_loss():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 4, generator=generator).double().requires_grad_(), torch.arange(12) % 6
    losses = []
    for whisker in (0.0, 0.5, 1.0, float("inf")):
        torch.manual_seed(0)
        losses.append(UNPG(ClassHead(6, 4, CosFace()).double(), whisker)(x, y).item())
    assert losses == sorted(losses) and losses[0] < losses[-1]
    pairs = negative_pairs(x, y, 0.0)
    (gradient,) = torch.autograd.grad(pairs.logsumexp(16.0), pairs.similarities)
    assert not gradient[~pairs.kept].any() and (gradient[pairs.kept] > 0).all()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_losses_do_not_see_unlabelled_rows_scale_or_order(name):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 4, generator=generator).double().requires_grad_(), torch.arange(10) % 3
    loss = pair_loss(name)
    expected = loss(x, y)
    order = torch.randperm(10, generator=generator)
    torch.testing.assert_close(loss(3 * x[order], y[order]), expected)
    more = torch.cat([x, torch.randn(2, 4, generator=generator).double()])
    torch.testing.assert_close(loss(more, torch.cat([y, torch.tensor([-1, -1])])), expected)
    assert torch.autograd.grad(expected, x)[0].isfinite().all()
    twins = torch.ones(4, 4).double().requires_grad_()
    assert torch.autograd.grad(loss(twins, torch.tensor([0, 0, 1, 1])), twins)[0].isfinite().all()
    assert loss(x, torch.full((10,), -1)).item() == 0


def test_pair_losses_by_hand():
    x, y = torch.eye(3).double(), torch.tensor([0, 0, 1])
    root = math.sqrt(2)
    assert TripletLoss(0.2)(x, y).item() == pytest.approx(0.2)
    assert ContrastiveLoss(0.0, 1.5)(x, y).item() == pytest.approx(root + 1.5 - root)
    assert SNPairLoss(5.0)(x, y).item() == pytest.approx(math.log(3))
    # Circle: one positive and one negative, both of similarity 0, for two of three anchors.
    expected = math.log1p(math.exp(80 * 0.4 * -0.4 + 80 * 1.4 * 0.6))
    assert CircleLoss()(x, y).item() == pytest.approx(expected)


def test_an_added_loss_stands_beside_the_heads_and_bad_names_are_told():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 4, generator=generator).double(), torch.arange(10) % 3
    head = ClassHead(3, 4, CosFace()).double()
    both = UNPG(head, aux="contrastive", weight=0.5)(x, y)
    torch.testing.assert_close(both, head(x, y) + 0.5 * ContrastiveLoss()(x, y))
    with pytest.raises(InputError, match="nearest: 'triplet'"):
        UNPG(head, aux="triplets")
    with pytest.raises(InputError, match="whisker"):
        UNPG(head, -1.0)
    with pytest.raises(InputError, match="expected a ClassHead"):
        UNPG(torch.nn.Linear(2, 2))
