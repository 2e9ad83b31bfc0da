"""What the buffers of batch norms give away: a client in training mode sends running means and variances along, and one step of them can be undone.

running = (1 - momentum) old + momentum batch, so that the batch's mean and variance (over n - 1) follow where one step was taken; a search can match them
(Yin et al. 2021, arXiv 2104.07586; Fang et al. 2023, arXiv 2308.04699, section 1.5).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

Statistics = Mapping[str, tuple[Tensor, Tensor]]


def norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Batch norms that keep running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            yield name, module


def batch_statistics(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Means and variances that the buffers of batch norms in training mode would give away; the variance as the buffers hold it, over n - 1."""
    told = [(name, module) for name, module in norms(model) if module.training]
    if not told:
        return {}
    still = copy.deepcopy(model)
    for _, module in norms(still):
        module.momentum = 1.0
    with torch.no_grad():
        still(images)
    moved = dict(norms(still))
    return {name: (moved[name].running_mean.clone(), moved[name].running_var.clone()) for name, _ in told}


def undone(
    model: nn.Module, old: Mapping[str, Tensor], new: Mapping[str, Tensor], steps: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The batch's statistics behind buffers that moved by one step; none of norms that did not move, or moved more often than once.

    ``steps``: of norms that do not count their batches.
    """
    found = {}
    for name, module in norms(model):
        keys = [f"{name}.running_mean", f"{name}.running_var"]
        if not all(key in state for key in keys for state in (old, new)):
            continue
        pairs = [(old[key], new[key].to(old[key])) for key in keys]
        counter = f"{name}.num_batches_tracked"
        counted = counter in old and counter in new
        taken = int(new[counter]) - int(old[counter]) if counted else steps
        share = module.momentum
        if share is None:  # the buffers are the mean of all batches so far
            share = 1 / max(int(new[counter]), 1) if counted else 0.0
        if taken == 1 and share and not all(torch.equal(a, b) for a, b in pairs):
            mean, variance = ((b - (1 - share) * a) / share for a, b in pairs)
            found[name] = mean, variance
    return found


def statistics_gap(
    still: nn.Module, parameters: Mapping[str, Tensor], sent: Statistics
) -> Callable[[Tensor], Tensor]:
    """How far pictures [rows, batch, ...] are from the statistics that were sent, [rows]; can be differentiated.

    Σ m (|mean - mean*| + |var - var*|) over norms, m = 10 for the first and 1 for the others.

    Args:
        sent: of each norm mean and variance, [rows, channels] each. still, parameters: see :func:`lineament.privacy.messages.fixed`.
    """
    names = list(sent)
    inside: dict[str, Tensor] = {}
    modules = dict(still.named_modules())

    def keep(name: str) -> Callable[..., None]:
        return lambda _m, given: inside.__setitem__(name, given[0])

    def gap(x: Tensor, *told: Tensor) -> Tensor:
        handles = [modules[name].register_forward_pre_hook(keep(name)) for name in names]
        try:
            functional_call(still, dict(parameters), (x,))
        finally:
            for handle in handles:
                handle.remove()
        found = x.new_zeros(())
        for k, name in enumerate(names):
            value = inside.pop(name).transpose(0, 1).flatten(1)
            mean, variance = told[2 * k], told[2 * k + 1]
            off = (value.mean(1) - mean).norm() + (value.var(1) - variance).norm()
            found = found + (10.0 if k == 0 else 1.0) * off
        return found

    def gaps(x: Tensor) -> Tensor:
        told = [t.to(x) for name in names for t in sent[name]]
        if len(x) == 1:
            return gap(x[0], *(t[0] for t in told))[None]
        return vmap(gap)(x, *told)

    return gaps
