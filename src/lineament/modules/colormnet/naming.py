"""What the published checkpoint calls each tensor, and what transformers does: the mapping, in both directions.

Weights are saved under their published names, so that no version of transformers, which renames parts of its models, changes what a file means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lineament.core.checks import require
from lineament.load.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from lineament.modules.colormnet.network import ColorMNet

LICENCE = "ColorMNet's published weights: CC BY-NC-SA 4.0 (no commercial use; share alike), Yang, Dong, Tang and Pan 2024"

_VIT = "key_encoder.network2.backbone."
# transformers 5, transformers 4.
_ATTENTION = {
    "q_proj": 0,
    "attention.query": 0,
    "k_proj": 1,
    "attention.key": 1,
    "v_proj": 2,
    "attention.value": 2,
}
_RULES = [
    (r"embeddings\.(cls_token|mask_token)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.(?:o_proj|output\.dense)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(norm1|norm2|mlp)\.(.+)", r"blocks.\1.\2.\3"),
    (r"layernorm\.(\w+)", r"norm.\1"),
]


def published_name(own: str) -> tuple[str, int | None]:
    """The published name of a tensor of the model, and which third of that it is where q, k and v are one.

    >>> published_name("key_encoder.detail.encoder.stages.0.layers.1.layer.2.convolution.weight")
    ('key_encoder.res2.1.conv3.weight', None)
    >>> published_name("key_encoder.network2.backbone.encoder.layer.3.attention.k_proj.bias")
    ('key_encoder.network2.backbone.blocks.3.attn.qkv.bias', 1)
    """
    if own.startswith(_VIT):
        inner = own.removeprefix(_VIT)
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.(\w+|attention\.\w+)\.(weight|bias)", inner)
        if found and found[2] in _ATTENTION:
            return f"{_VIT}blocks.{found[1]}.attn.qkv.{found[3]}", _ATTENTION[found[2]]
        for pattern, name in _RULES:
            if found := re.fullmatch(pattern, inner):
                return _VIT + found.expand(name), None
    for prefix, first in (("key_encoder.detail.", "res2"), ("value_encoder.chroma.", "layer1")):
        if own.startswith(prefix):
            return prefix.split(".")[0] + "." + _residual(own.removeprefix(prefix), first), None
    return own, None


def _residual(inner: str, first: str) -> str:
    kind = {"convolution": "conv", "normalization": "bn"}
    if found := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", inner):
        return f"{kind[found[1]]}1.{found[2]}"
    found = re.fullmatch(
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:layer\.(\d)|(shortcut))\.(convolution|normalization)\.(\w+)",
        inner,
    )
    assert found, inner
    stage = first if found[1] == "0" else f"layer{int(found[1]) + 1}"
    part = found[5]
    last = f"{kind[part]}{int(found[3]) + 1}" if found[3] else f"downsample.{list(kind).index(part)}"
    return f"{stage}.{found[2]}.{last}.{found[6]}"


def published_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under their published names; counters of batch norm are left out."""
    parts: dict[str, dict[int | None, Tensor]] = {}
    for own, tensor in model.state_dict().items():
        if not own.endswith("num_batches_tracked"):
            name, third = published_name(own)
            parts.setdefault(name, {})[third] = tensor
    return {
        name: found[None] if None in found else torch.cat([found[third] for third in range(3)])
        for name, found in parts.items()
    }


def from_published(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors under their published names; every one must be there and fit."""
    own = model.state_dict()
    new, used = {}, set()
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            continue
        told, third = published_name(name)
        require(
            told in state,
            f"weights: {told!r} is missing; expected a checkpoint of ColorMNet with this configuration",
        )
        found = state[told] if third is None else state[told].chunk(3)[third]
        if told == "value_encoder.conv1.weight" and found.shape[1] == tensor.shape[1] - 1:
            # A network of one object sees no other one: a channel of zeros.
            found = torch.cat([found, torch.zeros_like(found[:, :1])], 1)
        require(
            found.shape == tensor.shape,
            f"weights: {told!r} has the shape {tuple(found.shape)}, expected {tuple(tensor.shape)}",
        )
        new[name] = found
        used.add(told)
    over = sorted(name for name in set(state) - used if not name.endswith("num_batches_tracked"))
    require(not over, f"weights: {over[:1]} is no tensor of this network ({len(over)} such)")
    model.load_state_dict(new, strict=False)


def from_official(path: str | Path) -> ColorMNet:
    """The network of the published checkpoint (a ``.pth`` of tensors, read without pickle's code, or ``.safetensors``).

    The weights are not part of Lineament; ``model.licence`` says on which terms their authors give them. ``model.save_pretrained(folder)`` keeps them
    as safetensors.

    Raises:
        InputError: the file is none, is not read by ``weights_only``, or holds other tensors.

    >>> from_official("no-such-file.pth")
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: path: 'no-such-file.pth' is no file; expected the published checkpoint, a .pth or .safetensors
    """
    from lineament.modules.colormnet.configuration import ColorMNetConfig
    from lineament.modules.colormnet.network import ColorMNet

    path = Path(path)
    require(
        path.is_file(),
        f"path: {str(path)!r} is no file; expected the published checkpoint, a .pth or .safetensors",
    )
    state = read_checkpoint(path, "path")
    needed = ("key_proj.key_proj.weight", "value_encoder.fuser.block2.conv2.weight")
    require(
        isinstance(state, Mapping) and all(name in state for name in needed),
        f"path: {str(path)!r} has no {needed[0]!r}; expected a checkpoint of ColorMNet",
    )
    hidden = state.get("decoder.hidden_update.transform.weight")
    model = ColorMNet(
        ColorMNetConfig(
            key_width=len(state[needed[0]]),
            value_width=len(state[needed[1]]),
            hidden_width=0 if hidden is None else len(hidden) // 3,
        )
    )
    from_published(model, state)
    model.licence = LICENCE
    return model.eval()
