"""ColorMNet: the chroma of each frame of a grey video, from a memory of frames whose colours are known.

Yang, Dong, Tang and Pan 2024, arXiv 2404.06251. Pictures are CIE Lab, l = (L - 50) / 50 and (a, b) / 110; a and b are two "objects" that pass
the same weights, each seeing the other. Values of memory come from ResNet-18 with the chroma as further channels; the decoder
emits tanh of one logit for each object. The network is used in evaluation mode, in training too: its statistics are frozen.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, require, show
from lineament.core.files import atomic_write, write_json
from lineament.load.checkpoints import read_checkpoint
from lineament.modules.colormnet.blocks import (
    DecoderCell,
    ObjectFusion,
    UpsampleBlock,
    ValueCell,
    averaged,
    over_objects,
)
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.features import (
    FrameEncoder,
    FrameFeatures,
    KeyProjection,
    residual_network,
    stages_of,
)
from lineament.modules.colormnet.local_attention import LocalAttention
from lineament.modules.colormnet.naming import from_published, published_state

_WEIGHTS, _SETTINGS = "model.safetensors", "config.json"


class ValueEncoder(nn.Module):
    """The value of each object, from the frame and both chroma channels; with ``deep`` the hidden state moves on."""

    def __init__(self, config: ColorMNetConfig):
        super().__init__()
        self.chroma = residual_network(
            config.value_stem, config.value_stages, config.value_depths, "basic", 5
        )
        value = config.value_width
        self.fuser = ObjectFusion(config.stages[-1], config.value_stages[-1], value, value)
        self.hidden_reinforce = ValueCell(value, config.hidden_width) if config.hidden_width else None

    def forward(
        self, frame: Tensor, f16: Tensor, hidden: Tensor | None, ab: Tensor, *, deep: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        objects = ab.shape[1]
        others = ab.sum(1, keepdim=True) - ab if objects > 1 else torch.zeros_like(ab)
        x = torch.cat([frame[:, None].expand(-1, objects, -1, -1, -1), ab[:, :, None], others[:, :, None]], 2)

        def encoded(y: Tensor) -> Tensor:
            y = stages_of(self.chroma, y)[-1]
            return F.interpolate(y, size=f16.shape[2:], mode="bilinear", align_corners=False)

        value = self.fuser(f16, over_objects(encoded, x))
        if deep and self.hidden_reinforce is not None and hidden is not None:
            hidden = self.hidden_reinforce(value, hidden)
        return value, hidden


# Rows of 1/16 whose maps at 1/4 are decoded at a time, where no gradient needs all: a frame of 480 lines in two.
_STRIP = 18


class Decoder(nn.Module):
    """The chroma of each object from what memory answered; with ``update`` the hidden state moves on."""

    def __init__(self, config: ColorMNetConfig):
        super().__init__()
        s4, s8, s16 = config.stages
        fused, fine, hidden = config.fused, config.decoded, config.hidden_width
        self.fuser = ObjectFusion(s16, config.value_width + hidden, fused, fused)
        self.hidden_update = DecoderCell((fused, fine, fine + 1), fine, hidden) if hidden else None
        self.up_16_8, self.up_8_4 = UpsampleBlock(s8, fused, fine), UpsampleBlock(s4, fine, fine)
        self.pred = nn.Conv2d(fine, 1, 3, padding=1)

    def forward(
        self, features: FrameFeatures, hidden: Tensor | None, answer: Tensor, *, update: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        given = answer if hidden is None else torch.cat([answer, hidden], 2)
        g16 = self.fuser(features.f16, given)
        g8 = self.up_16_8(features.f8, g16)
        if torch.is_grad_enabled():
            g4 = self.up_8_4(features.f4, g8)
            logits = over_objects(self.pred, g4.relu())
            coarse = torch.cat([averaged(x, g16) for x in (g4, logits)], 2)
        else:
            logits, coarse = self._in_strips(features.f4, g8, g16.shape[3])
        if update and self.hidden_update is not None and hidden is not None:
            hidden = self.hidden_update(g16, g8, coarse, hidden)
        large = F.interpolate(logits[:, :, 0], scale_factor=4, mode="bilinear", align_corners=False)
        return hidden, large.tanh()

    def _in_strips(self, f4: Tensor, g8: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The chroma at 1/4, and what the hidden state reads of it at 1/16: the largest maps of all, so one object after the other, and a few rows (of 1/16) at a time."""
        parts = []
        for low in range(0, rows, _STRIP):
            high = min(low + _STRIP, rows)
            # Where a strip is cut, up-sampling and three convolutions have spoilt four rows of 1/4.
            above, below = (1 if low else 0), (1 if high < rows else 0)
            fine = slice(4 * (low - above), 4 * (high + below))
            finer = self.up_8_4.skip_conv(f4[:, :, fine])
            inner = slice(4 * above, 4 * (high - low + above))
            logits, coarse = [], []
            for part in g8[:, :, :, fine.start // 2 : fine.stop // 2].split(1, 1):
                g4 = self.up_8_4.of_skip(finer, part)
                logits.append(over_objects(self.pred, g4.relu())[:, :, :, inner])
                held = torch.cat([g4[:, :, :, inner], logits[-1]], 2)
                coarse.append(over_objects(lambda y: F.avg_pool2d(y, 4), held))
                del g4, held
            parts.append((torch.cat(logits, 1), torch.cat(coarse, 1)))
        first, second = (torch.cat(x, 3) for x in zip(*parts))
        return first, second


class ColorMNet(nn.Module):
    """The network; :func:`lineament.modules.colorize` runs it over a film.

    >>> model = ColorMNet(ColorMNetConfig.tiny()).eval()
    >>> frame, ab = torch.zeros(1, 3, 32, 48), torch.zeros(1, 2, 32, 48)
    >>> features = model.encode_frame(frame)
    >>> value, hidden = model.encode_value(frame, features.f16, model.empty_hidden(features.key), ab)
    >>> value.shape, model.decode(features, value, hidden)[1].shape
    (torch.Size([1, 2, 32, 2, 3]), torch.Size([1, 2, 32, 48]))
    """

    def __init__(self, config: ColorMNetConfig | None = None):
        super().__init__()
        self.config = config = config or ColorMNetConfig()
        self.key_encoder = FrameEncoder(config)
        self.value_encoder = ValueEncoder(config)
        self.key_proj = KeyProjection(config.stages[-1], config.key_width)
        self.short_term_attn = (
            LocalAttention(config.key_width, 2 * config.value_width, config.window) if config.window else None
        )
        self.decoder = Decoder(config)
        self.licence = ""

    def encode_frame(self, frame: Float[Tensor, "batch 3 height width"]) -> FrameFeatures:
        """What the frame alone says; sides must be multiples of ``config.multiple``."""
        require(
            frame.ndim == 4
            and frame.shape[1] == 3
            and not any(side % self.config.multiple for side in frame.shape[2:]),
            f"frame: got {show(frame)}, expected (batch, 3, height, width) with sides that are multiples of "
            f"{self.config.multiple}; pad it with padded()",
        )
        f16, f8, f4 = self.key_encoder(frame)
        key, shrinkage, selection = self.key_proj(f16)
        return FrameFeatures(key, shrinkage, selection, f16, f8, f4)

    def encode_value(
        self, frame: Tensor, f16: Tensor, hidden: Tensor | None, ab: Tensor, *, deep: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The value [batch, object, width, h, w] that memory keeps of a frame with its chroma, and the hidden state."""
        return self.value_encoder(frame, f16, hidden, ab, deep=deep)

    def near(self, key: Tensor, other_key: Tensor, other_value: Tensor) -> Tensor | float:
        """What local attention finds in a neighbouring frame."""
        return 0.0 if self.short_term_attn is None else self.short_term_attn(key, other_key, other_value)

    def decode(
        self, features: FrameFeatures, answer: Tensor, hidden: Tensor | None, *, update: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """The hidden state, and the chroma [batch, 2, height, width] in [-1, 1]."""
        return self.decoder(features, hidden, answer, update=update)

    def empty_hidden(self, key: Tensor) -> Tensor | None:
        """The hidden state before the first frame."""
        width = self.config.hidden_width
        return key.new_zeros(len(key), 2, width, *key.shape[2:]) if width else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights (safetensors, under their published names) and the configuration."""
        from safetensors.torch import save_file

        folder = Path(folder)
        with atomic_write(folder / _WEIGHTS) as temporary:
            state = {name: tensor.contiguous() for name, tensor in published_state(self).items()}
            save_file(state, temporary, metadata={"licence": self.licence} if self.licence else None)
        write_json(folder / _SETTINGS, self.config.to_dict() | {"licence": self.licence})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ColorMNet:
        """The network of :meth:`save_pretrained`, in evaluation mode."""
        folder = Path(folder)
        for name in (_WEIGHTS, _SETTINGS):
            require(
                (folder / name).is_file(),
                f"folder: {str(folder)!r} has no {name}; expected what save_pretrained() wrote "
                "(published weights: from_official())",
            )
        try:
            settings = json.loads((folder / _SETTINGS).read_text())
        except ValueError as error:
            raise InputError(f"folder: {str(folder / _SETTINGS)!r} is no JSON: {error}") from error
        require(isinstance(settings, dict), f"folder: {str(folder / _SETTINGS)!r} holds no settings")
        licence = settings.pop("licence", "")
        model = cls(ColorMNetConfig.from_dict(settings))
        from_published(model, read_checkpoint(folder / _WEIGHTS, "folder"))
        model.licence = licence
        return model.eval()
