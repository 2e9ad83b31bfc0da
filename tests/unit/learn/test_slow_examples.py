"""The partitions of USEFUL, the separating epoch, the order of learning: closed forms, invariances, degenerate data."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lineament.core.checks import InputError
from lineament.learn.useful.learning_order import learning_order
from lineament.learn.useful.separating import separating_epoch, window_of
from lineament.learn.useful.slow_examples import select_slow

LABELS = torch.arange(40) % 2


def outputs(seed: int = 0) -> torch.Tensor:
    """Two classes; examples 0 to 27 confident and right, 28 to 39 near the border."""
    generator = torch.Generator().manual_seed(seed)
    margin = torch.where(torch.arange(40) < 28, 4.0, 0.3) + 0.1 * torch.randn(40, generator=generator)
    return torch.stack([margin, -margin], 1) * (1 - 2 * LABELS)[:, None].float()


@pytest.mark.parametrize("output", ["softmax", "logits"])
def test_the_cluster_with_the_higher_loss_is_slow(output):
    found = select_slow(outputs(), LABELS, output=output)
    assert torch.equal(found.mask, torch.arange(40) >= 28)
    assert found.counts.tolist() == [[20, 6], [20, 6]] and found.fraction == pytest.approx(0.3)
    assert bool((found.cluster_losses[:, 1] > found.cluster_losses[:, 0]).all())
    json.dumps(found.to_dict())
    found.plot()


@pytest.mark.filterwarnings("ignore:more than 70%:UserWarning")
def test_rows_of_ones_own_are_clustered():
    rows = torch.zeros(40, 3)
    rows[:4, 2] = 1.0
    assert torch.equal(select_slow(outputs(), LABELS, output=rows).mask, torch.arange(40) >= 4)


@pytest.mark.filterwarnings("ignore:more than 70%:UserWarning")
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_the_examples_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 3, generator=generator)
    labels = torch.arange(60) % 3
    order = torch.randperm(60, generator=generator)
    for by in ("clusters", "misclassified", "eiil", "quantile"):
        one, two = select_slow(logits, labels, by=by), select_slow(logits[order], labels[order], by=by)
        assert torch.equal(one.mask[order], two.mask)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_the_multiset_has_n_plus_k_minus_one_times_s_entries(factor, seed):
    logits = torch.randn(50, 2, generator=torch.Generator().manual_seed(seed))
    found = select_slow(logits, torch.arange(50) % 2, by="random")
    rows = found.indices(factor)
    assert len(rows) == 50 + (factor - 1) * int(found.mask.sum())
    assert torch.equal(torch.bincount(rows), torch.where(found.mask, factor, 1))
    assert torch.equal(found.indices(1), torch.arange(50))
    assert torch.equal(found.weights(factor), torch.bincount(rows).double())


def test_balance_keeps_the_shares_or_makes_classes_equal():
    labels = torch.cat([torch.zeros(30), torch.ones(10)]).long()
    logits = outputs()
    logits[:] = torch.tensor([4.0, 0.0])
    logits[:12] = torch.tensor([0.1, 0.0])
    logits[30:] = torch.tensor([0.0, 4.0])
    logits[30] = torch.tensor([0.0, 0.1])
    found = select_slow(logits, labels)
    assert found.counts.tolist() == [[30, 12], [10, 1]]
    assert torch.bincount(labels[found.indices(2)]).tolist() == [42, 11]
    assert torch.bincount(labels[found.indices(2, balance="shares")]).tolist() == [42, 14]
    equal = found.indices(2, balance="equal", seed=3)
    assert torch.bincount(labels[equal]).tolist() == [42, 42]
    assert bool((torch.bincount(equal) >= torch.bincount(found.indices(2))).all())


def test_partitions_that_the_paper_compares_with():
    logits = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(90) % 3
    clusters = select_slow(logits, labels)
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    quantile = select_slow(logits, labels, by="quantile")
    assert torch.equal(quantile.counts, clusters.counts)
    for c in range(3):
        own = labels == c
        assert losses[own & quantile.mask].min() >= losses[own & ~quantile.mask].max()
    assert torch.equal(select_slow(logits, labels, by="misclassified").mask, logits.argmax(1) != labels)
    random = select_slow(logits, labels, by="random", like=clusters, seed=1)
    assert random.mask.sum() == clusters.mask.sum() and not torch.equal(random.mask, clusters.mask)


def test_eiils_environments_maximise_its_penalty():
    """The closed form against gradient ascent on soft assignments, which is how EIIL finds them."""
    logits = 2 * torch.randn(50, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.arange(50) % 3
    scale = torch.ones(50, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(logits * scale[:, None], labels, reduction="sum")
    slope = torch.autograd.grad(loss, scale)[0]

    def penalty(q: torch.Tensor) -> torch.Tensor:
        return (q * slope).sum() ** 2 + ((1 - q) * slope).sum() ** 2

    ours = select_slow(logits, labels, by="eiil").mask.double()
    free = 0.1 * torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        (-penalty(free.sigmoid())).backward()
        optimizer.step()
    reached = float(penalty(free.sigmoid().detach()))
    assert float(penalty(ours)) >= reached * (1 - 1e-9)
    assert reached > 0.9 * float(penalty(ours))


def test_ties_go_to_the_smaller_cluster():
    rows = torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0]])
    found = select_slow(torch.zeros(5, 1), torch.zeros(5).long(), output=rows, losses=torch.ones(5))
    assert found.mask.tolist() == [False, False, False, True, True]


def test_classes_that_cannot_be_parted_are_skipped_with_a_warning():
    logits = outputs()
    logits[LABELS == 1] = torch.tensor([0.0, 1.0])
    with pytest.warns(UserWarning, match=r"classes \[1\] have fewer than two"):
        found = select_slow(logits, LABELS)
    assert found.skipped == (1,) and not found.mask[LABELS == 1].any()
    assert found.inertia[1] == 0 and bool(found.centers[1].isnan().all())


def test_nearly_a_whole_class_selected_is_a_warning():
    logits = outputs()
    flipped = torch.where(torch.arange(40) < 36, 0.3, 4.0)
    logits = torch.stack([flipped, -flipped], 1) * (1 - 2 * LABELS)[:, None].float()
    with pytest.warns(UserWarning, match="more than 70%"):
        select_slow(logits, LABELS)


def test_excluded_examples_neither_count_nor_are_selected():
    logits = outputs()
    wrong = torch.zeros(40, dtype=torch.bool)
    wrong[:4] = True
    logits[:4] *= -1
    assert select_slow(logits, LABELS).mask[:4].all()
    for by in ("clusters", "quantile", "misclassified", "random", "eiil"):
        assert not select_slow(logits, LABELS, by=by, exclude=wrong).mask[:4].any()
    assert torch.equal(select_slow(logits, LABELS, exclude=wrong).mask, torch.arange(40) >= 28)


def test_what_cannot_be_used_is_named():
    logits = outputs()
    with pytest.raises(InputError, match="1 of 2 classes have no example, first class \\[1\\]"):
        select_slow(logits, torch.zeros(40).long())
    with pytest.warns(UserWarning, match="fewer than two"):
        select_slow(logits, torch.zeros(40).long(), allow_empty=True)
    broken = logits.clone()
    broken[3, 0] = float("nan")
    with pytest.raises(InputError, match="logits: 1 of 80 values are NaN"):
        select_slow(broken, LABELS)
    with pytest.raises(InputError, match="got label 4 at position 0"):
        select_slow(logits, LABELS + 4)
    with pytest.raises(InputError, match="by: got 'cluster'"):
        select_slow(logits, LABELS, by="cluster")
    with pytest.raises(InputError, match="output"):
        select_slow(logits, LABELS, output="probs")
    with pytest.raises(InputError, match="like: selects among 20"):
        select_slow(
            logits, LABELS, by="random", like=select_slow(logits[:20], LABELS[:20], by="misclassified")
        )
    with pytest.raises(InputError, match="factor"):
        select_slow(logits, LABELS).indices(0)
    with pytest.raises(InputError, match="balance"):
        select_slow(logits, LABELS).indices(2, balance="classes")


def test_the_separating_epoch_is_where_the_fall_slows_down():
    curve = [0.9, 0.88, 0.6, 0.3, 0.28, 0.27, 0.26, 0.05, 0.04]
    assert separating_epoch(curve) == 3  # falls by .3, then by .02
    assert separating_epoch(curve[4:]) == 3
    # 40 epochs: only epochs 2 to 6 (indices 1 to 5) are considered, in whatever happens later.
    later = [0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.05, 0.04, 0.03]
    assert separating_epoch(later) == 8 and separating_epoch(later, epochs=40) == 2
    assert separating_epoch([1.0, 1.0, 1.0, 1.0]) == 1
    assert window_of(200) == (4, 30)


def test_smoothing_passes_over_a_single_bad_epoch():
    curve = [0.9, 0.8, 0.76, 0.6, 0.5, 0.4, 0.3, 0.25, 0.25, 0.25, 0.25]
    assert separating_epoch(curve) in (1, 3)
    assert separating_epoch(curve, smooth=3) in (6, 7)


@pytest.mark.parametrize(
    ("errors", "options", "message"),
    [
        ([0.5, 0.4], {}, "got 2, expected at least 3"),
        ([0.5, float("nan"), 0.1], {}, "NaN"),
        ([0.5, 0.4, 0.3], {"smooth": 2}, "odd"),
        ([0.5, 0.4, 0.3, 0.2], {"epochs": 1000}, "expected at least 21"),
        ([0.5, 0.4, 0.3], {"epochs": 10, "window": (0.5, 0.1)}, "window"),
    ],
)
def test_curves_that_cannot_be_judged(errors, options, message):
    with pytest.raises(InputError, match=message):
        separating_epoch(errors, **options)


def test_the_order_of_learning_of_a_matrix_made_by_hand():
    right = torch.tensor(
        [
            [1, 0, 0, 0, 1],
            [1, 1, 0, 0, 0],
            [1, 0, 1, 0, 1],
            [1, 1, 1, 0, 0],
        ]
    ).bool()
    order = learning_order(right)
    assert order.forgetting.tolist() == [0, 1, 0, 0, 2]
    assert order.first_learned.tolist() == [1, 2, 3, 5, 1]
    assert order.learned.tolist() == [1, 4, 3, 5, 5]
    json.dumps(order.to_dict())
    order.plot()
    with pytest.raises(InputError, match="boolean"):
        learning_order(right.int())
