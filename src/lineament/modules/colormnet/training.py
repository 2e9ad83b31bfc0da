"""How ColorMNet is trained: clips of a few frames, each coloured from the ones before, mean |ab - true ab| over all but the first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.modules.colormnet.memory import read_all
from lineament.modules.colormnet.network import ColorMNet


def clip_losses(
    model: ColorMNet,
    lightness: Float[Tensor, "batch frames 1 height width"],
    ab: Float[Tensor, "batch frames 2 height width"],
    *,
    deep: Sequence[bool],
    decoder: Sequence[bool] | None = None,
    references: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, "frames_but_one"]:
    """The loss of each frame but the first, whose colours are given; what was predicted enters memory, and gradients pass through it.

    Args:
        deep: for each frame, whether its value updates the hidden state.
        decoder: for each frame, whether the decoder does, which comes before; default: all but the last.
        references: for each frame, which earlier ones its memory holds; default: all.
    """
    length = lightness.shape[1]
    frames = lightness.expand(-1, -1, 3, -1, -1)
    features = [model.encode_frame(frames[:, t]) for t in range(length)]
    hidden = model.empty_hidden(features[0].key)
    value, hidden = model.encode_value(frames[:, 0], features[0].f16, hidden, ab[:, 0], deep=deep[0])
    values, losses = [value], []
    for t in range(1, length):
        now = features[t]
        earlier = range(t) if references is None else references[t]
        key, shrinkage = (
            torch.cat([getattr(features[s], name).flatten(2) for s in earlier], 2)
            for name in ("key", "shrinkage")
        )
        stored = torch.cat([values[s].flatten(1, 2).flatten(2) for s in earlier], 2)
        answer = read_all(key, shrinkage, now.key.flatten(2), now.selection.flatten(2), stored)
        answer = answer.unflatten(1, values[0].shape[1:3]).unflatten(3, now.key.shape[2:])
        answer = answer + model.near(now.key, features[t - 1].key, values[t - 1])
        update = t < length - 1 if decoder is None else decoder[t]
        hidden, predicted = model.decode(now, answer, hidden, update=update)
        losses.append((predicted - ab[:, t]).abs().mean())
        if t < length - 1:
            value, hidden = model.encode_value(frames[:, t], now.f16, hidden, predicted, deep=deep[t])
            values.append(value)
    return torch.stack(losses)
