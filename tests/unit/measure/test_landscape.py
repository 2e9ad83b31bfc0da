"""Lines and planes: what must be exact, what must not depend on how it was computed, and what bad input gets."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.core.checks import InputError
from lineament.core.curvature.matrices import hessian
from lineament.measure.landscape.axes import (
    NORMALISATIONS,
    Axis,
    completed,
    given,
    hessian_axes,
    normalised,
    random_axes,
)
from lineament.measure.landscape.batchnorm_modes import LandscapeWarning
from lineament.measure.landscape.grids import (
    adam_equation,
    interpolation,
    line,
    panels,
    perturbations,
    plane,
    random_lines,
    random_planes,
)
from lineament.measure.landscape.network_axes import between, optimizer_axes, spanned_by, trajectory_axes
from lineament.measure.landscape.points import evaluate


def network(seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        *([nn.BatchNorm2d(4)] if norm else []),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(100, 3),
    ]
    net = nn.Sequential(*layers).double()
    if norm:
        net.train()
        for _ in range(30):
            net(torch.randn(16, 1, 5, 5, dtype=torch.float64))
    return net.eval()


def batches(sizes=(12, 12, 5), seed=3):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 1, 5, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g))
        for n in sizes
    ]


def loss_of(net, data):
    with torch.no_grad():
        return sum(float(F.cross_entropy(net(x), y)) * len(y) for x, y in data) / sum(len(y) for _, y in data)


def moved(net, axes, point):
    other = copy.deepcopy(net)
    for axis, c in zip(axes, point):
        for name, d in axis.split(net).items():
            dict(other.named_parameters())[name].data += c * d
    return other


def test_every_point_is_the_loss_of_a_network_with_those_weights():
    net, data = network(), batches()
    axes = random_axes(net)
    found = plane(net, F.cross_entropy, data, axes, steps=5, dist=0.7)
    for i in range(5):
        for j in range(5):
            expected = loss_of(moved(net, axes, (found.a[i].item(), found.b[j].item())), data)
            assert float(found.loss[i, j]) == pytest.approx(expected, rel=1e-12)
    assert found.centre == pytest.approx(loss_of(net, data), rel=1e-15)
    assert found.a[2] == 0 and torch.equal(found.a, -found.a.flip(0))


def test_neither_order_nor_batches_nor_processes_matter():
    net, data = network(), batches()
    axes = random_axes(net)
    points = [(a / 3, b / 3) for a in range(-3, 4) for b in range(-3, 4)]
    found = evaluate(net, F.cross_entropy, data, axes, points)["loss"]
    assert torch.equal(evaluate(net, F.cross_entropy, data, axes, points[::-1])["loss"].flip(0), found)
    assert torch.equal(evaluate(net, F.cross_entropy, iter(data), axes, points)["loss"], found)
    whole = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    torch.testing.assert_close(
        evaluate(net, F.cross_entropy, whole, axes, points)["loss"], found, rtol=1e-12, atol=0
    )


@pytest.mark.slow
def test_two_processes_give_the_same_numbers():
    net, data = network(), batches()
    axes = random_axes(net)
    alone = plane(net, F.cross_entropy, data, axes, steps=5, metrics=["accuracy"])
    shared = plane(net, F.cross_entropy, data, axes, steps=5, metrics=["accuracy"], jobs=2)
    torch.testing.assert_close(shared.loss, alone.loss, rtol=1e-12, atol=0)
    assert torch.equal(shared.metrics["accuracy"], alone.metrics["accuracy"])


def test_curvature_along_eigenvectors_is_their_eigenvalue():
    net, data = network(), batches()
    axes = hessian_axes(hessian(net, F.cross_entropy, data), which="ends", tol=1e-9)
    assert axes[0].info["eigenvalue"] > axes[1].info["eigenvalue"]
    found = plane(net, F.cross_entropy, data, axes, dist=1e-3, steps=3)
    first, second, mixed = found.curvatures()
    assert first == pytest.approx(axes[0].info["eigenvalue"], rel=1e-4)
    assert second == pytest.approx(axes[1].info["eigenvalue"], rel=1e-3)
    assert abs(mixed) < 1e-4 * first
    assert line(net, F.cross_entropy, data, axes[0], dist=1e-3, steps=3).curvature() == pytest.approx(first)


def test_hessian_axes_are_the_eigenvectors_asked_for():
    net, data = network(), batches()
    operator = hessian(net, F.cross_entropy, data)
    exact = torch.linalg.eigvalsh(operator.dense())
    top = exact[exact.abs().argsort(descending=True)][:2]
    axes = hessian_axes(operator, indices=(1,))
    assert axes[0].info["eigenvalue"] == pytest.approx(float(top[1]), rel=1e-2)
    least = hessian_axes(operator, which="smallest", indices=(0, 2), tol=1e-8)
    assert [a.info["eigenvalue"] for a in least] == pytest.approx(
        [float(exact[0]), float(exact[2])], rel=1e-4
    )


@pytest.mark.parametrize("order", [1, 2])
def test_normalised_slices_have_the_weights_norms(order):
    net = network()
    weights = dict(net.named_parameters())
    (axis,) = random_axes(net, 1, normalise="filter", order=order)
    for name, d in axis.split(net).items():
        if d.ndim < 2:
            assert not d.any()
            continue
        norms = [torch.linalg.vector_norm(t.detach().flatten(1), order, 1) for t in (d, weights[name])]
        torch.testing.assert_close(*norms, rtol=1e-8, atol=0)
    (layer,) = random_axes(net, 1, normalise="layer", order=order, one_dim="scale")
    for name, d in layer.split(net).items():
        assert float(d.reshape(-1).norm(order)) == pytest.approx(
            float(weights[name].detach().reshape(-1).norm(order)), rel=1e-7
        )
    (whole,) = random_axes(net, 1, normalise="model", order=order)
    theta = torch.cat([w.detach().reshape(-1) for w in weights.values()])
    assert float(whole.vector.norm(order)) == pytest.approx(float(theta.norm(order)), rel=1e-9)
    (copied,) = random_axes(net, 1, one_dim="copy")
    assert torch.equal(copied.split(net)["0.bias"], weights["0.bias"].detach())


def test_axes_of_zeros_and_zero_slices_stay_finite():
    net = network()
    net[0].weight.data[1] = 0
    for how in NORMALISATIONS:
        assert bool(
            torch.isfinite(
                normalised(net, given(net, torch.zeros(343).double()), how, one_dim="scale").vector
            ).all()
        )
        assert bool(torch.isfinite(random_axes(net, 1, normalise=how)[0].vector).all())
    assert not random_axes(net, 1)[0].split(net)["0.weight"][1].any()


def test_random_axes_are_orthogonal_seeded_and_of_the_distribution_asked_for():
    net = network()
    a, b, c = random_axes(net, 3, normalise=None, seed=5)
    assert (
        max(abs(float(a.vector @ b.vector)), abs(float(b.vector @ c.vector)), abs(float(a.vector @ c.vector)))
        < 1e-9
    )
    assert torch.equal(random_axes(net, 1, normalise=None, seed=5)[0].vector, a.vector)
    assert not torch.equal(random_axes(net, 1, normalise=None, seed=6)[0].vector, a.vector)
    (u,) = random_axes(net, 1, normalise=None, distribution="uniform")
    assert float(u.vector.min()) >= 0 and float(u.vector.max()) <= 1
    first, other = completed(net, a)
    assert first is a and abs(float(other.vector @ a.vector)) < 1e-9


def test_frozen_tensors_stay_and_subsets_move_alone():
    net = network()
    (late,) = random_axes(net, 1, freeze=2, one_dim="scale")
    (early,) = random_axes(net, 1, freeze=-2, one_dim="scale")
    moves = [[bool(d.any()) for d in axis.split(net).values()] for axis in (late, early)]
    assert moves == [[True, True, False, False], [False, False, True, True]]
    (head,) = random_axes(net, 1, params="3.*", one_dim="scale")
    assert head.names == ("3.weight", "3.bias")
    found = evaluate(net, F.cross_entropy, batches(), [head], [[0.5]])["loss"]
    assert float(found) == pytest.approx(loss_of(moved(net, [head], [0.5]), batches()), rel=1e-12)


def test_interpolation_ends_at_the_two_networks_batch_norm_included():
    a, b, data = network(0, norm=True), network(1, norm=True), batches()
    with torch.no_grad():
        for _ in range(20):
            b.train()(3 * torch.randn(16, 1, 5, 5, dtype=torch.float64) + 1)
    b.eval()
    found = interpolation(a, F.cross_entropy, data, b, steps=5)
    assert float(found.loss[0]) == pytest.approx(loss_of(a, data), rel=1e-12)
    assert float(found.loss[-1]) == pytest.approx(loss_of(b, data), rel=1e-9)
    assert torch.equal(interpolation(a, F.cross_entropy, data, b.state_dict(), steps=5).loss, found.loss)
    assert found.barrier() >= 0
    three = plane(
        a, F.cross_entropy, data, spanned_by(a, b, network(2, norm=True)), at=([0.0, 1.0], [0.0, 1.0])
    )
    assert float(three.loss[1, 0]) == pytest.approx(loss_of(b, data), rel=1e-9)
    assert float(three.loss[0, 1]) == pytest.approx(loss_of(network(2, norm=True), data), rel=1e-9)


def test_trajectory_coordinates_put_each_checkpoint_where_it_was():
    net = network()
    torch.manual_seed(0)
    u, v = (torch.randn(343).double() for _ in range(2))
    path = []
    for t in (3.0, 2.0, 1.0, 0.5):
        other = moved(net, [given(net, u), given(net, v)], (t, 0.3 * t * t))
        path.append(other.state_dict())
    found = trajectory_axes(net, path)
    assert float(found.shares.sum()) == pytest.approx(1)
    back = moved(net, found.axes, found.coordinates[1].tolist())
    for name, p in back.state_dict().items():
        torch.testing.assert_close(p, path[1][name], rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="fewer than 2 directions"):
        trajectory_axes(net, [path[0], path[0]])
    found.plot()


def test_optimizer_moments_and_the_adam_equation():
    net, data = network(), batches()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    with pytest.raises(InputError, match="made a step"):
        optimizer_axes(net, adam)
    for x, y in data:
        adam.zero_grad()
        F.cross_entropy(net(x), y).backward()
        adam.step()
    m, _ = optimizer_axes(net, adam)
    assert torch.equal(m.split(net)["3.bias"], adam.state[net[3].bias]["exp_avg"])
    found = adam_equation(net, F.cross_entropy, data, adam, steps=20)
    assert found.loss.shape == (20, 20) and found.a[0] == -1 and found.b[0] == pytest.approx(0.1)
    # a = -1/2 at b = 0.4 and a = -1 at b = 1.6 have the same a / sqrt(b).
    assert float(found.loss[5, 3]) == pytest.approx(float(found.loss[0, 15]), rel=1e-12)
    plain = adam_equation(net, F.cross_entropy, data, adam, steps=20, root=False)
    assert plain.loss[:, 10].isnan().all() and plain.loss[:, 11].isfinite().all()
    with pytest.raises(InputError, match="below zero"):
        adam_equation(net, F.cross_entropy, data, adam, normalise="weight")
    with pytest.raises(InputError, match="none of this model's parameters"):
        optimizer_axes(network(), adam)
    with pytest.raises(InputError, match=r"keeps no 'momentum_buffer'"):
        optimizer_axes(net, adam, moments=["momentum_buffer"])
    names = set(
        panels(net, F.cross_entropy, data, kinds=("random", "hessian", "adam"), optimizer=adam, steps=3)
    )
    assert len(names) == 14 and "adam equation, filter" in names


def test_metrics_beside_the_loss():
    net, data = network(), batches()
    (axis,) = random_axes(net, 1)
    metrics = {
        "acc": "accuracy",
        "slope": "gradient_norm",
        "each": "class_loss",
        "own": lambda z, y: z.mean(),
    }
    found = line(net, F.cross_entropy, data, axis, steps=3, metrics=metrics)
    torch.testing.assert_close(
        line(net, F.cross_entropy, data, axis, steps=3).loss, found.loss, rtol=1e-12, atol=0
    )
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    assert float(found.metrics["slope"][1]) == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in grads)), rel=1e-9
    )
    assert float(found.metrics["acc"][1]) == pytest.approx(float((net(x).argmax(1) == y).double().mean()))
    for k in range(3):
        assert float(found.metrics["each"][1, k]) == pytest.approx(
            F.cross_entropy(net(x)[y == k], y[y == k]).item(), rel=1e-9
        )
    assert float(found.metrics["own"][1]) == pytest.approx(float(net(x).mean()), rel=1e-9)
    absent = [(x[y > 0], y[y > 0])]
    assert math.isnan(
        float(
            line(net, F.cross_entropy, absent, axis, steps=3, metrics=["class_loss"]).metrics["class_loss"][
                1, 0
            ]
        )
    )


def test_labels_below_zero_count_in_no_metric():
    net, data = network(), [(x, torch.where(torch.arange(len(y)) % 3 > 0, y, -100)) for x, y in batches()]
    axes = random_axes(net)
    found = plane(net, F.cross_entropy, data, axes, steps=3, metrics=["accuracy", "class_loss"]).metrics
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    x, y = x[y >= 0], y[y >= 0]
    assert float(found["accuracy"][1, 1]) == pytest.approx(float((net(x).argmax(1) == y).double().mean()))
    each = [F.cross_entropy(net(x)[y == k], y[y == k]).item() for k in range(3)]
    assert found["class_loss"][1, 1].tolist() == pytest.approx(each)
    none = [(x, torch.full_like(y, -100))]
    found = plane(net, lambda z, y: z.mean(), none, axes, steps=3, metrics=["accuracy"]).metrics
    assert found["accuracy"].isnan().all()


def test_metrics_of_labels_at_every_place():
    net = nn.Conv2d(1, 3, 3, padding=1).double()
    x, y = batches((4,))[0][0], torch.arange(100).view(4, 5, 5) % 3
    found = plane(
        net, F.cross_entropy, [(x, y)], random_axes(net), steps=3, metrics=["accuracy", "class_loss"]
    ).metrics
    assert float(found["accuracy"][1, 1]) == pytest.approx(float((net(x).argmax(1) == y).double().mean()))
    losses = F.cross_entropy(net(x), y, reduction="none")
    assert found["class_loss"][1, 1].tolist() == pytest.approx(
        [losses[y == k].mean().item() for k in range(3)]
    )


@pytest.mark.parametrize("metric", ["accuracy", "class_loss"])
@pytest.mark.parametrize(
    ("loss", "targets", "said"),
    [
        (
            F.mse_loss,
            torch.randn(3, 3).double(),
            r"needs class labels.*shape \(3,\) for outputs of shape \(3, 3\).*float64 tensor",
        ),
        (F.cross_entropy, torch.eye(3).double(), "needs class labels"),
        (F.mse_loss, torch.eye(3).long(), "needs class labels"),
        (lambda z, y: z.mean(), torch.tensor([0, 1, 3]), "got label 3, expected labels from 0 to 2"),
    ],
)
def test_metrics_of_labels_refuse_other_targets(metric, loss, targets, said):
    net = nn.Linear(4, 3).double()
    with pytest.raises(InputError, match=f"metrics: '{metric}' {said}"):
        plane(net, loss, [(torch.randn(3, 4).double(), targets)], random_axes(net), steps=3, metrics=[metric])


@pytest.mark.parametrize("what", ["model", "loss_fn", "metrics"])
def test_what_cannot_be_sent_to_other_processes_is_named(what):
    lock = threading.Lock()

    def locked(*_):
        return lock and torch.zeros(())

    net, data = network(), batches()
    if what == "model":
        net.lock = lock
    loss = locked if what == "loss_fn" else F.cross_entropy
    metrics = {"own": locked} if what == "metrics" else {}
    with pytest.raises(InputError, match=rf"jobs: got 2, and the {what} .*lock.*use jobs=1"):
        plane(net, loss, data, random_axes(net), steps=3, jobs=2, metrics=metrics)


def test_values_that_are_not_finite_stay_so_and_a_cap_takes_the_infinite():
    net = nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(0.0)

    def loss(z, y):
        return torch.log(z).mean()  # -inf at 0, NaN below

    data = [(torch.ones(1, 1).double(), torch.zeros(1))]
    axis = given(net, torch.ones(1).double())
    values = line(net, loss, data, axis, at=[-1.0, 0.0, 1.0]).loss
    assert math.isnan(values[0]) and values[1] == -math.inf and values[2] == 0
    values = line(net, lambda z, y: 1 / z.abs().mean(), data, axis, at=[0.0, 0.5], cap=1.5).loss
    assert values.tolist() == [1.5, 1.5]
    assert math.isnan(line(net, loss, data, axis, at=[-1.0], cap=1.0).loss[0])
    found = plane(net, loss, data, [axis, axis], steps=3)
    assert found.to_dict()["loss"][0][0] is None
    found.plot(), found.surface()


def test_scale_of_filters_before_a_batch_norm_does_not_change_the_plane():
    net, data = network(norm=True), batches()
    net[1].eps = 1e-12
    other = copy.deepcopy(net)
    other[0].weight.data *= 7
    other[0].bias.data *= 7
    seen = []
    for each in (net, other):
        with pytest.warns(LandscapeWarning, match="does not feel the scale"):
            seen.append(
                plane(each, F.cross_entropy, data, random_axes(each), steps=3, batchnorm="batch").loss
            )
    torch.testing.assert_close(*seen, rtol=1e-6, atol=1e-8)


def test_recalibration_gives_the_statistics_of_the_moved_weights():
    net, data = network(norm=True), batches((20,))
    (axis,) = random_axes(net, 1)
    found = line(net, F.cross_entropy, data, axis, at=[0.5], batchnorm="recalibrate").loss
    other = moved(net, [axis], [0.5])
    other[1].reset_running_stats()
    other[1].momentum = None
    with torch.no_grad():
        other.train()(data[0][0])
    assert float(found[0]) == pytest.approx(loss_of(other.eval(), data), rel=1e-12)
    elsewhere = line(
        net, F.cross_entropy, data, axis, at=[0.5], batchnorm="recalibrate", calibration=batches(seed=9)
    ).loss
    assert float(elsewhere[0]) != float(found[0])
    with pytest.raises(InputError, match="no batch norm"):
        line(network(), F.cross_entropy, data, random_axes(network(), 1)[0], batchnorm="recalibrate")


def test_the_wrong_way_with_batch_norm_is_named():
    net, data = network(norm=True), batches()
    with pytest.raises(InputError, match=r"'train' would write.*'batch'"):
        line(net, F.cross_entropy, data, random_axes(net, 1)[0], batchnorm="train")
    with pytest.warns(LandscapeWarning, match="one_dim='ignore'"):
        line(net, F.cross_entropy, data, random_axes(net, 1, one_dim="scale")[0], steps=3)
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(25, 3), nn.BatchNorm1d(3)).double()
    with pytest.warns(LandscapeWarning, match="never seen a batch"):
        line(fresh, F.cross_entropy, data, random_axes(fresh, 1)[0], steps=3)


def test_repeats_and_perturbations_are_seeded():
    net, data = network(), batches()
    planes = random_planes(net, F.cross_entropy, data, 2, steps=3, seed=4)
    assert not torch.equal(planes[0].loss, planes[1].loss) and planes[0].centre == planes[1].centre
    assert torch.equal(
        planes[1].loss, plane(net, F.cross_entropy, data, random_axes(net, seed=5), steps=3).loss
    )
    lines = random_lines(net, F.cross_entropy, data, 3, steps=3, seed=4)
    assert len({float(each.loss[0]) for each in lines}) == 3
    assert torch.equal(lines[1].loss, random_lines(net, F.cross_entropy, data, 1, steps=3, seed=5)[0].loss)
    found = perturbations(net, F.cross_entropy, data, count=4, seed=4)
    assert float(found.rises[0]) == pytest.approx(float(lines[0].loss[2] - lines[0].loss[1]))
    found.plot(), found.to_dict(), lines[0].plot(), lines[0].to_dict()


def test_what_bad_input_gets():
    net, data = network(), batches()
    axes = random_axes(net)
    single = hessian(nn.Linear(1, 1, bias=False), F.mse_loss, [(torch.ones(2, 1), torch.ones(2, 1))])
    for call, message in (
        (lambda: random_axes(net, normalise="filtre"), "nearest: 'filter'"),
        (lambda: random_axes(net, order=3), "order: got 3"),
        (lambda: random_axes(net, params="9.*"), "names no parameter"),
        (lambda: plane(net, F.cross_entropy, data, axes[:1]), "expected two"),
        (lambda: plane(net, F.cross_entropy, data, axes, steps=4), "odd"),
        (lambda: plane(net, F.cross_entropy, data, axes, cap=0), r"cap: got 0"),
        (lambda: plane(net, F.cross_entropy, data, axes, dist=-1), "dist: got -1"),
        (lambda: plane(net, F.cross_entropy, data, axes, metrics=["accuracie"]), "nearest: 'accuracy'"),
        (lambda: plane(net, F.cross_entropy, [], axes), "empty"),
        (lambda: plane(net, F.cross_entropy, data, axes, jobs=0), "jobs: got 0"),
        (lambda: plane(net, lambda z, y: z, data, axes), "expected a scalar"),
        (
            lambda: plane(net, F.cross_entropy, data, axes, metrics={"own": lambda z, y: None}),
            "metrics: 'own' returned None, expected a number",
        ),
        (
            lambda: plane(net, F.cross_entropy, data, [axes[0], random_axes(net, 1, params="3.*")[0]]),
            "other parameters",
        ),
        (lambda: given(net, torch.ones(4)), "expected a tensor of shape"),
        (lambda: given(net, {"0.bias": torch.ones(9)}), r"shape \(4\)|shape \(4,\)"),
        (lambda: between(net, nn.Linear(2, 2)), "has no parameter '0.weight'"),
        (lambda: hessian_axes(torch.eye(3)), "expected a curvature"),
        (lambda: hessian_axes(single), r"of one parameter, 'weight', .*indices=\[0\]"),
        (lambda: hessian_axes(single, which="ends"), "of one parameter"),
        (lambda: panels(net, F.cross_entropy, data, kinds=("adam",)), "optimizer"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    net[0].weight.data[0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        plane(net, F.cross_entropy, data, axes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batchnorm", ["eval", "batch", "recalibrate"])
def test_a_network_in_half_precision_has_the_losses_of_its_weights_in_float64(dtype, batchnorm):
    """Steps that half precision does not tell apart, and losses that it rounds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).eval().to(dtype)
    x, y = torch.randn(20, 3).to(dtype), torch.arange(20) % 2
    exact = copy.deepcopy(net).double()
    axis = given(exact, torch.randn(sum(p.numel() for p in exact.parameters())))
    for names in (axis.names, axis.names[:2]):
        size = sum(exact.get_parameter(name).numel() for name in names)
        part = Axis(axis.vector[:size], names)
        options = {"at": [-1e-3, 0.0, 1e-3], "batchnorm": batchnorm, "metrics": ["gradient_norm"]}
        before = [t.clone() for t in (*net.parameters(), *net.buffers())]
        ours, right = (
            line(model, F.cross_entropy, [(inputs, y)], part, **options)
            for model, inputs in ((net, x), (exact, x.double()))
        )
        torch.testing.assert_close(ours.loss, right.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            ours.metrics["gradient_norm"], right.metrics["gradient_norm"], rtol=1e-3, atol=0
        )
        after = [*net.parameters(), *net.buffers()]
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(after, before))
