"""Importance, support, flow, redundancy and robustness: closed forms, definitions and limiting cases."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.measure.complexity.features import feature_function
from lineament.measure.complexity.flow import feature_cka, flow, residual_branches
from lineament.measure.complexity.groups import feature_objective
from lineament.measure.complexity.importance import importance, linear_importance
from lineament.measure.complexity.redundancy import masked_ratios, redundancy, redundancy_from_moments
from lineament.measure.complexity.removal import (
    dictionary_quality,
    keeping_top,
    removal_costs,
    support_features,
)
from lineament.measure.complexity.robustness import robustness


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gram(x):
    centred = x - x.mean(0)
    return centred @ centred.T


def unbiased(one, two):
    n = len(one)
    one, two = one - one.diag().diag(), two - two.diag().diag()
    sums = one.sum() * two.sum() / ((n - 1) * (n - 2)) - 2 * (one @ two).sum() / (n - 2)
    return ((one @ two).trace() + sums) / (n * (n - 3))


A, Z = normal(30, 5), normal(30, 4, seed=1) + normal(30, 5)[:, :4]


def test_cka_is_its_definition_by_gram_matrices():
    one = gram(A)
    for i in range(4):
        two = gram(Z[:, i : i + 1])
        usual = (one * two).sum() / (one.norm() * two.norm())
        squared = (one @ two).norm() ** 2 / ((one @ one).norm() * (two @ two).norm())
        debiased = unbiased(one, two) / (unbiased(one, one) * unbiased(two, two)).sqrt()
        for form, value in (("usual", usual), ("squared_gram", squared), ("debiased", debiased)):
            torch.testing.assert_close(feature_cka(A, Z, form=form)[i], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["usual", "squared_gram", "debiased"])
def test_cka_ignores_scale_rotation_and_shift_and_is_one_for_the_feature_itself(form):
    turn, _ = torch.linalg.qr(normal(5, 5, seed=2))
    torch.testing.assert_close(feature_cka(3 * A @ turn + 7, 2 - Z, form=form), feature_cka(A, Z, form=form))
    torch.testing.assert_close(feature_cka(Z[:, :1], Z[:, :1], form=form), torch.ones(1).double())
    assert feature_cka(A, torch.ones(30, 1).double(), form=form).isnan().all()


def test_the_debiased_form_is_about_zero_for_independent_features_and_the_usual_is_not():
    wide, z = normal(40, 200, seed=3), normal(40, 300, seed=4)
    assert (
        float(feature_cka(wide, z).mean()) > 0.1
        and abs(float(feature_cka(wide, z, form="debiased").mean())) < 0.02
    )


def test_redundancy_is_cka_of_masked_activations():
    masks = (normal(6, 5, seed=5) > 0).double()
    masks[0], masks[1] = 1.0, normal(5, seed=6).abs()  # all units, and weights other than 0 and 1
    covariance, cross = torch.cov(A.T, correction=0), (A - A.mean(0)).T @ (Z - Z.mean(0)) / 30
    expected = torch.stack([feature_cka(A * m, Z) / feature_cka(A, Z) for m in masks])
    torch.testing.assert_close(masked_ratios(covariance, cross, masks), expected, equal_nan=True)
    torch.testing.assert_close(expected[0], torch.ones(4).double())
    one_unit = masked_ratios(torch.eye(5), torch.eye(5)[:, :1], torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]]))
    assert float(one_unit) == 0


def test_masks_that_leave_nothing_are_told_and_not_counted():
    masks = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    with pytest.warns(RuntimeWarning, match="1 of 2 masks"):
        found = redundancy_from_moments(torch.eye(2), torch.ones(2, 1), masks)
    assert found.item() == pytest.approx(1, abs=1e-12)
    net, data = Head(), (normal(20, 4, dtype=torch.float32), torch.zeros(20))
    with pytest.warns(RuntimeWarning, match="masks leave no unit"):
        found = redundancy(net, data, "fc", keep=[0.05, 1.0], masks=8)
    assert found.empty > 0 and found.values.shape == (2, 6)
    torch.testing.assert_close(found.values[1], torch.ones(6).double())


def test_robustness_of_a_linear_function_is_its_noise():
    weight, inputs = normal(4, 3, seed=7), normal(40, 4, seed=8)
    noise = normal(200, 40, 4, seed=9)
    found = robustness(lambda x: x @ weight, inputs, scales=[0.0, 0.5], noise=noise)
    moved = (0.5 * noise) @ weight
    torch.testing.assert_close(found.variance[1], moved.var(0, correction=0).mean(0))
    torch.testing.assert_close(found.range[1], (moved.amax(0) - moved.amin(0)).mean(0))
    assert not found.variance[0].any() and not found.range[0].any()
    again = [robustness(lambda x: x @ weight, inputs, draws=5, seed=s).variance for s in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


CODES, ATOMS, W, B = normal(25, 6).abs(), normal(6, 5, seed=1), normal(3, 5, seed=2), normal(3, seed=3)


def test_importance_of_a_linear_head_is_its_definition():
    effects = ATOMS @ W.T
    scores = CODES @ effects + B
    chosen = scores.argmax(1)
    found = linear_importance(CODES, ATOMS, W, B)
    parts = CODES * effects[:, chosen].T
    torch.testing.assert_close(found.values, parts.abs().mean(0))
    torch.testing.assert_close(found.errors, parts.abs().std(0) / 5)
    torch.testing.assert_close(
        found.signed.sum(), (scores.gather(1, chosen[:, None])[:, 0] - B[chosen]).mean()
    )
    every = torch.stack([linear_importance(CODES, ATOMS, W, B, classes=c).values for c in range(3)])
    torch.testing.assert_close(linear_importance(CODES, ATOMS, W, B, classes="mean").values, every.mean(0))
    torch.testing.assert_close(linear_importance(CODES, ATOMS, W, B, classes=chosen).values, found.values)


def test_keeping_the_most_important_features():
    order = linear_importance(CODES, ATOMS, W, B).order
    found = keeping_top(CODES, ATOMS, W, B, order=order)
    whole = (CODES @ ATOMS @ W.T + B).argmax(1)
    for m in range(7):
        kept = CODES.clone()
        kept[:, order[m:]] = 0
        assert float(found[m]) == float(((kept @ ATOMS @ W.T + B).argmax(1) == whole).double().mean())
    assert keeping_top(CODES, ATOMS, W, B, order=order, targets=whole)[-1] == 1


class Head(nn.Module):
    """A linear head, or one with a layer between, over 6 units; also as a map of 2 x 2."""

    def __init__(self, deep=False, maps=False):
        super().__init__()
        torch.manual_seed(0)
        self.maps = maps
        self.fc, self.act = nn.Linear(4, 6 * 4 if maps else 6), nn.ReLU()
        self.mid = nn.Sequential(nn.Linear(6, 6), nn.Tanh()) if deep else nn.Identity()
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = self.act(self.fc(x).view(-1, 6, 2, 2) if self.maps else self.fc(x))
        x = x.mean((2, 3)) if self.maps else x
        return self.out(self.mid(x))


X, Y = normal(25, 4, dtype=torch.float32), torch.arange(25) % 3


def units(site, atoms=None):
    atoms = torch.eye(6) if atoms is None else atoms
    return SimpleNamespace(site=site, atoms=atoms, encode=lambda x: x @ atoms.T, decode=lambda z: z @ atoms)


def test_a_models_importance_is_the_closed_form_where_its_head_is_linear():
    net = Head()
    with torch.no_grad():
        z = net.act(net.fc(X))
    closed = linear_importance(z, torch.eye(6), net.out.weight, net.out.bias)
    for site in ("act", "out:in"):
        found = importance(net, (X, Y), units(site))
        torch.testing.assert_close(found.values, closed.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.signed, closed.signed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", ["predicted", "given", "mean", 1])
def test_a_deep_head_takes_gradients_at_the_reconstruction(classes):
    net, atoms = Head(deep=True, maps=True), torch.linalg.qr(normal(6, 6, dtype=torch.float32))[0]
    found = importance(net, (X, Y), units("act", atoms), classes=classes)
    with torch.no_grad():
        maps = net.act(net.fc(X).view(-1, 6, 2, 2))
    z = (maps.flatten(2).transpose(1, 2) @ atoms.T).requires_grad_()
    scores = net.out(net.mid((z @ atoms).mean(1)))
    chosen = {"predicted": scores.argmax(1), "given": Y, 1: torch.ones(25, dtype=torch.long)}
    parts = []
    for c in [chosen[classes]] if classes != "mean" else [torch.full((25,), c) for c in range(3)]:
        (slope,) = torch.autograd.grad(scores.gather(1, c[:, None]).sum(), z, retain_graph=True)
        parts.append((slope * z).sum(1).abs().mean(0))
    torch.testing.assert_close(
        found.values.float(), torch.stack(parts).mean(0).detach(), rtol=1e-4, atol=1e-6
    )


def test_support_and_quality_of_all_units_are_the_model_itself():
    net, data = Head(deep=True, maps=True), (X, Y)
    found = support_features(net, data, units("act"), torch.arange(6))
    assert found.kept[0] == 0 and found.kept[-1] == 6 and found.agreement[-1] == 1 and found.accuracy[-1] == 1
    assert found.agreement[0] < 1
    quality = dictionary_quality(net, data, units("act"))
    assert (
        quality.relative_error == 0
        and quality.agreement == 1
        and quality.accuracy_kept == 1
        and quality.dead == 0
    )
    half = torch.eye(6) * torch.tensor([0.0, 1, 1, 1, 1, 1])[:, None]
    quality = dictionary_quality(net, data, units("act", half))
    assert 0 < quality.relative_error < 1 and quality.dead == 1
    with pytest.raises(InputError, match="order: names 1 of 6"):
        support_features(net, data, units("act"), torch.zeros(6, dtype=torch.long))


class Block(nn.Module):
    """A residual block: ``kind`` "post" ends in a ReLU in place, "pre" in the sum, "down" has a shortcut of two layers."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if kind == "down" else None

    def forward(self, x):
        if self.kind == "pre":
            return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(4), nn.Linear(4, 4)
        self.ln_2, self.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


BRANCHES = {
    "post": (Block, ("0", "0:in", "0.bn2")),
    "down": (Block, ("0", "0.downsample", "0.bn2")),
    "pre": (Block, ("0", "0:in", "0.conv2")),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_of_convolutional_blocks_are_found_by_their_values(kind):
    torch.manual_seed(0)
    make, expected = BRANCHES[kind]
    net = nn.Sequential(make(kind), make("post"), nn.Flatten(), nn.Linear(64, 2))
    found = [(b.sum, b.residual, b.main) for b in residual_branches(net, torch.randn(3, 4, 4, 4))]
    assert found == [expected, ("1", "1:in", "1.bn2")]


def test_both_sums_of_transformer_blocks_are_found_in_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Transformer(), Transformer()))
    found = [(b.sum, b.residual, b.main) for b in residual_branches(net, torch.randn(2, 5, 4))]
    assert found == [
        ("1.0.ln_2:in", "1.0:in", "1.0.attn"),
        ("1.0", "1.0.ln_2:in", "1.0.mlp"),
        ("1.1.ln_2:in", "1.1:in", "1.1.attn"),
        ("1.1", "1.1.ln_2:in", "1.1.mlp"),
    ]
    with pytest.raises(InputError, match="no residual sum"):
        residual_branches(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))


@pytest.mark.parametrize("form", ["usual", "debiased"])
def test_flow_measures_each_branch_as_by_hand(form):
    torch.manual_seed(0)
    net = nn.Sequential(Block("post"), Block("down")).eval()
    x = torch.randn(60, 4, 3, 3)
    found = flow(net, (x, torch.zeros(60)), "1", form=form)
    with torch.no_grad():
        middle = net[0](x)
        z = net[1](middle).mean((2, 3))
        shortcut = net[1].downsample(middle).mean((2, 3))
    train = (
        torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) >= 0.2
    ).nonzero()[:, 0]
    torch.testing.assert_close(
        found.residual_cka[0], feature_cka(x.mean((2, 3))[train], z[train], form=form), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        found.residual_cka[1], feature_cka(shortcut[train], z[train], form=form), rtol=1e-3, atol=1e-4
    )
    assert found.branches[1].residual == "1.downsample" and found.errors.shape == (2, 2, 4)


def test_features_of_images_can_be_maximised():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    images = normal(2, 1, 5, 5, dtype=torch.float32).requires_grad_()
    highest = feature_function(net, "0", rows="max", gradients=True)(images)
    torch.testing.assert_close(highest, net[0](images).amax((2, 3)))
    objective = feature_objective(net, "0", 1)
    torch.testing.assert_close(objective(images), net[0](images)[:, 1].mean())
    assert torch.autograd.grad(objective(images), images)[0].any()
    with pytest.raises(InputError, match="feature: got 3"):
        feature_objective(net, "0", 3)(images)
    with pytest.raises(InputError, match="says nothing of other inputs"):
        feature_function(net, images.detach())


@pytest.mark.parametrize("site", ["act", "out:in"])
def test_removing_a_feature_costs_what_it_does_by_hand(site):
    net = Head()
    found = removal_costs(net, (X, Y), units(site), torch.tensor([4, 1]))
    with torch.no_grad():
        z = net.act(net.fc(X))
        right = (net.out(z).argmax(1) == Y).double()
        assert found.accuracy == float(right.mean())
        for at, feature in enumerate((4, 1)):
            other = z.clone()
            other[:, feature] = 0
            change = right - (net.out(other).argmax(1) == Y).double()
            assert abs(float(found.lost[at] - change.mean())) < 1e-12
            assert abs(float(found.errors[at] - change.std() / 5)) < 1e-6
    with pytest.raises(InputError, match="features: got label 6"):
        removal_costs(net, (X, Y), units(site), torch.tensor([6]))


class Turned(nn.Module):
    """A head whose answers are put into another order behind its linear layer."""

    def __init__(self):
        super().__init__()
        self.inner = Head()

    def forward(self, x):
        return self.inner(x)[:, [2, 0, 1]]


@pytest.mark.parametrize(
    "call", [removal_costs, importance, partial(support_features, order=torch.arange(6)), dictionary_quality]
)
def test_what_comes_after_the_last_linear_layer_counts(call):
    net = Turned()
    by_head = call(net, (X, Y), units("inner.out:in")).to_dict()
    whole = call(
        net, (X, Y), units("inner.act")
    ).to_dict()  # the same numbers, from a place that no layer reads alone
    for name, value in whole.items():
        if isinstance(value, list):
            torch.testing.assert_close(torch.tensor(by_head[name]), torch.tensor(value), rtol=1e-6, atol=1e-9)
        else:
            assert by_head[name] == pytest.approx(value), name
