"""Dual activations, deep kernels and their limits against 60-digit arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tests.golden.common import File, Scope, golden, listed
from torch import Tensor

from lineament.kernels.duals import (
    Dual,
    cosine,
    dual_of,
    erf,
    exponential,
    leaky_relu,
    moebius,
    polynomial,
    sine,
)
from lineament.kernels.hermite import hermite_coefficients
from lineament.kernels.recursion import log_nngp, log_ntk, log_psi
from lineament.kernels.regimes import optimal_activation, optimal_dual, regime
from lineament.kernels.scores import hilbert_scores, kernel_scores, nearest

DUALS: dict[str, Callable[[Scope], Dual]] = {
    "optimal": lambda case: optimal_dual(case["dim"]),
    "sine": lambda case: sine(case["alpha"]),
    "cosine": lambda case: cosine(case["alpha"]),
    "erf": lambda case: erf(),
    "relu": lambda case: leaky_relu(),
    "leaky_relu": lambda case: leaky_relu(case["alpha"]),
    "abs": lambda case: leaky_relu(-1.0),
    "exp": lambda case: exponential(case["alpha"]),
    "exponential": lambda case: exponential(case["alpha"]),
    "polynomial": lambda case: polynomial(case["coefficients"]),
    "mobius": lambda case: moebius(case["alpha"]),
}


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "logistic": torch.sigmoid,
    "swish": torch.nn.functional.silu,
    "step": lambda z: (z > 0).to(z),
    "heaviside": lambda z: (z > 0).to(z),
}


def dual_in(case: Scope) -> Dual:
    """The dual that the words of a case mean; a word without numbers may be any that the library knows."""
    word = case["dual"]
    return DUALS[word](case) if word in DUALS else dual_of(word)


def array(value: Any) -> Tensor:
    return torch.from_numpy(np.asarray(value, dtype=float))


def function(case: Scope) -> Callable[[Tensor], Tensor]:
    name, scale = case["function"], case.get("output_scale", 1.0)
    if name == "power":
        return lambda z: scale * z ** case["exponent"]
    if name == "gelu":
        kind = "tanh" if case["approximate"] else "none"
        return lambda z: scale * torch.nn.functional.gelu(z, approximate=kind)
    chosen = FUNCTIONS.get(name) or getattr(torch, name, None) or getattr(torch.nn.functional, name)
    return lambda z: scale * chosen(z)


def check_arrays(file: File) -> None:
    if file.has("xi"):
        file.input("xi")
    for case in file.cases:
        {"hermite": check_hermite, "dual": check_dual}[case["part"]](case)
    if file.has("cls_X"):
        check_classifiers(file)
    for dim in listed(file["optact_dim"]):
        if file.has(f"optact_d{dim}"):
            x = file.input("optact_x")
            file.compare(f"optact_d{dim}", optimal_activation(dim)(x))


def check_hermite(case: Scope) -> None:
    assert case["hermite_normalized"]
    found = hermite_coefficients(function(case), case["n_hermite"])
    case.compare(case.name, array(found.coefficients))


def check_dual(case: Scope) -> None:
    dual, xi = dual_in(case), case.input("xi").numpy()
    case.compare(f"{case.name}_dual", array(dual.value(xi)))
    case.compare(f"{case.name}_ddual", array(dual.slope(xi)))
    for depth in listed(case["depth"]):
        case.compare(f"{case.name}_lognngp_L{depth}", lambda depth=depth: array(log_nngp(dual, depth, xi=xi)))
        case.compare(f"{case.name}_logntk_L{depth}", lambda depth=depth: array(log_ntk(dual, depth, xi=xi)))
    case.compare(f"{case.name}_psi", lambda: array(np.exp(log_psi(dual, xi=xi))))
    if case.has(f"{case.name}_psi_delta"):
        delta = case.input(f"{case.name}_psi_delta").numpy()
        case.compare(f"{case.name}_psi_at_1minusdelta", array(np.exp(log_psi(dual, delta=delta))))


def check_classifiers(file: File) -> None:
    X, y, Z = (file.input(f"cls_{name}").numpy().astype(float) for name in ("X", "y", "Xtest"))
    file.compare("cls_1nn", torch.from_numpy(nearest(X, y, Z)).to(torch.int64))
    file.compare("cls_hilbert_score", array(hilbert_scores(X, y, Z, file["manifold_dim"])))
    for case in file.cases:
        if case["part"] != "dual" or case["cls_depth"] is None:
            continue
        for kernel in ("nngp", "ntk"):
            factor, log = kernel_scores(
                dual_in(case), case["cls_depth"], X, y, Z, kernel=kernel, ridge=case["ridge"]
            )
            with np.errstate(divide="ignore"):
                top = (np.log(np.abs(factor)) + log).max()
            name = f"cls_{case.name}_{kernel}"
            case.compare(f"{name}_sign", torch.from_numpy(np.sign(factor)).to(torch.int64))
            case.compare(f"{name}_score_over_max", array(factor * np.exp(log - top)))


def check_values(file: File) -> None:
    settings = {case.name: case for other in file.partners("wide_deep") for case in other.cases}
    for case in file.cases:
        there = settings[case.name]
        if {"hermite": True, "dual": False}[case["part"]]:
            found = hermite_coefficients(function(there), 1)
            case.compare(f"{case.name}_second_moment", found.second_moment)
            case.compare(f"{case.name}_E_dphi_sq", found.slope_moment)
            continue
        dual = dual_in(there)
        told = regime(dual)
        singular = 0 < told.a < 1 < told.b
        numbers = {
            "phi0": told.at_zero,
            "a": told.a,
            "b": told.b,
            "s": -np.log(told.a) / np.log(told.b) if singular else None,
            "fixed_point": told.fixed_point,
            "dphi_at_fixed": told.slope_there,
            "ntk_limit_offdiag": told.ntk_limit,
        }
        for key, value in numbers.items():
            if value is not None:
                case.compare(f"{case.name}.{key}", float(value))
        for depth in listed(case["depth"]):
            case.compare(f"{case.name}.ntk_diag_L{depth}_log", float(log_ntk(dual, depth, delta=0.0)))
    check_extremes(file, settings)


def check_extremes(file: File, settings: dict[str, Scope]) -> None:
    """What the classifiers' kernels come to, and relu's way to 1/4."""
    for other in file.partners("wide_deep"):
        if not other.has("cls_X"):
            continue
        X, y, Z = (other.input(f"cls_{name}").numpy().astype(float) for name in ("X", "y", "Xtest"))
        file.compare("cls_majority", int(np.sign(y.sum())))
        other["manifold_dim"]  # of the Hilbert rule, which the arrays' own check compares
        for name, case in settings.items():
            if case.get("cls_depth") is None:
                continue
            for kernel in ("nngp", "ntk"):
                array_name = f"cls_{name}_{kernel}_logmax"
                if file.has(array_name):
                    factor, log = kernel_scores(
                        dual_in(case),
                        case["cls_depth"],
                        X,
                        y,
                        Z,
                        kernel=kernel,
                        ridge=case["ridge"],
                    )
                    file.compare(array_name, float((np.log(np.abs(factor)) + log).max()))
        break
    if file.has("relu_ntk_offdiag_over_diag"):
        rows = file.input("relu_ntk_offdiag_over_diag")
        found = [[x, L, float(np.exp(log_ntk("relu", int(L), xi=x))) / (L + 1)] for x, L, _ in rows]
        file.compare("relu_ntk_offdiag_over_diag", torch.tensor(found, dtype=torch.float64))


test_golden, test_a_wrong_number_is_noticed = golden(
    "wide-deep-kernels",
    {"wide_deep": check_arrays, "wide_deep_values": check_values},
    # A layer more or less changes neither the sign nor the ratio of scores of a nearest neighbour or a majority; their size is in the values.
    fixed=("wide_deep:cls_depth",),
)
