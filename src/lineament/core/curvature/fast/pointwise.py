"""Activation functions whose second derivative is stored, not composed.

PyTorch puts the second derivative of GELU and SiLU together from a dozen passes over the activations, again for every
product, and that of ReLU is a tensor of zeros that it adds. Here slope and curvature are computed once,
where the graph is built; a product then costs multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.curvature.fast.recording import Recorded, call

# value, slope and curvature of an activation
Curve = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``F.gelu``, recorded so that it differentiates well twice."""
    return _Curved.apply(input, _gelu_tanh if approximate == "tanh" else _gelu)[0]


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.silu``, recorded so that it differentiates well twice."""
    return F.silu(input, True) if inplace else _Curved.apply(input, _silu)[0]


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``, recorded so that it differentiates well twice."""
    return F.relu(input, True) if inplace else _Relu.apply(input, False)


def relu_of_own(input: Tensor) -> Tensor:
    """:func:`relu` of what nobody else holds: the result may be changed in place."""
    return _Relu.apply(input, True)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return F.gelu(x), below + x * density, density * (2 - x.square())


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # x (1 + tanh p(x)) / 2 for a polynomial p
    a, b = math.sqrt(2 / math.pi), 0.044715
    square = x.square()
    t = torch.tanh(a * x * (1 + b * square))
    falling = 1 - t.square()
    first, second = a * (1 + 3 * b * square), 6 * a * b * x
    slope = 0.5 * (1 + t + x * falling * first)
    return (
        F.gelu(x, approximate="tanh"),
        slope,
        falling * (first + 0.5 * x * (second - 2 * t * first.square())),
    )


def _silu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(x)
    rising = s * (1 - s)
    return F.silu(x), s + x * rising, rising * (2 + x * (1 - 2 * s))


class _Curved(Recorded):
    """x -> (f(x), f'(x)): with the slope an output, each derivative finds it in the graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, curve: Curve) -> tuple[Tensor, Tensor, Tensor]:
        return curve(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.curve = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], output[2])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> Any:
        to_value, to_slope, _ = outputs
        x, slope, curvature = ctx.saved_tensors
        result = None if to_value is None else to_value * slope
        if to_slope is not None:
            if torch.is_grad_enabled():
                # Somebody differentiates a third time: the stored curvature would be a constant to them.
                curvature = ctx.curve(x)[2]
            part = to_slope * curvature
            result = part if result is None else result + part
        return result, None


class _Relu(Recorded):
    """max(x, 0). What passes can be told from the result, which leaves x free for changes, or from x, which leaves the result."""

    @staticmethod
    def forward(x: Tensor, by_input: bool) -> Tensor:
        return F.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, by_input = inputs
        ctx.save_for_backward(x if by_input else output)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return call(_Gate, outputs[0], y.detach()), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, by_input: bool) -> Any:
        return _Relu.apply(x, by_input), in_dims[0]


class _Gate(Recorded):
    """g where y > 0; it is linear, and its own derivative."""

    @staticmethod
    def forward(g: Tensor, y: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(g, y, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return call(_Gate, outputs[0], ctx.saved_tensors[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, y: Tensor) -> Any:
        if in_dims[1] is not None:
            g, y = (t if at is None else t.movedim(at, 0) for t, at in zip((g, y), in_dims))
            return _Gate.apply(*torch.broadcast_tensors(g, y)), 0
        at = in_dims[0]
        return _Gate.apply(g, y.unsqueeze(at).expand_as(g)), at
