"""Block selection and sparse attention against float64 evaluations, MoBA's reference and the released kernel."""

from __future__ import annotations

import torch
from tests.golden.common import File, golden
from torch import Tensor

from lineament.modules.sparse_attention.attention import alignment_loss, attention, sparsity_report
from lineament.modules.sparse_attention.layer import SparseSparseAttention
from lineament.modules.sparse_attention.selection import select_blocks

SCORING = {"group_softmax": "group_softmax", "moba": "dot"}


def blocks_of(file: File, q: Tensor, k: Tensor) -> Tensor:
    assert file.get("causal", True)
    return select_blocks(
        q, k, block_size=int(file["block_size"]), top_k=int(file["top_k"]), scoring=SCORING[file["selection"]],
        scale=file.get("scale"),
    )  # fmt: skip


def check_core(file: File) -> None:
    assert file["reduction"] == "mean"
    for dtype in file.dtypes:
        q, k, v, gate = (file.input(name).to(dtype).requires_grad_() for name in ("q", "k", "v", "gate"))
        size, scale = int(file["block_size"]), float(file["scale"])
        blocks = blocks_of(file, q, k)
        full = attention(q, k, v, scale=scale)
        sparse = attention(q, k, v, blocks, block_size=size, scale=scale)
        one, two = gate[..., None] * full, gate[..., None] * sparse
        loss = alignment_loss(one, two, beta=file["beta"])
        told = sparsity_report(q, k, v, blocks, block_size=size, scale=scale)
        for name, found in {
            "block_mask": blocks,
            "h_full": full,
            "h_sparse": sparse,
            "attn_sparsity": told.kept,
            "attn_entropy_nats": told.entropy,
            "first_token_mass": told.first,
            "error_norm": told.error,
            "error_bound": told.bound,
            "loss_sparsity": loss.full_to_sparse,
            "loss_commit": loss.sparse_to_full,
            "loss_align": loss.total,
            "loss_align_l2": alignment_loss(one, two, form="l2").total,
        }.items():
            file.compare(name, found, dtype)
        for name, found in zip(["q", "k", "v", "gate"], torch.autograd.grad(loss.total, (q, k, v, gate))):
            file.compare(f"d_{name}", found, dtype)


def check_layer(file: File) -> None:
    assert (file["rope"], file["selection"], file["gate"]) == (
        "half_rotation",
        "group_softmax",
        "sigmoid_per_head",
    )
    assert (file["beta"], file["bias"]) == (1.0, False)
    for dtype in file.dtypes:
        x = file.input("x").to(dtype).requires_grad_()
        layer = SparseSparseAttention(
            x.shape[2], int(file["n_heads"]), int(file["n_kv_heads"]), int(file["head_dim"]),
            block_size=int(file["block_size"]), top_k=int(file["top_k"]), theta=float(file["rope_theta"]),
        ).to(dtype)  # fmt: skip
        parts = {"Wq": layer.q, "Wk": layer.k, "Wv": layer.v, "Wo": layer.out, "Wg": layer.gate}
        for name, part in parts.items():
            part.weight.data.copy_(file.input(name))
        full, sparse, loss = layer.both(x)
        q, k, _ = layer.projected(x)
        total = (sparse * file.input("target").to(dtype)).mean() + file["align_weight"] * loss.total
        file.compare("block_mask", layer.blocks(q, k), dtype)
        file.compare("y_full", full, dtype)
        file.compare("y_sparse", sparse, dtype)
        file.compare("loss_align", loss.total, dtype)
        file.compare("total", total, dtype)
        torch.testing.assert_close(layer(x), sparse)
        torch.testing.assert_close(layer(x, "full"), full)
        given = [x, *(part.weight for part in parts.values())]
        for name, found in zip(("x", *parts), torch.autograd.grad(total, given)):
            file.compare(f"d_{name}", found, dtype)


def check_moba(file: File) -> None:
    q, k, v = (file.input(name)[None] for name in "qkv")
    blocks = blocks_of(file, q, k)
    file.compare("block_mask", blocks[0])
    file.compare("out", attention(q, k, v, blocks, block_size=int(file["block_size"]))[0])


def check_kernel(file: File) -> None:
    q, k, v = (file.input(name).requires_grad_() for name in "qkv")
    blocks = blocks_of(file, q, k)
    found = attention(q, k, v, blocks, block_size=int(file["block_size"]))
    file.compare("block_mask", blocks)
    file.compare("out", found)
    for name, gradient in zip("qkv", torch.autograd.grad(found, (q, k, v), file.input("d_out"))):
        file.compare(f"d_{name}", gradient)


def check_inexact(file: File) -> None:
    blocks = blocks_of(file, file.input("q"), file.input("k"))
    file.compare("exact_block_mask", blocks)
    file.differs("kernel_block_mask", blocks)


CHECKS = {
    "core": check_core,
    "layer": check_layer,
    "moba": check_moba,
    "official_kernel": check_kernel,
    "inexact_topk": check_inexact,
}
test_golden, test_a_wrong_number_is_noticed = golden(
    "ssa",
    CHECKS,
    fixed=("inexact_topk:kernel_block_mask",),  # a defect, which must only not be repeated
)
