"""Hashes and tables bit by bit against TensorFlow Recommenders, baselines and collisions against their formulas."""

from __future__ import annotations

import json
from typing import Any

import torch
from tests.golden.common import File, golden, listed

from lineament.modules.unified_embedding import baselines, collisions
from lineament.modules.unified_embedding.hashing import fast_range, mix64, mixed_salt, remainder, siphash
from lineament.modules.unified_embedding.table import UnifiedEmbedding, lexicographic


def check_layer(file: File) -> None:
    assert (file["hash"], file["table_assignment"]) == ("siphash24", "round_robin")
    tables = file.input("tables")
    count, rows, width = (int(file[key]) for key in ("num_tables", "num_buckets", "embedding_dim"))
    assert tables.shape == (count, rows, width)
    table = UnifiedEmbedding(rows, width, count, hash="siphash", salt="order", assign="order")
    with torch.no_grad():
        table.weight.copy_(tables.flatten(0, 1))
    # A feature's hash and tables depend on its place, also where the features before it have no arrays.
    chunks_of = {
        row["feature_id"]: row["num_chunks"]
        for inputs in file.partners("tfrs_layer_inputs")
        for row in inputs.input("")
        if "feature_id" in row
    }
    cases = {int(case["feature_id"]): case for case in file.cases}
    for number in range(max(cases, default=-1) + 1):
        case = cases.get(number)
        name = f"feature {number}" if case is None else case.name
        chunks = chunks_of[number] if case is None else case["num_chunks"]
        table.add(name, int(chunks), combiner="mean" if case is None else case["combiner"])
        assert table.features[name].number == number
    for case in cases.values():
        name, values = case.name, case["values"]
        case.compare(f"idx__{name}", table.rows_of(name, values))
        case.compare(f"tables__{name}", table.tables_of(name))
        found = table({name: values})
        case.compare(f"out_lookup_order__{name}", found)
        chunks = found.view(len(found), -1, width)
        case.compare(f"out_official__{name}", chunks[:, lexicographic(chunks.shape[1])].flatten(1))
        if case["ragged_rows"] is not None:
            bags = case["ragged_rows"]
            offsets = torch.tensor([0, *(len(bag) for bag in bags[:-1])]).cumsum(0)
            pooled = table({name: ([value for bag in bags for value in bag], offsets)})
            case.compare(f"out_ragged_{case['combiner']}__{name}", pooled)


def check_inputs(file: File) -> None:
    """The inputs are what the layer's own file takes."""
    file.input("")
    for other in file.partners("tfrs_layer"):
        for case in other.cases:
            case["values"]


def check_hashes(file: File) -> None:
    assert mixed_salt(file["reference_value"]) == file["reference_hash"]
    given: dict[str, Any] = {"mix64": file.input("mix64"), "siphash24": file.input("siphash24")}
    for k, row in enumerate(given["mix64"]):
        value = int(row["value"]) % 2**64
        z = mix64(torch.tensor([value - 2**64 if value >> 63 else value]), int(row["salt"]))
        assert str(int(z) % 2**64) == row["z"], f"mix64[{k}]"
        for m in listed(file["mod"]):
            assert int(remainder(z, m)) == row["mod"][str(m)]
            assert int(fast_range(z, m)) == row["fastrange"][str(m)]
    for k, row in enumerate(given["siphash24"]):
        h = siphash([row["value"]], tuple(row["key"]))
        assert str(int(h) % 2**64) == row["h"], f"siphash24[{k}]"
        for m in listed(file["mod"]):
            assert int(remainder(h, m)) == row["mod"][str(m)]


def check_baselines(file: File) -> None:
    get, compare = file.input, file.compare
    ids = get("ids")
    assert bool((ids < int(file["n"])).all())
    if file.has("mh_idx"):
        index, table = get("mh_idx"), get("ht_table")
        assert index.shape[1] == file["num_hashes"]
        compare("hash_trick", baselines.multi_hash(table, index[:, :1]))
        compare("mh_concat_shared", baselines.multi_hash(table, index))
        compare("mh_sum", baselines.multi_hash(table, index, "sum"))
        compare("mh_mean", baselines.multi_hash(table, index, "mean"))
        if file.has("mh_tables"):
            compare("mh_concat_separate", baselines.multi_hash(get("mh_tables"), index))
        if file.has("mh_signs"):
            compare("mh_signed_sum", baselines.multi_hash(table, index, "sum", get("mh_signs")))
        if file.has("he_importance"):
            importance = get("he_importance")[ids]
            compare("he_out", baselines.hash_embeddings(table, index, importance))
            compare("he_out_append", baselines.hash_embeddings(table, index, importance, append=True))
    if file.has("qr_wr"):
        quotients, remainders = get("qr_wq"), get("qr_wr")
        assert len(remainders) == file["qr_num_collisions"]
        for operation in ("mult", "add", "concat"):
            compare(f"qr_{operation}", baselines.quotient_remainder(quotients, remainders, ids, operation))
    if file.has("robe_starts"):
        found = baselines.robe(get("robe_array"), get("robe_starts"), int(file["robe_Z"]))
        compare("robe_out", found)
    if file.has("hn_idx"):
        compare("hn_out", baselines.hashed_net(get("robe_array"), get("hn_idx")))
    if file.has("hn_signs"):
        compare("hn_signed", baselines.hashed_net(get("robe_array"), get("hn_idx"), get("hn_signs")))
    if file.has("pq_codes"):
        compare("pq_out", baselines.product_quantised(get("pq_codebooks"), get("pq_codes")[ids]))
    if file.has("md_table"):
        compare("md_out", baselines.mixed_dimension(get("md_table"), ids, get("md_proj")))


def check_theory(file: File) -> None:
    assert file["reduction"] == "mean"
    table, theta, values, labels = (file.input(name) for name in ("E", "theta", "X", "y"))
    rows = [file.input(f"h{feature}") for feature in listed(file["feature"])]
    assert len(table) == int(file.input("M"))
    table.requires_grad_()
    theta.requires_grad_()
    loss = collisions.loss(table, theta, rows, values, labels)
    by_table, by_theta = torch.autograd.grad(loss, (table, theta))
    value, feature = int(file.input("w")), file["w_feature"]
    found = collisions.row_gradient(table, theta, rows, values, labels, value, feature)
    file.compare("loss", loss)
    file.compare("grad_E", by_table)
    file.compare("grad_theta", by_theta)
    file.compare("row", rows[feature][value])
    file.compare("g_true", found.own)
    file.compare("g_intra", found.intra)
    file.compare("g_inter", found.inter)
    assert torch.allclose(found.own + found.intra + found.inter, by_table[rows[feature][value]])


def check_counts(file: File) -> None:
    """Of the vocabularies of the theory's file beside it."""
    other = file.partners("theory")[0]
    sizes = [len(other.input(f"h{feature}")) for feature in listed(other["feature"])]
    found = collisions.expected_collisions(sizes, int(file.input("M")))
    file.compare("N", torch.tensor(sum(sizes)))
    for name, value in {
        "unified_intra": found.intra,
        "unified_inter": found.inter,
        "unified_total": found.total,
        "proportional_split_intra": found.proportional,
        "equal_split_intra": found.equal,
        "expected_occupied_unified": found.occupied,
    }.items():
        file.compare(name, value)
    file.compare("proportional_split_rows", torch.tensor(found.proportional_rows))
    assert "h0" in json.dumps(file["sizes_from"])


CHECKS = {
    "tfrs_layer": check_layer,
    "tfrs_layer_inputs": check_inputs,
    "hash_vectors": check_hashes,
    "baselines": check_baselines,
    "theory": check_theory,
    "collision_counts": check_counts,
}
test_golden, test_a_wrong_number_is_noticed = golden(
    "unified-embedding",
    CHECKS,
    fixed=("combiner", "collision_counts:sizes_from", "theory:feature", "baselines:n"),
)
