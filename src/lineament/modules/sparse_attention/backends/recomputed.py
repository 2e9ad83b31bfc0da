"""The autograd of the backends that skip keys: weights are computed again in the backward pass, never kept."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lineament.modules.sparse_attention.blocks import Blocks


class Kernel(Protocol):
    """A module with a forward and a backward pass over [batch, heads, tokens, size] in one dtype, at least float32 where it is ``WIDE``."""

    @property
    def WIDE(self) -> bool:
        """Whether half precision is to be widened first."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        ...

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float,
        lse: Tensor, d_out: Tensor, delta: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v; ``delta``: Σ d_out out less the gradient of the log-sum-exp."""
        ...


class Recomputed(torch.autograd.Function):
    """A kernel's output and log-sum-exp, in the inputs' dtype and at least float32; the arithmetic is at least float32."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        layout: Blocks,
        scale: float,
        kernel: Kernel,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = kernel.forward(*_inputs(kernel, q, k, v), indices, layout, scale)
        ctx.save_for_backward(q, k, v, out, lse, indices)
        ctx.layout, ctx.scale, ctx.kernel = layout, scale, kernel
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, indices = ctx.saved_tensors
        # A query that sees nothing has no log-sum-exp.
        delta = (d_out.to(lse.dtype) * out).sum(-1) - d_lse
        with torch.autocast(q.device.type, enabled=False):
            found = ctx.kernel.backward(
                *_inputs(ctx.kernel, q, k, v), indices, ctx.layout, ctx.scale, lse, d_out.to(out.dtype).contiguous(), delta
            )  # fmt: skip
        return *(x.to(y.dtype) for x, y in zip(found, (q, k, v))), None, None, None, None


def _inputs(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (wide(q), wide(k), wide(v)) if kernel.WIDE else (q, k, v)


def wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x if x.dtype == torch.float64 else x.float()
