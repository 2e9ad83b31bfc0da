"""EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors`` in a folder that is called after the module, ``layers.5`` or ``h.3.mlp``.

Top-k of relu(W (x - b_dec) + b). The folder's name is that of a module below the model's head, whose output is the activation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineament.core.checks import require, show
from lineament.dictionaries.formats.parts import Found, Request, Weights, autoencoder, placed, read_json
from lineament.load.checkpoints import read_checkpoint

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def matches(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read(folder: Path, request: Request) -> Any:
    """The dictionary in a folder of sparsify."""
    require((folder / CONFIG).is_file(), f"folder: {str(folder)!r} has {WEIGHTS!r} but no {CONFIG!r}")
    config = read_json(folder / CONFIG)
    for option, what in (
        ("transcode", "a transcoder, which predicts another activation"),
        ("skip_connection", "one with a skip connection"),
        ("signed", "one with signed features"),
    ):
        require(not config.get(option), f"folder: {option} is set: {what}, which has no counterpart here")
    function = config.get("activation", "topk")
    require(function == "topk", f"folder: activation {show(function)} has no counterpart here; expected topk")
    weights = Weights(read_checkpoint(folder / WEIGHTS, "folder"), folder / WEIGHTS)
    decoder = weights.matrix("W_dec")
    made = autoencoder(
        "TopK", weights.matrix("encoder.weight"), decoder, weights.get("encoder.bias"), weights.get("b_dec"),
        subtract_bias=True, k=weights.count("k", config.get("k"), len(decoder)),
    )  # fmt: skip
    run = folder.parent / "config.json"
    model = read_json(run).get("model") if run.is_file() else ""
    # Below the head: a model that has one finds the module by the end of its name.
    found = Found("sparsify", str(model or ""), site=folder.name if _module(folder.name) else None)
    return placed(made, found, request)


def _module(name: str) -> bool:
    parts = name.split(".")
    return all(part.isidentifier() or part.isdecimal() for part in parts) and any(map(str.isdecimal, parts))
