"""Neural collapse against an independent float64 evaluation of the paper's equations."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.golden.common import files
from torch import Tensor

from lineament.measure.collapse.central_path import central_path
from lineament.measure.collapse.near_collapse import PerturbationMap, block_spectrum, cross_norm, map_spectrum
from lineament.measure.collapse.profile import CollapseMeter, CollapseMetrics, collapse_metrics
from lineament.measure.collapse.ufm import UFM, minimise

FIELDS = {
    "trSW": "trace_within",
    "trSB": "trace_between",
    "NC1": "nc1",
    "NC1_tilde": "nc1_tilde",
    "NC2": "nc2",
    "NC3": "nc3",
    "NC3_alt": "self_duality",
    "NC2_equinorm": "equinorm",
    "NC2_equiangle": "equiangle",
    "NC4_disagree": "nc4",
}


def close(found: Tensor | float, wanted: Tensor | float, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=tolerance)


def arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: torch.from_numpy(np.asarray(stored[name])) for name in stored.files}


def model(a: dict[str, Tensor]) -> UFM:
    return UFM(int(a["K"]), int(a["n"]), float(a["lambda_W"]), float(a["lambda_H"]))


def labels(problem: UFM) -> Tensor:
    return torch.arange(problem.classes).repeat_interleave(problem.samples)


def check_metrics(found: CollapseMetrics, wanted: dict[str, float], tolerance: float) -> None:
    for name, value in wanted.items():
        assert name in FIELDS, f"metric {name!r} has no field"
        got = getattr(found, FIELDS[name])
        if got is not None:
            close(got, value, tolerance)


def check_flow(a: dict[str, Tensor]) -> None:
    problem = model(a)
    H0 = a["H0"]
    W = problem.best_weight(H0)
    close(W, a["W_star"], 1e-10)
    close(problem.reduced(H0), a["L"], 1e-10)
    close(problem.gradient(H0), a["grad_L"], 1e-10)

    wanted = {k.removeprefix("metric."): float(v) for k, v in a.items() if k.startswith("metric.")}
    y = labels(problem)
    check_metrics(collapse_metrics(H0.T, y, W), wanted, 1e-9)
    meters = [CollapseMeter(), CollapseMeter()]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    for index, part in enumerate(order.split(4)):
        meters[index % 2].update(H0.T[part], y[part])
    check_metrics((meters[0] + meters[1]).compute(W), wanted, 1e-9)

    path = central_path(problem, H0, a["flow_t"], rtol=1e-12, atol=1e-14)
    close(path.features, a["flow_H"], 1e-8)
    close(path.nc1_tilde, a["flow_NC1_tilde"], 1e-8)
    close(path.scaled_within, a["flow_trSW_scaled"], 1e-8)
    close(path.scaled_between, a["flow_trSB_scaled"], 1e-8)
    close(path.loss, a["flow_L"], 1e-8)
    assert (path.nc1_tilde.diff() < 0).all()
    assert (path.scaled_within.diff() < 0).all()
    assert (path.scaled_between.diff() > 0).all()

    for beta, H, ratio in zip(a["betas"].tolist(), a["H_min"], a["H_min_NC1_tilde"]):
        found = minimise(problem, H0, beta)
        assert found.converged
        close(found.H, H, 1e-7)
        within, between = problem.traces(found.H)
        close(within / between, ratio, 1e-7)


def check_near(a: dict[str, Tensor]) -> None:
    problem, beta, H = model(a), float(a["beta"]), a["H_star"]
    d = len(H)
    close(problem.rho, a["rho"], 1e-12)
    close(problem.best_weight(H), a["W_star"], 1e-10)
    close(problem.value(a["W_star"], H), a["L_star"], 1e-12)
    close(problem.c - problem.c**2 / 2, a["L_star"], 1e-12)

    expansion = PerturbationMap(problem, H, beta=beta, method="expansion")
    exact = PerturbationMap(problem, H, beta=beta)
    for name, block in a.items():
        if found := re.fullmatch(r"F_eq5_block_(\d)(\d)", name):
            to, of = map(int, found.groups())
            close(expansion.block(to, of), block, 1e-10)
            values = torch.linalg.svdvals(expansion.block(to, of))
            if to == of:
                close(values, block_spectrum(problem, d, beta).expanded(), 1e-10)
            else:
                close(values[0], cross_norm(problem, beta), 1e-10)
                assert values[1] < 1e-10
    close(block_spectrum(problem, d, beta).expanded(), a["F_eq5_singular_values_00"], 1e-10)
    close(cross_norm(problem, beta), a["F_eq5_sigma_max_01"], 1e-10)
    close(map_spectrum(problem, d, beta).expanded(), a["F_exact_eigenvalues"], 1e-10)
    if exact.shape[0] <= 4000:
        close(torch.linalg.eigvalsh(exact.dense()).flip(0), a["F_exact_eigenvalues"], 1e-10)

    change = a["delta_H0"]
    close(exact @ change, a["delta_H_first_order_exact"], 1e-12)
    close(expansion @ change, a["delta_H_eq5"], 1e-12)
    moved = minimise(problem, H + change, beta).H - H
    close(moved, a["delta_H_true"], 1e-9)
    assert torch.linalg.norm(exact @ change - moved) < 1e-5 * torch.linalg.norm(moved)


def check_edges(case: dict) -> None:
    known = {"collapsed_metrics", "c_gt_1"}
    assert set(case) <= known, f"edge cases {set(case) - known} have no adapter"
    if "collapsed_metrics" in case:
        wanted = case["collapsed_metrics"]
        # The file's own numbers fix the case: NC3_alt = 2 - 2 √((K-1)/K) gives K, tr S_B = ρ (K-1)/K gives ρ.
        ratio = (1 - wanted["NC3_alt"] / 2) ** 2
        classes = round(1 / (1 - ratio))
        rho = wanted["trSB"] * classes / (classes - 1)
        rotation = torch.linalg.qr(torch.randn(classes + 2, classes, dtype=torch.float64))[0]
        means = math.sqrt(rho) * rotation.T
        y = torch.arange(classes).repeat_interleave(3)
        check_metrics(collapse_metrics(means[y], y, 0.4 * means), wanted, 1e-9)
    if "c_gt_1" in case:
        edge = case["c_gt_1"]
        problem = UFM(3, 4, edge["lambda_W"], edge["lambda_H"])
        assert problem.c > 1 and problem.rho == 0
        H0 = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        # Near zero the slowest direction decays at the rate λ_H - 1/λ_W, which is positive as c > 1.
        end = 40 / (problem.lambda_h - 1 / problem.lambda_w)
        path = central_path(problem, H0, [0.0, end / 2, end])
        assert float(path.features[-1].norm()) <= max(edge["limit_norm_H"], 1e-8)
        zero = torch.zeros_like(H0)
        close(minimise(problem, zero, 0.0).H, zero, 1e-12)


@pytest.mark.parametrize("path", files("neural-collapse"), ids=lambda path: path.name)
def test_golden(path):
    if path.suffix == ".json":
        check_edges(json.loads(path.read_text()))
        return
    a = arrays(path)
    if {"H0", "flow_t"} <= a.keys():
        check_flow(a)
    elif {"H_star", "beta"} <= a.keys():
        check_near(a)
    else:
        pytest.fail(f"{path.name}: arrays {sorted(a)} are of no kind that an adapter knows")
