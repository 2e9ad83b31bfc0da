"""ReLU without the second derivative of zeros that PyTorch makes and adds (measured: 5 % of a product of a ResNet-8)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``; in place PyTorch's own."""
    return F.relu(input, True) if inplace else _Relu.apply(input)


class _Relu(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return _Gate.apply(outputs[0], ctx.saved_tensors[0].detach())


class _Gate(torch.autograd.Function):
    """g where y > 0; it is linear in g, and its own derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, y: Tensor) -> Tensor:
        if g.stride() != y.stride() and g.shape == y.shape:
            # Of two layouts in memory the operation takes twenty times as long.
            g = torch.empty_like(y, dtype=g.dtype).copy_(g)
        return torch.ops.aten.threshold_backward(g, y, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return _Gate.apply(outputs[0], ctx.saved_tensors[0]), None
