"""Convolutions whose second derivative is as fast as their first.

PyTorch differentiates a convolution twice by way of convolutions with kernels as large as the picture. A convolution is
bilinear, and so are both of its derivatives: three operations that are each other's derivatives close the family, each on the
library's own fast kernels, and each takes a block of vectors by stacking it into the samples or channels instead of
a grouped convolution. On the CPU all of them keep the channels last in memory, as those kernels do inside: other layouts are copied
there and back at every call (measured: 1.1 to 1.5 times the time).
"""

from __future__ import annotations

from itertools import zip_longest
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
# The functions replaced, with the number of axes that each slides along.
CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Convolution(NamedTuple):
    """The parts of a convolution; an unset bias adds nothing."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    geometry: Geometry


def prepare(
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Convolution | None:
    """The parts of a call of ``func``; ``None`` where only PyTorch's own form will do."""
    count = CONVOLUTIONS[func]
    plain = isinstance(padding, str) or input.ndim != count + 2 or input.dtype != weight.dtype
    if plain or input.is_complex() or torch.is_autocast_enabled(input.device.type):
        return None
    geometry = (_per_axis(stride, count), _per_axis(padding, count), _per_axis(dilation, count), groups)
    return Convolution(laid_out(input), weight, bias, geometry)


def convolve(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """w * x + bias, recorded with a cheap second derivative."""
    return _Forward.apply(x, w, bias, geometry, None)


def scaled(result: Tensor, made: Convolution, scale: Tensor, shift: Tensor) -> Tensor:
    """scale · result + shift by channel, for the result of a convolution: recorded as one with scaled weights."""
    x, w, bias, geometry = made
    if bias is not None:
        shift = shift + scale * bias
    with torch.no_grad():
        # The value is known already.
        value = result * _by_channel(scale, result)
        value += _by_channel(shift if bias is None else shift - scale * bias, result)
    weight = w * scale.reshape(-1, *[1] * (w.ndim - 1))
    return _Forward.apply(x, weight, shift, geometry, value)


def _by_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (like.ndim - 2))


def _over_places(tensor: Tensor) -> list[int]:
    return [0, *range(2, tensor.ndim)]


class _Forward(torch.autograd.Function):
    """y = w * x + bias, which may be known already."""

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, known: Tensor | None
    ) -> Tensor:
        if known is not None:
            # The input itself would be a view, which the model may not change in place.
            return known.detach()
        stride, padding, dilation, groups = geometry
        none = [0] * len(stride)
        return torch.ops.aten.convolution(
            _said_so(laid_out(x)), w, bias, stride, padding, dilation, False, none, groups
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, w, _, ctx.geometry, _ = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (g,) = outputs
        x, w = ctx.saved_tensors
        need_x, need_w, need_bias, *_ = ctx.needs_input_grad
        to_w = to_bias = None
        if need_w:
            to_w, *rest = _ToWeight.apply(x, g, ctx.geometry, tuple(w.shape), need_bias)
            to_bias = rest[0] if rest else None
        elif need_bias:
            to_bias = g.sum(_over_places(g))
        to_x = _ToInput.apply(g, w, ctx.geometry, tuple(x.shape)) if need_x else None
        return to_x, to_w, to_bias, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, known: None
    ) -> Any:
        k = info.batch_size
        if in_dims[1] is None and in_dims[0] is not None:
            result = _split(_Forward.apply(_beside(x, in_dims[0], 0), w, None, geometry, None), 0, k)
        elif in_dims[0] is None and in_dims[1] is not None and geometry[3] == 1:
            result = _split(_Forward.apply(x, _ahead(w, in_dims[1]), None, geometry, None), 1, k, front=True)
        else:
            result = _one_by_one(_Forward, info, in_dims[:2], x, w, None, geometry, None).movedim(0, 1)
        if bias is not None:
            # The vectors' axis is the second one, where it is a sample's.
            rows = bias if in_dims[2] is None else bias.movedim(in_dims[2], 0)
            result = result + rows.reshape(*rows.shape, *[1] * (result.ndim - 3))
        return result, 1


class _ToInput(torch.autograd.Function):
    """The derivative of <w * x, g> with respect to x."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, geometry: Geometry, shape: tuple[int, ...]) -> Tensor:
        # Its values are not read, its layout is.
        x = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=_layout(g))
        return _derivative(_said_so(laid_out(g)), x, w, geometry, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        g, w, ctx.geometry, _ = inputs
        ctx.save_for_backward(g, w)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (u,) = outputs
        g, w = ctx.saved_tensors
        need_g, need_w, *_ = ctx.needs_input_grad
        return (
            _Forward.apply(u, w, None, ctx.geometry, None) if need_g else None,
            _ToWeight.apply(u, g, ctx.geometry, tuple(w.shape), False)[0] if need_w else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, w: Tensor, geometry: Geometry, shape: Any) -> Any:
        k = info.batch_size
        if in_dims[1] is None:
            wide = (k * shape[0], *shape[1:])
            return _split(_ToInput.apply(_beside(g, in_dims[0], 0), w, geometry, wide), 0, k), 1
        if in_dims[0] is None and geometry[3] == 1:
            wide = (shape[0], k * shape[1], *shape[2:])
            stacked = _beside(w, in_dims[1], 1)
            return _split(_ToInput.apply(g, stacked, geometry, wide), 1, k, front=True), 1
        return _one_by_one(_ToInput, info, in_dims, g, w, geometry, shape), 0


class _ToWeight(torch.autograd.Function):
    """The derivatives of <w * x + bias, g> with respect to w and, where it is wanted, bias."""

    @staticmethod
    def forward(x: Tensor, g: Tensor, geometry: Geometry, shape: tuple[int, ...], to_bias: bool) -> Any:
        x, g = _said_so(laid_out(x)), _said_so(laid_out(g))
        found = _derivative(g, x, g.new_empty(shape), geometry, 1)
        return (found, g.sum(_over_places(g))) if to_bias else (found,)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, g, ctx.geometry, *_ = inputs
        ctx.save_for_backward(x, g)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> Any:
        u, w = outputs if len(outputs) == 2 else (outputs[0], None)
        x, g = ctx.saved_tensors
        need_x, need_g, *_ = ctx.needs_input_grad
        to_x = to_g = None
        if need_x and u is not None:
            to_x = _ToInput.apply(g, u, ctx.geometry, tuple(x.shape))
        if need_g and u is not None:
            to_g = _Forward.apply(x, u, w, ctx.geometry, None)
        elif need_g and w is not None:
            to_g = _by_channel(w, g).expand_as(g)
        return to_x, to_g, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, g: Tensor, geometry: Geometry, shape: Any, to_bias: bool
    ) -> Any:
        k = info.batch_size
        rest: tuple[Tensor, ...] = ()
        if to_bias:
            each = g[None].expand(k, *g.shape) if in_dims[1] is None else g.movedim(in_dims[1], 0)
            rest = (each.sum([1, *range(3, each.ndim)]),)
        dims = (1, *[0] * to_bias)
        if in_dims[1] is None and geometry[3] == 1:
            wide = (shape[0], k * shape[1], *shape[2:])
            found = _ToWeight.apply(_beside(x, in_dims[0], 1), g, geometry, wide, False)[0]
            return (_split(found, 1, k, front=True), *rest), dims
        dims = (0, *[0] * to_bias)
        if in_dims[0] is None and geometry[3] == 1:
            wide = (k * shape[0], *shape[1:])
            found = _ToWeight.apply(x, _beside(g, in_dims[1], 1), geometry, wide, False)[0]
            return (found.reshape(k, *shape), *rest), dims
        return (_one_by_one(_ToWeight, info, in_dims, x, g, geometry, shape, False), *rest), dims


def _derivative(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, which: int) -> Tensor:
    stride, padding, dilation, groups = geometry
    mask = [which == 0, which == 1, False]
    none = [0] * len(stride)
    if which == 1 and max(w.shape[2:]) == 1 < max(stride) and not any(padding):
        # A kernel of one place reads only where it stands. With a stride, and few channels that lie last, oneDNN's writes past its memory.
        x = laid_out(x[(..., *(slice(None, None, step) for step in stride))])
        stride = type(stride)([1] * len(stride))
    return torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, none, groups, mask
    )[which]


def channels_last(tensor: Tensor) -> bool:
    """Whether the kernels for this tensor want its channels last in memory."""
    return _layout(tensor) is not torch.contiguous_format


def _layout(tensor: Tensor) -> torch.memory_format:
    """What the kernels for this tensor want; where there are none (float64, signals), the usual layout."""
    fast = (
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )
    return _LAST.get(tensor.ndim, torch.contiguous_format) if fast else torch.contiguous_format


def laid_out(tensor: Tensor) -> Tensor:
    """The tensor as the kernels for it want it in memory."""
    return tensor.contiguous(memory_format=_layout(tensor))


def _said_so(tensor: Tensor) -> Tensor:
    """The same memory, with strides that say so: of one channel, which is first and last at once, PyTorch takes it for first.

    The result would have its channels first, and all that meets it would be copied.
    """
    if tensor.ndim != 4 or tensor.shape[1] != 1 or not channels_last(tensor):
        return tensor
    n, c, h, w = tensor.shape
    return tensor.as_strided((n, c, h, w), (h * w, 1, w, 1))


def channels_first(tensor: Tensor) -> Tensor:
    """The tensor and all its derivatives in the usual layout.

    For norms over places: PyTorch's kernels for channels that lie last lose digits where the mean is far from zero, are slower,
    and some of their derivatives read what is not theirs.
    """
    return _First.apply(tensor) if channels_last(tensor) else tensor


class _First(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # The input itself would be a view, which the model may not change in place.
        return x.detach() if x.is_contiguous() else x.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return _First.apply(outputs[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return _First.apply(x.movedim(in_dims[0], 0)), 0


def _per_axis(value: Any, count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, Integral) else tuple(value)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def _beside(tensor: Tensor, at: int, axis: int) -> Tensor:
    """The vectors' axis merged into ``axis``: as its fast part for the samples (0), as its slow part for channels (1).

    Either is a view when the vectors' axis lies between samples and channels, which is where results put it.
    """
    return tensor.movedim(at, 1).flatten(axis, axis + 1)


def _ahead(tensor: Tensor, at: int) -> Tensor:
    return tensor.movedim(at, 0).flatten(0, 1)


def _split(tensor: Tensor, axis: int, k: int, front: bool = False) -> Tensor:
    """The inverse of :func:`_beside`, with the vectors' axis at 1."""
    return tensor.unflatten(axis, (k, -1) if front else (-1, k))


def _one_by_one(function: Any, info: Any, in_dims: Any, *args: Any) -> Tensor:
    """Where a convolution has groups, or both sides carry vectors."""
    picked = [
        [a.select(at, i) if isinstance(at, int) else a for a, at in zip_longest(args, in_dims)]
        for i in range(info.batch_size)
    ]
    found = [function.apply(*each) for each in picked]
    return torch.stack([one[0] if isinstance(one, tuple) else one for one in found])
