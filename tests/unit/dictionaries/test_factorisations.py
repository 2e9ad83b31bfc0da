"""Factorisations and non-negative codes: SciPy's answers, falling losses, exact cases, what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import nnls as scipy_nnls
from sklearn.decomposition import NMF as SklearnNMF

from lineament.core.checks import InputError
from lineament.dictionaries import factorisations
from lineament.dictionaries.factorisations import (
    convex_nmf,
    hals_step,
    multiplicative_step,
    nmf,
    nmf_per_class,
    pca,
    semi_nmf,
    start,
)
from lineament.dictionaries.nnls import METHODS, duality_gap, nnls, residual, sweep


def uniform(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X, ATOMS = uniform(40, 12), uniform(5, 12, seed=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signed", [False, True])
def test_codes_are_scipys(method, signed):
    x, atoms = (X - 0.5, ATOMS - 0.5) if signed else (X, ATOMS)
    found = nnls(x, atoms, method=method)
    for row, code in zip(x, found):
        expected = torch.from_numpy(scipy_nnls(atoms.T.numpy(), row.numpy())[0])
        torch.testing.assert_close(code, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_a_ridge_makes_many_atoms_unique_and_a_penalty_makes_codes_sparse(method):
    many = uniform(30, 12, seed=2)
    found = nnls(X, many, method=method, ridge=0.1)
    stacked = torch.cat([many, 0.1**0.5 * torch.eye(30)], 1).T.numpy()
    for row, code in zip(X, found):
        wanted = scipy_nnls(stacked, torch.cat([row, torch.zeros(30)]).numpy())[0]
        torch.testing.assert_close(code, torch.from_numpy(wanted), rtol=0, atol=1e-6)
    assert float(duality_gap(X, many, found, ridge=0.1).max()) < 1e-9
    sparse = nnls(X, ATOMS, method=method, sparsity=1.0)
    slope = (sparse @ ATOMS - X) @ ATOMS.T + 1.0
    assert float(slope.min()) > -1e-8 and float((slope * sparse).abs().max()) < 1e-8
    assert (sparse == 0).sum() > (nnls(X, ATOMS) == 0).sum()


def test_the_gap_bounds_how_far_a_code_is_from_the_best():
    best = residual(X, ATOMS, nnls(X, ATOMS)).square() / 2
    for codes in (torch.zeros(40, 5).double(), uniform(40, 5, seed=3)):
        above = residual(X, ATOMS, codes).square() / 2 - best
        assert (duality_gap(X, ATOMS, codes) >= above - 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_rows_code_does_not_depend_on_the_others(method):
    whole = nnls(X, ATOMS, method=method)
    parts = torch.cat([nnls(part, ATOMS, method=method) for part in X.split([1, 7, 32])])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert nnls(X[:0], ATOMS, method=method).shape == (0, 5)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_a_sweep_is_the_rule_code_by_code(ridge):
    """z_j <- max(0, z_j + (b_j - Σ z_i G_ij - λ z_j) / (G_jj + λ)) one after the other, over more than one block of atoms and of samples."""
    atoms, x = uniform(70, 90, seed=3) - 0.5, uniform(2100, 90, seed=4)
    atoms[5] = 0  # has no best code where there is no ridge: stays
    codes, products, gram = uniform(70, 2100, seed=5), atoms @ x.T, atoms @ atoms.T
    wanted = codes.clone()
    for j in range(70):
        if gram[j, j] + ridge > 0:
            slope = products[j] - gram[j] @ wanted - ridge * wanted[j]
            wanted[j] = (wanted[j] + slope / (gram[j, j] + ridge)).clamp(min=0)
    torch.testing.assert_close(sweep(codes, products, gram, ridge), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("count", "rows"), [(5, 2100), (70, 30)])  # solved for exactly, and not
def test_codes_do_not_depend_on_where_they_start(count, rows):
    atoms = 0.02 * uniform(count, 90, seed=9) + torch.eye(count, 90)
    x = uniform(rows, count, seed=1) @ atoms
    start = uniform(rows, count, seed=2)
    torch.testing.assert_close(nnls(x, atoms, start=start, tolerance=1e-12), nnls(x, atoms, tolerance=1e-12), rtol=0, atol=1e-6)  # fmt: skip
    assert start.equal(uniform(rows, count, seed=2))
    with pytest.raises(InputError, match="start: got codes for method 'fista'"):
        nnls(x, atoms, method="fista", start=start)


@pytest.mark.parametrize("step", [multiplicative_step, hals_step])
def test_the_loss_never_rises(step):
    codes, atoms = uniform(40, 4, seed=4), uniform(4, 12, seed=5)
    losses = []
    for _ in range(50):
        codes, atoms = step(X, codes, atoms)
        losses.append(float((X - codes @ atoms).norm()))
        assert (codes >= 0).all() and (atoms >= 0).all()
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("solver", factorisations.SOLVERS)
@pytest.mark.parametrize("init", factorisations.INITS)
def test_rank_two_is_recovered_and_others_come_near_scikit_learn(solver, init):
    low = uniform(300, 2, seed=6) @ uniform(2, 12, seed=7)
    exact = nmf(low, 2, solver=solver, init=init, tolerance=1e-7, iterations=500)
    assert exact.info["relative_error"] < (0.02 if solver == "multiplicative" else 0.01)
    x = uniform(300, 12, seed=8)
    found = nmf(x, 4, solver=solver, init=init)
    peer = SklearnNMF(4, init="nndsvda", max_iter=600).fit(x.numpy())
    assert found.info["relative_error"] < 1.03 * peer.reconstruction_err_ / float(x.norm())
    torch.testing.assert_close(found.atoms.norm(dim=1), torch.ones(4).double())
    left = float((x - found.decode(found.encode(x))).norm() / x.norm())
    assert abs(left - found.info["relative_error"]) < 1e-6


def test_the_start_is_scikit_learns():
    from sklearn.decomposition._nmf import _initialize_nmf

    codes, atoms = start(X, 4, "nndsvda", torch.Generator())
    expected = _initialize_nmf(X.numpy(), 4, init="nndsvda", random_state=0)
    torch.testing.assert_close(codes @ atoms, torch.from_numpy(expected[0] @ expected[1]), rtol=0, atol=0.02)


def test_semi_convex_and_principal_components():
    x = uniform(60, 6) - 0.5
    best = pca(x, 3)
    centred = x - x.mean(0)
    values = torch.linalg.svdvals(centred)
    torch.testing.assert_close(
        (x - best.decode(best.encode(x))).norm(), values[3:].norm(), rtol=1e-6, atol=1e-8
    )
    semi, convex = semi_nmf(x, 3), convex_nmf(x, 3)
    assert (semi.encode(x) >= 0).all() and (semi.atoms < 0).any()
    floor = float(torch.linalg.svdvals(x)[3:].norm() / x.norm())
    assert floor <= semi.info["relative_error"] <= convex.info["relative_error"] < 1
    # Atoms of convex NMF lie in the cone of the rows.
    left = [scipy_nnls(x.T.numpy(), atom.numpy())[1] for atom in convex.atoms]
    assert max(left) < 1e-6


def test_more_atoms_than_numbers_need_classes_or_sparsity():
    with pytest.raises(InputError, match="width: got 12 atoms for rows of 12 numbers"):
        nmf(X, 12)
    assert len(nmf(X, 20, sparsity=0.1, iterations=50).atoms) == 20
    found = nmf_per_class(X, torch.arange(40) % 4, 3, iterations=50)
    assert found.atoms.shape == (12, 12) and found.settings["ridge"] > 0
    with pytest.raises(InputError, match="class 0 has 10 samples"):
        nmf_per_class(X, torch.arange(40) % 4, 11)
    with pytest.raises(InputError, match="values below 0"):
        nmf(X - 0.5, 3)
    assert semi_nmf(X - 0.5, 3).info["samples"] == 40


@pytest.mark.parametrize("apart", [0.1, 1e-2, 3e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_in_nearly_alike_atoms_are_the_minimum(apart: float, dtype: torch.dtype) -> None:
    """Five times four atoms that differ by ``apart``; SciPy's active sets in float64 say what the codes are."""
    generator = torch.Generator().manual_seed(1)
    atoms = torch.rand(5, 32, generator=generator).repeat_interleave(4, 0)
    atoms = (atoms + apart * torch.rand(20, 32, generator=generator)).to(dtype)
    given = torch.rand(160, 20, generator=generator) * (torch.rand(160, 20, generator=generator) < 0.4)
    x = given.to(dtype) @ atoms + 0.01 * torch.randn(160, 32, generator=generator).to(dtype)
    wide = atoms.double().numpy().T
    expected = torch.stack([torch.from_numpy(scipy_nnls(wide, row.double().numpy())[0]) for row in x])
    found = nnls(x, atoms).double()
    assert ((found - expected).abs().amax(1) < 1e-4 * expected.amax(1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_in_a_hundred_dependent_atoms_are_the_minimum(dtype: torch.dtype) -> None:
    """Passes alone are a hundredth and more off in these after ten thousand of them; a slope of 0 on the support and none below it is the minimum."""
    generator = torch.Generator().manual_seed(0)
    atoms = (torch.rand(1, 256, generator=generator) + 0.1 * torch.rand(100, 256, generator=generator)).to(
        dtype
    )
    x = torch.rand(8, 100, generator=generator) * (torch.rand(8, 100, generator=generator) < 0.2)
    x = x.to(dtype) @ atoms + 0.01 * torch.randn(8, 256, generator=generator).to(dtype)
    wide = atoms.double().numpy().T
    expected = torch.stack([torch.from_numpy(scipy_nnls(wide, row.double().numpy())[0]) for row in x])
    found = nnls(x, atoms).double()
    assert ((found - expected).abs().amax(1) < 1e-4 * expected.amax(1)).all()
