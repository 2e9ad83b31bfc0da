"""Operations rewritten so that their second derivative is as fast as their first.

PyTorch differentiates a convolution twice by way of convolutions with kernels as large as the picture, batch norm in eval mode
by way of the formula for train mode. A convolution is bilinear, and so are both of its derivatives:
three operations that are each other's derivatives close the family, each on the library's own fast kernels, and each takes a
block of vectors by stacking it into the channels instead of a grouped convolution. :class:`Twice` puts them in place while
a graph is built; the model and its results stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


class Twice(TorchFunctionMode):
    """A with-block in which convolutions and batch norm are recorded in a form that differentiates well twice.

    ``bytes`` holds about what the graph recorded so far keeps.

    >>> x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    >>> with Twice():
    ...     ours = F.conv2d(x, w, padding=1)
    >>> torch.allclose(ours, F.conv2d(x, w, padding=1))
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            result = _convolve(func, *args, **kwargs)
        elif func is F.batch_norm:
            result = _batch_norm(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and len(args) > 1:
            # The scores inside, before and after the softmax, are seen by nobody.
            query, key = args[:2]
            self.bytes += 2 * query.element_size() * query.numel() // query.shape[-1] * key.shape[-2]
        if isinstance(result, Tensor) and result.requires_grad and result._base is None:
            self.bytes += result.element_size() * result.numel()
        return result


_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


def _convolve(
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    count = _CONVOLUTIONS[func]
    plain = isinstance(padding, str) or input.ndim != count + 2 or input.dtype != weight.dtype
    if plain or torch.is_autocast_enabled(input.device.type):
        return func(input, weight, bias, stride, padding, dilation, groups)
    geometry = (_each(stride, count), _each(padding, count), _each(dilation, count), groups)
    result = _Forward.apply(input, weight, geometry)
    return result if bias is None else result + bias.reshape(-1, *[1] * count)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None or input.ndim < 2:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    # With fixed statistics it is a multiplication and an addition for each channel.
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (-1, *[1] * (input.ndim - 2))
    return (input * scale.reshape(shape) + shift.reshape(shape)).to(input.dtype)


class _Forward(torch.autograd.Function):
    """y = w * x."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        stride, padding, dilation, groups = geometry
        none = [0] * len(stride)
        return torch.ops.aten.convolution(x, w, None, stride, padding, dilation, False, none, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, w, ctx.geometry = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (g,) = outputs
        x, w = ctx.saved_tensors
        need_x, need_w, _ = ctx.needs_input_grad
        return (
            _ToInput.apply(g, w, ctx.geometry, tuple(x.shape)) if need_x else None,
            _ToWeight.apply(x, g, ctx.geometry, tuple(w.shape)) if need_w else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor, geometry: Geometry) -> Any:
        k = info.batch_size
        if in_dims[1] is None:
            return _split(_Forward.apply(_beside(x, in_dims[0], 0), w, geometry), 0, k), 1
        if in_dims[0] is None and geometry[3] == 1:
            return _split(_Forward.apply(x, _ahead(w, in_dims[1]), geometry), 1, k, front=True), 1
        return _one_by_one(_Forward, info, in_dims, x, w, geometry), 0


class _ToInput(torch.autograd.Function):
    """The derivative of <w * x, g> with respect to x."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, geometry: Geometry, shape: tuple[int, ...]) -> Tensor:
        return _derivative(g, g.new_empty(shape), w, geometry, 0)

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
            _Forward.apply(u, w, ctx.geometry) if need_g else None,
            _ToWeight.apply(u, g, ctx.geometry, tuple(w.shape)) if need_w else None,
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
    """The derivative of <w * x, g> with respect to w."""

    @staticmethod
    def forward(x: Tensor, g: Tensor, geometry: Geometry, shape: tuple[int, ...]) -> Tensor:
        return _derivative(g, x, g.new_empty(shape), geometry, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, g, ctx.geometry, _ = inputs
        ctx.save_for_backward(x, g)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (u,) = outputs
        x, g = ctx.saved_tensors
        need_x, need_g, *_ = ctx.needs_input_grad
        return (
            _ToInput.apply(g, u, ctx.geometry, tuple(x.shape)) if need_x else None,
            _Forward.apply(x, u, ctx.geometry) if need_g else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, g: Tensor, geometry: Geometry, shape: Any) -> Any:
        k = info.batch_size
        if in_dims[1] is None and geometry[3] == 1:
            wide = (shape[0], k * shape[1], *shape[2:])
            return _split(_ToWeight.apply(_beside(x, in_dims[0], 1), g, geometry, wide), 1, k, front=True), 1
        if in_dims[0] is None and geometry[3] == 1:
            wide = (k * shape[0], *shape[1:])
            found = _ToWeight.apply(x, _beside(g, in_dims[1], 1), geometry, wide)
            return found.reshape(k, *shape), 0
        return _one_by_one(_ToWeight, info, in_dims, x, g, geometry, shape), 0


def _derivative(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, which: int) -> Tensor:
    stride, padding, dilation, groups = geometry
    mask = [which == 0, which == 1, False]
    none = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, none, groups, mask
    )[which]


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


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
        [a if at is None else a.select(at, i) for a, at in zip(args, in_dims)] for i in range(info.batch_size)
    ]
    return torch.stack([function.apply(*each) for each in picked])
