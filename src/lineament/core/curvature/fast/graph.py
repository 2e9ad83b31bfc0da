"""Record graphs whose second derivative is as fast as their first.

PyTorch's own second derivative of a convolution takes another road than the library's fast kernels. :class:`FastGraph` replaces
convolutions, batch norm in eval mode, ReLU and, on some processors, linear layers while a graph is built; the model and its results stay
the same. Batch norm with fixed statistics multiplies each channel by a number: after a convolution that number goes into its weights, so
that no pass over the activations is left. What else was tried (max pooling, GELU, cross-entropy) gained too little.

What a model does with a tensor between two such operations (a hook, a change in place, a gradient of its own) is watched; where the
replacements cannot give what PyTorch gives, :class:`UnsupportedOperation` says so before anything is computed from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lineament.core.curvature.fast import convolutions, products
from lineament.core.curvature.fast.relu import relu


class UnsupportedOperation(Exception):
    """The model does what only PyTorch's own operations can follow."""


class FastGraph(TorchFunctionMode):
    """A with-block in which operations are recorded with cheap second derivatives.

    ``bytes`` holds about what the graph recorded so far keeps. Without ``replace`` it is only counted.

    >>> x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    >>> with FastGraph():
    ...     ours = F.conv2d(x, w, padding=1)
    >>> torch.allclose(ours, F.conv2d(x, w, padding=1))
    True
    """

    def __init__(self, replace: bool = True) -> None:
        super().__init__()
        self.bytes = 0
        self._replace = replace
        self._convolved: _Made | None = None
        # Results that the graph goes around, and copies that the model takes for views.
        self._around: list[weakref.ref[Tensor]] = []
        self._copies: list[_Copy] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # The replacements know of vmap over their derivatives, not of what a model does with torch.func inside.
        form = _TWICE.get(func) or (_REPLACED.get(func) if self._replace and not _transformed() else None)
        result = func(*args, **kwargs) if form is None else form(self, func, *args, **kwargs)
        if self._copies:
            self._copies = [copy for copy in self._copies if copy.unwritten()]
        self._count(func, args, result)
        return result

    def _count(self, func: Any, args: Any, result: Any) -> None:
        if func is F.cross_entropy and args and args[0].requires_grad:
            # The logarithms of the probabilities, and these.
            self.bytes += 2 * args[0].element_size() * args[0].numel()
        if func is F.scaled_dot_product_attention and len(args) > 1:
            # The scores before and after the softmax are no result of a call.
            query, key = args[:2]
            self.bytes += 2 * query.element_size() * query.numel() // query.shape[-1] * key.shape[-2]
        # A view keeps nothing of its own.
        if isinstance(result, Tensor) and result._base is None and result.requires_grad:
            self.bytes += result.element_size() * result.numel()

    def _convolve(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = convolutions.prepare(func, input, weight, *args, **kwargs)
        if made is None:
            return func(input, weight, *args, **kwargs)
        result = convolutions.convolve(*made)
        inputs = [input, weight] if made.bias is None else [input, weight, made.bias]
        self._convolved = _Made.of(result, inputs, made)
        return result

    def _batch_norm(
        self,
        func: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if running_mean is None or running_var is None or training:
            x = convolutions.channels_first(input)
            return func(x, running_mean, running_var, weight, bias, training, momentum, eps)
        if input.ndim < 2 or any(s.shape != input.shape[1:2] for s in (running_mean, running_var)):
            return func(input, running_mean, running_var, weight, bias, training, momentum, eps)
        scale = (running_var + eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        made, self._convolved = self._convolved, None
        if made is not None and made.gave(input) and input.dtype == scale.dtype == shift.dtype:
            self._around.append(weakref.ref(input))
            # The convolution's own result was counted, and is not kept.
            self.bytes -= input.element_size() * input.numel() * input.requires_grad
            return convolutions.scaled(input, made.parts, scale, shift)
        shape = (-1, *[1] * (input.ndim - 2))
        return (input * scale.reshape(shape) + shift.reshape(shape)).to(input.dtype)

    def _norm(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return func(convolutions.channels_first(input), *args, **kwargs)

    def _view(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A view, or what would be one if no convolution had put its channels last."""
        if func is Tensor.view and args and not isinstance(args[0], torch.dtype):
            func = Tensor.reshape
        elif func is Tensor.view_as:
            func = Tensor.reshape_as
        result = func(tensor, *args, **kwargs)
        if _channels_last(tensor) and result.data_ptr() != tensor.data_ptr():
            self._copies.append(_Copy(tensor, result))
        return result

    def _by_strides(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _channels_last(tensor):
            raise UnsupportedOperation(f"{func.__name__}: the channels lie last in memory here")
        return func(tensor, *args, **kwargs)

    def _in_the_middle(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """A hook on a tensor, or the gradient to one."""
        of = args[1] if func is torch.autograd.grad and len(args) > 1 else kwargs.get("inputs", args[:1])
        wanted = [of] if isinstance(of, Tensor) else list(of or ())
        if any(gone() is tensor for gone in self._around for tensor in wanted):
            raise UnsupportedOperation("what the model asks a gradient of is not in the graph here")
        return func(*args, **kwargs)

    def _data(self, func: Any, tensor: Tensor) -> Tensor:
        # Changes through ``.data`` are not counted anywhere.
        self._convolved = None
        return func(tensor)


_REPLACED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(convolutions.CONVOLUTIONS, FastGraph._convolve),
    F.linear: lambda graph, func, *args, **kwargs: products.linear(*args, **kwargs),
    torch.addmm: lambda graph, func, *args, **kwargs: products.addmm(*args, **kwargs),
    **dict.fromkeys((F.relu, torch.relu), lambda graph, func, *args, **kwargs: relu(*args, **kwargs)),
    F.batch_norm: FastGraph._batch_norm,
    **dict.fromkeys((F.group_norm, F.instance_norm), FastGraph._norm),
    **dict.fromkeys((Tensor.view, Tensor.view_as, Tensor.reshape, Tensor.reshape_as), FastGraph._view),
    **dict.fromkeys((Tensor.flatten, Tensor.ravel, Tensor.contiguous), FastGraph._view),
    **dict.fromkeys((torch.reshape, torch.flatten, torch.ravel), FastGraph._view),
    **dict.fromkeys((Tensor.as_strided, torch.as_strided), FastGraph._by_strides),
    **dict.fromkeys((torch.autograd.grad, Tensor.backward, Tensor.register_hook), FastGraph._in_the_middle),
    Tensor.data.__get__: FastGraph._data,  # pyright: ignore[reportAttributeAccessIssue]
}  # fmt: skip


def _hardsigmoid(graph: FastGraph, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return func(input, True) if inplace and not input.requires_grad else F.relu6(input + 3) / 6


def _distances(
    graph: FastGraph, func: Any, x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None
) -> Tensor:
    apart = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p != 2:
        return torch.linalg.vector_norm(apart, ord=p, dim=-1)
    square = apart.square().sum(-1)
    # The norm has no second derivative at zero; as PyTorch's, its first is zero there.
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _embedding(
    graph: FastGraph,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        # PyTorch shortens the rows in place, before it reads them; the model's own stay as they are here.
        norms = torch.linalg.vector_norm(weight.detach(), ord=norm_type, dim=1, keepdim=True)
        factor = torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1.0)
        weight = weight + (weight.detach() * factor - weight.detach())
    return func(input, weight, padding_idx, None, 2.0, scale_grad_by_freq, False)


# Operations whose backward PyTorch cannot differentiate, or not as a dense tensor, by others of the same value.
_TWICE: dict[Any, Callable[..., Any]] = {
    F.hardsigmoid: _hardsigmoid,
    torch.cdist: _distances,
    F.embedding: _embedding,
}


class _Made:
    """A convolution's result, as long as somebody else holds it, and what it was made of, as long as neither is changed."""

    def __init__(self, result: Tensor, inputs: Sequence[Tensor], parts: convolutions.Convolution):
        self._result, self._inputs, self.parts = weakref.ref(result), inputs, parts
        self._state = self._look(result)

    @classmethod
    def of(cls, result: Tensor, inputs: Sequence[Tensor], parts: convolutions.Convolution) -> _Made | None:
        # Tensors of inference mode count no changes.
        return None if any(t.is_inference() for t in (result, *inputs)) else cls(result, inputs, parts)

    def gave(self, tensor: Tensor) -> bool:
        """Whether the result is this tensor, with the same past and nobody who listens to its gradient."""
        return self._result() is tensor and not tensor._backward_hooks and self._look(tensor) == self._state

    def _look(self, result: Tensor) -> tuple[Any, ...]:
        changes = [t._version for t in (result, *self._inputs)]
        return torch.is_grad_enabled(), result.requires_grad, result.is_leaf, changes


class _Copy:
    """A copy where PyTorch gives a view: right until one of the two is changed."""

    def __init__(self, tensor: Tensor, copy: Tensor):
        self._pair = weakref.ref(tensor), weakref.ref(copy)
        self._versions = tensor._version, copy._version

    def unwritten(self) -> bool:
        """Whether it is still to be watched: both are held by somebody.

        Raises:
            UnsupportedOperation: one was changed, which the other should show.
        """
        tensor, copy = (each() for each in self._pair)
        if tensor is None or copy is None:
            return False
        if (tensor._version, copy._version) != self._versions:
            raise UnsupportedOperation("a view of a convolution's result is changed in place")
        return True


def _channels_last(tensor: Tensor) -> bool:
    """Whether a convolution here may have put the channels of this tensor last."""
    return tensor.ndim in (4, 5) and tensor.stride(1) == 1 and not tensor.is_contiguous()


def _transformed() -> bool:
    """Whether what is computed now is transformed (``torch.func``), or carries tangents (``torch.autograd.forward_ad``)."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
