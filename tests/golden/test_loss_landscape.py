"""Planes, directions, spectra and criteria against the official code's numbers and independent float64 evaluations."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tests.golden.common import files
from torch import nn

from lineament.core.curvature.krylov import lanczos
from lineament.core.curvature.matrices import hessian
from lineament.core.curvature.traces import trace
from lineament.core.gradients import flatten
from lineament.measure.landscape.axes import given, hessian_axes, normalised
from lineament.measure.landscape.criteria import density_curve, extreme_ratio, negative_ratio
from lineament.measure.landscape.grids import adam_equation, interpolation, line, plane
from lineament.measure.landscape.points import evaluate

PATHS = files("loss-landscape")
LOSS = nn.functional.cross_entropy
MLP = ("l1.weight", "l1.bias", "l2.weight", "l2.bias")
CONV = ("c.weight", "c.bias", "bn.weight", "bn.bias", "l.weight", "l.bias")


class Mlp(nn.Module):
    def __init__(self, parameters):
        super().__init__()
        (h, d), (k, _) = parameters["l1.weight"].shape, parameters["l2.weight"].shape
        self.l1, self.l2 = nn.Linear(d, h), nn.Linear(h, k)
        self.double().load_state_dict(parameters)

    def forward(self, x):
        return self.l2(torch.tanh(self.l1(x)))


class Conv(nn.Module):
    def __init__(self, state):
        super().__init__()
        (c, inputs, side, _), (k, width) = state["c.weight"].shape, state["l.weight"].shape
        self.c, self.bn = nn.Conv2d(inputs, c, side, padding=side // 2), nn.BatchNorm2d(c)
        self.l = nn.Linear(width, k)
        self.double().load_state_dict(state)
        self.eval()

    def forward(self, x):
        return self.l(torch.relu(self.bn(self.c(x))).flatten(1))


class Case:
    def __init__(self, path):
        self.arrays = {
            k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path, allow_pickle=False).items()
        }
        self.data = [(self["X"], self["y"])]
        self.used = {"X", "y"}

    def __getitem__(self, key):
        if hasattr(self, "used"):
            self.used.add(key)
        return self.arrays[key]

    def mlp(self, which):
        return Mlp({name: self[f"{which}_{name.replace('.', '_')}"] for name in MLP})

    def direction(self, prefix, names):
        return {name: self[f"{prefix}_{name.replace('.', '_')}"] for name in names}


@pytest.fixture(params=PATHS, ids=lambda p: p.name)
def case(request):
    return Case(request.param)


def close(found, expected, atol, rtol=0.0):
    torch.testing.assert_close(
        torch.as_tensor(found), expected.to(torch.as_tensor(found)), atol=atol, rtol=rtol
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_every_file_and_every_array_is_recognised(path):
    assert path.suffix == ".npz", f"{path.name}: no adapter reads this file"
    quantity = r"l[12]_(weight|bias)|loss|grad|hess|eigs|trace|v0|lanczos_(alpha|beta)|nodes|weights|hutch_single|re|K_[\d.]+|density(_grid)?(_s1e-2)?"
    known = (
        rf"X|y|(init|trained)_({quantity})|multi_(re|K_[\d.]+)|dir[12]_(l[12]_(weight|bias)|filter)|dir1_(layer|weight|model|filter_L1)|"
        r"plane_(axis|filter|official_steps|official_filter_dist1|freeze_axis|freeze_from2|freeze_before2)|interp_(alpha|loss|official_steps5)|"
        r"eigvec_top[12]|eigval_top2_mag|hess_plane(_axis)?|adam_[mv]|adameq_(steps|correct|a|b)|conv_.*|convdir_.*"
    )
    strange = [key for key in np.load(path, allow_pickle=False).files if not re.fullmatch(known, key)]
    assert not strange, f"no adapter reads {strange}"


@pytest.mark.parametrize("which", ["init", "trained"])
def test_hessian_lanczos_and_hutchinson(case, which):
    net = case.mlp(which)
    operator = hessian(net, LOSS, case.data)
    loss = LOSS(net(case["X"]), case["y"])
    close(loss.detach(), case[f"{which}_loss"], 1e-9)
    close(flatten(torch.autograd.grad(loss, list(net.parameters()))), case[f"{which}_grad"], 1e-9)
    dense = operator.dense()
    close(dense, case[f"{which}_hess"], 1e-9)
    close(torch.linalg.eigvalsh(dense), case[f"{which}_eigs"], 1e-9)
    close(torch.trace(dense), case[f"{which}_trace"], 1e-9)
    estimate = trace(operator, 300)
    assert abs(estimate.value - float(case[f"{which}_trace"])) < 1e-6
    v = case[f"{which}_v0"]
    close(v @ (operator @ v), case[f"{which}_hutch_single"], 1e-9)
    run = lanczos(operator, len(case[f"{which}_lanczos_alpha"]), start=v)
    close(run.diagonal, case[f"{which}_lanczos_alpha"], 1e-12, 1e-6)
    close(run.off_diagonal[:-1], case[f"{which}_lanczos_beta"], 1e-12, 1e-6)
    nodes, vectors = run.ritz()
    close(nodes, case[f"{which}_nodes"], 1e-12, 1e-6)
    close(vectors[0].square(), case[f"{which}_weights"], 1e-5)


@pytest.mark.parametrize("which", ["init", "trained"])
def test_criteria_and_density(case, which):
    nodes, weights = case[f"{which}_nodes"], case[f"{which}_weights"]
    close(extreme_ratio(nodes), case[f"{which}_re"], 1e-10)
    exponents = [k.split("K_")[1] for k in case.arrays if k.startswith(f"{which}_K_")]
    assert exponents
    for n in exponents:
        close(negative_ratio(nodes, weights, float(n)), case[f"{which}_K_{n}"], 1e-10)
    for ending, variance, margin in (("", 1e-5, 1e-3), ("_s1e-2", 1e-2, 0.1)):
        expected = case[f"{which}_density{ending}"]
        grid, height = density_curve(nodes, weights, variance=variance, margin=margin, points=len(expected))
        close(grid, case[f"{which}_density_grid{ending}"], 1e-9)
        close(height, expected, 1e-9)


def test_criteria_are_means_over_probes(case):
    nodes = torch.stack([case["init_nodes"], case["trained_nodes"]])
    weights = torch.stack([case["init_weights"], case["trained_weights"]])
    close(extreme_ratio(nodes).mean(), case["multi_re"], 1e-10)
    for key in (k for k in case.arrays if k.startswith("multi_K_")):
        close(negative_ratio(nodes, weights, float(key.split("K_")[1])).mean(), case[key], 1e-10)


def axes_of(case, net, how="filter", **options):
    raw = [given(net, case.direction(f"dir{k}", MLP)) for k in (1, 2)]
    return [normalised(net, axis, how, **{"one_dim": "scale", **options}) for axis in raw]


def test_directions(case):
    net = case.mlp("trained")
    for key, how, options in (
        ("filter", "filter", {}),
        ("layer", "layer", {}),
        ("weight", "weight", {}),
        ("model", "model", {}),
        ("filter_L1", "filter", {"order": 1}),
    ):
        first, second = axes_of(case, net, how, **options)
        close(first.vector, case[f"dir1_{key}"], 1e-8)
        if f"dir2_{key}" in case.arrays:
            close(second.vector, case[f"dir2_{key}"], 1e-8)


def test_planes(case):
    net = case.mlp("trained")
    axes = axes_of(case, net)
    grid = case["plane_axis"]
    close(plane(net, LOSS, case.data, axes, at=(grid, grid)).loss, case["plane_filter"], 1e-8)
    grid = case["plane_freeze_axis"]
    for key, count in (("from2", 2), ("before2", -2)):
        held = [axis.frozen(net, count) for axis in axes]
        close(plane(net, LOSS, case.data, held, at=(grid, grid)).loss, case[f"plane_freeze_{key}"], 1e-8)


def test_the_official_saw_tooth_is_understood(case):
    """Their rows are shifted by one cell in turn; the same points by our evaluation give their numbers."""
    net, steps = case.mlp("trained"), int(case["plane_official_steps"])
    points = [
        ((i - steps / 2) / steps, (j + (i % 2 == 0) - steps / 2) / steps)
        for i in range(steps)
        for j in range(steps)
    ]
    found = evaluate(net, LOSS, case.data, axes_of(case, net), points)["loss"]
    close(found.view(steps, steps), case["plane_official_filter_dist1"], 1e-8)


def test_interpolation(case):
    start, end = case.mlp("init"), case.mlp("trained")
    close(interpolation(start, LOSS, case.data, end, at=case["interp_alpha"]).loss, case["interp_loss"], 1e-8)
    theirs = case["interp_official_steps5"]
    at = torch.arange(1, len(theirs) + 1, dtype=torch.float64) / len(theirs)
    close(interpolation(start, LOSS, case.data, end, at=at).loss, theirs, 1e-8)


def test_hessian_axes_and_their_plane(case):
    net = case.mlp("trained")
    axes = hessian_axes(hessian(net, LOSS, case.data), tol=1e-11)
    values = torch.tensor([axis.info["eigenvalue"] for axis in axes], dtype=torch.float64)
    close(values, case["eigval_top2_mag"], 1e-9)
    for number, axis in enumerate(axes, 1):
        close(axis.vector, case[f"eigvec_top{number}"], 1e-8)
    grid = case["hess_plane_axis"]
    close(plane(net, LOSS, case.data, axes, at=(grid, grid)).loss, case["hess_plane"], 1e-8)


def test_adam_equation(case):
    net, steps = case.mlp("trained"), int(case["adameq_steps"])
    moments = [given(net, case[f"adam_{k}"]) for k in "mv"]
    found = adam_equation(
        net, LOSS, case.data, torch.optim.Adam(net.parameters()), steps=steps, moments=moments
    )
    close(found.a, case["adameq_a"], 1e-12)
    close(found.b, case["adameq_b"], 1e-12)
    close(found.loss, case["adameq_correct"], 1e-8)


@pytest.mark.filterwarnings("ignore::lineament.measure.landscape.batchnorm_modes.LandscapeWarning")
def test_batch_norm(case):
    keys = [*CONV, "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    net = Conv(case.direction("conv", keys))
    raw = given(net, case.direction("convdir", CONV))
    scaled, ignored = normalised(net, raw, one_dim="scale"), normalised(net, raw)
    close(scaled.vector, case["convdir_filter"], 1e-8)
    close(ignored.vector, case["convdir_filter_biasbn_ignored"], 1e-8)
    data, at = [(case["conv_X"], case["conv_y"])], case["conv_line_alpha"]
    close(line(net, LOSS, data, scaled, at=at).loss, case["conv_line_eval"], 1e-8)
    close(line(net, LOSS, data, scaled, at=at, batchnorm="batch").loss, case["conv_line_trainBN"], 1e-8)
    close(line(net, LOSS, data, ignored, at=at).loss, case["conv_line_eval_biasbn_ignored"], 1e-8)
