"""Batch norms of a network, and their running statistics taken anew after its weights changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lineament.core.models import buffers_kept, called


def batchnorms(model: nn.Module) -> dict[str, Any]:
    """The batch norms of a model by name.

    >>> list(batchnorms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
    ['1']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def recalibrate(model: nn.Module, inputs: Iterable[Any]) -> None:
    """Running statistics as the mean over the inputs of some batches, at the weights as they are; momentum, modes and all other buffers are put back.

    >>> net = nn.BatchNorm1d(1).eval()
    >>> recalibrate(net, [torch.tensor([[1.0], [3.0]])])
    >>> net.running_mean.item(), net.training
    (2.0, False)
    """
    norms = [m for m in batchnorms(model).values() if m.running_mean is not None]
    flags = [(m, m.training, m.momentum) for m in norms]
    try:
        for module in norms:
            module.eval()
        with torch.no_grad(), buffers_kept(model):
            for module in norms:
                module.reset_running_stats()
                module.momentum = None  # PyTorch's word for a plain average over batches
                module.train()
            for each in inputs:
                called(model, each)
    finally:
        for module, training, momentum in flags:
            module.training, module.momentum = training, momentum
