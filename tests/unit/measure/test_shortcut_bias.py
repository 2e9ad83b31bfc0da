"""Reliance and shortcut bias: closed forms, symmetries and limiting cases of the two latents, and of users' attributes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lineament.core.checks import InputError
from lineament.data.footprint import footprint
from lineament.data.samples import Samples
from lineament.data.two_latents import TwoLatents, VectorEmbedding, two_latents
from lineament.measure.shortcuts.latents import latent_bias
from lineament.measure.shortcuts.ntk import (
    KERNELS,
    availability_sign,
    empirical_ntk,
    kernel_ridge,
    relu_nngp,
    relu_ntk,
    relu_ntk_profile,
)
from lineament.measure.shortcuts.reliance import decisions, linear_reliance, reliance
from lineament.measure.shortcuts.votes import bias_of_answers, shortcut_bias


def plain(rho=(0.85, 0.9), sigma=0.6):
    return TwoLatents(lambda z: z, rho, sigma)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rho", [(0.6, 0.9), (0.85, 0.9), (0.9, 0.95)])
def test_predictivity_and_the_best_rules_accuracy_are_what_many_samples_show(rho):
    world = plain(rho)
    samples = world.draw(200_000, seed=1)
    y, z = 2 * samples.targets - 1, samples.extras["latents"]
    right = (z.sign() == y[:, None]).double().mean(0)
    assert (right - torch.tensor(rho)).abs().max() < 0.003
    best = (decisions(z @ world.optimal_weights) == y).double().mean()
    assert abs(float(best) - world.optimal_accuracy) < 0.003
    assert abs(float(torch.corrcoef((z - y[:, None] * world.means).T)[0, 1]) - 0.6) < 0.01


def test_stratified_samples_have_each_predictivity_to_one_sample_and_keep_the_correlation():
    world = plain((0.85, 0.9))
    samples = world.draw(1000, stratified=True)
    y, z = 2 * samples.targets - 1, samples.extras["latents"]
    right = (z.sign() == y[:, None]).double().mean(0)
    assert (right - torch.tensor([0.85, 0.9])).abs().max() <= 2 / 1000
    assert abs(float(torch.corrcoef((z - y[:, None] * world.means).T)[0, 1]) - 0.6) < 0.05


def test_reliance_of_rules_of_one_latent_and_of_none():
    grid = plain().grid(10)
    one, other, none = (reliance(scores, grid) for scores in (grid[:, 0], grid[:, 1], torch.ones(100)))
    assert (one.value, one.with_shortcut, one.with_core) == (1.0, 1.0, 0.0)
    assert (other.value, other.with_shortcut, other.with_core) == (-1.0, 0.0, 1.0)
    assert (none.value, none.with_shortcut, none.with_core) == (0.0, 0.0, 0.0)


def test_both_terms_tell_disuse_from_reversed_use():
    """A shortcut of weight 0 and one of weight -0.81 have the reliance -1 both."""
    grid = plain((0.55, 0.9)).grid(30)
    unused = reliance(grid[:, 1], grid)
    reverse = reliance(grid @ torch.tensor([-2.0, 0.3], dtype=torch.float64), grid)
    assert unused.reversed == () and reverse.reversed == ("shortcut",)
    assert reverse.absolute > reverse.value and unused.absolute == unused.value


@given(st.floats(-2, 2), st.floats(0.05, 2))
@settings(max_examples=10, deadline=None)
def test_the_closed_form_is_the_limit_of_fine_grids(a, b):
    world, w = plain(), torch.tensor([a, b], dtype=torch.float64)
    grid = world.grid(200)
    assert abs(reliance(grid @ w, grid).value - linear_reliance(w, world.means)) < 0.03


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_symmetries(seed):
    """ŷ -> -ŷ with z -> -z changes nothing; exchanging the roles negates; logits of two classes are their difference."""
    z, scores = randn(60, 2, seed=seed), randn(60, seed=seed + 1)
    value = reliance(scores, z).value
    assert reliance(-scores, -z).value == value
    assert reliance(scores, z.flip(1)).value == pytest.approx(-value, abs=1e-15)
    assert reliance(torch.stack([-scores, scores], 1), z).value == value
    assert reliance(scores, z, weights=torch.full((60,), 3.0)).value == pytest.approx(value, abs=1e-12)


def test_least_squares_does_not_depend_on_the_amplification():
    found = []
    for ratio in (1.0, 8.0, 64.0):
        world = two_latents(amplification=(0.1 * ratio, 0.1), dims=6)
        train = world.draw(400, dtype=torch.float64)
        w = torch.linalg.lstsq(
            train.inputs, (2.0 * train.targets[:, None] - 1).double(), driver="gelsd"
        ).solution
        net = nn.Linear(6, 1, bias=False).double()
        net.weight.data = w.T
        found.append(latent_bias(net, world).bias)
    assert len(set(found)) == 1


def test_one_setting_changes_alone():
    """Amplification and predictivity leave directions and noise as they were; the shortcut's matrices do not depend on the core's."""
    base, louder = two_latents(dims=5), two_latents(dims=5, amplification=(6.4, 0.1))
    assert torch.equal(base.embed.directions, louder.embed.directions)
    assert torch.equal(base.draw(10).extras["latents"], louder.draw(10).extras["latents"])
    one, two = (two_latents(dims=5, nesting=(1, k)).embed.nesting for k in (0, 2))
    assert torch.equal(one[0][0], two[0][0]) and len(two[1]) == 2
    z = randn(4, 2)
    zero = VectorEmbedding(base.embed.directions, (0.1, 0.1), ((), ()))
    assert torch.equal(zero(z), base.embed(z))
    right = VectorEmbedding(base.embed.directions, (1, 1), orthogonal=True).directions
    assert (right @ right.T - torch.eye(2)).abs().max() < 1e-12


def test_the_ntk_is_what_wide_networks_have():
    x = randn(5, 3)
    K, width = relu_ntk(x, x), 200_000
    w = randn(width, 3, seed=2)
    h, on = (x @ w.T).relu(), (x @ w.T > 0).double()
    assert ((h @ h.T * 2 / width - relu_nngp(x, x)).abs() / K.max()).max() < 0.02
    assert (2 * (h @ h.T + x @ x.T * (on @ on.T)) / width - K).abs().max() / K.max() < 0.02
    assert torch.allclose(
        relu_ntk_profile(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([0.0, 1 / math.pi, 2.0])
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_positive_and_of_degree_two(kernel):
    x = torch.cat([randn(12, 4), torch.zeros(1, 4, dtype=torch.float64)])
    K = KERNELS[kernel](x, x)
    assert torch.linalg.eigvalsh(K).min() > -1e-6 and not K[-1].any()
    assert torch.allclose(KERNELS[kernel](3 * x, x / 2), 1.5 * K)
    f = kernel_ridge(x[:6], x[:6, 0], kernel, ridge=0.1)
    A = KERNELS[kernel](x[:6], x[:6])
    A = A + 0.1 * A.trace() / 6 * torch.eye(6)
    assert torch.allclose(f(x), K[:, :6] @ torch.linalg.solve(A, x[:6, 0]))


@pytest.mark.parametrize("memory", [2**26, 40])
def test_the_empirical_ntk_is_the_product_of_jacobians(memory):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = randn(5, 3)
    rows = []
    for row in x:
        net.zero_grad()
        net(row[None])[0, 1].backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    net.zero_grad()
    J = torch.stack(rows)
    assert torch.allclose(empirical_ntk(net, x, output=1, memory=memory), J @ J.T)
    assert torch.allclose(empirical_ntk(net, x[:2], x[2:], output=1, memory=memory), (J @ J.T)[:2, 2:])


def test_the_more_available_of_two_alike_is_preferred_whichever_is_named_first():
    assert availability_sign((2, 1), (1, 1)) == 1 and availability_sign((1, 2), (1, 1)) == -1
    assert availability_sign((1, 1), (3, 1)) == 0 and availability_sign((2, 1), (0.1, 1)) == -1


def test_a_fitted_best_rule_agrees_with_the_closed_one_and_a_density_counts_cells():
    world = two_latents(dims=4, amplification=(0.5, 0.1))
    net = nn.Linear(4, 2)
    closed = latent_bias(net, world)
    fitted = shortcut_bias(net, world, reference=world.draw(50_000))
    assert abs(closed.best.value - fitted.best.value) < 0.02 and "50000" in fitted.rule
    weighed = latent_bias(net, world, density="gaussian")
    assert weighed.best.value != closed.best.value and -1 <= weighed.best.value <= 1


def test_footprints_do_not_overlap_and_have_one_grey_map():
    world = footprint(2.0, size=20, base=4)
    z = randn(50, 2)
    disc, square = world.embed.masks(z)
    assert not (disc * square).any() and (square.sum((1, 2)) == 16).all()
    assert (disc.sum((1, 2)) == disc[0].sum()).all() and abs(float(disc[0].sum()) - math.pi * 16) < 8
    images = world.embed(z)
    for mask, latent in ((disc, z[:, 0]), (square, z[:, 1])):
        seen = (images * mask[:, None]).sum((2, 3)) / mask.sum((1, 2))[:, None]
        assert torch.allclose(
            seen, ((latent + 4.5) / 9).clamp(0, 1)[:, None].float().expand(-1, 3), atol=1e-5
        )
    assert torch.equal(world.embed(z), images)


BAD = [
    (lambda: two_latents(predictivity=(0.5, 0.9)), r"predictivity: got 0\.5"),
    (lambda: two_latents(predictivity=(0.9,)), "predictivity: got .*two values"),
    (lambda: two_latents(correlation=1.0), r"correlation: got 1\.0"),
    (lambda: two_latents(amplification=(0.0, 1.0)), r"amplification: got 0\.0"),
    (lambda: two_latents().grid(1), "points: got 1"),
    (lambda: two_latents().draw(3), "samples: got 3, expected an even number"),
    (lambda: footprint(6.0), "factor: got 6"),
    (lambda: reliance(torch.ones(3), torch.ones(4, 2)), "scores: got 3 for 4 latents"),
    (lambda: decisions(torch.ones(3, 5)), "scores: .*two logits"),
    (lambda: kernel_ridge(torch.ones(2, 2), torch.ones(2), "ntk"), "kernel: got 'ntk'"),
    (lambda: kernel_ridge(torch.ones(2, 2), torch.ones(2), ridge=0), "ridge: got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input_is_named(call, says):
    with pytest.raises(InputError, match=says):
        call()


# Users' attributes.

Y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1] * 10)
CORE = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1] * 10)
EASY = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1] * 10)
# A training table in which both predict the label, the core attribute better.
TABLE_Y = torch.tensor([0, 1]).repeat_interleave(100)
TABLE = {
    "core": torch.cat([(torch.arange(100) < 10).long(), (torch.arange(100) >= 10).long()]),
    "easy": torch.cat([(torch.arange(100) % 5 == 4).long(), (torch.arange(100) % 5 != 4).long()]),
}


@given(st.lists(st.integers(0, 1), min_size=80, max_size=80))
@settings(max_examples=10, deadline=None)
def test_for_two_binary_attributes_it_is_the_papers_mean_over_four_groups(answers):
    said = torch.tensor(answers)
    data = Samples(torch.zeros(80, 1), Y)
    found = bias_of_answers(said, data, groups={"easy": EASY, "core": CORE}, reference=(TABLE_Y, TABLE))
    signs, a_n, a_c = (2 * v.double() - 1 for v in (said, EASY, CORE))
    groups = [(n == EASY) & (c == CORE) for n in (0, 1) for c in (0, 1)]
    paper = sum(float((signs[g] * (a_n[g] - a_c[g])).mean()) for g in groups) / 4
    pair = found["easy", "core"]
    assert pair.reliance[0] == pytest.approx(paper, abs=1e-12)
    assert pair.reliance[1] <= pair.reliance[0] <= pair.reliance[2]
    assert pair.best == -1.0 and pair.bias == pytest.approx(paper + 1, abs=1e-12)


def test_answers_with_one_attribute_against_each_other_and_the_label():
    data = Samples(torch.zeros(80, 1), Y)
    found = bias_of_answers(EASY, data, groups={"easy": EASY, "core": CORE}, reference=(TABLE_Y, TABLE))
    assert found["easy", "core"].reliance[0] == 1.0 and found["easy"].reliance[0] == 1.0
    assert found["core"].reliance[0] == 0.0 and found.worst.accuracy[0] == 0.0
    low, value = found["easy"].reliance[1], found["easy"].reliance[0]
    assert 0.8 < low < value, "an interval has a width where all agree"
    assert {c.samples for c in found.cells} == {10} and found.accuracy[0] == 0.5
    predictive = {a.name: round(a.predictivity[0], 2) for a in found.attributes}
    assert predictive == {"easy": 0.8, "core": 0.9}


def test_words_and_several_classes_and_the_samples_own_groups():
    y = torch.arange(3).repeat(40)
    colours = ["red", "green", "blue"]
    wall = torch.arange(3).repeat_interleave(40)
    data = Samples(torch.zeros(120, 1), y, groups=wall, group_names=tuple(colours))
    table = Samples(
        torch.zeros(30, 1),
        torch.arange(3).repeat(10),
        groups=torch.arange(3).repeat(10),
        group_names=tuple(colours),
    )
    found = bias_of_answers(wall, data, reference=table)["group"]
    assert (found.reliance[0], found.cells, found.samples, found.missing) == (1.0, 6, 78, 0)
    named = bias_of_answers(
        wall,
        data,
        groups={"wall": [colours[k] for k in wall]},
        reference=(y, {"wall": [colours[k] for k in y]}),
    )
    assert named["wall"].reliance == found.reliance


def test_cells_count_alike_however_many_samples_they_have():
    y = torch.cat([torch.zeros(90), torch.ones(10)]).long()
    wall = 1 - y
    said = torch.cat(
        [torch.ones(90), torch.ones(10)]
    ).long()  # follows the wall in the large cell, the label in the small one
    data = Samples(torch.zeros(100, 1), y)
    found = bias_of_answers(
        said, data, groups={"wall": wall}, reference=(torch.tensor([0, 1]), {"wall": [0, 1]})
    )
    assert found["wall"].reliance[0] == 0.0 and (found["wall"].with_attribute, found["wall"].with_other) == (
        0.5,
        0.5,
    )


def test_without_a_training_table_it_says_so_and_what_never_disagrees_is_told():
    data = Samples(torch.zeros(80, 1), Y)
    found = bias_of_answers(Y, data, groups={"copy": Y})
    assert math.isnan(found["copy"].reliance[0]) and found["copy"].samples == 0
    assert any("audited samples themselves" in note for note in found.notes)
    assert any("never disagree" in note for note in found.notes)
    idle = bias_of_answers(Y, data, groups={"easy": EASY})
    assert any("says no more of the class" in note for note in idle.notes)


def test_a_network_is_called_on_any_form_of_data_and_left_as_it_was():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    x = torch.stack([EASY, CORE], 1).float()
    net[0].weight.data, net[0].bias.data = torch.tensor([[0.0, -1.0], [0.0, 1.0]]), torch.tensor([0.5, -0.5])
    groups = {"easy": EASY.numpy()}
    once = shortcut_bias(net, (x, CORE), groups=groups, reference=(TABLE_Y, TABLE))
    again = shortcut_bias(
        net, torch.utils.data.TensorDataset(x, CORE), groups=groups, reference=(TABLE_Y, TABLE), batch_size=7
    )
    assert once.accuracy[0] == 1.0 and once["easy"].reliance == again["easy"].reliance and net[1].training


WRONG = [
    ({"groups": {"easy": EASY[:5]}}, "'easy' has the shape"),
    ({"groups": {"easy": torch.zeros(80)}}, "'easy' has one value"),
    ({"groups": {"easy": torch.full((80,), math.nan)}}, "NaN or infinite"),
    ({"groups": {"label": EASY}}, "give the attribute another name"),
    ({"groups": None}, "the samples have no groups of their own"),
    ({"groups": ["easy"]}, "groups: got 'easy'"),
    ({"groups": {"easy": EASY}, "reference": (TABLE_Y, {"hue": EASY})}, "has the shape"),
    ({"groups": {"easy": EASY}, "reference": (Y, {"hue": EASY})}, "reference: it has no group 'easy'"),
    ({"groups": {"easy": EASY}, "reference": (Y, {"easy": EASY + 1})}, "no sample has easy = 0"),
    ({"groups": {"easy": EASY}, "reference": 3}, "reference: got 3"),
]


@pytest.mark.parametrize(("options", "says"), WRONG, ids=[says for _, says in WRONG])
def test_wrong_groups_are_named(options, says):
    with pytest.raises(InputError, match=says):
        bias_of_answers(Y, Samples(torch.zeros(80, 1), Y), **options)


def test_one_class_and_too_many_values_are_refused():
    with pytest.raises(InputError, match="all 80 are of class 1"):
        bias_of_answers(Y, Samples(torch.zeros(80, 1), torch.ones(80).long()), groups={"easy": EASY})
    y = torch.arange(2).repeat(150)
    with pytest.raises(InputError, match=r"300 different values.*bin it"):
        bias_of_answers(y, Samples(torch.zeros(300, 1), y), groups={"real": torch.arange(300) / 7})
