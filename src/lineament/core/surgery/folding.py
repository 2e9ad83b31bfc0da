"""Fold batch norms into the layers before them: the same function with fewer steps, whose channels can then be added up."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from lineament.core.models import called, frozen
from lineament.core.surgery.groups import plain_network
from lineament.core.surgery.saving import with_biases, without


def fold_norms(model: nn.Module, example: Any) -> tuple[nn.Module, dict[str, str]]:
    """A copy in which each batch norm is part of the layer before it, and {batch norm: that layer}.

    W becomes gamma / sqrt(var + eps) W. Batch norms that follow something else (a sum, a concatenation, a pooling) stay; so do those whose layer
    is read by something else as well, which shows in the outputs.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU()).eval()
    >>> x = torch.ones(1, 1, 2, 2)
    >>> folded, pairs = fold_norms(net, x)
    >>> pairs, torch.allclose(folded(x), net(x))
    ({'1': '0'}, True)
    """
    model = plain_network(model)
    pairs = following_norms(model, example)
    while pairs:
        new = _folded(model, pairs)
        if alike(model, new, example):
            return new, pairs
        alone = {
            norm: layer
            for norm, layer in pairs.items()
            if alike(model, _folded(model, {norm: layer}), example)
        }
        if len(alone) == len(pairs):
            break
        pairs = alone
    return without(model, []), {}


def following_norms(model: nn.Module, example: Any) -> dict[str, str]:
    """{batch norm: the one layer whose output it takes}.

    >>> following_norms(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), torch.ones(1, 1, 2, 2))
    {'1': '0'}
    """
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[Tensor, str]] = {}
    calls: dict[str, list[str]] = {}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = names[module]
        if isinstance(module, _BatchNorm):
            source = made.get(id(args[0]))
            calls.setdefault(name, []).append(source[1] if source else "")
        elif isinstance(output, Tensor):
            calls.setdefault(name, []).append(name)
            made[id(output)] = output, name

    with ExitStack() as stack, frozen(model), torch.no_grad():
        for module in model.modules():
            if isinstance(module, (_BatchNorm, nn.Linear, _ConvNd)):
                stack.callback(module.register_forward_hook(after).remove)
        called(model, example)
    found = {}
    for name, sources in calls.items():
        module = model.get_submodule(name)
        layers = [s for s in sources if s]
        tracked = isinstance(module, _BatchNorm) and module.running_mean is not None
        once = len(sources) == len(layers) == 1 and len(calls[layers[0]]) == 1
        if tracked and once and "weight" in model.get_submodule(layers[0])._parameters:
            found[name] = layers[0]
    return {norm: layer for norm, layer in found.items() if list(found.values()).count(layer) == 1}


def _folded(model: nn.Module, pairs: dict[str, str]) -> nn.Module:
    new = without(with_biases(model, sorted(pairs.values())), sorted(pairs))
    modules: dict[str, Any] = dict(new.named_modules())
    with torch.no_grad():
        for norm_name, layer_name in pairs.items():
            norm: Any = model.get_submodule(norm_name)
            layer = modules[layer_name]
            vector: Any = layer.bias
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight.double()
            bias = (vector.double() - norm.running_mean.double()) * scale
            if norm.bias is not None:
                bias = bias + norm.bias.double()
            weight = layer.weight.double()
            if isinstance(layer, _ConvTransposeNd):
                out = weight.shape[1] * layer.groups
                by_out = weight.view(layer.groups, -1, out // layer.groups, *weight.shape[2:])
                shape = (layer.groups, 1, out // layer.groups) + (1,) * (weight.ndim - 2)
                weight = (by_out * scale.view(shape)).view(weight.shape)
            else:
                weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
            layer.weight.copy_(weight)
            vector.copy_(bias)
    return new


def alike(a: nn.Module, b: nn.Module, example: Any) -> bool:
    """Whether two networks answer an example alike, to the rounding of their weights."""
    outputs = []
    for model in (a, b):
        with frozen(model), torch.no_grad():
            found = [t for t in tree_leaves(called(model, example)) if isinstance(t, Tensor)]
        outputs.append([t.double() for t in found if t.is_floating_point()])
    exact = {torch.float64: 1e-9, torch.float32: 1e-3}
    limit = max((exact.get(p.dtype, 0.05) for p in a.parameters() if p.is_floating_point()), default=1e-9)
    return all((x - y).abs().max() <= limit * x.abs().max() + 1e-30 for x, y in zip(*outputs) if x.numel())
