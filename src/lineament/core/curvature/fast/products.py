"""Linear layers on oneDNN's matrix product, on processors where it is the faster one.

PyTorch multiplies float32 matrices on the CPU with MKL, which uses the 512-bit registers of Intel's processors only. oneDNN, which PyTorch
brings along, uses those of every processor (measured on an AMD EPYC with AVX-512: 2.2 times MKL's rate; on one with AVX2 it is
slower, so :func:`faster_here` keeps MKL there). Both round as float32 does, in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many multiplications the call costs more than the product.
_SMALL = 1 << 18


def faster_here() -> bool:
    """Whether oneDNN multiplies matrices faster than MKL on this processor."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, so that every product of its derivatives runs on the fast kernel."""
    if input.ndim < 2 or not _suits(input, weight.T, bias):
        return F.linear(input, weight, bias)
    result = _Product.apply(input.reshape(-1, input.shape[-1]), weight.T, bias)
    return result.reshape(*input.shape[:-1], len(weight))


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.addmm``, which GPT-2's layers in transformers call, likewise."""
    if beta != 1 or alpha != 1 or not _suits(mat1, mat2, input):
        return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)
    return _Product.apply(mat1, mat2, input)


def _suits(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """The kernel reads memory as it is told, without a look at what is there: everything must fit."""
    tensors = [a, b] if bias is None else [a, b, bias]
    plain = all(
        t.device.type == "cpu" and t.layout == torch.strided and t.dtype == torch.float32 for t in tensors
    )
    fits = b.ndim == 2 and a.shape[-1] == len(b) and (bias is None or bias.shape == b.shape[1:])
    return plain and fits and a.numel() > 0 and faster_here() and not torch.is_autocast_enabled("cpu")


class _Product(torch.autograd.Function):
    """a b + bias; its derivatives are such products again."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        if a.numel() * b.shape[1] < _SMALL:
            return a @ b if bias is None else torch.addmm(bias, a, b)
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (g,) = outputs
        a, b = ctx.saved_tensors
        to_a, to_b, to_bias = ctx.needs_input_grad
        return (
            _Product.apply(g, b.T, None) if to_a else None,
            _Product.apply(a.T, g, None) if to_b else None,
            g.sum(0) if to_bias else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Any:
        a, b = (x if at is None else x.movedim(at, 0) for x, at in zip((a, b), in_dims))
        result = torch.matmul(a, b)
        if bias is not None:
            result = result + (bias if in_dims[2] is None else bias.movedim(in_dims[2], 0)[:, None])
        return result, 0
