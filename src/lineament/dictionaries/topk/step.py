"""The gradients of a TopK step, for the kept latents alone.

A sparse code touches k rows of the encoder and of the decoder. The two weight gradients are sums over the rows of a batch by latent, taken
over the indices sorted by latent: one ``embedding_bag`` each, no [batch, width] gradient, no [batch, k, d] tensor, and no atomic additions, so
that every run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def decoded(indices: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
    """(rows, d): the sum of each row's atoms with its values, differentiable in the values and the atoms.

    >>> decoded(torch.tensor([[1, 0]]), torch.tensor([[2.0, 1.0]]), torch.eye(2)).tolist()
    [[1.0, 2.0]]
    """
    return _Decoded.apply(indices, values, atoms)  # pyright: ignore[reportReturnType]


def picked(h: Tensor, encoder: Tensor, bias: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """The known values relu(z) of the kept latents, z = h @ encoder[i] + bias[i], differentiable in h, encoder and bias.

    >>> h, w = torch.tensor([[2.0]]), torch.tensor([[3.0]], requires_grad=True)
    >>> picked(h, w, torch.zeros(1), torch.tensor([[0]]), torch.tensor([[6.0]])).sum().backward()
    >>> w.grad.item()
    2.0
    """
    return _Picked.apply(h, encoder, bias, indices, values)  # pyright: ignore[reportReturnType]


class ByLatent:
    """Sums over the rows of a batch by latent: out[m] = sum over (b, j) with indices[b, j] = m of weights[b, j] * rows[b]."""

    def __init__(self, indices: Tensor, width: int):
        flat = indices.flatten()
        self._latents, self.order = flat.sort(stable=True)
        self._rows = torch.div(self.order, max(indices.shape[-1], 1), rounding_mode="floor")
        steps = torch.arange(width + 1, device=flat.device, dtype=flat.dtype)
        self.starts = torch.searchsorted(self._latents, steps)
        self.width = width

    def sums(self, weights: Tensor, rows: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """(latents, d), for the latents from ``first`` to ``last``."""
        last = self.width if last is None else last
        a, b = (
            (0, len(self.order)) if (first, last) == (0, self.width) else self.starts[[first, last]].tolist()
        )
        part = slice(a, b)
        return F.embedding_bag(
            self._rows[part],
            rows,
            self.starts[first:last] - a,
            mode="sum",
            per_sample_weights=weights.flatten()[self.order[part]],
        )

    def totals(self, weights: Tensor) -> Tensor:
        """(width): the sum of the weights of each latent."""
        return self.sums(weights, weights.new_ones(len(weights), 1)).squeeze(1)


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, atoms: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values, atoms)
        if not indices.numel():
            return values.new_zeros(len(indices), atoms.shape[1])
        return F.embedding_bag(indices, atoms.detach(), mode="sum", per_sample_weights=values.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        indices, values, atoms = ctx.saved_tensors
        (grad,) = grads
        grad = grad.contiguous()
        to_values = dots(indices, atoms, grad) if ctx.needs_input_grad[1] else None
        to_atoms = ByLatent(indices, len(atoms)).sums(values, grad) if ctx.needs_input_grad[2] else None
        return None, to_values, to_atoms


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, encoder: Tensor, bias: Tensor, indices: Tensor, values: Tensor
    ) -> Tensor:
        ctx.save_for_backward(h, encoder, indices, values)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        h, encoder, indices, values = ctx.saved_tensors
        grad = grads[0] * (values > 0)
        to_h = to_encoder = to_bias = None
        if ctx.needs_input_grad[0]:
            to_h = F.embedding_bag(indices, encoder, mode="sum", per_sample_weights=grad)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            by_latent = ByLatent(indices, len(encoder))
            to_encoder = by_latent.sums(grad, h) if ctx.needs_input_grad[1] else None
            to_bias = by_latent.totals(grad) if ctx.needs_input_grad[2] else None
        return to_h, to_encoder, to_bias, None, None


def dots(indices: Tensor, atoms: Tensor, rows: Tensor) -> Tensor:
    """(rows, k): the inner products of each row with the atoms that its indices name.

    It is the gradient of ``embedding_bag`` with respect to its weights, which PyTorch computes without gathering the atoms.

    >>> dots(torch.tensor([[1]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 3.0]])).tolist()
    [[6.0]]
    """
    if not indices.numel():
        return rows.new_zeros(indices.shape)
    with torch.enable_grad():
        weights = torch.zeros(indices.shape, dtype=rows.dtype, device=rows.device, requires_grad=True)
        out = F.embedding_bag(indices, atoms.detach(), mode="sum", per_sample_weights=weights)
        return torch.autograd.grad(out, weights, rows)[0]
