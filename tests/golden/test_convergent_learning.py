"""Alignment of units: matching, cycles, bins and information as the authors' functions give them; lasso and clusters from their definitions."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from tests.golden.common import File, golden
from torch import Tensor

from lineament.measure.alignment import clusters, information, joint, matching, sparse


def gathered(*units: Tensor) -> joint.JointMoments:
    """The moments of units of several networks, from batches of any size, in two parts that are joined."""
    parts = []
    for rows in torch.arange(len(units[0])).tensor_split(2):
        part = joint.JointMoments([u.shape[1] for u in units], blocks=2, nulls=())
        for batch in rows.split(5):
            part.update([u[batch][:, None] for u in units])
        parts.append(part)
    return parts[0] + parts[1]


def check_matching(file: File) -> None:
    X, Y = file.input("X"), file.input("Y")
    moments = gathered(X, Y)
    std = moments.deviations(correction=file["ddof"])
    within, between = moments.correlations(0, 0), moments.correlations(0, 1)
    dead = file["dead_unit_Y"]
    for unit in [] if dead is None else [dead]:
        assert unit in moments.dead(1).tolist()
        assert (between[:, unit] == file["constant_unit_correlation"]).all()
    for name, net in (("X", 0), ("Y", 1)):
        file.compare(f"mean_{name}", moments.means(net))
        file.compare(f"std_{name}", std[net])
        file.compare(f"within_{name}", moments.correlations(net, net))
    file.compare("between", between)
    semi = matching.semi_matching(between)
    file.compare("semi_match", semi.columns)
    file.compare("semi_values", semi.values)
    pairs = matching.matching(between)
    if file.has("match_rows"):
        file.compare("match_rows", pairs.rows)
        file.compare("match_cols", pairs.columns)
        file.compare("match_values", pairs.values)
    else:
        file.compare("match", pairs.columns)
        file.compare("match_values", pairs.values)
    if file.has("overlap_ratio"):
        file.compare("overlap_ratio", matching.overlap(between, pairs))
    if file.has("loop_order") or file.has("loop_lengths"):
        order, lengths = matching.cycle_order(pairs.columns)
        file.compare("loop_order", order)
        file.compare("loop_lengths", lengths)
    if file.has("within_match_value_sum") or file.has("within_match_ignore_diag"):
        own = matching.self_matching(within)
        assert (own.rows != own.columns).all()
        file.compare("within_match_value_sum", own.values.sum())
        if file.has("within_match_ignore_diag"):
            # Several permutations may reach the sum: the stored one is judged by it.
            stored = file.input("within_match_ignore_diag")
            assert sorted(stored.tolist()) == list(range(len(within)))
            assert (stored != torch.arange(len(within))).all()
            reached = within[torch.arange(len(within)), stored].sum()
            assert abs(reached - own.values.sum()) <= 1e-9 * len(within)
            file.compare("within_match_value_sum", reached)
    if file.has("conv_X_shape"):
        n, d, h, w = file.input("conv_X_shape").tolist()
        maps = X[: n * h * w].reshape(n, h, w, d).permute(0, 3, 1, 2)
        conv = joint.JointMoments([d], blocks=1, nulls=())
        for batch in maps.split(2):
            conv.update([batch.flatten(2).transpose(1, 2)])
        file.compare("conv_within", conv.correlations(0, 0))


def check_information(file: File) -> None:
    bins, margin, zero = int(file["num_bins"]), file["edge_margin"], file["zero_threshold"]
    x, y = file.input("xy").T
    # Between whole matrices the library bins with the margin and threshold that its edges have when they are given none.
    usual = inspect.signature(information.official_edges).parameters
    paper = (margin, zero) == (usual["margin"].default, usual["zero"].default)

    def edges_of(u: Tensor) -> np.ndarray:
        return information.official_edges(u, bins, margin=margin, zero=zero)

    def pairs(a: Tensor, b: Tensor, bias: str) -> Tensor:
        return information.mutual_information(a, b, bins=f"official:{bins}", bias=bias)

    edges = [edges_of(u) for u in (x, y)]
    file.compare("x_edges", torch.from_numpy(edges[0]))
    file.compare("y_edges", torch.from_numpy(edges[1]))
    counts = information.official_histogram(x, y, edges[0], edges[1])
    file.compare("hist", counts)
    for array, bias in (
        ("mi_nats", "none"),
        ("mi_minus_bias_official", "official"),
        ("mi_miller_madow_nats", "miller_madow"),
    ):
        file.compare(array, information.histogram_information(counts, bias=bias))
        if paper:
            file.compare(array, lambda: pairs(x[:, None], y[:, None], bias)[0, 0])  # noqa: B023
    for array in file.arrays(r"hist_(\w+)"):
        made = file.input(array)
        found = [information.histogram_information(made.double(), bias=bias) for bias in ("none", "official")]
        file.compare(array.replace("hist", "mi"), torch.stack(found))
    for array in file.arrays(r"mi_matrix_\d+x\d+"):
        units = file["matrix_units"]
        beside = file.partners("correlation_matching")[0]
        X, Y = beside.input("X")[:, :units], beside.input("Y")[:, :units]
        each = [
            [information.official_histogram(a, b, edges_of(a), edges_of(b)) for b in Y.T.contiguous()]
            for a in X.T.contiguous()
        ]
        counts = torch.stack([torch.stack(row) for row in each])
        file.compare(array, information.histogram_information(counts, bias="none"))
        if paper:
            file.compare(array, pairs(X, Y, "none"))


def check_sparse(file: File) -> None:
    X, Y = file.input("X_std").double(), file.input("Y_std").double()
    if file["fit_intercept"]:
        X, Y = X - X.mean(0), Y - Y.mean(0)
    gram, cross, variances = X.T @ X / len(X), X.T @ Y / len(X), Y.square().mean(0)
    lambdas = file["lambdas"].tolist()
    weights = sparse.lasso_path(gram, cross, lambdas)
    file.compare("W", weights)
    file.compare("half_mse_per_unit", sparse.half_mse(weights, gram, cross, variances))
    file.compare("nnz_per_unit", (weights.abs() > file["nonzero_threshold"]).sum(-1))
    file.compare("lambda_max_per_unit", cross.abs().amax(0))


def check_clusters(file: File) -> None:
    P, Q, k = file.input("P"), file.input("Q"), int(file["n_clusters"])
    moments = gathered(P, Q)
    correlations = moments.correlations()
    similarity = correlations.abs().fill_diagonal_(1.0)
    file.compare("similarity", similarity)
    values, vectors = clusters.laplacian_eigenpairs(similarity)
    file.compare("eigenvalues", values)
    file.compare("subspace_projector", vectors[:, :k] @ vectors[:, :k].T)
    sizes = [P.shape[1], Q.shape[1]]
    if file["row_normalize"]:
        spectral = clusters.unit_clusters(correlations, sizes, k, restarts=file["n_init"]).labels
    else:
        means = KMeans(k, n_init=file["n_init"], random_state=0)
        spectral = means.fit_predict(vectors[:, :k].numpy())
    hierarchical = clusters.unit_clusters(
        correlations, sizes, k, method="hierarchical", linkage=file["linkage"]
    )
    assert hierarchical.merges is not None
    file.compare("hac_merge_heights", hierarchical.merges[:, 2])
    truth = file.input("true_labels")
    file.compare("ari_spectral", adjusted_rand_score(truth, spectral))
    file.compare("ari_hac", adjusted_rand_score(truth, hierarchical.labels))


test_golden, test_a_wrong_number_is_noticed = golden(
    "convergent-learning",
    {
        "correlation_matching": check_matching,
        "mutual_information": check_information,
        "sparse_prediction": check_sparse,
        "spectral_clustering": check_clusters,
    },
    fixed=("n_init", "fit_intercept", "row_normalize", "spectral_clustering:Q"),
)
