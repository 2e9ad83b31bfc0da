"""Σ <Y_c, A_ci> of one layer from the forward itself and one product with the shape of a weight gradient; no second moment, no further forward.

W * dL/dW summed over taps, with L = E |Y|² / 2, is the saliency. A batch norm behind the layer takes means out: their part follows from the mean patch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from lineament.core.models import weight_of
from lineament.core.statistics.accumulation import working
from lineament.edit.patches import batched, is_transposed, matrix, padded, patches, widened

_FEW = 512  # patches of so few rows are multiplied faster than convolutions, whose time then goes into the kernels themselves
_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)


class PairSums:
    """Sums over data of what the pairs of one layer give; called with what enters the layer and then with what leaves it.

    Args:
        centred: whether means are taken out.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> sums, x = PairSums(layer, False), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> sums.enter(x); sums.leave(layer(x).detach())
    >>> sums.saliency(2).tolist()
    [[0.5, 4.5]]
    """

    def __init__(self, layer: nn.Module, centred: bool) -> None:
        self.layer, self.centred, self.count = layer, centred, 0
        self._x = torch.zeros(0)
        self._pairs: Any = 0.0
        self._mean: Any = 0.0
        # Only of a layer as PyTorch has it is the output known to be W x + b.
        self._plain = type(layer).forward in _FORWARDS and not layer._forward_hooks

    def enter(self, x: Tensor) -> None:
        """What the layer takes."""
        self._x = x.detach()

    def leave(self, y: Tensor) -> None:
        """What it gives, from which its bias is taken."""
        layer, weight = self.layer, weight_of(self.layer).detach()
        x, self._x = working(batched(layer, self._x)), torch.zeros(0)
        conv = isinstance(layer, (nn.Conv1d, nn.Conv2d))
        if not self._plain:
            y = _product(layer, x, weight.to(x))
        else:
            y = working(batched(layer, y))
            bias: Any = getattr(layer, "bias", None)
            if bias is not None:
                y = y - bias.detach().to(y).view(-1, *[1] * (y.ndim - 2 if conv else 0))
        matrix_ = matrix(layer)
        gradient = _weight_gradient(layer, x, y, matrix_).view(matrix_.shape)
        self._pairs = self._pairs + torch.einsum("oit,oit->oi", matrix_.to(gradient), gradient).double()
        if self.centred:
            whole = x.sum(0, keepdim=True) if conv else x
            self._mean = self._mean + patches(layer, whole).sum(0, dtype=torch.float64)
        self.count += y.numel() // y.shape[1 if conv else -1]

    def saliency(self, samples: int) -> Tensor:
        """[outputs, inputs], float64, a mean over samples."""
        pairs = self._pairs / samples
        if self.centred:
            weight = matrix(self.layer)
            mean = (self._mean / self.count).to(working(weight[:0])).view(weight.shape[1:])
            part = torch.einsum("oit,it->oi", weight.to(mean), mean).double()
            pairs = pairs - part * part.sum(1, keepdim=True) * (self.count / samples)
        return pairs


def _product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's output without its bias."""
    if isinstance(layer, nn.Conv1d):
        return F.conv1d(x, weight, None, layer.stride, layer.padding, layer.dilation)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
    return x @ (weight if is_transposed(layer) else weight.T)


def _weight_gradient(layer: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Σ <y, d(W x) / dW>, [outputs, inputs * taps]."""
    if isinstance(layer, nn.Conv1d):
        x, y, layer = x[:, :, None], y[:, :, None], widened(layer)
    if not isinstance(layer, nn.Conv2d):
        return y.reshape(-1, y.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    if y.numel() <= _FEW * y.shape[1]:
        return y.transpose(0, 1).flatten(1) @ patches(layer, x).to(y)
    shape = (*weight.shape[:2], *layer.kernel_size)
    stride: Any = layer.stride
    dilation: Any = layer.dilation
    padding: Any = layer.padding
    if isinstance(padding, str):
        x, padding = padded(layer, x), 0
    return conv2d_weight(x, shape, y, stride, padding, dilation).flatten(1)
