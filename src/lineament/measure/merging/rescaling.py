"""Bring what makes each channel to norm one: under a ReLU, channels that differ by a positive factor are the same feature."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lineament.core.surgery.folding import alike
from lineament.core.surgery.groups import ChannelGroup
from lineament.measure.merging.distance import Weights, counted


def rescaled(model: nn.Module, groups: Sequence[ChannelGroup], example: Any) -> nn.Module:
    """A copy with rows of norm one (bias included) and the norms in the columns, for each group where that keeps the function."""

    new = model
    for group in groups:
        if group.having("norm", "scale") or group.products or group.heads:
            continue
        tried = _scaled(new, group)
        if alike(new, tried, example):
            new = tried
    return new


def _scaled(model: nn.Module, group: ChannelGroup) -> nn.Module:
    new = copy.deepcopy(model)
    tensors = {**dict(new.named_parameters()), **dict(new.named_buffers())}
    values = {e.parameter: tensors[e.parameter].detach().double() for e in group.entries}
    makes, _ = counted(group.entries, values, "all")
    weights = Weights(values)
    channels = list(range(group.size))
    squares = sum(weights.rows(e, channels).square().sum(1) for e in makes)
    norms = torch.as_tensor(squares).sqrt()
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    with torch.no_grad():
        for e in group.entries:
            moved = tensors[e.parameter].movedim(e.axis, 0)
            factor = norms if e.role == "read" else 1 / norms
            wide = factor.repeat_interleave(e.slots.shape[1]).view(-1, *(1,) * (moved.ndim - 1)).to(moved)
            slots = e.slots.reshape(-1)
            moved[slots] = moved[slots] * wide
    return new
