"""Matrix products on the fastest kernel for float32 on a CPU, differentiable any number of times.

PyTorch multiplies float32 matrices with MKL, which leaves the wide registers of processors that are not Intel's unused. oneDNN,
which PyTorch brings along for its convolutions and its compiler, uses them (measured on an AMD EPYC: 2.2 times the rate). Both
round as float32 does, in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Below so many multiplications the call costs more than the product.
_SMALL = 1 << 18


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, recorded so that every product of its derivatives runs on the fast kernel."""
    if not _suits(input, weight) or input.ndim < 2:
        return F.linear(input, weight, bias)
    result = _Product.apply(input.reshape(-1, input.shape[-1]), weight.T)
    result = result.reshape(*input.shape[:-1], len(weight))
    return result if bias is None else result + bias


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.addmm``, recorded like :func:`linear` (GPT-2's layers in transformers call it)."""
    if not _suits(mat1, mat2) or beta != 1 or alpha != 1:
        return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)
    return input + _Product.apply(mat1, mat2)


def _suits(a: Tensor, b: Tensor) -> bool:
    return (
        a.device.type == b.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and b.ndim == 2
        and not torch.is_autocast_enabled("cpu")
        and a.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    if a.numel() * b.shape[1] < _SMALL:
        return a @ b
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], None)


class _Product(torch.autograd.Function):
    """a @ b; the derivative to either is another one, laid out in memory as that operand is."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _multiply(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (g,) = outputs
        a, b = ctx.saved_tensors
        to_a, to_b = ctx.needs_input_grad
        return _laid_out_as(a, g, b.T) if to_a else None, _laid_out_as(b, a.T, g) if to_b else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor) -> Any:
        k = info.batch_size
        if in_dims[1] is None:
            rows = a.movedim(in_dims[0], 0)
            return _Product.apply(rows.flatten(0, 1), b).unflatten(0, (k, -1)), 0
        if in_dims[0] is None:
            # One product for each vector: side by side they would have to be copied first.
            return torch.stack([_Product.apply(a, b.select(in_dims[1], i)) for i in range(k)]), 0
        return torch.matmul(a.movedim(in_dims[0], 0), b.movedim(in_dims[1], 0)), 0


def _laid_out_as(like: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _Product.apply(a, b) if like.is_contiguous() else _Product.apply(b.T, a.T).T
