"""Gemma Scope: ``params.npz`` in folders such as ``layer_20/width_16k/average_l0_71``, read without pickles.

JumpReLU, whose bias is not subtracted from the input. The path says where it sits: ``res`` is the residual stream behind a layer, ``mlp`` what the MLP adds
(behind its norm), ``att`` the heads' mixed values.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lineament.core.checks import InputError, require
from lineament.dictionaries.formats.parts import Found, Request, Weights, autoencoder, placed

WEIGHTS = "params.npz"


def matches(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read(folder: Path, request: Request) -> Any:
    """The dictionary in a folder of Gemma Scope."""
    file = folder / WEIGHTS
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: torch.from_numpy(np.asarray(archive[name])) for name in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"folder: {str(file)!r} is damaged, or holds objects, which are not read ({error})"
        ) from error
    path = str(folder.absolute())
    kind = re.findall(r"gemma-scope-(\w+)-((?:pt|it))-(\w+)", path)
    size, state, part = kind[-1] if kind else ("", "", "")
    layers = re.findall(r"layer_(\d+)", path)
    require(
        "transcoder" not in path,
        "folder: a transcoder, which predicts another activation, has no counterpart here",
    )
    weights = Weights(arrays, file)
    encoder, decoder, b_dec = (
        weights.matrix("W_enc", "w_enc").T,
        weights.matrix("W_dec", "w_dec"),
        weights.get("b_dec"),
    )
    found = Found("Gemma Scope", f"gemma-2-{size}{'-it' if state == 'it' else ''}" if size else "")
    hooks = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
    if "embedding" in folder.parts:
        # Trained on embeddings before the model multiplies them by sqrt(d).
        root = decoder.shape[1] ** 0.5
        encoder, decoder, b_dec = encoder / root, decoder * root, b_dec * root
        found.hook = "hook_embed"
        found.notes.append("its units are those of the embeddings times sqrt(d)")
    elif layers and part in hooks:
        found.hook = f"blocks.{layers[-1]}.{hooks[part]}"
    made = autoencoder(
        "JumpReLU", encoder, decoder, weights.get("b_enc"), b_dec, subtract_bias=False, threshold=weights.get("threshold"),
    )  # fmt: skip
    return placed(made, found, request)
