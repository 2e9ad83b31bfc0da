"""Infidelity and sensitivity: closed forms, Captum's numbers on the same draws, and the table beside a random map."""

from __future__ import annotations

import math

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.faithfulness.input_gradients import input_gradient
from lineament.explain.faithfulness.pixel_scores import infidelity, score_maps, sensitivity
from lineament.explain.faithfulness.retraining import DiffROAR


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 6, 3)).double()


def curved():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()


X = torch.rand(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_gradient_of_a_linear_model_tells_all():
    net = linear()
    gradient = input_gradient(net, X, kind="logit_predicted")
    found = infidelity(net, X, gradient, perturb="noise")
    assert float(found.value.max()) < 1e-20 and float(found.relative.max()) < 1e-12
    told = infidelity(net, X, gradient * X, perturb="removal", baseline="zero", scale=0.5)
    assert float(told.value.max()) < 1e-20
    # One map for both channels tells the sum over the removed pixels as well.
    assert float(infidelity(net, X, (gradient * X).sum(1, keepdim=True), baseline="zero").value.max()) < 1e-20


def test_scale_matters_to_the_value_and_not_to_the_relative_form():
    net = curved()
    gradient = input_gradient(net, X)
    one, ten = (infidelity(net, X, s * gradient, perturb="noise") for s in (1, 10))
    assert bool((ten.value > 5 * one.value).all())
    torch.testing.assert_close(one.relative, ten.relative)
    best = infidelity(net, X, 10 * gradient, perturb="noise", normalise=True)
    assert bool((best.value <= one.value + 1e-15).all())


def test_a_map_of_nothing_tells_nothing():
    found = infidelity(curved(), X, torch.zeros(3, 1, 6, 6).double())
    assert torch.equal(found.relative, torch.ones(3).double())
    constant = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double()
    constant[1].weight.data.zero_()
    assert bool(infidelity(constant, X, torch.ones(3, 1, 6, 6).double()).relative.isnan().all())


def test_infidelity_is_captums_on_the_same_noise():
    captum = pytest.importorskip("captum.metrics")
    net = curved()
    gradient = input_gradient(net, X)
    target = net(X).argmax(1)
    for normalise in (False, True):
        ours = infidelity(
            net, X, gradient, samples=40, scale=0.1, perturb="noise", seed=3, normalise=normalise
        )
        generator = torch.Generator().manual_seed(3)
        drawn = iter([0.1 * torch.randn(X.shape, generator=generator) for _ in range(40)])

        def noise(x, drawn=drawn):
            change = next(drawn).double()
            return change, x - change

        theirs = captum.infidelity(
            net,
            noise,
            X,
            gradient,
            target=target,
            n_perturb_samples=40,
            max_examples_per_batch=3,
            normalize=normalise,
        )
        torch.testing.assert_close(ours.value, theirs, rtol=1e-5, atol=1e-9)


def test_sensitivity_is_captums_on_the_same_draws():
    captum = pytest.importorskip("captum.metrics")
    net = curved()
    ours = sensitivity(
        lambda x: input_gradient(net, x, [0, 1, 2], kind="logit_true"), X, radius=0.05, samples=12, seed=4
    )
    generator = torch.Generator().manual_seed(4)
    drawn = [
        0.05 * (2 * torch.rand(X.shape, generator=generator, dtype=torch.float64) - 1) for _ in range(12)
    ]

    def perturb(x):
        # Captum asks for one image after the other, each with all its draws.
        return (torch.cat([X[i : i + 1] + d[i : i + 1] for i in range(3) for d in drawn]),)

    def explain(x):
        x = x[0] if isinstance(x, tuple) else x
        target = torch.arange(3).repeat_interleave(len(x) // 3)
        return (input_gradient(net, x, target, kind="logit_true"),)

    theirs = captum.sensitivity_max(
        explain, (X,), perturb_func=perturb, n_perturb_samples=12, max_examples_per_batch=36
    )
    torch.testing.assert_close(ours.largest, theirs.double(), rtol=1e-5, atol=1e-7)
    assert bool((ours.mean <= ours.largest).all())


def test_sensitivity_of_maps_that_ignore_or_copy_the_input():
    assert float(sensitivity(lambda x: torch.ones_like(x), X).largest.max()) == 0
    assert bool(sensitivity(lambda x: torch.zeros_like(x), X).largest.isnan().all())
    found = sensitivity(lambda x: x, torch.ones(2, 1, 5, 5), radius=0.1)
    assert 0 < float(found.largest.max()) <= 0.1 + 1e-6
    assert found.plot().get_ylabel() == "images"


@pytest.fixture(scope="module")
def table():
    net = linear()

    def truth(x):
        return (input_gradient(net, x, [0, 1, 2], kind="logit_true") * x).sum(1, keepdim=True)

    retrained = {
        "truth": DiffROAR((1.0, 0.1), torch.tensor([[0.9], [0.8]]), torch.tensor([[0.9], [0.3]])),
    }
    with unchanged(net):
        found = score_maps(
            net, X, {"truth": truth, "given": truth(X)}, torch.tensor([0, 1, 2]), baseline="zero", retrained=retrained
        )  # fmt: skip
    return found


def test_the_table_has_every_method_and_a_random_map(table):
    names, lines = table.table()
    assert [line[0] for line in lines] == ["truth", "given", "random"]
    assert (
        names[-1] == "DiffROAR at 10 % kept" and lines[0][-1] == pytest.approx(0.5) and lines[1][-1] is None
    )
    rows = {line[0]: dict(zip(names[1:], line[1:])) for line in lines}
    assert rows["truth"]["relative infidelity"] < 1e-12
    assert rows["random"]["relative infidelity"] > 0.2
    assert rows["given"]["largest change of the map"] is None, "a map alone cannot be asked again"
    assert rows["random"]["largest change of the map"] > rows["truth"]["largest change of the map"]
    assert table.to_dict()["scores"]["truth"]["gain"] > table.to_dict()["scores"]["random"]["gain"]
    assert table.plot() is not None


def test_the_same_call_gives_the_same_table(table):
    net = linear()
    maps = {"gradient": input_gradient(net, X)}
    assert score_maps(net, X, maps).table() == score_maps(net, X, maps).table()


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.rand(3, 1, 5, 5), "maps: got"),
        (torch.rand(3, 3, 6, 6), "maps: got .*one map or 2 channels"),
        (torch.rand(2, 1, 6, 6), "maps: got"),
        (torch.full((3, 1, 6, 6), math.nan), "NaN"),
    ],
)
def test_bad_maps_are_named(maps, message):
    with pytest.raises(InputError, match=message):
        infidelity(linear(), X, maps)


def test_bad_settings_are_named():
    net, maps = linear(), torch.rand(3, 1, 6, 6)
    for change, message in [
        ({"perturb": "blur"}, "perturb: got 'blur'"),
        ({"samples": 0}, "samples: got 0"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"baseline": "black"}, "baseline: got 'black'"),
        ({"targets": 9}, "targets: got label 9"),
    ]:
        with pytest.raises(InputError, match=message):
            infidelity(net, X, maps, **change)
    with pytest.raises(InputError, match="'random' is the row that is added"):
        score_maps(net, X, {"random": maps})
    with pytest.raises(InputError, match="explain: it returned"):
        sensitivity(lambda x: x[:1], X)
    with pytest.raises(InputError, match="methods: got none"):
        score_maps(net, X, {})
