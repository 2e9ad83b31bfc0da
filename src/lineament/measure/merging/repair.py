"""Give merged channels back the spread of those that they stand for: a mean of channels that differ varies less than each of them.

Jordan et al. (2023, arXiv 2211.08403) measure the spread on data; Wang et al. (2025, Model Folding, arXiv 2502.10216) estimate it from the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import require
from lineament.core.loaders import batches_of
from lineament.core.models import called, device_of, frozen, moved
from lineament.core.sites.activations import capture
from lineament.measure.merging.merged import Merged


def repair(merged: Merged, data: Any = "data_free") -> Merged:
    """Rescale each merged channel around its mean, so that it varies as much as its members did on average.

    Args:
        merged: what :func:`lineament.measure.merge` gave, with ``rule="mean_sum"``.
        data: inputs, a tensor or batches (of inputs, or of pairs), on which means and spreads are measured, layer after layer; or ``"data_free"``:
            the spread of each channel is the scale of its batch norm, the correlation of two is the cosine of their weights (an estimate, which takes
            the inputs of a layer for uncorrelated).

    Returns:
        The same result with another network. Layers whose channels several modules make stay as they are.

    Raises:
        InputError: ``"data_free"`` for a network without batch norms that were folded.

    >>> from lineament.measure import merge
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> found = merge(net, example=x[:1], keep=0.5)
    >>> repair(found, x).model(x).shape
    torch.Size([200, 2])
    """
    new = copy.deepcopy(merged.model)
    layers = {
        name: merged.layers[name][0]
        for name, (before, after) in merged.sizes.items()
        if after < before and len(merged.layers[name]) == 1 and not merged.channels[name].heads
    }
    if isinstance(data, str):
        require(data == "data_free", f"data: got {data!r}, expected inputs or 'data_free'")
        known = {name: layer for name, layer in layers.items() if name in merged.norms}
        require(
            bool(known) or not layers,
            "data: without batch norms nothing tells the spread of a channel; pass inputs instead of 'data_free'",
        )
        for name, layer in known.items():
            shift, scale = merged.norms[name]
            rows = _rows(merged.original.get_submodule(layer))
            share = _mean_over(merged.groups[name])
            cosine = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
            spread = (share @ (cosine * scale[:, None] * scale) @ share.T).diagonal().clamp_min(0).sqrt()
            _rescale(new.get_submodule(layer), share @ shift, share @ scale, share @ shift, spread)
        return replace(merged, model=new)
    batches = list(batches_of(data, name="data", once=True))
    inputs = [b[0] if isinstance(b, (tuple, list)) else b for b in batches]
    order = _called_in_order(new, inputs[0], list(layers.values()))
    wanted = _moments(merged.original, order, inputs)
    for layer in order:
        share = _mean_over(merged.groups[next(n for n, of in layers.items() if of == layer)])
        mean, spread = wanted[layer]
        now = _moments(new, [layer], inputs)[layer]
        _rescale(new.get_submodule(layer), share @ mean, share @ spread, *now)
    return replace(merged, model=new)


def _mean_over(member: Tensor) -> Tensor:
    whole = torch.zeros(int(member.max()) + 1, len(member), dtype=torch.float64)
    whole[member, torch.arange(len(member))] = 1
    return whole / whole.sum(1, keepdim=True)


def _rows(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    moved_first = (
        weight.transpose(0, 1) if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)) else weight
    )
    return moved_first.detach().double().cpu().flatten(1)


def _rescale(layer: nn.Module, mean: Tensor, spread: Tensor, old_mean: Tensor, old_spread: Tensor) -> None:
    """(z - old mean) spread / old spread + mean, in the layer's weights."""
    weight: Any = layer.weight
    scale = torch.where(old_spread > 1e-12, spread / old_spread.clamp_min(1e-12), torch.ones_like(spread))
    axis = 1 if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)) else 0
    shape = [1] * weight.ndim
    shape[axis] = -1
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().double().cpu()  # pyright: ignore
    shifted = (bias - old_mean) * scale + mean
    with torch.no_grad():
        weight.mul_(scale.view(shape).to(weight))
        if layer.bias is None:
            layer.bias = nn.Parameter(shifted.to(weight))
        else:
            layer.bias.copy_(shifted)  # pyright: ignore


def _called_in_order(model: nn.Module, example: Any, names: Sequence[str]) -> list[str]:
    seen: list[str] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda *_, name=name: seen.append(name) if name not in seen else None
        )
        for name in names
    ]
    try:
        with frozen(model), torch.no_grad():
            called(model, moved(example, device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _moments(
    model: nn.Module, layers: Sequence[str], inputs: Sequence[Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each channel over samples and positions."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    for batch in inputs:
        with frozen(model), torch.no_grad(), capture(model, list(layers)) as acts:
            called(model, moved(batch, device_of(model)))
        for layer in layers:
            z = acts[layer].double().cpu()
            z = z.movedim(1, -1) if z.ndim >= 4 else z
            z = z.reshape(-1, z.shape[-1])
            sums[layer] = sums.get(layer, 0) + torch.stack([z.sum(0), z.square().sum(0)])
            counts[layer] += len(z)
    found = {}
    for layer in layers:
        mean, square = sums[layer] / counts[layer]
        found[layer] = mean, (square - mean.square()).clamp_min(0).sqrt()
    return found
