"""Fidelity, compensation and bounds: the specification's oracles against direct least squares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament import edit
from lineament.core.checks import InputError, NotFiniteError
from lineament.core.statistics.moments import Covariance
from lineament.edit import components
from lineament.edit.patches import padding_of, patches
from lineament.edit.repairs import left_over
from lineament.edit.shifts import PatchMoments


def conv_net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(5, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    return net.double().eval()


X = torch.randn(30, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (3, 2), stride=2, padding="valid", dilation=2),
        nn.Conv2d(3, 4, (3, 5), padding="same", dilation=2),
        nn.Conv1d(3, 4, 3, padding=2, stride=2),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{getattr(layer, 'padding', '')}",
)
def test_scores_equal_contributions_built_one_by_one(layer, center):
    layer = layer.double()
    dims = {nn.Linear: (6,), nn.Conv1d: (3, 11), nn.Conv2d: (3, 9, 8)}[type(layer)]
    x = torch.randn(7, *dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    silent = [x.new_zeros(x.shape) for _ in range(dims[0])]
    for i, part in enumerate(silent):
        part[:, i] = x[:, i]
    empty = layer(x.new_zeros(x.shape))
    A = torch.stack([(layer(part) - empty).detach() for part in silent], 1)  # samples, inputs, outputs, ...
    A = A.flatten(3) if A.ndim > 3 else A[..., None]
    mean = A.mean((0, 3), keepdim=True) if center else 0
    Q = torch.einsum("niop,njop->oij", A - mean, A - mean) / len(x)
    found = edit.fidelity(layer, x, center=center, batch_size=3)[""]
    wanted = components.component_scores(Q)
    torch.testing.assert_close(found.similarity(), Q)
    for name in ("alpha", "fidelity", "saliency", "energy", "total"):
        torch.testing.assert_close(getattr(found.scores, name), getattr(wanted, name))
    torch.testing.assert_close(edit.saliency(layer, x, center=center, batch_size=3)[""], wanted.saliency)
    torch.testing.assert_close(found.cholesky_energies(0.0).sum(1) > 0, torch.ones(len(Q), dtype=torch.bool))


@pytest.mark.parametrize("size", [(9, 8), (5, 4)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 1), (4, 3), "same"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 3)])
def test_distances_of_taps_give_the_moments_of_unfolded_patches(kernel, padding, dilation, size):
    conv = nn.Conv2d(3, 4, kernel, padding=padding, dilation=dilation).double()
    stream, unfolded = PatchMoments(kernel, dilation, padding_of(conv)), Covariance(correction=0)
    g = torch.Generator().manual_seed(0)
    for samples, (high, wide) in ((5, size), (3, size), (2, (6, 7))):  # maps of other sizes join
        x = torch.randn(samples, 3, high, wide, generator=g, dtype=torch.float64)
        x = x + torch.tensor([100.0, 0.0, -3.0], dtype=torch.float64)[:, None, None]
        stream.update(x)
        unfolded.update(patches(conv, x))
    assert stream.count == unfolded.count
    torch.testing.assert_close(stream.mean, unfolded.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stream.covariance, unfolded.covariance, rtol=1e-10, atol=1e-9)  # of 1e4


def test_nothing_cancels_in_single_precision():
    x = torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 3000.0
    single, double = (PatchMoments((3, 3), (1, 1), ((0, 0), (0, 0))) for _ in range(2))
    single.update(x)
    double.update(x.double())
    torch.testing.assert_close(single.covariance, double.covariance, rtol=1e-4, atol=1e-5)


def test_stand_ins_of_single_precision_inputs_are_solved_in_double():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=g)
    x[:, 4] = x[:, 3] + 1e-3 * torch.randn(40, generator=g)  # condition number 10^6
    weight, kept = torch.randn(2, 5, generator=g), torch.tensor([True, False, True, True, True])
    found = [
        components.compensation(components.component_similarity(a, b), kept, lam=0.0)
        for a, b in ((x, weight), (x.double(), weight.double()))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_few_and_many_patches_give_the_same_saliency():
    x = torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    net = conv_net()
    once = edit.saliency(net, x, batch_size=40)
    for name, found in edit.saliency(net, x, batch_size=4).items():
        torch.testing.assert_close(found, once[name])
        torch.testing.assert_close(found, edit.fidelity(net, x)[name].scores.saliency)


def test_a_layer_whose_output_is_changed_is_scored_by_its_own_weights():
    layer, x = nn.Linear(3, 2).double(), X[:, 0, 0, :3]
    wanted = edit.saliency(layer, x)[""]
    layer.register_forward_hook(lambda _m, _x, y: 5 * torch.as_tensor(y))
    torch.testing.assert_close(edit.saliency(layer, x)[""], wanted)


def test_a_batch_norm_centres_the_layer_before_it():
    found = edit.fidelity(conv_net(), X)
    assert {name: each.centred for name, each in found.items()} == {"0": True, "3": False, "6": False}


def test_curves_are_monotone_and_greedy_is_between_naive_and_best():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=g, dtype=torch.float64)
    x[:, 3] = x[:, 0]  # a duplicate
    Q = components.component_similarity(x, torch.randn(3, 6, generator=g, dtype=torch.float64))
    best, _ = components.best_subsets(Q, range(1, 7))
    for choice in ("naive", "greedy", "random"):
        curve = edit.fidelity_curve(Q, choice, draws=5)
        assert (curve.fidelity.diff(dim=1) >= -1e-9).all() and (curve.fidelity <= best + 1e-9).all()
        torch.testing.assert_close(curve.fidelity[:, -1], torch.ones(3, dtype=torch.float64))
        if curve.order is not None:
            for k in (1, 3, 5):
                kept = torch.zeros(3, 6, dtype=torch.bool).scatter_(1, curve.order[:, :k], True)
                direct = [edit.subset_fidelity(Q[o : o + 1], kept[o])[0] for o in range(3)]
                torch.testing.assert_close(curve.fidelity[:, k - 1], torch.stack(direct))
    assert (edit.hifi_sizes(Q, 0.999) <= 5).all()  # the duplicate costs nothing
    diagonal = torch.diag(torch.tensor([4.0, 1.0, 3.0]))[None]
    naive = edit.fidelity_curve(diagonal, "naive").fidelity
    torch.testing.assert_close(naive, components.best_subsets(diagonal.double(), [1, 2, 3])[0])


@pytest.mark.parametrize("how", ["delta", "refit", "taps"])
@pytest.mark.parametrize("taps", [1, 4])
def test_compensation_is_least_squares_and_never_raises_the_error(how, taps):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 5 * taps, generator=g, dtype=torch.float64) @ torch.randn(
        5 * taps, 5 * taps, generator=g, dtype=torch.float64
    )
    weight = torch.randn(3, 5, taps, generator=g, dtype=torch.float64)
    moment, kept = rows.T @ rows / 50, torch.tensor([True, False, True, True, False])
    cut = torch.where(kept[:, None], weight, 0)
    errors = [
        left_over(weight, edit.compensated(weight, moment, kept, how, lam=lam), moment)
        for lam in (0.0, 1e-4, 10.0)
    ]
    for error in errors:
        assert (error <= left_over(weight, cut, moment) + 1e-9).all()
    y = rows @ weight.flatten(1).T
    for o in range(3):
        parts = (rows * weight[o].flatten()).view(50, 5, taps)[:, kept]
        basis = (
            parts.sum(2)
            if how == "delta" or (how == "refit" and taps > 1)
            else rows.view(50, 5, taps)[:, kept].flatten(1)
        )
        solution = torch.linalg.lstsq(basis, y[:, o : o + 1]).solution
        direct = (y[:, o] - (basis @ solution)[:, 0]).square().mean()
        torch.testing.assert_close(errors[0][o], direct, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", [True, False])
def test_the_worst_case_bounds_what_is_measured(norm):
    net = conv_net(norm)
    if norm:
        net[1].running_var.uniform_(0.5, 2)
    worst = edit.worst_case_constant(net, X, "0")
    ratio = edit.empirical_ratio(net, X, "0", torch.tensor([True, False]))
    assert 0 < ratio <= worst


def test_an_operator_is_not_its_reshaped_kernel():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, padding=1, bias=False))
    nn.init.ones_(net[1].weight)
    assert 8 < edit.worst_case_constant(net, torch.ones(1, 1, 32, 32), "0") < 9.01  # the matrix has 3


def test_norms_need_a_least_norm():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(50, 4)
    with pytest.raises(InputError, match="min_norm_probe"):
        edit.worst_case_constant(net, x, "0")
    least = edit.min_norm_probe(net, x)
    assert edit.worst_case_constant(net, x, "0", least_norms=least) > 0
    y = net[0](x)
    jac = [torch.linalg.matrix_norm(torch.autograd.functional.jacobian(net[1], row), 2) for row in y[:20]]
    assert max(jac) <= 1.001 * 4**0.5 / least["1"]
    with pytest.raises(InputError, match="attention"):
        edit.worst_case_constant(
            nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1, batch_first=True)),
            torch.ones(1, 3, 4),
            "0",
        )


def test_bad_input_is_named():
    net = conv_net()
    with pytest.raises(NotFiniteError, match="NaN"):
        edit.fidelity(net, torch.full((4, 2, 8, 8), torch.nan).double())
    with pytest.raises(InputError, match="convolution without groups"):
        edit.fidelity(net, X, sites="2")
    with pytest.raises(InputError, match="empty"):
        edit.fidelity(net, X[:0])
    unused = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    unused.forward = lambda x: F.relu(unused["a"](x))
    with pytest.raises(InputError, match="'b' never ran"):
        edit.fidelity(unused, torch.ones(2, 2))
    with pytest.raises(InputError, match="keep at least one"):
        edit.compensated(torch.ones(1, 2, 1), torch.eye(2), torch.zeros(2, dtype=torch.bool))
