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

from lineament.core.curvature.fast.recording import Recorded, recorded

# Below so many multiplications the call costs more than the product.
_SMALL = 1 << 18


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, recorded so that every product of its derivatives runs on the fast kernel."""
    if not _suits(input, weight) or input.ndim < 2 or (bias is not None and not _row(bias, weight.T)):
        return F.linear(input, weight, bias)
    result = _Product.apply(input.reshape(-1, input.shape[-1]), weight.T, bias)
    return result.reshape(*input.shape[:-1], len(weight))


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.addmm``, recorded like :func:`linear` (GPT-2's layers in transformers call it)."""
    if not _suits(mat1, mat2) or beta != 1 or alpha != 1:
        return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)
    if _row(input, mat2):
        return _Product.apply(mat1, mat2, input)
    return input + _Product.apply(mat1, mat2, None)


def _row(bias: Tensor, b: Tensor) -> bool:
    # The kernel reads it as it is told, without a look at what it is.
    return bias.device == b.device and bias.dtype == b.dtype and bias.shape == b.shape[1:]


def _suits(a: Tensor, b: Tensor) -> bool:
    return (
        a.device.type == b.device.type == "cpu"
        and a.layout == b.layout == torch.strided
        and a.dtype == b.dtype == torch.float32
        and b.ndim == 2
        and not torch.is_autocast_enabled("cpu")
        and a.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _Product(Recorded):
    """a @ b + bias; the derivative to a or b is laid out in memory as that operand is."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(a, b, bias=bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.turned = {}

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (g,) = outputs
        a, b = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if recorded():
            found = iter(_Slopes.apply(g, a, b, *needed))
            return tuple(next(found) if need else None for need in needed)
        to_a, to_b, to_bias = needed
        return (
            _multiply(g, b.T) if to_a else None,
            _to_weights(ctx, "a", a, g, b.is_contiguous()) if to_b else None,
            g.sum(0) if to_bias else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Any:
        k = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            rows = a.movedim(in_dims[0], 0)
            return _Product.apply(rows.flatten(0, 1), b, bias).unflatten(0, (k, -1)), 0
        if in_dims[0] is None and in_dims[1] is not None:
            # One product for each vector: side by side they would have to be copied first.
            vectors = b.movedim(in_dims[1], 0)
            biases = [bias] * k if bias is None or in_dims[2] is None else bias.movedim(in_dims[2], 0)
            return torch.stack([_Product.apply(a, v, row) for v, row in zip(vectors, biases)]), 0
        a, b = (x if at is None else x.movedim(at, 0) for x, at in zip((a, b), in_dims))
        result = torch.matmul(a, b)
        if bias is not None:
            result = result + (bias if in_dims[2] is None else bias.movedim(in_dims[2], 0)[:, None])
        return result, 0


class _Slopes(Recorded):
    """(g bᵀ, aᵀ g, 1ᵀ g), or some of them: the derivatives of <a b + bias, g>.

    One function for all, so that what comes back to g through each is added by the kernel that multiplies.
    """

    @staticmethod
    def forward(g: Tensor, a: Tensor, b: Tensor, to_a: bool, to_b: bool, to_bias: bool) -> Any:
        found = []
        if to_a:
            found.append(_multiply(g, b.T))
        if to_b:
            found.append(_multiply(a.T, g) if b.is_contiguous() else _multiply(g.T, a).T)
        if to_bias:
            found.append(g.sum(0))
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, a, b, *ctx.wanted = inputs
        ctx.save_for_backward(g, a, b)
        ctx.set_materialize_grads(False)
        ctx.turned = {}

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> Any:
        given = iter(outputs)
        u, v, w = (next(given) if wanted else None for wanted in ctx.wanted)
        g, a, b = ctx.saved_tensors
        need_g, need_a, need_b, *_ = ctx.needs_input_grad
        to_g = to_a = to_b = None
        if recorded():
            multiply = _Product.apply
            if need_g:
                parts = [multiply(u, b, None)] if u is not None else []
                if v is not None:
                    parts.append(multiply(a, v, w))
                elif w is not None:
                    parts.append(w.expand_as(g))
                to_g = sum(parts[1:], parts[0]) if parts else None
            if need_b and u is not None:
                to_b = multiply(u.T, g, None) if b.is_contiguous() else multiply(g.T, u, None).T
            to_a = multiply(g, v.T, None) if need_a and v is not None else None
        else:
            if need_g and u is not None:
                to_g = _multiply(u, _in_rows(ctx, b, u))
            if need_g and v is not None:
                to_g = _multiply(a, v, to_g, w)
            elif need_g and w is not None:
                to_g = w.expand_as(g) if to_g is None else to_g.add_(w)
            if need_b and u is not None:
                to_b = _to_weights(ctx, "g", g, u, not b.is_contiguous()).T
            to_a = _multiply(g, v.T) if need_a and v is not None else None
        return to_g, to_a, to_b, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, g: Tensor, a: Tensor, b: Tensor, to_a: bool, to_b: bool, to_bias: bool
    ) -> Any:
        g, a, b = (x if at is None else x.movedim(at, 0) for x, at in zip((g, a, b), in_dims))
        found = []
        if to_a:
            found.append(torch.matmul(g, b.mT))
        if to_b:
            found.append(torch.matmul(a.mT, g))
        if to_bias:
            found.append(g.sum(-2))
        return tuple(found), (0,) * len(found)


def _multiply(a: Tensor, b: Tensor, more: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """a b, and another matrix and a row added to it by the same kernel."""
    if a.numel() * b.shape[1] < _SMALL:
        result = a @ b if more is None else torch.addmm(more, a, b)
        return result if bias is None else result.add_(bias)
    if bias is not None:
        # The kernel reads it entry by entry, whatever its stride.
        bias = bias.contiguous()
    if more is None:
        return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], None)
    return torch.ops.mkldnn._linear_pointwise.binary(a, more, b.T, bias, "add")


def _to_weights(ctx: Any, name: str, saved: Tensor, other: Tensor, in_rows: bool) -> Tensor:
    """savedᵀ other, with its rows in memory if the weights' lie so; from weights larger than ``other`` on at any price.

    Whoever puts the derivatives side by side copies, and copies what lies otherwise entry by entry.
    """
    if in_rows or other.numel() > saved.shape[1] * other.shape[1]:
        return _multiply(_turned(ctx, name, saved, other), other)
    return _multiply(other.T, saved).T


def _turned(ctx: Any, name: str, saved: Tensor, other: Tensor) -> Tensor:
    """A saved matrix, transposed, to be multiplied by another one.

    The kernel wants rows in memory. What is saved stays the same for every product of a curvature, so it is turned once.
    """
    if saved.numel() * other.shape[1] < _SMALL:
        return saved.T
    if name not in ctx.turned:
        ctx.turned[name] = saved.T.contiguous()
    return ctx.turned[name]


def _in_rows(ctx: Any, b: Tensor, other: Tensor) -> Tensor:
    """The weights with their rows in memory, which several threads read faster; not where they outgrow the activations."""
    if b.is_contiguous() or b.numel() > other.numel() or other.numel() * b.shape[1] < _SMALL:
        return b
    if "b" not in ctx.turned:
        ctx.turned["b"] = b.contiguous()
    return ctx.turned["b"]
