"""Fidelity, compensation and coupled choices against direct least squares."""

from __future__ import annotations

from typing import Any

import torch
from tests.golden.common import File, Scope, golden, listed

from lineament.edit import components


def similarity(case: Scope, x: Any, weight: Any, **given: Any) -> Any:
    return components.component_similarity(x, weight, center=case["center"], **given)


def check_linear(file: File) -> None:
    for dtype in file.dtypes:
        x, weight = file.input("phi").to(dtype), file.input("W").to(dtype)
        Q = similarity(file, x, weight)
        scores = components.component_scores(Q)
        file.compare("Q", Q, dtype)
        for name in ("alpha", "saliency"):
            file.compare(name, getattr(scores, name), dtype)
        file.compare("singleton_fidelity", scores.fidelity, dtype)
        if file.has("subset_masks"):
            check_subsets(file, Q, weight, dtype)
        if dtype == torch.float64 and (file.has("kmfs_best") or file.has("kmfs_sets")):
            sizes = torch.as_tensor(file["k"]).flatten().tolist()
            best, sets = components.best_subsets(Q, sizes)
            file.compare("kmfs_best", best)
            file.compare("kmfs_sets", sets)


def check_subsets(file: File, Q: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> None:
    masks = file.input("subset_masks")
    kept = [components.compensation(Q, mask, lam=file["lam"]) for mask in masks]
    exact = [components.compensation(Q, mask, lam=0.0) for mask in masks]
    shares = [components.subset_fidelity(Q, mask, lam=file["lam_fidelity"]) for mask in masks]
    file.compare("subset_fidelity", torch.stack(shares, 1), dtype)
    file.compare("delta", torch.stack(exact, 1), dtype)
    file.compare("delta_reg", torch.stack(kept, 1), dtype)
    for name, m in file.arrays(r"W_comp_subset(\d+)").items():
        file.compare(name, weight * exact[int(m[1])], dtype)


def check_conv(file: File) -> None:
    for dtype in file.dtypes:
        x, weight, keep = file.input("x").to(dtype), file.input("W").to(dtype), file.input("keep")
        for case in file.cases:
            Q = similarity(case, x, weight, stride=case["stride"], padding=case["padding"])
            scores = components.component_scores(Q)
            delta = components.compensation(Q, keep, lam=case["lam"])
            for name, found in {
                "Q": Q,
                "singleton_fidelity": scores.fidelity,
                "alpha": scores.alpha,
                "saliency": scores.saliency,
                "delta": delta,
                "W_pruned": weight * delta[..., None, None],
                "fidelity_keep": components.subset_fidelity(Q, keep, lam=case["lam_fidelity"]),
                "mse_zeroed": components.squared_error(Q, keep.to(delta).expand_as(delta)),
                "mse_compensated": components.squared_error(Q, delta),
            }.items():
                case.compare(f"{name}_{case.name}", found, dtype)


def chosen(case: Scope, inputs: int) -> torch.Tensor:
    mask = torch.zeros(inputs, dtype=torch.bool)
    mask[listed(case["subset"])] = True
    return mask


def check_edges(file: File) -> None:
    assert file["solve"] == "minimum_norm" and file["zero_fidelity"] == 0
    for dtype in file.dtypes:
        x, weight = file.input("phi").to(dtype), file.input("W").to(dtype)
        Q = similarity(file, x, weight)
        scores, orth = components.component_scores(Q), Q
        file.compare("Q", Q, dtype)
        file.compare("singleton_fidelity", scores.fidelity, dtype)
        file.compare("alpha", scores.alpha, dtype)
        if file.has("phi_orth"):
            orth = similarity(file, file.input("phi_orth").to(dtype), file.input("W_orth").to(dtype))
            file.compare("Q_orth", orth, dtype)
            file.compare("singleton_orth", components.component_scores(orth).fidelity, dtype)
        for case in file.cases:
            mask = chosen(case, Q.shape[1])
            case.compare(
                f"delta_reg_keep_{case.name}", components.compensation(Q, mask, lam=case["lam"]), dtype
            )
            at, lam = listed(case["outputs"]), case["lam_fidelity"]
            case.compare(f"fidelity_{case.name}", components.subset_fidelity(Q, mask, lam=lam)[at], dtype)
            if case.has(f"fid_orth_{case.name}"):
                mask = chosen(case, orth.shape[1])
                found = components.subset_fidelity(orth, mask, lam=lam)[at]
                case.compare(f"fid_orth_{case.name}", found, dtype)


def check_union(file: File) -> None:
    assert file["score"] == "saliency"
    for dtype in file.dtypes:
        x, scores = file.input("phi").to(dtype), []
        for number in sorted(int(m[1]) for m in file.arrays(r"W(\d+)").values()):
            Q = similarity(file, x, file.input(f"W{number}").to(dtype))
            scores.append(components.component_scores(Q).saliency)
            file.compare(f"saliency{number}", scores[-1], dtype)
        removed = float(file["removed_fraction"])
        file.compare(
            "n_keep_per_output", torch.tensor(components.kept_per_output(x.shape[1], removed)), dtype
        )
        file.compare("keep_layer1_only", components.union_kept(scores[:1], removed), dtype)
        file.compare("keep_coupled", components.union_kept(scores, removed), dtype)


CHECKS = {"linear": check_linear, "conv": check_conv, "edge": check_edges, "coupled_union": check_union}
test_golden, test_a_wrong_number_is_noticed = golden("modhifi", CHECKS)
