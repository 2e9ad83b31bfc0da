"""StyleGAN2 as a prior: a mapping network, modulated convolutions with noise, and RGB summed over resolutions.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020, arXiv 1912.04958; searched as in Fang et al. 2023, arXiv 2308.04699, section 1.4: the
code is one style for each layer (W+) and all noise maps, and the picture summed so far goes along from block to block, so that no stage begins with another picture than the
one before ended with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import number, require
from lineament.privacy.priors import Block

_GAIN = math.sqrt(2)


class Scaled(nn.Module):
    """A linear layer whose weights are divided by the root of their number, and learn at ``rate`` (Karras et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, *, rate: float = 1.0, bias: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.rate / math.sqrt(self.weight.shape[1])), self.bias * self.rate)


class Styled(nn.Module):
    """A convolution whose input channels are scaled by a style and whose output is brought to variance 1, then noise, bias and leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, style: int, *, doubles: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.strength = nn.Parameter(torch.zeros(()))
        self.affine = Scaled(style, inputs, bias=1.0)
        self.doubles = doubles

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        style, weight = self.affine(w), self.weight / math.sqrt(self.weight[0].numel())
        # Scaling inputs and outputs gives each sample its own weights without making them.
        norm = torch.einsum("oikl,ni->no", weight.square(), style.square())
        x = x * style[:, :, None, None]
        if self.doubles:
            x = _blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1, 1)
        else:
            x = F.conv2d(x, weight, padding=1)
        x = x * (norm + 1e-8).rsqrt()[:, :, None, None] + self.strength * noise
        return F.leaky_relu(x + self.bias[:, None, None], 0.2) * _GAIN


class ToRGB(nn.Module):
    """Channels mixed to colours by weights that a style scales."""

    def __init__(self, inputs: int, outputs: int, style: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.affine = Scaled(style, inputs, bias=1.0)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) / math.sqrt(self.weight.shape[1])
        return F.conv2d(x * style[:, :, None, None], self.weight, self.bias)


class StyleGAN2(nn.Module):
    """The generator; called on codes z [n, code], it makes pictures around [-1, 1].

    Args:
        side: of the pictures, 4 times a power of 2. colours: their channels. code: entries of z and w. widths: channels at 4, 8, ... pixels.
        depth: layers of the mapping network.

    >>> StyleGAN2(16, 1, code=8, widths=(16, 16, 8))(torch.zeros(2, 8)).shape
    torch.Size([2, 1, 16, 16])
    """

    def __init__(self, side: int, colours: int, *, code: int, widths: Sequence[int], depth: int = 4):
        super().__init__()
        require(
            len(widths) > 1 and side == 4 * 2 ** (len(widths) - 1),
            f"side: got {side} with {len(widths)} widths, expected 4 times a power of 2, and a width for 4, 8, ... pixels",
        )
        number("depth", depth, low=1, integer=True)
        self.code, self.side, self.colours, self.widths = code, side, colours, tuple(widths)
        self.mapping = nn.ModuleList(Scaled(code, code, rate=0.01) for _ in range(depth))
        self.const = nn.Parameter(torch.randn(widths[0], 4, 4))
        layers = [(widths[0], widths[0], False)]
        for before, after in itertools.pairwise(widths):
            layers += [(before, after, True), (after, after, False)]
        self.convs = nn.ModuleList(Styled(a, b, code, doubles=up) for a, b, up in layers)
        self.rgbs = nn.ModuleList(ToRGB(width, colours, code) for width in widths)

    @property
    def sides(self) -> list[int]:
        """Of each layer's noise map."""
        return [4 * 2 ** ((k + 1) // 2) for k in range(len(self.convs))]

    @property
    def styles(self) -> int:
        """Styles of W+: one a convolution, and one for the last colours."""
        return len(self.convs) + 1

    def before_last(self, z: Tensor) -> Tensor:
        """The mapping network up to its last leaky ReLU."""
        x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for k, layer in enumerate(self.mapping):
            x = layer(x if k == 0 else _style(x))
        return x

    def block(self, k: int, x: Tensor, rgb: Tensor | None, w: Tensor, noise: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One resolution: features and colours so far to those of twice the side; w [n, styles, code], ``noise`` of the layers of this block."""
        first = 0 if k == 0 else 2 * k - 1
        for j, own in enumerate(noise):
            x = self.convs[first + j](x, w[:, first + j], own)
        told = self.rgbs[k](x, w[:, first + len(noise)])
        return x, told if rgb is None else told + _blur(_spread(rgb), 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        w = _style(self.before_last(z))[:, None].expand(-1, self.styles, -1)
        noise = [torch.randn(len(z), 1, side, side, device=z.device, dtype=z.dtype) for side in self.sides]
        x, rgb = self.const.expand(len(z), -1, -1, -1), None
        for k in range(len(self.rgbs)):
            x, rgb = self.block(k, x, rgb, w, noise[:1] if k == 0 else noise[2 * k - 1 : 2 * k + 1])
        return x[:, :0] if rgb is None else rgb


class StylePrior:
    """A StyleGAN2 as the search asks for it. A code is the styles' coordinates and all noise maps, each standard normal: w = leaky ReLU(mean + deviation · n), with mean and
    deviation of the mapping network's outputs before their last leaky ReLU (P space). What a later block takes is features, colours so far, coordinates and the noise still to
    come, side by side.

    >>> prior = StylePrior(StyleGAN2(8, 1, code=4, widths=(8, 8)))
    >>> prior.code, [size for size, _ in prior.parts(0)]
    (160, [4, 4, 4, 4, 16, 64, 64])
    """

    def __init__(self, generator: StyleGAN2, render: Block = lambda made: made, *, samples: int = 4096):
        self.generator, self.render = generator.eval().requires_grad_(False), render
        device = generator.const.device
        z = torch.randn(samples, generator.code, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            told = generator.before_last(z.to(device, generator.const.dtype))
        self.mean, self.deviation = told.mean(0), told.std(0)
        self.code = generator.styles * generator.code + sum(side**2 for side in generator.sides)

    @property
    def side(self) -> int:
        """Of its pictures."""
        return self.generator.side

    def parts(self, stage: int) -> list[tuple[int, str]]:
        """How what a stage searches is made up: sizes, and whether each part is ``"free"``, on its own ``"sphere"``, or ``"fixed"``."""
        g = self.generator
        latents = [(g.code, "sphere")] * g.styles
        maps = [(side**2, "sphere") for side in g.sides[0 if stage == 0 else 2 * stage - 1 :]]
        if stage == 0:
            return [*latents, *maps]
        side = 4 * 2 ** (stage - 1)
        return [(g.widths[stage - 1] * side**2, "free"), (g.colours * side**2, "fixed"), *latents, *maps]

    def blocks(self, code: Tensor, targets: Tensor | None) -> Sequence[Block]:
        return [self._block(k) for k in range(len(self.generator.rgbs))]

    def _block(self, k: int) -> Block:
        g = self.generator

        def run(value: Tensor) -> Tensor:
            parts = list(value.split([size for size, _ in self.parts(k)], 1))
            n, x, rgb = len(value), g.const.expand(len(value), -1, -1, -1), None
            if k > 0:
                side = 4 * 2 ** (k - 1)
                x, rgb = parts.pop(0).view(n, -1, side, side), parts.pop(0).view(n, -1, side, side)
            latents, maps = parts[: g.styles], parts[g.styles :]
            w = _style(self.mean + self.deviation * torch.stack(latents, 1))
            used = 1 if k == 0 else 2
            sides = g.sides[0 if k == 0 else 2 * k - 1 :]
            noise = [m.view(n, 1, side, side) for m, side in zip(maps[:used], sides)]
            x, rgb = g.block(k, x, rgb, w, noise)
            if k == len(g.rgbs) - 1:
                return rgb
            return torch.cat([x.flatten(1), rgb.flatten(1), *latents, *maps[used:]], 1)

        return run


def _style(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * _GAIN


def _spread(x: Tensor) -> Tensor:
    """Zeros between the pixels."""
    n, channels, height, width = x.shape
    wide = x.new_zeros(n, channels, height, 2, width, 2)
    wide[:, :, :, 0, :, 0] = x
    return wide.view(n, channels, 2 * height, 2 * width)


def _blur(x: Tensor, before: int, after: int) -> Tensor:
    """The binomial filter (1, 3, 3, 1) along both sides, with the gain 4 that makes up for zeros between pixels."""
    x = F.pad(x, (before, after, before, after))
    # Sums of slices: grouped convolutions of one channel have slow derivatives.
    x = (x[..., :-3] + x[..., 3:] + 3 * (x[..., 1:-2] + x[..., 2:-1])) / 4
    return (x[..., :-3, :] + x[..., 3:, :] + 3 * (x[..., 1:-2, :] + x[..., 2:-1, :])) / 4
