"""Max pooling whose second derivative is as fast as its first, in the layout that the convolutions around it want.

Once it is known which entry each window picks, pooling is linear: picking, and its transpose, adding back. PyTorch differentiates
it twice by way of copies with the channels first in memory (measured: a fifth of a product of LeNet's Hessian).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.curvature.fast.convolutions import channels_last, each, laid_out
from lineament.core.curvature.fast.recording import Recorded, call


class Windows(NamedTuple):
    """How the windows lie, as ``aten`` takes it, and the shapes before and after."""

    options: tuple[Any, ...]
    large: tuple[int, ...]
    small: tuple[int, ...]


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """``F.max_pool2d``, recorded so that it differentiates well twice."""
    if input.ndim != 4 or return_indices:
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    x = laid_out(input)
    n, c, *sides = x.shape
    with torch.no_grad():
        values, places = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, True)
        # From places in a picture to places in memory.
        area = sides[0] * sides[1]
        step, to_channel = (c, 1) if channels_last(x) else (1, area)
        channel = torch.arange(c, device=x.device).view(c, 1, 1) * to_channel
        at = torch.arange(n, device=x.device).view(n, 1, 1, 1) * (c * area) + channel + places * step
    pairs = (kernel_size, kernel_size if stride in (None, []) else stride, padding, dilation)
    options = (*([*each(value, 2)] for value in pairs), ceil_mode)
    windows = Windows(options, tuple(x.shape), tuple(values.shape))
    return _Pick.apply(x, _flat(at, channels_last(x)), places, windows, values)


class _Pick(Recorded):
    """The entries of x at some places of its memory; they may be known already."""

    @staticmethod
    def forward(x: Tensor, at: Tensor, places: Tensor, windows: Windows, known: Tensor | None) -> Tensor:
        if known is not None:
            # The input itself would be a view, which the model may not change in place.
            return known.detach()
        last = channels_last(x)
        return _shaped(_flat(x, last).index_select(0, at), windows.small, last)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, at, places, ctx.windows, _ = inputs
        ctx.save_for_backward(at, places)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return call(_Put, outputs[0], *ctx.saved_tensors, ctx.windows), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, at: Tensor, places: Tensor, windows: Any, known: Any) -> Any:
        return _each_vector(info, in_dims, _Pick, (x, at, places), windows, None), 1


class _Put(Recorded):
    """Zeros with each entry of g added at its place: the transpose of picking."""

    @staticmethod
    def forward(g: Tensor, at: Tensor, places: Tensor, windows: Windows) -> Tensor:
        # The kernel fills each picture with zeros and adds to it while it is in the cache. It reads no value of x.
        layout = torch.channels_last if channels_last(g) else torch.contiguous_format
        x = torch.empty(windows.large, dtype=g.dtype, device=g.device, memory_format=layout)
        return torch.ops.aten.max_pool2d_with_indices_backward(laid_out(g), x, *windows.options, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, at, places, ctx.windows = inputs
        ctx.save_for_backward(at, places)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return call(_Pick, outputs[0], *ctx.saved_tensors, ctx.windows, None), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, at: Tensor, places: Tensor, windows: Any) -> Any:
        return _each_vector(info, in_dims, _Put, (g, at, places), windows), 1


def _flat(tensor: Tensor, last: bool) -> Tensor:
    """The entries in the order of memory."""
    return (tensor.permute(0, 2, 3, 1) if last else tensor).reshape(-1)


def _shaped(flat: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2) if last else flat.view(shape)


def _each_vector(info: Any, in_dims: Any, function: Any, tensors: tuple[Tensor, ...], *more: Any) -> Tensor:
    """Vector by vector, beside each other after the samples, where convolutions want them."""
    picked = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims)]
        for i in range(info.batch_size)
    ]
    return torch.stack([function.apply(*one, *more) for one in picked], 1)
