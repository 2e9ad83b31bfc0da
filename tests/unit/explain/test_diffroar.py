"""DiffROAR: what must be zero is zero, what must win wins, labels do not leak, and an untrained model is told."""

from __future__ import annotations

import math

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.faithfulness.input_gradients import attribution, input_gradient
from lineament.explain.faithfulness.retraining import DiffROAR, diffroar
from lineament.explain.faithfulness.unmasking import Unmasked, fill_value, groups_of, rank
from lineament.explain.saliency.maps import saliency
from lineament.train.stacked import Training


def draw(count, seed, d=8):
    """The label is in coordinates 0 and 1; the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, d, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


DATA = (*draw(600, 0), *draw(600, 1))
TRAIN = Training(lambda: nn.Linear(8, 2), epochs=12, lr=0.05, select="last")
TRUTH = torch.tensor([2.0, 2.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])


def truth(x):
    return TRUTH.expand(len(x), 8)


def one_by_one(x, y, seed):
    return TRAIN(x, y, seed)


def test_the_truth_wins_its_opposite_loses_and_the_whole_is_exactly_zero():
    found = diffroar(truth, TRAIN, DATA, fractions=(1.0, 0.25, 0.0), fill="zero")
    assert found.mean[0] == 0.0 and found.at(0.25) > 0.4 and found.mean[2] == 0.0
    # Nothing kept: both ends learn the most frequent class, or the other where both are nearly as frequent.
    assert float((found.keep_top[2] - 0.5).abs().max()) < 0.05
    opposite = diffroar(lambda x: 1 / truth(x), TRAIN, DATA, fractions=(0.25,), fill="zero")
    # What is noise is tied among itself here, so the two are mirrors at this level only by the two signal coordinates.
    assert opposite.at(0.25) < -0.4
    assert found.roar[0] == 0.0 and found.roar[1] > 0.3
    assert found.kar[1] > 0.9 and found.zero_share == (0.0, 0.0) and found.tests == 600


def test_random_orders_have_no_difference():
    found = diffroar(
        attribution(nn.Linear(8, 2), "random", seed=3), TRAIN, DATA, fractions=(0.5,), fill="zero"
    )
    assert abs(found.at(0.5)) < 2 * math.hypot(float(found.test_error[0]), float(found.std[0]))


def test_monotone_transforms_change_nothing():
    net = TRAIN(*DATA[:2], 0)
    x = DATA[0][:50]
    order = rank(input_gradient(net, x)).ranks
    for change in (lambda g: 7 * g, lambda g: g.square(), lambda g: -g, lambda g: g.abs().sqrt()):
        assert torch.equal(rank(change(input_gradient(net, x).double())).ranks, order)


def test_a_linear_model_masks_alike_within_a_predicted_class():
    torch.manual_seed(0)
    net = nn.Linear(8, 3)
    x = DATA[0][:100]
    ranks, predicted = rank(input_gradient(net, x)).ranks, net(x).argmax(1)
    for c in range(3):
        own = ranks[predicted == c]
        assert len(own) > 1 and bool((own == own[0]).all())


def test_both_ends_are_disjoint_and_share_a_permutation_also_with_ties():
    scores = torch.zeros(3, 11)
    scores[:, 4] = 1
    for ties in ("stable", "random"):
        order = rank(scores, ties=ties)
        assert order.ranks.sort(1).values.tolist() == [list(range(11))] * 3
        for kept in (0.0, 0.1, 0.3, 0.5, 1.0):
            top, bottom = (order.keeps(slice(None), kept, end) for end in ("top", "bottom"))
            assert top.sum(1).tolist() == bottom.sum(1).tolist()
            if 2 * int(top[0].sum()) <= 11:
                assert not bool((top & bottom).any())
        assert order.zero_share == pytest.approx(10 / 11)
    assert rank(scores).ranks[0].tolist() == [1, 2, 3, 4, 0, 5, 6, 7, 8, 9, 10]
    assert rank(scores, ties="random").ranks[0].tolist() != rank(scores).ranks[0].tolist()


def test_removed_counts_are_the_official_ones():
    for d in (5, 10, 192, 1568):
        order = rank(torch.rand(1, d))
        for masked in (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
            assert int(order.keeps([0], 1 - masked, "top").sum()) == d - int(round(masked * d))  # noqa: RUF046


def test_pixels_and_blocks_are_kept_whole():
    scores = torch.rand(2, 3, 4, 6)
    pixel = rank(scores, group="pixel")
    assert pixel.groups == 24
    assert torch.equal(pixel.ranks[0].long().argsort(), scores[0].sum(0).flatten().argsort(descending=True))
    kept = pixel.keeps([0, 1], 0.5, "top")
    assert kept.shape == scores.shape and bool((kept.sum(1) % 3 == 0).all()) and int(kept[0].sum()) == 36
    block = rank(scores, group=(2, 3))
    assert block.groups == 4
    assert block.keeps([0], 0.25, "top").sum() == 3 * 6
    assert groups_of((1, 5, 5), 2).max() == 8
    one_map = rank(torch.rand(2, 1, 4, 6), group="pixel", shape=(3, 4, 6))
    assert one_map.keeps([0], 0.5, "bottom").shape == (1, 3, 4, 6)
    with pytest.raises(InputError, match="group: the scores are one map for 3 channels"):
        rank(torch.rand(2, 1, 4, 6), shape=(3, 4, 6))


def test_views_make_rows_on_the_fly_and_fill_what_is_not_kept():
    x = torch.arange(8.0).reshape(2, 4)
    order = rank(torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]))
    view = Unmasked(x, order, 0.5, "top", fill_value("mean", x))
    assert view.whole().tolist() == [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    assert torch.equal(view[torch.tensor([1])], view.whole()[1:])
    assert fill_value("mean", torch.rand(5, 3, 2, 2)).shape == (3, 1, 1)
    with pytest.warns(UserWarning, match="outside the inputs' range"):
        fill_value(99.0, x)
    with pytest.raises(InputError, match=r"fill: got .*expected one that broadcasts"):
        fill_value(torch.zeros(3), x)


def test_stacked_and_one_by_one_are_the_same():
    settings = {"fractions": (1.0, 0.5), "seeds": (0, 1), "fill": "zero"}
    stacked = diffroar(truth, TRAIN, DATA, **settings)
    alone = diffroar(truth, one_by_one, DATA, **settings)
    for name in ("keep_top", "keep_bottom"):
        torch.testing.assert_close(getattr(stacked, name), getattr(alone, name), atol=0.01, rtol=0)


@pytest.mark.slow
def test_workers_give_the_same_numbers():
    settings = {"fractions": (0.5, 0.25), "seeds": (0, 1), "fill": "zero"}
    alone = diffroar(truth, one_by_one, DATA, **settings)
    shared = diffroar(truth, one_by_one, DATA, jobs=2, **settings)
    assert torch.equal(alone.keep_top, shared.keep_top)
    assert torch.equal(alone.keep_bottom, shared.keep_bottom)


def test_shuffled_labels_stay_at_chance_at_both_ends():
    generator = torch.Generator().manual_seed(5)
    x, _, x_test, _ = DATA
    y, y_test = (torch.randint(2, (600,), generator=generator) for _ in range(2))
    net = TRAIN(x, y, 0)
    found = diffroar(attribution(net), TRAIN, (x, y, x_test, y_test), fractions=(0.5, 0.25), chance_ok=True)
    bar = 0.5 + 4 * 0.5 / 600**0.5
    assert float(found.keep_top.max()) < bar and float(found.keep_bottom.max()) < bar
    with pytest.raises(InputError, match="looks untrained"):
        diffroar(attribution(net), TRAIN, (x, y, x_test, y_test), fractions=(0.5,))


def test_labels_in_the_attribution_leak_and_are_refused():
    # What the refusal protects from: on pure noise, masks that know the label tell it.
    generator = torch.Generator().manual_seed(2)
    x, x_test = torch.rand(600, 8, generator=generator) + 1, torch.rand(500, 8, generator=generator) + 1
    y, y_test = DATA[1], DATA[3][:500]

    def leaking(inputs):
        scores = torch.full((len(inputs), 8), 0.1)
        scores[torch.arange(len(inputs)), y if len(inputs) == 600 else y_test] = 1.0
        return scores

    with pytest.warns(UserWarning, match="outside the inputs' range"):
        found = diffroar(
            leaking, TRAIN, (x, y, x_test, y_test), fractions=(0.125,), fill="zero", chance_ok=True
        )
    assert found.kar[0] > 0.95
    for kind in ("logit_true", "softmax_true", "loss"):
        with pytest.raises(InputError, match="looks at the true label"):
            attribution(nn.Linear(8, 2), kind)


def test_a_train_function_that_does_not_train_is_told():
    calls = []

    def lazy(x, y, seed):
        calls.append(seed)
        return lambda z: torch.zeros(len(z), 2)

    with pytest.raises(
        InputError, match=r"trained on everything, its model is right for .* % of the test inputs.*untrained"
    ):
        diffroar(truth, lazy, DATA, fractions=(0.5,))
    assert len(calls) == 1, "the first training shows it, before any other is paid for"


def test_maps_of_saliency_and_captum_objects_are_judged():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 2, 6, 6, generator=generator) * 0.5
    y = torch.arange(300) % 2
    # Class 1 is bright in the middle, in both channels.
    x[y == 1, :, 2:4, 2:4] += 0.5
    train = Training(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)),
        epochs=10, lr=0.01, batch_size=50, select="last",
    )  # fmt: skip
    data = (x[:200], y[:200], x[200:], y[200:])
    net = train(*data[:2], 0)
    settings = {"fractions": (0.11,), "seeds": (0,), "fill": "zero"}
    with unchanged(net):
        found = diffroar(
            lambda z: saliency(net, z, site=":in", method="linear_approx"),
            train,
            data,
            group="pixel",
            **settings,
        )
    # The values at the bottom tell nothing, but the place of the mask does: only the order of the two ends is sure.
    assert found.kar[0] > 0.95 and found.at(0.11) > 0
    captum = pytest.importorskip("captum.attr")
    with unchanged(net):
        ours = diffroar(attribution(net), train, data, **settings)
        theirs = diffroar(captum.Saliency(net), train, data, **settings)
    assert torch.equal(ours.keep_top, theirs.keep_top) and torch.equal(ours.keep_bottom, theirs.keep_bottom)


def test_results_hold_numbers_and_draw():
    top, bottom = (
        torch.tensor([[0.9, 0.8], [0.5, 0.7]], dtype=torch.float64),
        torch.tensor([[0.6, 0.5], [0.5, 0.7]], dtype=torch.float64),
    )
    found = DiffROAR((0.5, 0.1), top, bottom, (0, 1), tests=100)
    assert found.mean.tolist() == pytest.approx([0.3, 0.0])
    assert found.std.tolist() == pytest.approx([math.sqrt(0.005), math.sqrt(0.02)])
    # The pairs of a seed agree exactly here, so that the interval over seeds has no width.
    assert found.interval().flatten().tolist() == pytest.approx([0.3, 0.3, 0.0, 0.0])
    assert found.to_dict()["mean"] == found.mean.tolist()
    single = DiffROAR((0.5,), top[:1, :1], bottom[:1, :1])
    assert single.interval().tolist() == [[-math.inf, math.inf]]
    assert found.plot().get_xlabel() == "coordinates kept, %"
    with pytest.raises(InputError, match=r"fraction: got 0\.2"):
        found.at(0.2)


def test_the_interval_over_seeds_is_students():
    from scipy import stats

    pairs = torch.tensor([[0.1, 0.3, 0.2, 0.6]]).double()
    found = DiffROAR((0.5,), pairs, torch.zeros_like(pairs), (0, 1, 2, 3))
    expected = stats.t.interval(0.95, 3, loc=pairs.mean().item(), scale=stats.sem(pairs[0].numpy()))
    assert found.interval()[0].tolist() == pytest.approx(list(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": (1.5,)}, r"fractions: got 1.5, expected a number in \[0, 1\]"), ({"fractions": (-0.1,)}, "fractions: got -0.1"),
        ({"fractions": ()}, "fractions: got none"), ({"fractions": (0.5, 0.5)}, "expected each once"),
        ({"fractions": 0.5}, "fractions: got 0.5, expected a list of kept shares"),
        ({"seeds": 3}, r"seeds: got 3, expected a list of seeds, such as range\(3\)"), ({"seeds": (0, 0)}, "seeds: got"),
        ({"group": "pixels"}, "group: got 'pixels'|have no pixels"), ({"group": "pixel"}, "have no pixels"), ({"fill": "median"}, "fill: got 'median'"),
        ({"ties": "first"}, "ties: got 'first'"), ({"jobs": 0}, "jobs: got 0"),
        ({"train_fn": lambda x, y: None}, r"train_fn\(inputs, targets, seed\) and takes \(x, y\)"),
        ({"train_fn": lambda x, y, seed: None}, "train_fn: it returned None"),
        ({"attribute_fn": lambda x: torch.ones(len(x), 3)}, r"scores: .*expected \(batch, 8\)"),
        ({"attribute_fn": lambda x: torch.ones(2, 8)}, "attribute_fn: it returned"), ({"attribute_fn": lambda x: None}, "attribute_fn: it returned None"),
        ({"attribute_fn": lambda x: torch.full((len(x), 8), math.nan)}, "scores: .*NaN"), ({"attribute_fn": 3}, "attribute_fn: got 3"),
        ({"data": DATA[:3]}, "data: got 3 parts, expected four"), ({"data": (DATA[0], DATA[1], DATA[2][:, :4], DATA[3])}, "expected the same"),
        ({"data": (DATA[0], DATA[1][:5], DATA[2], DATA[3])}, "training targets"),
        ({"data": (*DATA[:3], DATA[3] + 1)}, "test targets: got label 2 at position .*expected labels from 0 to 1"),
        ({"data": (DATA[0], DATA[1] + 1, DATA[2], DATA[3] + 1)}, "targets: got label 2 at position"),
        ({"data": (DATA[0], DATA[1] * 0, DATA[2], DATA[3] * 0)}, "all training targets are class 0"), ({"data": (DATA[0] * math.nan, *DATA[1:])}, "NaN"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(change, message):
    call = {"attribute_fn": truth, "train_fn": one_by_one, "data": DATA, "fractions": (0.5,), "seeds": (0,)}
    with pytest.raises(InputError, match=message):
        diffroar(**{**call, **change})
