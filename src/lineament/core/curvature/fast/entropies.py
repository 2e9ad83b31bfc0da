"""Cross-entropy whose second derivative is one pass over the probabilities.

PyTorch takes the exponentials anew for every product, and puts the rest together from five more passes: for a language model each as
long as its vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.curvature.fast.recording import Recorded, recorded


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy``, recorded so that it differentiates well twice."""
    outdated = size_average is not None or reduce is not None
    # Probabilities as targets and smoothed labels use the logarithms in more ways than one, and are rare.
    if outdated or label_smoothing or not _labels(input, target) or _cast(input):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    axis = 0 if input.ndim == 1 else 1
    counts = target != ignore_index
    places = torch.where(counts, target, 0)
    # Not by ``F.nll_loss``, whose second derivative passes zeros on.
    picked = _LogSoftmax.apply(input, axis).gather(axis, places.unsqueeze(axis)).squeeze(axis)
    shares = counts.to(input.dtype) if weight is None else weight[places] * counts
    # What is ignored may be infinite where it was picked.
    losses = -torch.where(counts, picked, 0) * shares
    return losses if reduction == "none" else losses.sum() / (shares.sum() if reduction == "mean" else 1)


def _labels(input: Tensor, target: Tensor) -> bool:
    """Whether the targets are class numbers, one for each distribution; errors are left to PyTorch."""
    shape = input.shape[1:] if input.ndim == 1 else (*input.shape[:1], *input.shape[2:])
    return target.dtype == torch.long and bool(input.ndim) and tuple(target.shape) == tuple(shape)


def log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    """``F.log_softmax``, recorded so that it differentiates well twice."""
    if dim is None or _cast(input) or dtype not in (None, input.dtype):
        return F.log_softmax(input, dim, _stacklevel, dtype)
    return _LogSoftmax.apply(input, dim)


def _cast(input: Tensor) -> bool:
    return torch.is_autocast_enabled(input.device.type) or not input.is_floating_point()


class _LogSoftmax(Recorded):
    @staticmethod
    def forward(x: Tensor, axis: int) -> Tensor:
        return torch.log_softmax(x, axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.axis = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (g,) = outputs
        x, y = ctx.saved_tensors
        if not recorded():
            return torch.ops.aten._log_softmax_backward_data(g, y, ctx.axis, x.dtype), None
        # The softmax keeps its result, and its derivative is one kernel.
        return g - torch.softmax(x, ctx.axis) * g.sum(ctx.axis, keepdim=True), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, axis: int) -> Any:
        batched = x.movedim(in_dims[0], 0)
        return _LogSoftmax.apply(batched, axis if axis < 0 else axis + 1), 0
