"""The parts of ColorMNet that work on features of each colour channel (a and b are two "objects"), [batch, object, channels, h, w].

What depends on the frame alone is shared by both objects: a convolution of [frame, object] features is split into its frame part, computed
once, and its object part, which is exact and saves a third of the decoder's work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import require


def over_objects(function, x: Tensor) -> Tensor:
    """``function`` of [batch * object, ...], put back to [batch, object, ...]."""
    return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def resized(x: Tensor, factor: float, mode: str = "bilinear") -> Tensor:
    """Each object's map, ``factor`` times as large."""
    aligned = {"align_corners": False} if mode == "bilinear" else {}
    return over_objects(lambda y: F.interpolate(y, scale_factor=factor, mode=mode, **aligned), x)


def averaged(x: Tensor, like: Tensor) -> Tensor:
    """Each object's map brought down to the size of another by means over areas."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return over_objects(lambda y: F.interpolate(y, size=like.shape[-2:], mode="area"), x)


def conv3(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


def gated_update(values: Tensor, hidden: Tensor) -> Tensor:
    """The hidden state after a step: σ(f) h (1 - σ(u)) + σ(u) tanh(n), with [f, u, n] = ``values`` along channels."""
    forget, update, new = values.chunk(3, 2)
    update = update.sigmoid()
    return forget.sigmoid() * hidden * (1 - update) + update * new.tanh()


def with_frame(conv: nn.Conv2d, frame: Tensor, objects: Tensor) -> Tensor:
    """``conv`` of the channels [frame, objects], its frame part computed once for all objects."""
    width = frame.shape[1]
    shared = F.conv2d(frame, conv.weight[:, :width], conv.bias, conv.stride, conv.padding)
    own = over_objects(
        lambda g: F.conv2d(g, conv.weight[:, width:], None, conv.stride, conv.padding), objects
    )
    return own + shared[:, None]


class ResidualBlock(nn.Module):
    """conv(relu(conv(relu(x)))) + x, with a convolution of x where widths differ."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.downsample = conv3(inside, outside) if inside != outside else None
        self.conv1, self.conv2 = conv3(inside, outside), conv3(outside, outside)

    def forward(self, x: Tensor) -> Tensor:
        return over_objects(self._one, x)

    def _one(self, x: Tensor) -> Tensor:
        inner = self.conv2(self.conv1(x.relu()).relu_())
        return inner.add_(x if self.downsample is None else self.downsample(x))

    def joined(self, frame: Tensor, objects: Tensor) -> Tensor:
        """The block of the channels [frame, objects]."""
        inner = with_frame(self.conv1, frame.relu(), objects.relu())
        inner = over_objects(self.conv2, inner.relu_())
        if self.downsample is None:
            return inner + torch.cat([frame[:, None].expand(-1, objects.shape[1], -1, -1, -1), objects], 2)
        return inner + with_frame(self.downsample, frame, objects)


class ChannelGate(nn.Module):
    """Channels weighted by σ(mlp(mean) + mlp(max))."""

    def __init__(self, width: int, reduction: int):
        super().__init__()
        inner = width // reduction
        require(inner > 0, f"reduction: got {reduction}, expected at most the width, {width}")
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        return x * scale.sigmoid()[:, :, None, None]


class SpatialGate(nn.Module):
    """Places weighted by σ(conv7x7([max, mean] over channels))."""

    def __init__(self):
        super().__init__()
        self.spatial = nn.ModuleDict({"conv": nn.Conv2d(2, 1, 7, padding=3)})

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([x.amax(1), x.mean(1)], 1)
        return x * self.spatial["conv"](pooled).sigmoid()


class ChannelSpatialGate(nn.Module):
    """CBAM: a gate over channels, then one over places."""

    def __init__(self, width: int, reduction: int = 16):
        super().__init__()
        self.ChannelGate, self.SpatialGate = ChannelGate(width, reduction), SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        return self.SpatialGate(self.ChannelGate(x))


class ObjectFusion(nn.Module):
    """Features of the frame joined to each object's: y = GRes([x, g]); GRes(y + CBAM(y))."""

    def __init__(self, frame: int, objects: int, middle: int, outside: int, *, reduction: int = 16):
        super().__init__()
        self.block1 = ResidualBlock(frame + objects, middle)
        self.attention = ChannelSpatialGate(middle, reduction)
        self.block2 = ResidualBlock(middle, outside)

    def forward(self, frame: Tensor, objects: Tensor) -> Tensor:
        y = self.block1.joined(frame, objects)
        return self.block2(y + over_objects(self.attention, y))


class UpsampleBlock(nn.Module):
    """An object's map, twice as large, with the frame's finer features added."""

    def __init__(self, skip: int, inside: int, outside: int, *, factor: int = 2):
        super().__init__()
        self.skip_conv, self.out_conv, self.factor = (
            conv3(skip, inside),
            ResidualBlock(inside, outside),
            factor,
        )

    def forward(self, skip: Tensor, objects: Tensor) -> Tensor:
        return self.of_skip(self.skip_conv(skip), objects)

    def of_skip(self, finer: Tensor, objects: Tensor) -> Tensor:
        """The same from what :attr:`skip_conv` made of the frame."""
        return self.out_conv(resized(objects, self.factor).add_(finer[:, None]))


class ValueCell(nn.Module):
    """The hidden state after a frame enters memory ("deep update")."""

    def __init__(self, value: int, hidden: int):
        super().__init__()
        self.transform = conv3(value + hidden, 3 * hidden)

    def forward(self, value: Tensor, hidden: Tensor) -> Tensor:
        return gated_update(over_objects(self.transform, torch.cat([value, hidden], 2)), hidden)


class DecoderCell(nn.Module):
    """The hidden state after a frame that does not enter memory, from the decoder's maps at 1x, 2x and 4x."""

    def __init__(self, widths: tuple[int, int, int], middle: int, hidden: int):
        super().__init__()
        self.g16_conv, self.g8_conv, self.g4_conv = (nn.Conv2d(width, middle, 1) for width in widths)
        self.transform = conv3(middle + hidden, 3 * hidden)

    def forward(self, g16: Tensor, g8: Tensor, g4: Tensor, hidden: Tensor) -> Tensor:
        """Maps that have the hidden state's size already are taken as they are."""
        g = (
            over_objects(self.g16_conv, g16)
            + over_objects(self.g8_conv, averaged(g8, hidden))
            + over_objects(self.g4_conv, averaged(g4, hidden))
        )
        return gated_update(over_objects(self.transform, torch.cat([g, hidden], 2)), hidden)
