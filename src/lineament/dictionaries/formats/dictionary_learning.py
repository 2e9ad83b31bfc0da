"""dictionary_learning: ``ae.pt`` and ``config.json``. The former is a pickle and read as tensors alone; no code in it runs.

``AutoEncoder`` is brought to atoms of norm 1, as its own loader does; the others are as they lie there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lineament.core.checks import require, show
from lineament.dictionaries.formats.parts import Found, Request, Weights, autoencoder, placed, read_json
from lineament.load.checkpoints import read_checkpoint

WEIGHTS, CONFIG = "ae.pt", "config.json"
_CLASSES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
)  # fmt: skip


def matches(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read(folder: Path, request: Request) -> Any:
    """The dictionary in a folder of dictionary_learning."""
    content = read_checkpoint(folder / WEIGHTS, "folder")
    require(
        isinstance(content, dict),
        f"folder: {WEIGHTS!r} in {str(folder)!r} holds {show(content)}, expected tensors by name",
    )
    weights = Weights(content, folder / WEIGHTS)
    config: dict[str, Any] = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    trainer = config.get("trainer") if isinstance(config.get("trainer"), dict) else {}
    assert isinstance(trainer, dict)
    kind = trainer.get("dict_class") or _told(weights)
    require(
        kind in _CLASSES,
        f"folder: a dictionary of class {show(kind)}, which has no counterpart here; expected one of {', '.join(_CLASSES)}",
    )
    found = Found("dictionary_learning", str(trainer.get("lm_name") or ""), _hook(trainer))
    return placed(_made(kind, weights, trainer, found), found, request)


def _made(kind: str, weights: Weights, trainer: dict[str, Any], found: Found) -> Any:
    if kind == "JumpReluAutoEncoder":
        return autoencoder(
            "JumpReLU", weights.matrix("W_enc").T, weights.matrix("W_dec"), weights.get("b_enc"), weights.get("b_dec"),
            subtract_bias=False, threshold=weights.get("threshold"),
        )  # fmt: skip
    if kind == "MatryoshkaBatchTopKSAE":
        encoder, decoder, b_enc = weights.matrix("W_enc").T, weights.matrix("W_dec"), weights.get("b_enc")
    else:
        encoder, decoder = weights.matrix("encoder.weight"), weights.matrix("decoder.weight").T
        b_enc = torch.zeros(len(decoder)) if kind == "GatedAutoEncoder" else weights.get("encoder.bias")
    if kind == "GatedAutoEncoder":
        return autoencoder(
            "Gated", encoder, decoder, weights.get("mag_bias"), weights.get("decoder_bias"), subtract_bias=True,
            b_gate=weights.get("gate_bias"), r_mag=weights.get("r_mag"),
        )  # fmt: skip
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        new = kind == "AutoEncoderNew"
        b_dec = weights.get("decoder.bias" if new else "bias")
        if not new:
            found.notes.append("the atoms' norms are folded into the encoder, as its own loader does")
        return autoencoder("ReLU", encoder, decoder, b_enc, b_dec, subtract_bias=not new, unit_norm=not new)
    k = weights.count("k", weights.tensors.get("k", trainer.get("k")), len(decoder))
    b_dec = weights.get("b_dec")
    if kind == "AutoEncoderTopK":
        return autoencoder("TopK", encoder, decoder, b_enc, b_dec, subtract_bias=True, k=k)
    threshold = weights.get("threshold", shape=())
    if float(threshold) < 0:
        found.notes.append("its threshold was not measured, so that the rows of a batch compete")
    return autoencoder(
        "BatchTopK", encoder, decoder, b_enc, b_dec, subtract_bias=True, k=k, threshold=threshold
    )


def _told(weights: Weights) -> str:
    """The class, from the names of the tensors, where no configuration names it."""
    if "r_mag" in weights:
        return "GatedAutoEncoder"
    if "group_sizes" in weights:
        return "MatryoshkaBatchTopKSAE"
    if "W_enc" in weights:
        return "JumpReluAutoEncoder"
    if "k" in weights:
        # Top-k and batch top-k have the same tensors; without the configuration nothing tells them apart.
        return "AutoEncoderTopK or BatchTopKSAE (config.json, which tells them apart, is missing)"
    return "AutoEncoder" if "bias" in weights else "AutoEncoderNew"


def _hook(trainer: dict[str, Any]) -> str:
    layer, part = trainer.get("layer"), str(trainer.get("submodule_name") or "resid_post")
    names = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "att": "hook_attn_out"}
    kind = next((hook for start, hook in names.items() if part.startswith(start)), None)
    if "resid_pre" in part:
        kind = "hook_resid_pre"
    return f"blocks.{layer}.{kind}" if isinstance(layer, int) and kind else ""
