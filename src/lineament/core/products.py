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

from lineament.core.recording import recorded

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


class _Product(torch.autograd.Function):
    """a @ b; the derivative to either is laid out in memory as that operand is."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _multiply(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.turned = None

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (g,) = outputs
        a, b = ctx.saved_tensors
        to_a, to_b = ctx.needs_input_grad
        if recorded():
            found = _Slopes.apply(g, a, b, to_a, to_b)
            return found if to_a and to_b else (found, None) if to_a else (None, found)
        return _multiply(g, b.T) if to_a else None, _multiply(_turned(ctx, a, g), g) if to_b else None

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


class _Slopes(torch.autograd.Function):
    """(g bᵀ, aᵀ g), or one of them: the derivatives of <a b, g>.

    One function for both, so that what comes back to g through either is added by the kernel that multiplies.
    """

    @staticmethod
    def forward(g: Tensor, a: Tensor, b: Tensor, to_a: bool, to_b: bool) -> Any:
        found = []
        if to_a:
            found.append(_multiply(g, b.T))
        if to_b:
            found.append(_multiply(a.T, g) if b.is_contiguous() else _multiply(g.T, a).T)
        return tuple(found) if len(found) > 1 else found[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, a, b, ctx.to_a, ctx.to_b = inputs
        ctx.save_for_backward(g, a, b)
        ctx.set_materialize_grads(False)
        ctx.turned = None

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> Any:
        given = list(outputs)
        u = given.pop(0) if ctx.to_a else None
        v = given.pop(0) if ctx.to_b else None
        g, a, b = ctx.saved_tensors
        need_g, need_a, need_b, *_ = ctx.needs_input_grad
        if recorded():
            multiply = _Product.apply
            to_b = _laid_out_as(b, u.T, g) if need_b and u is not None else None
        else:
            multiply = _multiply
            to_b = _multiply(_turned(ctx, g, u), u).T if need_b and u is not None else None
        to_g = multiply(u, b) if need_g and u is not None else None
        if need_g and v is not None:
            if to_g is None or recorded():
                part = multiply(a, v)
                to_g = part if to_g is None else to_g + part
            else:
                to_g = _multiply(a, v, to_g)
        to_a = multiply(g, v.T) if need_a and v is not None else None
        return to_g, to_a, to_b, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, a: Tensor, b: Tensor, to_a: bool, to_b: bool) -> Any:
        g, a, b = (x if at is None else x.movedim(at, 0) for x, at in zip((g, a, b), in_dims))
        found = []
        if to_a:
            found.append(torch.matmul(g, b.mT))
        if to_b:
            found.append(torch.matmul(a.mT, g))
        return (tuple(found), (0,) * len(found)) if len(found) > 1 else (found[0], 0)


def _multiply(a: Tensor, b: Tensor, more: Tensor | None = None) -> Tensor:
    """a b, and another matrix added to it by the same kernel."""
    if a.numel() * b.shape[1] < _SMALL:
        return a @ b if more is None else torch.addmm(more, a, b)
    if more is None:
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], None)
    return torch.ops.mkldnn._linear_pointwise.binary(a, more, b.T, None, "add")


def _turned(ctx: Any, saved: Tensor, other: Tensor) -> Tensor:
    """A saved matrix, transposed, to be multiplied by another one.

    The kernel wants rows in memory. What is saved stays the same for every product of a curvature, so it is turned once.
    """
    if saved.numel() * other.shape[1] < _SMALL:
        return saved.T
    if ctx.turned is None:
        ctx.turned = saved.T.contiguous()
    return ctx.turned


def _laid_out_as(like: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _Product.apply(a, b) if like.is_contiguous() else _Product.apply(b.T, a.T).T
