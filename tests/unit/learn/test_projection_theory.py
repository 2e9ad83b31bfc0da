"""The closed forms of arXiv 2403.11391 against descent, grids and each other, and heads against what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.learn import (
    DiagonalNetwork,
    Reweighting,
    SymmetricReLU,
    balanced_descent,
    decay_threshold,
    decayed_weights,
    feature_weights,
    features_by_layer,
    head_criterion,
    layer_gram,
    projection_head,
    relative_complexity,
)
from lineament.learn.projection.theory import invariance, lowest_loss, minimiser, spectral_loss


def moments(features: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """M of full rank, and M' between 0.3 and 0.9 of it in every direction."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(features, features, generator=generator, dtype=torch.float64)
    root = 0.3 * root @ root.T / features + 0.7 * torch.eye(features, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]
    return root @ root, root @ (turn * torch.linspace(0.3, 0.9, features).double()) @ turn.T @ root


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_descent_from_a_balanced_start_ends_at_the_minimiser_and_each_layer_at_its_power(depth):
    moment, across = moments()
    found = balanced_descent(moment, across, depth, steps=2500 if depth > 2 else 6000, flow=depth > 2)
    best = minimiser(moment, across)
    assert found.slope < 1e-6 and found.imbalance < 1e-2
    assert torch.allclose(found.gram(), best, rtol=1e-4, atol=1e-4)
    for layer in range(1, depth):
        goal = layer_gram(best, layer, depth)
        assert float((found.gram(layer) - goal).norm() / goal.norm()) < 3e-3
    loss = spectral_loss(found.product(), moment, across)
    assert float(loss) == pytest.approx(float(lowest_loss(moment, across)), rel=1e-6)


def test_a_narrow_network_keeps_the_directions_that_survive_views():
    moment, across = moments()
    found = balanced_descent(moment, across, 2, steps=6000, width=2)
    assert found.layers[0].shape == (2, 4)
    assert torch.allclose(found.gram(), minimiser(moment, across, 2), rtol=1e-3, atol=1e-3)


def test_flow_keeps_three_layers_balanced_where_descent_drifts():
    moment, across = moments()
    descent, flow = (balanced_descent(moment, across, 3, steps=2500, flow=each) for each in (False, True))
    assert flow.imbalance < descent.imbalance / 10


def test_finer_steps_keep_the_layers_more_balanced():
    moment, across = moments()
    coarse, fine = (balanced_descent(moment, across, steps=n, rate=50 / n) for n in (500, 5000))
    assert fine.imbalance < coarse.imbalance / 5


def test_descent_with_weight_decay_ends_at_the_decayed_weights():
    moment, across = torch.tensor([1.0, 0.5, 1.5]).double(), torch.tensor([0.8, 0.05, 0.9]).double()
    decay = 0.05
    found = balanced_descent(torch.diag(moment), torch.diag(across), steps=4000, decay=decay)
    goal = decayed_weights(moment, across, decay)
    assert goal[1] == 0 and decay > decay_threshold(moment, across)[1] and (goal[[0, 2]] > 0.5).all()
    assert torch.allclose(found.gram(1), torch.diag(goal), atol=1e-6)
    assert torch.allclose(found.weights(2), goal, atol=1e-6)


def test_a_feature_is_cut_exactly_from_the_threshold_on():
    moment, across = torch.tensor([0.7, 2.0]).double(), torch.tensor([0.5, 0.1]).double()
    for each, limit in enumerate(decay_threshold(moment, across).tolist()):
        below, above = (decayed_weights(moment, across, limit * f)[each] for f in (1 - 1e-6, 1 + 1e-6))
        assert above == 0 and below > 0
        m, t = moment[each], across[each]
        assert float(2 * m**2 * below**3 - 2 * t * below + limit * (1 - 1e-6)) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(decayed_weights(moment, across, 0.0), across.sqrt() / moment)


def test_weights_peak_where_strength_is_noise_and_vanish_at_a_fair_flip():
    phi = torch.linspace(0.05, 3, 60).double()
    found = feature_weights(phi, torch.full_like(phi, 0.1), torch.full_like(phi, 0.75))
    assert float(phi[found.after.argmax()]) == pytest.approx(0.75, abs=0.03)
    assert torch.allclose(found.before.square(), found.after)
    one = torch.ones(1).double()
    assert feature_weights(one, one / 2, one).after == 0
    assert float(feature_weights(one, 0.9 * one, one).after) == pytest.approx(0.4)  # |1 - 2 alpha|
    assert float(feature_weights(one, 0.9 * one, one, disruption="copy").after) == pytest.approx(0.05)


@pytest.mark.parametrize("disruption", ["flip", "copy"])
def test_moments_are_those_of_drawn_views(disruption):
    generator = torch.Generator().manual_seed(0)
    n, alpha = 200_000, 0.3

    def sign() -> torch.Tensor:
        return torch.randint(2, (n,), generator=generator) * 2.0 - 1

    u = sign()

    def view() -> torch.Tensor:
        hit = torch.rand(n, generator=generator) < alpha
        other = -u if disruption == "flip" else sign()
        return torch.where(hit, other, u) + 0.5 * torch.randn(n, generator=generator)

    a, b = view(), view()
    found = feature_weights(*(torch.tensor([v]) for v in (1.0, alpha, 0.5)), disruption=disruption)
    assert float((a * a).mean()) == pytest.approx(float(found.moment), abs=0.01)
    assert float((a * b).mean()) == pytest.approx(float(found.across), abs=0.01)


def test_without_views_the_minimiser_whitens_and_scaling_divides_it():
    moment, across = moments()
    assert torch.allclose(minimiser(moment, moment), torch.linalg.inv(moment))
    assert torch.allclose(invariance(moment, moment), torch.ones(4).double())
    assert torch.allclose(minimiser(9 * moment, 9 * across), minimiser(moment, across) / 9)


def test_the_criterion_prefers_the_side_before_the_head_for_disrupted_weak_and_strong_features():
    phi = torch.tensor([1.0, 1.0, 0.05, 20.0, 1.0])
    alpha = torch.tensor([0.0, 0.4, 0.0, 0.0, 0.1])
    found = feature_weights(phi, alpha, torch.ones(5))
    better = [head_criterion(found, torch.ones(5), j).better for j in range(5)]
    assert better == ["after", "before", "before", "before", "after"]
    assert relative_complexity(torch.ones(5), torch.ones(5), 2) == 5
    with pytest.raises(InputError, match="relevant"):
        head_criterion(found, torch.ones(5), 5)


def test_a_diagonal_network_deletes_in_the_upper_layer_what_the_lower_one_keeps():
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(2, (400, 3), generator=generator) * 2.0 - 1
    x = features * torch.tensor([1.0, 0.8, 0.25])
    net = DiagonalNetwork(3, bias=0.1, start=0.8)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(150):
        z = net(x)
        loss = -2 * z.square().sum(1).mean() + (z.T @ z / len(z)).square().sum()  # spectral, two equal views
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = features_by_layer(net, x, features, tolerance=0.2)
    assert found.sites == ("0", "1") and found.present.tolist() == [[True] * 3, [True, True, False]]
    weight = net[1][0].weight.tolist()
    assert weight[0] > 0.9 and weight[2] == pytest.approx(0.8), "a dead feature gets no gradient"
    # Without a threshold nothing is deleted.
    assert features_by_layer(DiagonalNetwork(3, start=0.8), x, features, tolerance=0.2).present.all()


def test_symmetric_relu_and_heads_at_their_limits():
    x = torch.linspace(-2, 2, 41, requires_grad=True)
    relu = SymmetricReLU(0.5)
    assert torch.equal(relu(-x), -relu(x)) and (relu(x)[x.abs() <= 0.5] == 0).all()
    slope = torch.autograd.grad(relu(x).sum(), x)[0]
    assert (slope[x.abs() > 0.51] == 1).all() and torch.equal(SymmetricReLU(0.0)(x), x)
    z = torch.randn(5, 6)
    for kind in ("identity", "diagonal", "none"):
        assert torch.equal(projection_head(kind, 6)(z), z)
    fixed = Reweighting(6, 1.5)(z)
    assert torch.allclose(fixed[:, :-1] / fixed[:, 1:], 1.5 * z[:, :-1] / z[:, 1:])
    assert not list(Reweighting(6, 1.5).parameters())
    with pytest.warns(UserWarning, match="identity"):
        assert torch.equal(Reweighting(6, 1.0)(z), z)


@pytest.mark.parametrize(
    ("kappa", "small", "denormal", "zero"),
    [(1.05, 284, 1791, 2132), (1.2, 76, 480, 571), (1.5, 35, 216, 257), (2.0, 20, 127, 150)],
)
def test_where_the_fixed_head_underflows(kappa, small, denormal, zero):
    with pytest.warns(UserWarning, match=f"only {small} of 2200"):
        head = Reweighting(2200, kappa)
    assert head.effective_dim == small
    tiny = torch.finfo(torch.float32).tiny
    assert int((head.weights >= tiny).sum()) == denormal and int((head.weights > 0).sum()) == zero


def test_bad_input_is_named():
    one = torch.ones(2)
    for call, message in {
        lambda: feature_weights(one, 2 * one, one): "alpha",
        lambda: feature_weights(one, one, 0 * one - 1): "at least 0",
        lambda: feature_weights(one, one, one, disruption="drop"): "expected one of|disruption",
        lambda: balanced_descent(torch.eye(2), torch.eye(3)): "two square matrices",
        lambda: balanced_descent(torch.eye(2), torch.eye(2), width=3): "width",
        lambda: features_by_layer(nn.Sequential(nn.Identity()), one[None], one): "features: got",
        lambda: DiagonalNetwork(3)(one): "3 coordinates",
    }.items():
        with pytest.raises(InputError, match=message):
            call()
