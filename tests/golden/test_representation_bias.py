"""Representation bias against an independent float64 evaluation of the paper's definitions."""

from __future__ import annotations

import re

import torch
from tests.golden.common import File, golden
from torch import Tensor

from lineament.core.statistics.moments import Covariance, CrossCovariance
from lineament.data.bit_features import bit_feature, truth_table
from lineament.measure.alignment.similarity import similarity
from lineament.measure.bias.consequences import pca_decoding, rdm, readout_reliance, rsa
from lineament.measure.bias.density import density, participation
from lineament.measure.bias.interventions import feature_direction, flips, linear_readout
from lineament.measure.bias.variance import columns_of, representation_variance


def columns(file: File, parts: list[str]) -> Tensor:
    """The columns of a feature as cases.json names them: an array, onehot(array), or a product of arrays."""
    found = []
    for part in parts:
        if m := re.fullmatch(r"onehot\((\w+)\)", part):
            values = file.input(m[1])
            assert values.min() >= 0 and values.max() < file["n_categories"]
            # A category that no row has, or one of two, adds nothing to what the intercept and the others span.
            found.append(columns_of(m[1], values, len(values)))
        else:
            product = torch.stack([file.input(name).double() for name in part.split("*")]).prod(0)
            found.append(product[:, None])
    return torch.cat(found, 1)


def check_measures(file: File) -> None:
    phi, test = file.input("phi"), file.input("split_T")
    assert file["fit_intercept"] is True and file["solver"] == "minimum_norm"
    features = {name: columns(file, file["columns"][name]) for name in file["feature"]}
    options = {"test": test, "threshold": file["density_threshold"], "dead": file["zero_variance_threshold"]}
    every = representation_variance(phi, features, **options)["representation"]
    literal = representation_variance(phi, features, reduction="per_sample", **options)["representation"]
    for name in file["feature"]:
        file.compare(f"r2.{name}", every[name].r2)
        file.compare(f"r2_persample.{name}", literal[name].r2)
    for name in file["unit_feature"]:
        one = every[name]
        file.compare(f"unit_r2.{name}", one.units)
        for value in (one.density, density(one.units, file["density_threshold"])):
            file.compare(f"density.{name}", value)
        for value in (one.participation, participation(one.units)):
            file.compare(f"participation.{name}", value)
    for name in file.arrays(r"\w+_shuffled"):
        shuffled = representation_variance(phi, {"f": file.input(name)}, **options)
        file.compare(f"r2.{name}", shuffled["representation"]["f"].r2)
    if file.has("bal_phi"):
        a, b = file.input("bal_f1"), file.input("bal_f2")
        closed = torch.tensor(file["balanced_amplitudes"], dtype=torch.float64).square()
        file.compare("bal_r2", closed / closed.sum())
        found = representation_variance(file.input("bal_phi"), {"a": a, "b": b}, interactions=True)
        file.compare(
            "bal_r2", torch.tensor([f.r2 for f in found["representation"].features], dtype=torch.float64)
        )
    check_similarity(file, phi)
    check_readouts(file, phi, test)


def check_similarity(file: File, phi: Tensor) -> None:
    n = file["n_rdm"]
    for metric in file["rdm_metric"]:
        file.compare(f"rdm1.{metric}", lambda: rdm(phi[:n], metric))  # noqa: B023
    if not file.has("phi2"):
        return
    other = file.input("phi2")
    for metric in file["rdm_metric"]:
        found = rsa(phi[:n], other[:n], metric=metric, kendall=True)
        named = {"pearson": found.pearson, "spearman": found.spearman, "kendall_tau_b": found.kendall}
        file.compare(f"rsa.{metric}", torch.tensor([named[how] for how in file["rsa"]], dtype=torch.float64))
    a, b, both = Covariance(), Covariance(), CrossCovariance()
    a.update(phi)
    b.update(other)
    both.update(phi, other)
    parts = a.covariance, b.covariance, both.covariance
    assert file["cka"] == "linear"
    file.compare("cka", similarity("cka", *parts))
    if not (file.has("svcca_mean") or file.has("svcca_k")):
        return
    keep = file["svcca_keep"]
    file.compare("svcca_mean", similarity("svcca", *parts, variance=keep))
    sizes = []
    for x in (phi, other):
        explained = pca_decoding(x, [], []).explained
        sizes.append(int((explained.cumsum(0) < keep - 1e-12).sum()) + 1)
    file.compare("svcca_k", torch.tensor(min(sizes)))


def check_readouts(file: File, phi: Tensor, test: Tensor) -> None:
    file.compare("pca_var", pca_decoding(phi, [], []).explained)
    if file.has("pca_decode_acc"):
        targets = [file.input(name) for name in file["decode_target"]]
        found = pca_decoding(phi, targets, [int(k) for k in file["pca_ks"]], test=test)
        file.compare("pca_var", found.explained)
        file.compare("pca_decode_acc", found.accuracy)
    if file.has("ridge_w") or file.has("reliance_on_f1"):
        assert file["ridge_fit_intercept"] is False
        chosen = readout_reliance(phi, file.input("f1"), file.input("f2"), ridge=file["ridge"])
        file.compare("ridge_w", chosen.weights)
        file.compare("reliance_on_f1", chosen.value)
    readouts = {name: linear_readout(phi, file.input(name)) for name in file["readout"]}
    for name, w in readouts.items():
        file.compare(f"readout.{name}", w)
    for name in file["direction"]:
        file.compare(f"dir.{name}", feature_direction(phi, file.input(name)))
        if not any(file.has(f"flip.{name}_dir_on_{other}_readout") for other in readouts):
            continue
        moved = flips(phi, file.input(name), readouts, file["intervention_grid"].tolist())
        for other, values in moved.flipped.items():
            file.compare(f"flip.{name}_dir_on_{other}_readout", values)


def check_tables(file: File) -> None:
    for name in file["feature"]:
        file.compare(f"features.{name}.n_bits", torch.tensor(bit_feature(name)[0]))
        file.compare(f"features.{name}.truth_table", truth_table(name))


test_golden, test_a_wrong_number_is_noticed = golden(
    "representation-bias",
    {"measures": check_measures, "feature_truth_tables": check_tables},
    # A balanced design read backwards is the same one with its signs exchanged; the dead unit never varies at all.
    fixed=("measures:bal_*", "measures:zero_variance_threshold"),
)
