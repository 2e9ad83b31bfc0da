"""Means of 2 x 2 pixels, as average pooling gives them, in a third of its time on a processor: two sums of whole rows and columns in place of a loop over windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Values below which the calls cost more than what they save.
_WORTH = 2**14


class Halving(nn.AvgPool2d):
    """``AvgPool2d(2)``, with derivatives of any order.

    >>> Halving()(torch.arange(4.0).reshape(1, 1, 2, 2)).item()
    1.5
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:
        even = input.ndim == 4 and input.shape[2] % 2 == input.shape[3] % 2 == 0
        if not even or input.device.type != "cpu" or input.numel() < _WORTH:
            return super().forward(input)
        return _Means.apply(input)


class _Means(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        rows = x[..., ::2, :] + x[..., 1::2, :]
        return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Spread.apply(grads[0])


class _Spread(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor) -> Tensor:
        return (0.25 * g).repeat_interleave(2, -1).repeat_interleave(2, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Means.apply(grads[0])
