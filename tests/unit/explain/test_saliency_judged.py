"""What maps are judged with: faithfulness, pointing, weights of layers, repeated meta steps, randomised weights."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.faithfulness.deletion import deletion_insertion, removed
from lineament.explain.saliency.aggregation import combined, smoothed
from lineament.explain.saliency.checks import class_sensitivity, randomisation, spearman
from lineament.explain.saliency.maps import combined_saliency, saliency
from lineament.explain.saliency.meta import meta_saliency, still_to_learn
from lineament.explain.saliency.pointing import PointingGame, difficult, hits
from lineament.explain.saliency.weighting import layer_weights


def linear(weights: torch.Tensor) -> nn.Module:
    """Logit 0 is the sum of the pixels times ``weights``, logit 1 is zero."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(weights.numel(), 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([weights.flatten(), torch.zeros(weights.numel())]))
    return net


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).double()  # fmt: skip


def test_curves_of_a_linear_model_are_the_sorted_sums():
    torch.manual_seed(0)
    weights = torch.rand(1, 4, 5)
    net, x = linear(weights), torch.ones(2, 1, 4, 5)
    found = deletion_insertion(
        net, x, weights.expand(2, 1, 4, 5), 0, steps=20, baseline="zero", output="logit"
    )
    falling = torch.cat([torch.zeros(1), weights.flatten().sort(descending=True).values.cumsum(0)])
    torch.testing.assert_close(found.insertion[0], falling)
    torch.testing.assert_close(found.deletion[1], weights.sum() - falling)
    torch.testing.assert_close(found.insertion_area[0], torch.trapezoid(falling, dx=1 / 20))
    assert found.gain > 0 and found.better_than_random == 1.0
    worst = deletion_insertion(
        net, x, -weights.expand(2, 1, 4, 5), 0, steps=20, baseline="zero", output="logit"
    )
    assert worst.gain < 0 and worst.better_than_random == 0.0
    json.dumps(found.to_dict(), allow_nan=False)


def test_faithfulness_does_not_depend_on_the_batch_size_and_leaves_the_model():
    net, x = small(), torch.rand(3, 1, 12, 9).double()
    net.train()
    maps = torch.rand(3, 1, 6, 5)
    with unchanged(net):
        found = deletion_insertion(net, x, maps, steps=7)
        again = deletion_insertion(net, x, maps, steps=7, batch_size=4)
    for name in ("deletion", "insertion", "random_deletion", "random_insertion"):
        torch.testing.assert_close(getattr(found, name), getattr(again, name))
    assert found.deletion.shape == (3, 8) and found.deletion.dtype == torch.float64
    torch.testing.assert_close(found.insertion[:, -1], found.deletion[:, 0])
    assert found.plot() is not None


def test_a_constant_map_is_no_better_than_chance():
    net, x = linear(torch.rand(1, 8, 8)), torch.ones(64, 1, 8, 8)
    found = deletion_insertion(net, x, torch.ones(64, 1, 8, 8), 0, steps=16, baseline="zero", output="logit")
    assert abs(found.gain) < 0.3 * float(found.insertion_area.mean())


def test_what_stands_for_removed():
    x = torch.rand(2, 3, 8, 6)
    assert bool((removed(x, "zero") == 0).all())
    torch.testing.assert_close(removed(x, "mean")[1, 2], x[1, 2].mean().expand(8, 6))
    torch.testing.assert_close(removed(x, "blur")[:, 1:2], smoothed(x[:, 1:2], 0.1))
    assert removed(x, torch.full((3, 1, 1), 0.5)).shape == x.shape


def test_bad_input_of_faithfulness_is_named():
    net, x = linear(torch.rand(1, 5, 5)), torch.rand(2, 1, 5, 5)
    for maps, options, message in [
        (torch.rand(3, 1, 5, 5), {}, "maps: .*expected"),
        (torch.full((2, 1, 5, 5), float("nan")), {}, "maps: .*NaN"),
        (torch.rand(2, 1, 5, 5), {"steps": 26}, "steps"),
        (torch.rand(2, 1, 5, 5), {"baseline": "black"}, "baseline: .*'black'"),
        (torch.rand(2, 1, 5, 5), {"baseline": torch.rand(3, 4)}, "broadcasts"),
        (torch.rand(2, 1, 5, 5), {"targets": 2}, "label 2"),
        (torch.rand(2, 1, 5, 5), {"targets": "all"}, "targets"),
    ]:
        with pytest.raises(InputError, match=message):
            deletion_insertion(net, x, maps, **options)
    one = nn.Sequential(nn.Flatten(), nn.Linear(25, 1))
    with pytest.raises(InputError, match="output='logit'"):
        deletion_insertion(one, x, torch.rand(2, 1, 5, 5))


def test_pointing_is_strict_in_rows_and_columns_and_games_add_up():
    mask = torch.zeros(6, 11, dtype=torch.bool)
    mask[1, 2] = True
    maps = torch.zeros(3, 1, 6, 11)
    maps[0, 0, 1, 5] = maps[1, 0, 4, 2] = maps[2, 0, 3, 4] = 1.0
    assert hits(maps, mask.expand(3, 6, 11), tolerance=3).tolist() == [False, False, True]
    large = torch.zeros(12, 22, dtype=torch.bool)
    large[2:4, 10:12] = True
    assert hits(maps[:1], [large], tolerance=2).tolist() == [True]
    left, right = PointingGame(3), PointingGame(3)
    left.update(maps[:2], mask.expand(2, 6, 11), torch.tensor([0, 1]), tolerance=3)
    right.update(maps[2:], [mask], torch.tensor([1]), tolerance=3)
    total = (left + right).compute()
    assert total.accuracies == [0.0, 0.5, None] and total.mean == 0.25 and total.cases == [1, 2, 0]
    assert (left + right).mean(unseen_as_zero=True) == pytest.approx(0.5 / 3)
    assert difficult(mask, True) and not difficult(mask, False) and not difficult(~mask, True)
    with pytest.raises(InputError, match="no case"):
        PointingGame(2).mean()
    with pytest.raises(InputError, match="masks: got 1"):
        hits(maps, [mask])


def test_weights_of_layers():
    net, sites = small(), ["2", "5"]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    x = torch.rand(40, 1, 12, 10, generator=generator).double() * 0.1 + labels[:, None, None, None]
    masks = torch.zeros(40, 12, 10, dtype=torch.bool)
    masks[:, :2] = True
    for by in ("uniform", "linear", "spread", "accuracy", "pointing"):
        with unchanged(net):
            found = layer_weights(net, x, labels, site=sites, by=by, masks=masks, tolerance=4)
        assert list(found) == sites and sum(found.values()) == pytest.approx(1) and min(found.values()) >= 0
    # Both layers separate bright from dark images, so that neither probe is better.
    assert layer_weights(net, x, labels, site=sites, by="accuracy") == pytest.approx({"2": 0.5, "5": 0.5})
    weights = list(layer_weights(net, x, site=sites, by="spread").values())
    maps = saliency(net, x[:2], 0, site=sites, resize=False)
    joined = combined_saliency(net, x[:2], 0, site=sites, how="sum", weights=weights)
    torch.testing.assert_close(joined, combined(list(maps.values()), (12, 10), how="sum", weights=weights))
    with pytest.raises(InputError, match="labels: by='accuracy'"):
        layer_weights(net, x, site=sites, by="accuracy")
    with pytest.raises(InputError, match="rarest class has 1"):
        layer_weights(net, x[:4], torch.tensor([0, 0, 0, 1]), site=sites, by="accuracy")


def test_a_second_meta_step_starts_from_the_first_and_negating_turns_it_round():
    net, x, eps = small(), torch.rand(2, 1, 12, 10).double(), 0.05
    with unchanged(net):
        found = meta_saliency(net, x, 3, eps=eps, order=2, site="5")
        negated = meta_saliency(net, x, 3, eps=eps, negate=True, site="5")
        once = meta_saliency(net, x, 3, eps=eps, site="5")
    for sign, steps, maps in ((1, 2, found), (-1, 1, negated), (1, 1, once)):
        other = copy.deepcopy(net).eval()
        for _ in range(steps):
            loss = F.cross_entropy(other(x[1:]), torch.tensor([3]))
            for p, g in zip(other.parameters(), torch.autograd.grad(loss, list(other.parameters()))):
                p.data -= sign * eps * g
        torch.testing.assert_close(maps[1:], saliency(other, x[1:], 3, site="5"))
    with pytest.raises(InputError, match="'all' would need"):
        meta_saliency(net, x, "all")
    with pytest.raises(InputError, match="NaN or infinities"), unchanged(net):
        meta_saliency(net, x, 3, eps=1e300, order=2, site="5")


def test_an_image_that_is_learned_changes_less():
    net, x = small().eval(), torch.rand(2, 1, 12, 10).double()
    assert (
        still_to_learn(net, x, 1, eps=1e-6, site="2").mean > still_to_learn(net, x, 1, eps=0.5, site="2").mean
    )


def test_spearman_ranks_raw_values_in_float64_and_knows_rounding_noise():
    torch.manual_seed(0)
    a, b = torch.rand(4, 1, 5, 6) * 1e-12, torch.rand(4, 1, 5, 6) * 1e-12
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b)]
    assert spearman(a, b).tolist() == pytest.approx(expected)
    constant = F.interpolate(torch.full((1, 1, 3, 5), 0.1), (48, 37), mode="bilinear") * 7.3
    noisy = constant + 1e-8 * torch.randn(constant.shape)
    assert spearman(noisy, torch.rand(1, 1, 48, 37)).isnan().all()
    tied = [torch.randint(0, 4, (5, 30)).double() for _ in range(2)]
    expected = [spearmanr(x, y).statistic for x, y in zip(*tied)]
    assert spearman(*tied).tolist() == pytest.approx(expected)
    ranked = torch.arange(30.0).reshape(1, 1, 5, 6)
    assert spearman(ranked, ranked.square()).item() == 1.0 and spearman(ranked, -ranked).item() == -1.0


def test_randomised_weights_by_layer():
    net, x = small(), torch.rand(3, 1, 12, 10).double()
    with unchanged(net):
        found = randomisation(net, x, site=":in", method="linear_approx", layers=["0", "4"])
        alone = randomisation(net, x, site=":in", method="linear_approx", layers="4", mode="independent")
        both = [
            randomisation(net, x, site=":in", method="linear_approx", mode=m)
            for m in ("cascading", "independent")
        ]
        moving = randomisation(net, x, site=":in", method="linear_approx", layers="0", retarget=True)
    assert found.layers == ["4", "0"] and alone.layers == ["4"] and found.skipped == []
    assert not torch.equal(alone.raw[0].per_image, found.raw[0].per_image)
    # The same weights are drawn in both modes: the first layer from the output is alone in both.
    torch.testing.assert_close(both[0].raw[0].per_image, both[1].raw[0].per_image)
    assert found.raw[1].mean < 0.9 and moving.layers == ["0"]
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="mode"):
        randomisation(net, x, mode="both")


def test_class_sensitivity_needs_two_classes_and_one_map():
    net, x = small(), torch.rand(3, 1, 12, 10).double()
    with pytest.raises(InputError, match="several maps"):
        class_sensitivity(net, x, site=["2", "5"])
    one = nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="one output"):
        class_sensitivity(one, x.float(), site="0")
