"""Shortcut learning against an independent float64 evaluation of the paper's equations."""

from __future__ import annotations

import torch
from tests.golden.common import ACTIVATIONS, File, Scope, golden
from torch import Tensor

from lineament.data.two_latents import TwoLatents, VectorEmbedding
from lineament.measure.shortcuts.ntk import KERNELS, kernel_ridge, relu_ntk_profile
from lineament.measure.shortcuts.reliance import decisions, linear_reliance, reliance


def world(scope: Scope, directions: Tensor, layers: dict[str, list[Tensor]], activation: str) -> TwoLatents:
    embed = VectorEmbedding(
        directions,
        (scope["alpha_s"], scope["alpha_c"]),
        (layers["s"], layers["c"]),
        orthogonal=scope["orthogonalize"],
        activation=ACTIVATIONS[activation](),
    )
    return TwoLatents(embed, (scope["rho_s"], scope["rho_c"]), scope["sigma_sc"])


def layers_of(file: File) -> dict[str, list[Tensor]]:
    found = {}
    for latent in "sc":
        numbers = file.get(f"nest_{latent}", [])
        assert len(numbers) == file[f"eta_{latent}"]
        found[latent] = [file.input(f"nest_N{latent}{number}") for number in numbers]
    return found


def grid_of(file: File) -> tuple[TwoLatents, Tensor]:
    plain = world(file, file.input("w_raw"), {"s": [], "c": []}, file["nesting_activation"])
    return plain, plain.grid(file["grid_points"], reach=file["grid_range"])


def predictions(file: File, kernel: str) -> tuple[Tensor, Tensor]:
    """(the kernel of the first rows, the prediction on the grid), of the stored x: one rounding of it is 5e-9 in the arccosine at identical rows."""
    plain, grid = grid_of(file)
    x, y = file.input("x"), file.input("y")
    few, train = x[: file["kernel_rows"]], min(len(x), file["max_train"])
    f = kernel_ridge(x[:train], y[:train], kernel, ridge=file["ridge_relative"])
    return KERNELS[kernel](few, few), f(plain.embed(grid))


def check_vector(file: File) -> None:
    plain, grid = grid_of(file)
    y, eps, w_raw = file.input("y"), file.input("eps"), file.input("w_raw")
    assert eps.shape == (file["n"], 2) and w_raw.shape == (2, file["d"])
    z = plain.latents(y, eps)
    file.compare("mu", plain.means)
    file.compare("z", z)
    file.compare("x", plain.embed(z))
    nested = world(file, w_raw, layers_of(file), file["nesting_activation"])
    file.compare("x_nested", nested.embed(z))
    file.compare("grid", grid)
    file.compare("x_grid", plain.embed(grid))
    file.compare("w_opt", plain.optimal_weights)
    file.compare("y_opt", decisions(grid @ plain.optimal_weights))
    for kernel in file["kernel"]:
        K, f = predictions(file, kernel)
        file.compare(f"K_{kernel}", K)
        file.compare(f"f_{kernel}", f)


SETTINGS = (
    *("d", "n", "rho_s", "rho_c", "sigma_sc", "alpha_s", "alpha_c"),
    *("grid_points", "grid_range", "eta_s", "eta_c", "ridge_relative"),
)


def check_scalars(file: File) -> None:
    assert (file["sign_zero_decision"], file["sign_zero_latent"]) == (
        float(decisions(torch.zeros(1))),
        float(reliance(torch.zeros(1), torch.zeros(1, 2)).with_core),
    )
    for case in file.cases:
        data, at = file.beside(case["file"]), f"datasets.{case.name}"
        told = file.nodes[at]
        for name in SETTINGS:
            if name in told:
                assert file.input(f"{at}.{name}") == data[name]
        plain, grid = grid_of(data)
        best = reliance(grid @ plain.optimal_weights, grid).value

        def exact(name: str, found: float) -> None:
            """Reliances are averages of small whole numbers: ``reliance_atol`` alone may part them, beyond the rounding of the mean."""
            if file.has(name):
                file.compare(name, found)
                assert abs(found - file.nodes[name]) <= case["reliance_atol"] + 1e-15 * 4, name  # noqa: B023

        exact(f"{at}.reliance_opt_grid", best)
        file.compare(f"{at}.reliance_opt_continuum", linear_reliance(plain.optimal_weights, plain.means))
        file.compare(f"{at}.bayes_accuracy", plain.optimal_accuracy)
        exact(f"{at}.reliance_only_s", reliance(grid[:, 0], grid).value)
        exact(f"{at}.reliance_only_c", reliance(grid[:, 1], grid).value)
        exact(f"{at}.reliance_constant", reliance(torch.ones(len(grid)), grid).value)
        y = data.input("y")
        right = plain.latents(y, data.input("eps")).sign() == y[:, None]
        for number, latent in enumerate("sc"):
            file.compare(f"{at}.empirical_predictivity_{latent}", right[:, number].double().mean())
        for kernel in data["kernel"]:
            found = reliance(predictions(data, kernel)[1], grid).value
            exact(f"{at}.reliance_{kernel}", found)
            exact(f"{at}.bias_{kernel}", found - best)
    for name, row in file.nodes.items():
        if name.startswith("optimal_table[") and isinstance(row, dict):
            told = TwoLatents(
                lambda z: z,
                (file.input(f"{name}.rho_s"), file.input(f"{name}.rho_c")),
                file.input(f"{name}.sigma_sc"),
            )
            points, reach = file["optimal_table_grid_points"], file["optimal_table_grid_range"]
            grid = told.grid(points, reach=reach)
            for what, values in (("mu", told.means), ("w", told.optimal_weights)):
                for number, latent in enumerate("sc"):
                    file.compare(f"{name}.{what}_{latent}", values[number])
            file.compare(f"{name}.bayes_accuracy", told.optimal_accuracy)
            file.compare(f"{name}.reliance_grid{points}", reliance(grid @ told.optimal_weights, grid).value)
            file.compare(f"{name}.reliance_continuum", linear_reliance(told.optimal_weights, told.means))
    if "relu_ntk_h.u" in file.nodes:
        u = torch.tensor(file.input("relu_ntk_h.u"), dtype=torch.float64)
        file.compare("relu_ntk_h.h", relu_ntk_profile(u))


test_golden, test_a_wrong_number_is_noticed = golden(
    "shortcut-learning",
    {"vector": check_vector, "scalars": check_scalars},
    # Signs on a grid do not depend on its scale; the other is a tolerance.
    fixed=("scalars:optimal_table_grid_range", "scalars:reliance_atol"),
)
