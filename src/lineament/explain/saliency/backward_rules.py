"""Backward passes with other rules: guided backpropagation, deconvnet, excitation backpropagation and its contrast.

Springenberg et al. 2015 (arXiv 1412.6806), Zeiler and Fergus 2014 (1311.2901), Zhang et al. 2016 (1608.00507). The forward results are those of
the model, to the bit; only what flows backwards changes. A ``TorchFunctionMode`` catches the operations themselves, so that functional
calls (``F.relu``, ``x + y``) obey the rule as modules do, and nothing in the model is swapped or left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from lineament.core import checks

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_CLAMP = {torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_, torch.clamp_min, torch.clamp_min_}
_CLAMP |= {Tensor.clamp_min, Tensor.clamp_min_, torch.clip, torch.clip_, Tensor.clip, Tensor.clip_}
_LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_AVERAGE = {F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d}
_AVERAGE |= {torch.mean, Tensor.mean, torch.sum, Tensor.sum}
_NORMALISE = {F.batch_norm, torch.batch_norm}
_ADD = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
# Excitation backpropagation says nothing of these; their plain gradient would pass for a probability.
_UNDEFINED = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.mm,
    Tensor.mm,
    torch.einsum,
}
_UNDEFINED |= {F.layer_norm, F.group_norm, F.instance_norm, F.gelu, F.silu, F.elu, F.softmax, torch.softmax}
_UNDEFINED |= {
    Tensor.softmax,
    torch.sigmoid,
    Tensor.sigmoid,
    F.sigmoid,
    torch.tanh,
    Tensor.tanh,
    F.tanh,
    F.hardswish,
}
_UNDEFINED |= {
    F.scaled_dot_product_attention,
    F.leaky_relu,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.hardsigmoid,
}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__, Tensor.__rmul__}


class GuidedBackward(TorchFunctionMode):
    """Every ReLU inside the block passes only positive signals backwards.

    ``masked=True`` is guided backpropagation (p passes where p > 0 and the input is not negative), ``masked=False`` the
    deconvnet, which ignores the forward mask.

    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> with GuidedBackward(masked=False):
    ...     y = F.relu(x).sum()
    >>> torch.autograd.grad(y, x)[0].tolist()
    [1.0, 1.0]
    """

    def __init__(self, *, masked: bool):
        super().__init__()
        self.masked = masked
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = _rectified(func, args, kwargs)
        self.count += x is not None
        if x is None or not x.requires_grad or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        return _store(func, kwargs, x, lambda source: _Rectify.apply(source, self.masked))

    def check(self, method: str) -> None:
        """Raise unless a ReLU ran in the forward: without one the method is the plain gradient under another name."""
        checks.require(
            self.count > 0,
            f"method {method!r}: no ReLU ran in the forward that could be seen (a network without, or scripted), so that the map would be "
            "the plain gradient's under another name; use method='gradient'",
        )


class ExcitationBackward(TorchFunctionMode):
    """Excitation backpropagation in every linear map, convolution, pooling, batch norm and residual sum inside the block.

    p_in = x ⊙ fᵀ₊(p_out / (f₊(x) + 1e-20)) with the positive weights and no bias; a sum a + b shares p in proportion to its parts;
    batch norm passes p. Whatever came out of the model last, ``last`` keeps its last linear map for the contrast.

    >>> x = torch.tensor([[1.0, 3.0]], requires_grad=True)
    >>> with ExcitationBackward():
    ...     y = F.linear(x, torch.tensor([[1.0, 1.0], [2.0, -5.0]]))
    >>> torch.autograd.grad(y[:, 0], x)[0].tolist()
    [[0.25, 0.75]]
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: LinearCall | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in _LINEAR:
            return self._linear(func, args, kwargs)
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not x.requires_grad:
            return func(*args, **kwargs)
        rest = args[1:]
        named = {key: value for key, value in kwargs.items() if key != "input"}
        if func in _AVERAGE and x.ndim > 2 and (rest or named):

            def average(leaf: Tensor) -> Tensor:
                return func(leaf, *rest, **named)

            return _Excite.apply(x, average, average)
        if func in _NORMALISE:
            return _Through.apply(x, lambda source: func(source, *rest, **named))
        if func in _ADD and _residual(args):
            b, alpha = args[1], kwargs.get("alpha", 1)
            return _store(func, kwargs, x, lambda source: _Share.apply(source, alpha * b))
        both = func in _PRODUCTS and isinstance(args[1], Tensor) and args[1].requires_grad
        if func in _UNDEFINED or both:
            raise checks.InputError(
                f"excitation backpropagation has no rule for {resolve_name(func) or func}, which ran behind the site; it is "
                "defined for networks of convolutions, linear maps, ReLUs, pooling, batch norm and residual sums"
            )
        return func(*args, **kwargs)

    def _linear(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        named = dict(kwargs)
        x = args[0] if args else named.pop("input")
        weight = args[1] if len(args) > 1 else named.pop("weight")
        bias = args[2] if len(args) > 2 else named.pop("bias", None)
        rest = args[3:]
        if not x.requires_grad:
            return func(*args, **kwargs)

        def signed(sign: float) -> Callable[[Tensor], Tensor]:
            # Made when the signal comes back, so that no second set of weights is held in the meantime.
            return lambda leaf: func(leaf, (sign * weight.detach()).clamp_min(0), None, *rest, **named)

        output = _Excite.apply(x, lambda source: func(source, weight, bias, *rest, **named), signed(1.0))
        self.last = LinearCall(x, output, signed(1.0), signed(-1.0))
        return output


class LinearCall:
    """The last linear map of a forward: its input, its output, and the map with its positive or negated negative weights."""

    def __init__(
        self,
        x: Tensor,
        output: Tensor,
        positive: Callable[[Tensor], Tensor],
        negative: Callable[[Tensor], Tensor],
    ):
        self.x, self.output, self.positive, self.negative = x, output, positive, negative

    def contrast(self, scores: Tensor, cotangent: Tensor, sites: Sequence[Tensor]) -> list[Tensor | None]:
        """The contrastive signal at the sites: p from the positive weights minus p from the negated ones, at this map's input."""
        (p,) = torch.autograd.grad(scores, [self.output], cotangent, retain_graph=True)
        difference = _excited(self.x, p, self.positive) - _excited(self.x, p, self.negative)
        return list(
            torch.autograd.grad(self.x, list(sites), difference, retain_graph=True, allow_unused=True)
        )


class _Rectify(torch.autograd.Function):
    """ReLU whose backward passes positive signals only; ``masked`` also blocks where the input is negative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, masked: bool) -> Tensor:
        ctx.masked = masked
        # The mask, not the input: an in-place ReLU overwrites that.
        if masked:
            ctx.save_for_backward(x < 0)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        p = grads[0].clamp_min(0)
        return (p.masked_fill(ctx.saved_tensors[0], 0.0) if ctx.masked else p), None


class _Excite(torch.autograd.Function):
    """An operation whose backward is the excitation rule of ``positive``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, operation: Callable[[Tensor], Tensor], positive: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.positive = positive
        # A copy, because what reads x may be followed by what changes it: ``x += block(x)``.
        ctx.save_for_backward(x.clone())
        return operation(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _excited(ctx.saved_tensors[0], grads[0], ctx.positive), None, None


class _Share(torch.autograd.Function):
    """a + b, whose backward gives each part its share of the sum; nothing where the sum is zero."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        output = a + b
        # A copy of the sum: ReLUs in place follow residual sums.
        ctx.save_for_backward(a.clone(), b.clone(), output.clone())
        ctx.shapes = a.shape, b.shape
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b, output = ctx.saved_tensors
        share = torch.where(output == 0, 0.0, grads[0] / torch.where(output == 0, 1.0, output))
        return (share * a).sum_to_size(ctx.shapes[0]), (share * b).sum_to_size(ctx.shapes[1])


class _Through(torch.autograd.Function):
    """An operation whose backward hands the signal to ``x`` unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
        return operation(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def _excited(x: Tensor, p: Tensor, positive: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        z = positive(leaf)
        # Where z is zero so are all its parts x · w; half precision has no 1e-20 to divide by.
        share = torch.where(z.detach() == 0, 0.0, p / (z.detach() + 1e-20))
        back = torch.autograd.grad(z, leaf, share)[0]
    return x.detach() * back


def _rectified(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a ReLU in any of its spellings, else ``None``."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor):
        return None
    if func in _RELU:
        return x
    if func in _CLAMP:
        least = args[1] if len(args) > 1 else kwargs.get("min")
        most = args[2] if len(args) > 2 else kwargs.get("max")
        return x if isinstance(least, (int, float)) and least == 0 and most is None else None
    if func is F.threshold or func is torch.threshold:
        numbers = [*args[1:3], *(kwargs[k] for k in ("threshold", "value") if k in kwargs)]
        return x if numbers == [0, 0] else None
    return None


def _store(func: Any, kwargs: dict[str, Any], x: Tensor, rule: Callable[[Tensor], Any]) -> Tensor:
    """The rule's result, written into ``x`` where the operation works in place."""
    name = getattr(func, "__name__", "")
    in_place = (
        kwargs.get("inplace", False) or name == "__iadd__" or (name.endswith("_") and name[-2:] != "__")
    )
    if not in_place:
        return rule(x)
    return x.copy_(rule(x.clone()))


def _residual(args: Any) -> bool:
    tensors = len(args) > 1 and all(isinstance(t, Tensor) for t in args[:2])
    return tensors and args[0].ndim > 1 and args[0].requires_grad and args[1].requires_grad
