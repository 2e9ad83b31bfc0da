"""Complexity of features against an independent float64 evaluation of the paper's equations, and NMF against a public package."""

from __future__ import annotations

import itertools
import json
import math

import torch
from tests.golden.common import File, golden, listed
from torch import Tensor

from lineament.dictionaries.factorisations import multiplicative_step
from lineament.dictionaries.nnls import METHODS, nnls, residual
from lineament.measure.complexity.flow import feature_cka
from lineament.measure.complexity.groups import hoyer
from lineament.measure.complexity.importance import linear_importance
from lineament.measure.complexity.readouts import ReadoutMoments
from lineament.measure.complexity.redundancy import redundancy_from_moments
from lineament.measure.complexity.removal import keeping_top
from lineament.measure.complexity.robustness import robustness
from lineament.measure.complexity.vinformation import vinformation


def information(
    file: File, acts: list[Tensor], z: Tensor, train: int | None = None, *, raw: bool = False, **options
) -> Tensor:
    """V-information (probes, features) on the first ``train`` rows and judged on the others, or in sample; z standardised as the file says, or ``raw``."""
    fitted, judged = split(file, acts, z, train, raw)
    options = {"ridge": 0.0, "form": "difference", **options}
    found = vinformation(fitted[:-1], fitted[-1], heldout=(judged[:-1], judged[-1]), **options)
    # In units of the variance of z; the file's values are those of z as it is.
    return found.information * fitted[-1].var(0, correction=0)


def learned_information(file: File, acts: list[Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """(½ ln(Var / MSE), whether the floor acts), the floor being one of the MSE of z as it is: relative to each feature's variance in the library."""
    fitted, _ = split(file, acts, z, None, False)
    floors = file["mse_floor"] / fitted[-1].var(0, correction=0)
    found = [
        vinformation(
            fitted[:-1],
            fitted[-1][:, [j]],
            heldout=(fitted[:-1], fitted[-1][:, [j]]),
            ridge=0.0,
            form="difference",
            variance="learned",
            floor=float(floor) if floor.isfinite() else file["mse_floor"],
        ).information
        for j, floor in enumerate(floors)
    ]
    learned = torch.cat(found, 1)
    return learned, learned >= -0.5 * floors.log() - 0.01


def split(
    file: File, acts: list[Tensor], z: Tensor, train: int | None, raw: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The fitting and the judging rows of [*acts, z]."""
    train = len(z) if train is None else train
    if file["standardize"] and not raw:
        spread = z[:train].std(0, correction=file["ddof"])
        # A constant feature stays one, of which the library gives NaN.
        z = (z - z[:train].mean(0)) / torch.where(spread > 0, spread, 1)
    fitted, judged = [[*acts, z]] * 2
    if train < len(z):
        fitted, judged = ([x[rows] for x in (*acts, z)] for rows in (slice(train), slice(train, None)))
    if not file["fit_intercept"]:  # rows and their negatives have no mean: a fit through the origin
        fitted, judged = ([torch.cat([x, -x]) for x in rows] for rows in (fitted, judged))
    return fitted, judged


def check(file: File) -> None:
    z = file.input("z_raw")
    layers = {
        layer: file.input(f"act|{layer}") for layer in listed(file["layer"]) if file.has(f"act|{layer}")
    }
    steps = [file.input(f"checkpoint|{e}") for e in listed(file["checkpoint"]) if file.has(f"checkpoint|{e}")]
    if layers:
        check_layers(file, list(layers.values()), z)
    if file.has("masks"):
        check_redundancy(file, layers[file["last_layer"]], z)
    if file.has("edge_rank_deficient_act"):
        for acts in (file.input("edge_rank_deficient_act"), layers[file["rank_deficient_layer"]]):
            file.compare("edge_rank_deficient_vinfo", information(file, [acts], z)[0])
    if steps:
        found = information(file, steps, z)
        file.compare("vinfo_checkpoints", found)
        file.compare("temporal_score", 1 - found.mean(0))
    if file.has("sens_x"):
        check_sensitivity(file)
    if file.has("nmf_A"):
        check_factorisation(file)


def check_layers(file: File, layers: list[Tensor], z: Tensor) -> None:
    found = information(file, layers, z)
    file.compare("vinfo_in_sample", found)
    file.compare("complexity_in_sample", 1 - found.mean(0))
    file.compare("vinfo_raw_scale", information(file, layers, z, raw=True))
    held = information(file, layers, z, math.floor(file["train_fraction"] * len(z)))
    file.compare("vinfo_heldout_last_quarter", held)
    file.compare("complexity_heldout", 1 - held.clamp(min=0).mean(0))
    file.compare("complexity_heldout_unclipped", 1 - held.mean(0))
    file.compare(
        "vinfo_ridge_in_sample", information(file, layers, z, ridge=file["ridge_lambda"], scale=False)
    )
    if file.has("vinfo_learned_variance_nats"):
        learned, capped = learned_information(file, layers, z)
        tolerance = file.tolerance("vinfo_learned_variance_nats", torch.float64)
        atol = torch.where(capped, tolerance.get("capped_atol", tolerance["atol"]), tolerance["atol"])
        file.record("vinfo_learned_variance_nats", learned, {**tolerance, "atol": atol}, "")
    file.compare("cka_layers_features", torch.stack([feature_cka(a, z) for a in layers]))
    squared = torch.stack([feature_cka(a, z, form="squared_gram") for a in layers])
    file.compare("cka_variant_squared_gram", squared)


def check_redundancy(file: File, last: Tensor, z: Tensor) -> None:
    moments = ReadoutMoments()
    for rows in torch.arange(len(z)).split(17):
        moments.update({"last": last[rows]}, z[rows])
    covariance, cross = moments.activations["last"].covariance, moments.cross_covariance()["last"]
    file.compare("redundancy", redundancy_from_moments(covariance, cross, file.input("masks")))


def check_sensitivity(file: File) -> None:
    first, second = file.input("sens_W"), file.input("sens_V")
    scales = [s for s in listed(file["scale"]) if file.has(f"sensitivity_variance|{s}") or file.has(f"sensitivity_range|{s}")]  # fmt: skip

    def function(x: Tensor) -> Tensor:
        return (x @ first).relu() @ second

    found = robustness(function, file.input("sens_x"), scales=scales, noise=file.input("sens_noise"))
    for at, scale in enumerate(scales):
        file.compare(f"sensitivity_variance|{scale}", found.variance[at])
        file.compare(f"sensitivity_range|{scale}", found.range[at])


def check_factorisation(file: File) -> None:
    x, codes, atoms = file.input("nmf_A"), file.input("nmf_Z0"), file.input("nmf_D0")
    losses = []
    for _ in range(file["nmf_iterations"]):
        codes, atoms = multiplicative_step(x, codes, atoms, eps=file["nmf_eps"], order=file["nmf_order"])
        losses.append((x - codes @ atoms).norm())
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    file.compare("nmf_Z", codes)
    file.compare("nmf_D", atoms)
    file.compare("nmf_loss", torch.stack(losses))
    if file.has("nnls_x"):
        rows = file.input("nnls_x")
        for method in METHODS:
            found = nnls(rows, atoms, method=method)
            file.compare("nnls_z", found)
            file.compare("nnls_residual", residual(rows, atoms, found))
        if file.has("overcomplete_D"):
            many = file.input("overcomplete_D")
            file.compare("overcomplete_residual", residual(rows, many, nnls(rows, many)))
    file.compare("hoyer_atoms", hoyer(atoms))
    if file.has("head_W"):
        head = atoms, file.input("head_W").T, file.input("head_b")
        found = {
            "importance_predicted": linear_importance(codes, *head),
            "importance_class0": linear_importance(codes, *head, classes=file["importance_class"]),
            "importance_all_classes": linear_importance(codes, *head, classes="mean"),
        }
        found[f"importance_class{file['importance_class']}"] = found["importance_class0"]
        for name, importance in found.items():
            file.compare(name, importance.values)
            file.compare(f"{name}_signed", importance.signed)
        name = file["agreement_order"]
        by = found[name.removesuffix("_signed")]
        values = by.signed if name.endswith("_signed") else by.values
        order = values.argsort(descending=True, stable=True)
        file.compare("agreement_when_keeping_top_m", keeping_top(codes, *head, order=order))


def check_scalars(file: File) -> None:
    """Settings, each of which another file takes from here."""
    taken = json.dumps([other.spec for other in file.partners("complexity")])
    for name in file.data:
        if f"{file.path.name}#/{name}" in taken:
            file.input(name)


test_golden, test_a_wrong_number_is_noticed = golden(
    "vinfo-complexity", {"complexity": check, "scalars": check_scalars}
)
