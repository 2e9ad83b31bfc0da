"""The two phases of backpropagation saliency: extract per-location contributions, aggregate them over channels.

A virtual identity layer is put behind an activation x; the gradient g of the score gives, at each location u, a
contribution to the gradient of that layer's weights (Rebuffi et al. 2020, arXiv 2004.02866):

    bias: g_u      scaling: g_u ⊙ x_u      conv N x N: g_u ⊗ window_u(x)      depthwise: g_uk window_u(x_k)

The outer products are never formed. A sum over them factors, a norm is a product of norms, and an extreme of products is
a product of extremes, so that every map costs O(channels x locations), not O(channels² x locations).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lineament.core import checks

EXTRACTS = ("bias", "scaling", "conv", "depthwise")
AGGREGATES = ("sum", "norm", "filter_norm", "max", "max_abs")


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution: which inputs each output location sees."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom, as F.pad has it
    dilation: tuple[int, int] = (1, 1)
    mode: str = "constant"

    @classmethod
    def square(cls, size: int) -> Window:
        """An N x N window of stride 1 with zero padding N // 2; N must be odd."""
        checks.number("kernel", size, low=1, integer=True)
        checks.require(
            size % 2 == 1, f"kernel: got {size}, expected an odd size, so that the map keeps its shape"
        )
        half = size // 2
        return cls((size, size), padding=(half, half, half, half))

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Window:
        """The geometry of a real convolution, its padding mode included."""
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        rows, columns = _pair(conv.kernel_size), _pair(conv.dilation)
        if isinstance(conv.padding, str):
            spans = [columns[i] * (rows[i] - 1) if conv.padding == "same" else 0 for i in (1, 0)]
            left, right, top, bottom = (half for span in spans for half in (span // 2, span - span // 2))
        else:
            height, width = _pair(conv.padding)
            left, right, top, bottom = width, width, height, height
        return cls(rows, _pair(conv.stride), (left, right, top, bottom), columns, mode)

    @property
    def trivial(self) -> bool:
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)

    def box(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """The sum over each location's window, channel by channel."""
        if self.trivial:
            return x
        batch, channels = x.shape[:2]
        flat = F.pad(x, self.padding, mode=self.mode).flatten(0, 1)[:, None]
        ones = torch.ones(1, 1, *self.kernel, dtype=x.dtype, device=x.device)
        summed = F.conv2d(flat, ones, stride=self.stride, dilation=self.dilation)
        return summed.reshape(batch, channels, *summed.shape[-2:])

    def most(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """The largest value in each location's window, the zeros of the padding among them."""
        if self.trivial:
            return x
        return F.max_pool2d(
            F.pad(x, self.padding, mode=self.mode), self.kernel, self.stride, dilation=self.dilation
        )


def aggregate_contributions(
    x: Float[Tensor, "batch channels rows columns"],
    g: Float[Tensor, "batch outputs height width"],
    extract: str = "conv",
    aggregate: str = "norm",
    *,
    window: Window | None = None,
    groups: int = 1,
) -> Float[Tensor, "batch 1 height width"]:
    """The map of one activation and its gradient, for any extraction and aggregation.

    Args:
        x: activation (for a real convolution: its input).
        g: gradient of the score with respect to the activation (for a real convolution: its output).
        extract: ``"bias"``, ``"scaling"``, ``"conv"`` or ``"depthwise"``.
        aggregate: over the entries e of a contribution: ``"sum"``, ``"norm"`` √Σe², ``"filter_norm"`` √Σmax(e,0)², ``"max"``, ``"max_abs"``.
        window: geometry for the two convolutions; 1 x 1 by default.
        groups: groups of a real convolution.

    >>> x, g = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1), torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1)
    >>> aggregate_contributions(x, g).item()
    10.0
    """
    checks.one_of("extract", extract, EXTRACTS)
    checks.one_of("aggregate", aggregate, AGGREGATES)
    # Squares of very small gradients (a saturated network) vanish in float32; all aggregations are homogeneous in g.
    scale = g.abs().amax((1, 2, 3), keepdim=True)
    tiny = torch.finfo(g.dtype).tiny ** 0.25
    if bool(((scale > 0) & (scale < tiny)).any()):
        scale = torch.where(scale > 0, scale, 1.0)
        maps = aggregate_contributions(x, g / scale, extract, aggregate, window=window, groups=groups)
        return scale * maps
    if extract == "bias":
        return _reduce(g, aggregate)
    if extract == "scaling":
        return _reduce(g * x, aggregate)
    window = window or Window()
    if extract == "depthwise":
        return _depthwise(x, g, aggregate, window)
    if groups == 1:
        return _outer(x, g, aggregate, window)
    # Each group is a convolution of its own: fold the groups into the batch, then join what they give.
    parts = _outer(_folded(x, groups), _folded(g, groups), aggregate, window)
    joined = parts.reshape(len(x), groups, *parts.shape[-2:])
    # The parts of a filtered norm are norms already, so that they join as norms.
    return _reduce(joined, "norm" if aggregate == "filter_norm" else aggregate)


def _folded(x: Tensor, groups: int) -> Tensor:
    return x.reshape(len(x) * groups, -1, *x.shape[-2:])


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _reduce(entries: Tensor, aggregate: str) -> Tensor:
    if aggregate == "sum":
        return entries.sum(1, keepdim=True)
    if aggregate == "norm":
        return torch.linalg.vector_norm(entries, dim=1, keepdim=True)
    if aggregate == "filter_norm":
        return torch.linalg.vector_norm(entries.clamp_min(0), dim=1, keepdim=True)
    if aggregate == "max":
        return entries.amax(1, keepdim=True)
    return entries.abs().amax(1, keepdim=True)


def _outer(x: Tensor, g: Tensor, aggregate: str, window: Window) -> Tensor:
    def total(t: Tensor) -> Tensor:
        return t.sum(1, keepdim=True)

    def squares(t: Tensor) -> Tensor:
        # A vector norm reads the tensor once; its square costs a map, not a copy of the activation.
        return torch.linalg.vector_norm(t, dim=1, keepdim=True).square()

    if aggregate == "sum":
        return window.box(total(x)) * total(g)
    if aggregate == "norm":
        if window.trivial:
            return torch.linalg.vector_norm(x, dim=1, keepdim=True) * torch.linalg.vector_norm(
                g, dim=1, keepdim=True
            )
        return (window.box(squares(x)) * squares(g)).clamp_min(0).sqrt()
    if aggregate == "filter_norm":
        # A product is positive where both factors are, or neither is.
        rising = window.box(squares(x.clamp_min(0))) * squares(g.clamp_min(0))
        falling = window.box(squares(x.clamp_max(0))) * squares(g.clamp_max(0))
        return (rising + falling).clamp_min(0).sqrt()
    if aggregate == "max_abs":
        return window.most(x.abs().amax(1, keepdim=True)) * g.abs().amax(1, keepdim=True)
    x_most, x_least = window.most(x.amax(1, keepdim=True)), -window.most(-x.amin(1, keepdim=True))
    g_most, g_least = g.amax(1, keepdim=True), g.amin(1, keepdim=True)
    # A product of two ranges is largest at one of its four corners.
    corners = [x_most * g_most, x_most * g_least, x_least * g_most, x_least * g_least]
    return torch.stack(corners).amax(0)


def _depthwise(x: Tensor, g: Tensor, aggregate: str, window: Window) -> Tensor:
    if aggregate == "sum":
        return (g * window.box(x)).sum(1, keepdim=True)
    if aggregate == "norm":
        return (g.square() * window.box(x.square())).sum(1, keepdim=True).clamp_min(0).sqrt()
    if aggregate == "filter_norm":
        rising = g.clamp_min(0).square() * window.box(x.clamp_min(0).square())
        falling = g.clamp_max(0).square() * window.box(x.clamp_max(0).square())
        return (rising + falling).sum(1, keepdim=True).clamp_min(0).sqrt()
    if aggregate == "max_abs":
        return (g.abs() * window.most(x.abs())).amax(1, keepdim=True)
    return torch.where(g >= 0, g * window.most(x), -g * window.most(-x)).amax(1, keepdim=True)


def smoothed(
    maps: Float[Tensor, "batch 1 height width"], fraction: float
) -> Float[Tensor, "batch 1 height width"]:
    """Maps blurred by a Gaussian of sigma = fraction · max(height, width), half width ⌈4 sigma⌉, replicate padding.

    >>> round(smoothed(torch.ones(1, 1, 4, 4), 0.2).mean().item(), 5)
    1.0
    """
    checks.number("smooth", fraction, low=0)
    if fraction == 0:
        return maps
    sigma = fraction * max(maps.shape[-2:])
    half = math.ceil(4 * sigma)
    offsets = torch.arange(-half, half + 1, dtype=maps.dtype, device=maps.device)
    bell = torch.exp(-0.5 * (offsets / sigma) ** 2)
    bell = bell / bell.sum()
    # Separable: along rows, then along columns. Replicating twice half the window needs no limit on its width.
    wide = F.pad(maps, (half, half, half, half), mode="replicate")
    return F.conv2d(F.conv2d(wide, bell.reshape(1, 1, 1, -1)), bell.reshape(1, 1, -1, 1))


def normalised(
    maps: Float[Tensor, "batch 1 height width"],
) -> tuple[Float[Tensor, "batch 1 height width"], Tensor]:
    """Each map scaled to [0, 1] by its minimum and maximum; and which maps were constant (they become zeros).

    >>> normalised(torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]]))[0].flatten().tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    constant = is_constant(maps)[:, None, None, None]
    scaled = (maps - low) / torch.where(constant, 1.0, high - low)
    return torch.where(constant, 0.0, scaled), constant.flatten()


def is_constant(maps: Float[Tensor, "batch 1 height width"]) -> Bool[Tensor, "batch"]:
    """Which maps have a range that is rounding noise: at most max(1e-10, 8 ulp) of their largest absolute value.

    >>> is_constant(torch.tensor([[[[1.0, 1.0 + 1e-7]]], [[[1.0, 1.1]]]])).tolist()
    [True, False]
    """
    low, high = maps.amin((1, 2, 3)), maps.amax((1, 2, 3))
    tolerance = max(1e-10, 8 * torch.finfo(maps.dtype).eps)
    return high - low <= tolerance * torch.maximum(high.abs(), low.abs())


def combined(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    *,
    how: str = "product",
    weights: str | Sequence[float] = "uniform",
) -> Float[Tensor, "batch 1 height width"]:
    """Several layers' maps as one: each resized to ``size``, scaled to [0, 1] per image, then joined.

    The sum is Σ_l w_l m_l, the product the weighted geometric mean Π_l m_l^w_l, with weights that sum to one.

    A layer whose map is constant says nothing about where: it adds zeros to a sum and is left out of a product.

    Args:
        maps: one (batch, 1, h, w) a layer, in depth order.
        size: (height, width).
        how: ``"sum"``, ``"product"``, or ``"plain_product"``, the product of the maps themselves, without weights.
        weights: ``"uniform"``, ``"linear"`` (1/L, 2/L, ..., 1 in depth order), or one non-negative number a layer.

    >>> two = [torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[0.0, 4.0]]]])]
    >>> combined(two, (1, 2)).flatten().tolist()
    [0.0, 1.0]
    """
    checks.one_of("how", how, ("sum", "product", "plain_product"))
    checks.require(len(maps) > 0, "maps: got none, expected at least one layer's maps")
    if isinstance(weights, str):
        checks.one_of("weights", weights, ("uniform", "linear"))
        values = [1.0] * len(maps) if weights == "uniform" else [float(i + 1) for i in range(len(maps))]
    else:
        values = [float(w) for w in weights]
    fits = len(values) == len(maps) and all(w >= 0 for w in values) and sum(values) > 0
    checks.require(fits, f"weights: got {values}, expected {len(maps)} non-negative numbers, not all zero")
    shares = [w / sum(values) for w in values]
    scaled, constant = zip(*(normalised(resized(m, size)) for m in maps))
    if how == "sum":
        return torch.stack([w * m for w, m in zip(shares, scaled)]).sum(0)
    powers = [1.0] * len(maps) if how == "plain_product" else shares
    silent = torch.stack(constant)[:, :, None, None, None]
    factors = torch.stack([m**w for w, m in zip(powers, scaled)])
    return torch.where(silent.all(0), 0.0, torch.where(silent, 1.0, factors).prod(0))


def resized(
    maps: Float[Tensor, "batch columns h w"], size: tuple[int, int]
) -> Float[Tensor, "batch columns height width"]:
    """Maps brought to (height, width), bilinear with ``align_corners=False``."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
