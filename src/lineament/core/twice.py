"""A way of building a graph whose second derivative is as fast as its first.

PyTorch's own second derivatives are correct, and slow where they are put together from many small operations or take another
road than the library's fast kernels. :class:`Twice` replaces the operations where that shows (convolutions, max pooling,
batch norm in eval mode, linear layers, activations, cross-entropy) while a graph is built; the model and its results stay the same. Batch norm with fixed
statistics multiplies each channel by a number: after a convolution that number goes into its weights, so that
no pass over the activations is left. ReLU and max pooling change places where one follows the other, so that it is the small result that is cut.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lineament.core import convolutions, entropies, pointwise, pooling, products

# What is replaced, and how many tensors of its result's size the replacement keeps.
_REPLACED: dict[Any, tuple[Callable[..., Tensor], int]] = {
    F.linear: (products.linear, 2),
    torch.addmm: (products.addmm, 2),
    F.max_pool2d: (pooling.max_pool2d, 3),
    F.gelu: (pointwise.gelu, 3),
    F.silu: (pointwise.silu, 3),
    F.cross_entropy: (entropies.cross_entropy, 3),
    F.log_softmax: (entropies.log_softmax, 3),
    F.relu: (pointwise.relu, 1),
    torch.relu: (pointwise.relu, 1),
}


class Twice(TorchFunctionMode):
    """A with-block in which operations are recorded in a form that differentiates well twice.

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
        self._last: _Convolved | None = None
        self._cut: _Cut | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement, copies = _REPLACED.get(func, (func, 1))
        if func in convolutions.CONVOLUTIONS:
            result = self._convolve(func, *args, **kwargs)
        elif func is F.max_pool2d:
            result = self._pool(*args, **kwargs)
        elif func is F.batch_norm:
            result = self._batch_norm(*args, **kwargs)
        elif func is Tensor.view and _hidden_layout(*args, **kwargs):
            result = args[0].reshape(*args[1:], **kwargs)
        else:
            result = replacement(*args, **kwargs)
        if replacement is pointwise.relu and args and result is not args[0]:
            self._cut = _Cut(result, args[0])
        if func is F.cross_entropy and args and args[0].requires_grad:
            # The logarithms of the probabilities, and these.
            self.bytes += 2 * args[0].element_size() * args[0].numel()
        if func is F.scaled_dot_product_attention and len(args) > 1:
            # The scores inside, before and after the softmax, are seen by nobody.
            query, key = args[:2]
            self.bytes += 2 * query.element_size() * query.numel() // query.shape[-1] * key.shape[-2]
        # A view keeps nothing of its own, but for what a replacement reshapes at its end.
        new = isinstance(result, Tensor) and (result._base is None or func in _REPLACED)
        if new and result.requires_grad:
            self.bytes += copies * result.element_size() * result.numel()
        return result

    def _convolve(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        made = convolutions.prepare(func, *args, **kwargs)
        if made is None:
            return func(*args, **kwargs)
        result = convolutions.convolve(*made)
        self._last = _Convolved(weakref.ref(result), result._version, made)
        return result

    def _pool(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        cut, self._cut = self._cut, None
        if cut is None or not cut.gave(input):
            return pooling.max_pool2d(input, *args, **kwargs)
        pooled = pooling.max_pool2d(cut.input, *args, **kwargs)
        # With the places of the greatest entries, which are asked for of what was cut.
        return (
            pointwise.relu(pooled)
            if isinstance(pooled, Tensor)
            else pooling.max_pool2d(input, *args, **kwargs)
        )

    def _batch_norm(
        self,
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
        scale = (running_var + eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        last, self._last = self._last, None
        if last is not None and last.result() is input and last.version == input._version:
            return convolutions.scaled(input, last.made, scale, shift).to(input.dtype)
        shape = (-1, *[1] * (input.ndim - 2))
        return (input * scale.reshape(shape) + shift.reshape(shape)).to(input.dtype)


class _Convolved:
    """The last convolution: its result, as long as somebody else holds it, and what it was made of."""

    def __init__(self, result: Any, version: int, made: convolutions.Convolution):
        self.result, self.version, self.made = result, version, made


class _Cut:
    """The last ReLU: its result, as long as somebody else holds it, and its input."""

    def __init__(self, result: Tensor, input: Tensor):
        self._result, self.input = weakref.ref(result), input
        self._versions = result._version, input._version

    def gave(self, tensor: Tensor) -> bool:
        return self._result() is tensor and self._versions == (tensor._version, self.input._version)


def _hidden_layout(tensor: Tensor, *shape: Any, **kwargs: Any) -> bool:
    """Whether ``tensor.view(*shape)`` could fail because a convolution here keeps its channels last in memory."""
    return bool(shape) and not isinstance(shape[0], torch.dtype) and not tensor.is_contiguous()
