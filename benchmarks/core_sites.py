"""What recording costs: ten sites of a GPT-2-small-sized model against the bare forward, and an early stop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lineament.bench import Row, compare, quick
from lineament.core.sites.activations import capture, record

SLUG = "core-sites"


def rows(repeats: int = 7) -> Iterator[Row]:
    """One row for each comparison; weights are random, so nothing is downloaded."""
    try:
        from transformers import GPT2Config, GPT2Model
    except ImportError:
        yield Row(
            SLUG,
            "capture of 10 sites, GPT-2 small",
            0.0,
            "transformers",
            None,
            None,
            None,
            None,
            "not installed",
        )
        return
    torch.manual_seed(0)
    # Of the size of GPT-2 small, or of its depth and a quarter of its width.
    name, width, heads = ("GPT-2 of width 192", 192, 3) if quick() else ("GPT-2 small", 768, 12)
    model = GPT2Model(GPT2Config(n_embd=width, n_head=heads, vocab_size=5000)).eval()
    ten = [f"h.{layer}" for layer in range(2, 12)]
    for batch, length in ((1, 64), (2, 128)):
        ids = torch.randint(5000, (batch, length))

        def bare(ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                model(ids, use_cache=False)

        def captured(ids: torch.Tensor = ids) -> None:
            with torch.no_grad(), capture(model, ten):
                model(ids, use_cache=False)

        what = f"{name}, {batch} x {length} tokens"
        values = 10 * batch * length * width
        note = f"the limit is the copy of {4 * values / 2**20:.1f} MiB"
        yield compare(
            SLUG,
            f"capture of 10 sites, {what}",
            captured,
            "bare forward",
            bare,
            target=1 / 1.05,
            repeats=3 * repeats,
            note=note,
        )
    mixed = [f"h.{layer}.attn:z" for layer in range(2, 12)]

    def captured_heads() -> None:
        with torch.no_grad(), capture(model, mixed):
            model(ids, use_cache=False)

    yield compare(
        SLUG,
        f"capture of the heads' z at 10 layers, {what}",
        captured_heads,
        "bare forward",
        bare,
        repeats=repeats,
    )
    yield compare(
        SLUG,
        f"record at layer 3 of 12, early stop, {what}",
        lambda: record(model, {"input_ids": ids, "use_cache": False}, "h.2"),
        "whole forward",
        bare,
        target=2.5,
        repeats=repeats,
        note="the limit is 4: three layers of twelve",
    )
    yield _against_transformer_lens(model, ten, ids, repeats)


def _against_transformer_lens(model: Any, ten: list[str], ids: torch.Tensor, repeats: int) -> Row:
    """The same ten residual streams by ``run_with_cache`` of a model of the same size."""
    size = model.config
    what = f"capture of 10 sites, GPT-2 of width {size.n_embd}, {ids.shape[0]} x {ids.shape[1]} tokens, its own GPT-2"
    try:
        import transformer_lens  # pyright: ignore[reportMissingImports]
    except ImportError:
        theirs = None
    else:
        peer = transformer_lens.HookedTransformer(
            transformer_lens.HookedTransformerConfig(
                n_layers=12,
                d_model=size.n_embd,
                n_ctx=1024,
                d_head=64,
                n_heads=size.n_head,
                d_vocab=size.vocab_size,
                act_fn="gelu_new",
            )
        ).eval()
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(2, 12)]

        def theirs() -> None:
            with torch.no_grad():
                peer.run_with_cache(ids, names_filter=names, return_type=None)

    def ours() -> None:
        with torch.no_grad(), capture(model, ten):
            model(ids, use_cache=False)

    return compare(SLUG, what, ours, "transformer-lens run_with_cache", theirs, target=1.0, repeats=repeats)


if __name__ == "__main__":
    for row in rows():
        print(row)
