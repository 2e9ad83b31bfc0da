"""Backward passes with other rules: guided backpropagation, deconvnet, excitation backpropagation.

Springenberg et al. 2015 (arXiv 1412.6806), Zeiler and Fergus 2014 (1311.2901), Zhang et al. 2016 (1608.00507). The forward results are those of the model, to the
bit; only what flows backwards changes. A ``TorchFunctionMode`` catches the operations themselves, so that functional calls
(``F.relu``, ``x + y``) obey the rule as modules do, and nothing in the model is swapped or left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lineament.core import checks

_RELU = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu_}
_LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
_AVERAGE: set[Any] = {F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, Tensor.mean}
_NORMALISE = {F.batch_norm, torch.batch_norm}
_ADD = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}


class _Rectify(torch.autograd.Function):
    """ReLU whose backward passes positive signals only; ``masked`` also asks for a non-negative input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, masked: bool) -> Tensor:
        ctx.masked = masked
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p = grads[0].clamp_min(0)
        (x,) = ctx.saved_tensors
        return (torch.where(x < 0, 0.0, p) if ctx.masked else p), None


class _Excite(torch.autograd.Function):
    """p_in = x ⊙ fᵀ₊(p_out / (f₊(x) + 1e-20)), with f₊ the operation with its positive weights and no bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, positive: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.positive = positive
        ctx.save_for_backward(x)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z = ctx.positive(leaf)
            back = torch.autograd.grad(z, leaf, grads[0] / (z.detach() + 1e-20))[0]
        return x * back, None, None


class _Share(torch.autograd.Function):
    """A sum whose backward gives each part its share of the output; nothing where the output is zero."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b, output = ctx.saved_tensors
        share = torch.where(output == 0, 0.0, grads[0] / torch.where(output == 0, 1.0, output))
        return share * a, share * b, None


class _Through(torch.autograd.Function):
    """The operation's result forwards, the signal unchanged backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor) -> Tensor:
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class RectifiedBackward(TorchFunctionMode):
    """Guided backpropagation (``masked=True``) or deconvnet in every ReLU that runs inside the block.

    >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
    >>> with RectifiedBackward(masked=False):
    ...     y = F.relu(x).sum()
    >>> torch.autograd.grad(y, x)[0].tolist()
    [1.0, 1.0]
    """

    def __init__(self, *, masked: bool):
        super().__init__()
        self.masked = masked
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELU:
            self.count += 1
            x = args[0] if args else (kwargs or {})["input"]
            return _Rectify.apply(x, self.masked)
        return func(*args, **(kwargs or {}))

    def used(self, method: str) -> None:
        """Raise unless a ReLU ran: without one the method is the plain gradient under another name."""
        checks.require(
            self.count > 0,
            f"method {method!r}: no ReLU ran in the forward, so that it would be the plain gradient under another name; "
            "use method='gradient'",
        )


class ExcitationBackward(TorchFunctionMode):
    """Excitation backpropagation in every linear, convolution, pooling, batch norm and residual sum inside the block.

    ``last_input`` is the input of the last linear operation, where the contrast of contrastive EBP is taken; ``negate`` names the call
    (counted from 0) whose weights count negated.
    """

    def __init__(self, *, negate: int | None = None):
        super().__init__()
        self.negate = negate
        self.calls = 0
        self.last_input: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RELU:
            # Out of place: autograd cannot follow a change of what a rule returned.
            return torch.relu(args[0] if args else kwargs["input"])
        if func in _LINEAR:
            return self._linear(func, args, kwargs)
        if func in _AVERAGE and args and args[0].is_floating_point() and args[0].requires_grad:
            x = args[0]
            output = func(x.detach(), *args[1:], **kwargs)
            return _Excite.apply(x, output, lambda leaf: func(leaf, *args[1:], **kwargs))
        if func in _NORMALISE:
            x = args[0] if args else kwargs["input"]
            with torch.no_grad():
                output = func(*args, **kwargs)
            return _Through.apply(x, output)
        if func in _ADD and _residual(args):
            a, b = args[0], args[1]
            output = a.detach() + kwargs.get("alpha", 1) * b.detach()
            return _Share.apply(a, b, output)
        return func(*args, **kwargs)

    def _linear(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        named = dict(kwargs)
        x = args[0] if args else named.pop("input")
        weight = args[1] if len(args) > 1 else named.pop("weight")
        rest = args[3:]
        named.pop("bias", None)
        sign = -1.0 if self.calls == self.negate else 1.0
        self.calls += 1
        with torch.no_grad():
            output = func(*args, **kwargs)
        if not x.requires_grad:
            return output
        if self.negate is None or sign < 0:
            self.last_input = x
        positive = (sign * weight).detach().clamp_min(0)
        return _Excite.apply(x, output, lambda leaf: func(leaf, positive, None, *rest, **named))


def _residual(args: Any) -> bool:
    tensors = len(args) > 1 and all(isinstance(t, Tensor) for t in args[:2])
    return tensors and args[0].shape == args[1].shape and args[0].requires_grad and args[1].requires_grad
