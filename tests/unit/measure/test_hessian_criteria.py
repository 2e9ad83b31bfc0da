"""Criteria of spectra whose eigenvalues are known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.core.checks import InputError
from lineament.core.curvature.density import spectral_density
from lineament.core.curvature.krylov import random_signs
from lineament.core.curvature.matrices import hessian
from lineament.core.curvature.traces import trace
from lineament.measure.landscape.batchnorm_modes import LandscapeWarning
from lineament.measure.landscape.criteria import (
    criteria,
    density_curve,
    extreme_ratio,
    hessian_criteria,
    negative_ratio,
)


def spectrum(values, **options):
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    matrix = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
    return spectral_density((matrix + matrix.T) / 2, **{"steps": len(values), **options})


def test_all_steps_find_all_eigenvalues_and_exact_moments():
    values = [-2.0, -0.5, 0.1, 1.0, 3.0, 7.0]
    found = criteria(spectrum(values))
    torch.testing.assert_close(found.density.nodes, torch.tensor([values] * 2, dtype=torch.float64))
    assert found.re.tolist() == pytest.approx([2 / 7] * 2)
    assert float(found.density.weights.sum()) == pytest.approx(2)
    assert found.average(torch.ones_like) == pytest.approx(1)
    assert found.condition == pytest.approx(70)


def test_k1_is_the_negative_part_of_the_trace_over_the_positive():
    found = criteria(spectrum([-2.0, -1.0, 1.0, 3.0, 7.0]), n=1)
    mass = found.density.nodes * found.density.weights
    assert found.k.tolist() == pytest.approx((-mass.clamp(max=0).sum(1) / mass.clamp(min=0).sum(1)).tolist())
    assert found.negative + found.positive == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::lineament.measure.landscape.batchnorm_modes.LandscapeWarning")
def test_quadrature_and_hutchinson_are_one_estimator_for_the_same_probe():
    torch.manual_seed(0)
    matrix = torch.randn(40, 40).double()
    matrix = matrix + matrix.T
    found = criteria(spectral_density(matrix, steps=6, probes=1, seed=3))
    signs = random_signs(matrix, (40,), torch.Generator().manual_seed(3))
    assert found.trace == pytest.approx(float(signs @ matrix @ signs), rel=1e-10)
    assert math.isnan(found.trace_error) and found.to_dict()["trace_error"] is None


def test_symmetric_spectra_give_one_and_positive_ones_nothing():
    nodes, weights = torch.tensor([-3.0, -1.0, 1.0, 3.0]), torch.full((4,), 0.25)
    assert float(extreme_ratio(nodes)) == 1
    for n in (0.25, 0.5, 1.0):
        assert float(negative_ratio(nodes, weights, n)) == pytest.approx(1)
        assert float(negative_ratio(nodes.abs(), weights, n)) == 0
    assert float(negative_ratio(-nodes.abs(), weights)) == math.inf
    assert float(extreme_ratio(torch.tensor([1.0, 4.0]))) == 0.25


def test_what_a_probe_never_saw_does_not_count():
    # The identity exhausts its Krylov space at once: the other nodes have no weight.
    found = criteria(spectral_density(torch.eye(5).double(), steps=5))
    assert found.re.tolist() == pytest.approx([1, 1]) and found.k.tolist() == [0, 0]
    assert found.effective_rank == pytest.approx(5)


def test_a_spectrum_above_zero_is_a_settled_minimum():
    """Its r_e is the inverse of a condition number, near 1 in a round bowl."""
    found = criteria(spectral_density(torch.diag(torch.tensor([2.0, 2.5, 3.0])).double(), steps=3))
    assert float(found.re.mean()) == pytest.approx(2 / 3)
    assert (
        found.reach == 0 and found.verdict == "settled" and "reaches 0 % as far below zero" in found.meaning
    )


def test_a_spectrum_of_zeros_is_flat():
    found = criteria(spectral_density(torch.zeros(6, 6).double(), steps=3))
    assert found.k.isnan().all() and found.trace == 0
    assert found.verdict == found.to_dict()["verdict"] == "flat" and "Nothing curves" in found.meaning


def test_a_mainly_negative_spectrum_is_warned_of():
    with pytest.warns(LandscapeWarning, match="do not apply"):
        found = criteria(spectrum([-5.0, -4.0, -3.0, 0.5, 1.0]))
    assert found.mainly_negative and found.verdict == "mainly negative" and "do not apply" in found.meaning


def test_the_density_sums_to_one_at_the_official_width():
    found = spectrum([-1.0, 0.0, 0.0, 5.0])
    grid, height = density_curve(found.nodes, found.weights)
    assert len(grid) == 10_000 and float(height.sum() * (grid[1] - grid[0])) == pytest.approx(1)


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x = torch.randn(60, 8).double()
    return net, [(x, x[:, :3].argmax(1))]


def test_training_lowers_both_criteria():
    net, data = problem()
    before = hessian_criteria(net, F.cross_entropy, data, steps=30)
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        adam.zero_grad()
        F.cross_entropy(net(data[0][0]), data[0][1]).backward()
        adam.step()
    after = hessian_criteria(net, F.cross_entropy, data, steps=30)
    assert float(after.re.mean()) < 0.3 * float(before.re.mean())
    assert float(after.k.mean()) < float(before.k.mean())
    exact = float(torch.trace(hessian(net, F.cross_entropy, data).dense()))
    assert abs(after.trace - exact) < 5 * after.trace_error + 1e-9
    assert abs(trace(hessian(net, F.cross_entropy, data), 60).value - exact) < 0.2 * abs(exact)


def test_gauss_newton_is_never_negative_and_subsets_have_spectra_of_their_own():
    net, data = problem()
    found = hessian_criteria(net, F.cross_entropy, data, matrix="gauss_newton", steps=20)
    assert float(found.density.nodes.min()) > -1e-10
    assert float(
        hessian_criteria(net, F.cross_entropy, data, matrix="gauss_newton", steps=20).k.mean()
    ) == pytest.approx(float(found.k.mean()))
    part = hessian_criteria(net, F.cross_entropy, data, params="2.*", steps=10)
    assert part.density.size == 51
    for bad in ({"n": 0}, {"n": -1.0}, {"matrix": "hesian"}, {"steps": 0}, {"probes": 0}):
        with pytest.raises(InputError):
            hessian_criteria(net, F.cross_entropy, data, **bad)
    with pytest.raises(InputError, match="expected a Density"):
        criteria(torch.eye(2))


def test_shares_of_directions_and_a_window_of_the_basis():
    found = criteria(spectral_density(torch.diag(torch.tensor([-2.0, 0.5, 1.0, 4.0])), steps=4, probes=1))
    # From random signs every eigenvector has the same weight.
    assert found.below == pytest.approx(0.25, abs=1e-5) and found.above == pytest.approx(0.75, abs=1e-5)
    assert {"below", "above"} <= set(found.to_dict())
    net, data = problem()
    bare = hessian_criteria(net, F.cross_entropy, data, steps=10, reorthogonalise="none")
    full = hessian_criteria(net, F.cross_entropy, data, steps=10, seed=0)
    torch.testing.assert_close(bare.re, full.re, rtol=1e-3, atol=0)


def test_the_meaning_of_gentle_and_of_steep_descents_differs():
    gentle = torch.diag(torch.tensor([100.0] + [-0.5] * 60 + [0.5] * 39))
    steep = torch.diag(torch.tensor([10.0] * 50 + [-5.0] * 5 + [0.1] * 45))
    found = [criteria(spectral_density(m, steps=3, probes=4)) for m in (gentle, steep)]
    assert [c.verdict for c in found] == ["unsettled", "unsettled"]
    assert found[0].meaning.startswith(
        "The curvature reaches 0.5 % as far below zero as above, but many directions"
    )
    assert "No direction" not in found[0].meaning, "an end of the spectrum is a number, not a word"
    assert found[1].meaning.startswith("A good part curves downwards")
