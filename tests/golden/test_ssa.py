"""Block selection and sparse attention against float64 evaluations, MoBA's reference and the released kernel."""

from __future__ import annotations

import torch
from tests.golden.common import File, golden
from torch import Tensor

from lineament.modules.sparse_attention.alignment import alignment_loss
from lineament.modules.sparse_attention.attend import attend, full_attention
from lineament.modules.sparse_attention.layer import SparseSparseAttention
from lineament.modules.sparse_attention.selection import Selection, select
from lineament.modules.sparse_attention.theory import sparsity_report

SCORING = {"group_softmax": "group_softmax", "moba": "dot"}


def turned(x: Tensor) -> Tensor:
    """[batch, tokens, heads, ...] as [batch, heads, tokens, ...], and back."""
    return x.transpose(1, 2)


def selected(file: File, q: Tensor, k: Tensor, how: str = "exact") -> Selection:
    assert file.get("causal", True)
    return select(
        q, k, block_size=int(file["block_size"]), blocks=int(file["top_k"]), scoring=SCORING[file["selection"]],
        scale=file.get("scale"), selection=how,
    )  # fmt: skip


def check_core(file: File) -> None:
    assert file["reduction"] == "mean"
    for dtype in file.dtypes:
        given = [file.input(name).to(dtype).requires_grad_() for name in ("q", "k", "v", "gate")]
        q, k, v, gate = (turned(x) for x in given)
        scale, selection = float(file["scale"]), selected(file, q, k)
        full = full_attention(q, k, v, scale=scale)
        told = sparsity_report(q, k, v, selection, scale=scale)
        for backend in ("dense", "gather", "block_major"):
            sparse = attend(q, k, v, selection, scale=scale, backend=backend).output
            one, two = gate[..., None] * full, gate[..., None] * sparse
            loss = alignment_loss(one, two, beta=file["beta"])
            for name, found in {
                "block_mask": turned(selection.mask()),
                "h_full": turned(full),
                "h_sparse": turned(sparse),
                "attn_sparsity": turned(told.kept),
                "attn_entropy_nats": turned(told.entropy),
                "first_token_mass": turned(told.first),
                "error_norm": turned(told.error),
                "error_bound": turned(told.bound),
                "loss_sparsity": loss.full_to_sparse,
                "loss_commit": loss.sparse_to_full,
                "loss_align": loss.total,
                "loss_align_l2": alignment_loss(one, two, form="l2").total,
            }.items():
                file.compare(name, found, dtype)
            found = torch.autograd.grad(loss.total, given, retain_graph=True)
            for name, gradient in zip(["q", "k", "v", "gate"], found):
                file.compare(f"d_{name}", gradient, dtype)


def check_layer(file: File) -> None:
    assert (file["rope"], file["selection"], file["gate"]) == (
        "half_rotation",
        "group_softmax",
        "sigmoid_per_head",
    )
    assert file["bias"] is False
    for dtype in file.dtypes:
        x = file.input("x").to(dtype).requires_grad_()
        layer = SparseSparseAttention(
            x.shape[2], int(file["n_heads"]), int(file["n_kv_heads"]), int(file["head_dim"]),
            block_size=int(file["block_size"]), blocks=int(file["top_k"]), theta=float(file["rope_theta"]),
        ).to(dtype)  # fmt: skip
        parts = {"Wq": layer.q, "Wk": layer.k, "Wv": layer.v, "Wo": layer.out, "Wg": layer.gate}
        for name, part in parts.items():
            part.weight.data.copy_(file.input(name))
        full, sparse, loss = layer.both(x, beta=file["beta"])
        q, k, _ = layer.projected(x)
        total = (sparse * file.input("target").to(dtype)).mean() + file["align_weight"] * loss.total
        file.compare("block_mask", turned(layer.selection(q, k).mask()), dtype)
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
    q, k, v = (turned(file.input(name)[None]) for name in "qkv")
    selection = selected(file, q, k)
    file.compare("block_mask", turned(selection.mask())[0])
    file.compare("out", turned(attend(q, k, v, selection).output)[0])


def check_kernel(file: File) -> None:
    given = [file.input(name).requires_grad_() for name in "qkv"]
    q, k, v = (turned(x) for x in given)
    selection = selected(file, q, k)
    file.compare("block_mask", turned(selection.mask()))
    for backend in ("dense", "gather", "block_major"):
        found = turned(attend(q, k, v, selection, backend=backend).output)
        file.compare("out", found)
        for name, gradient in zip("qkv", torch.autograd.grad(found, given, file.input("d_out"))):
            file.compare(f"d_{name}", gradient)


def check_inexact(file: File) -> None:
    q, k = (turned(file.input(name)) for name in "qk")
    file.compare("exact_block_mask", turned(selected(file, q, k).mask()))
    file.compare("kernel_block_mask", turned(selected(file, q, k, "released").mask()))


CHECKS = {
    "core": check_core,
    "layer": check_layer,
    "moba": check_moba,
    "official_kernel": check_kernel,
    "inexact_topk": check_inexact,
}
test_golden, test_a_wrong_number_is_noticed = golden("ssa", CHECKS)
