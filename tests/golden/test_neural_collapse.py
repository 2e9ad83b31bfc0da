"""Neural collapse against an independent float64 evaluation of the paper's equations."""

from __future__ import annotations

import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor

from lineament.measure.collapse.central_path import central_path
from lineament.measure.collapse.metrics import CollapseMeter, CollapseMetrics, collapse_metrics
from lineament.measure.collapse.near_collapse import PerturbationMap, block_spectrum, cross_norm, map_spectrum
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


def model(file: Scope) -> UFM:
    return UFM(file["n_classes"], file["n_per_class"], file["lambda_W"], file["lambda_H"])


def all_metrics(problem: UFM, H: Tensor, W: Tensor) -> list[CollapseMetrics]:
    """At once, and gathered by two meters from parts in any order."""
    y = torch.arange(problem.classes).repeat_interleave(problem.samples)
    meters = [CollapseMeter(problem.classes), CollapseMeter(problem.classes)]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    for index, part in enumerate(order.split(4)):
        meters[index % 2].update(H.T[part], y[part])
    return [collapse_metrics(H.T, y, W), (meters[0] + meters[1]).compute(W)]


def check_flow(file: File) -> None:
    problem, H0 = model(file), file.input("H0")
    assert len(H0) == file["dim"]
    W = problem.best_weight(H0)
    file.compare("W_star", W)
    file.compare("L", problem.reduced(H0))
    file.compare("grad_L", problem.gradient(H0))
    for found in all_metrics(problem, H0, W):
        for name in file["metric"]:
            if (value := getattr(found, FIELDS[name])) is not None:
                file.compare(f"metric.{name}", value)
    if file.has("flow_t"):
        speed = {"K*n": 1.0}[file["flow_rate"]]  # the library's flow is dH/dt = -K n grad L
        path = central_path(problem, H0, file.input("flow_t") * speed, rtol=file["flow_rtol"], atol=1e-14)
        file.compare("flow_H", path.features)
        file.compare("flow_NC1_tilde", path.nc1_tilde)
        file.compare("flow_trSW_scaled", path.scaled_within)
        file.compare("flow_trSB_scaled", path.scaled_between)
        file.compare("flow_L", path.loss)
        assert (path.nc1_tilde.diff() < 0).all()
        assert (path.scaled_within.diff() < 0).all() and (path.scaled_between.diff() > 0).all()
    reached = (
        [minimise(problem, H0, beta) for beta in file["betas"].tolist()] if "betas" in file.values else []
    )
    if reached:
        assert all(found.converged for found in reached)
        file.compare("H_min", torch.stack([found.H for found in reached]))
        traces = torch.tensor([problem.traces(found.H) for found in reached], dtype=torch.float64)
        file.compare("H_min_NC1_tilde", traces[:, 0] / traces[:, 1])
        slopes = [
            problem.gradient(found.H) + beta / H0.shape[1] * (found.H - H0)
            for found, beta in zip(reached, file["betas"].tolist())
        ]
        file.compare("H_min_grad_max", torch.stack([slope.abs().max() for slope in slopes]))


def check_near(file: File) -> None:
    problem, beta, H = model(file), file["beta"], file.input("H_star")
    d = file["dim"]
    W = problem.best_weight(H)
    file.compare("rho", problem.rho)
    file.compare("rho", H.square().sum(0).mean())
    file.compare("W_star", W)
    file.compare("L_star", problem.value(W, H))
    file.compare("L_star", problem.c - problem.c**2 / 2)

    expansion = PerturbationMap(problem, H, beta=beta, method="expansion")
    exact = PerturbationMap(problem, H, beta=beta)
    for array, m in file.arrays(r"F_eq5_block_(\d)(\d)").items():
        block = expansion.block(int(m[1]), int(m[2]))
        assert file["vec"] == "columns"
        file.compare(array, block)
        values = torch.linalg.svdvals(block)
        if m[1] == m[2]:
            file.compare(f"F_eq5_singular_values_{m[1]}{m[2]}", values)
        else:
            file.compare(f"F_eq5_sigma_max_{m[1]}{m[2]}", values[0])
    for array in file.arrays(r"F_eq5_singular_values_(\d)\1"):
        file.compare(array, block_spectrum(problem, d, beta).expanded())
    for array in file.arrays(r"F_eq5_sigma_max_\d\d"):
        file.compare(array, cross_norm(problem, beta))
    file.compare("F_exact_eigenvalues", map_spectrum(problem, d, beta).expanded())
    file.compare("F_exact_eigenvalues", lambda: torch.linalg.eigvalsh(exact.dense()).flip(0))

    if file.has("delta_H0"):
        change = file.input("delta_H0")
        moved = minimise(problem, H + change, beta).H - H
        file.compare("delta_H_first_order_exact", exact @ change)
        file.compare("delta_H_eq5", expansion @ change)
        file.compare("delta_H_true", moved)
        assert torch.linalg.norm(exact @ change - moved) < file["first_order_rtol"] * torch.linalg.norm(moved)


def check_edges(file: File) -> None:
    for case in file.cases:
        if "base" in case.values:
            base = file.beside(case["base"])
            for found in all_metrics(model(base), base.input(case["H"]), base.input(case["W"])):
                for name in case["metric"]:
                    if (value := getattr(found, FIELDS[name])) is not None:
                        case.compare(f"{case.name}.{name}", value)
        else:
            problem = UFM(3, 4, case["lambda_W"], case["lambda_H"])
            assert problem.c > 1 and problem.rho == 0
            start = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            # Near zero the slowest direction decays at the rate λ_H - 1/λ_W, which is positive as c > 1.
            end = 40 / (problem.lambda_h - 1 / problem.lambda_w)
            path = central_path(problem, start, [0.0, end / 2, end])
            case.compare(f"{case.name}.limit_norm_H", path.features[-1].norm())
            assert not minimise(problem, torch.zeros_like(start), 0.0).H.any()


test_golden, test_a_wrong_number_is_noticed = golden(
    "neural-collapse",
    {"flow_and_minimiser": check_flow, "near_collapse": check_near, "edge_cases": check_edges},
    fixed=("first_order_rtol",),
)
