"""Which distribution of the targets a loss stands for, and targets drawn from it: what the true Fisher needs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core import checks


def likelihood_of(loss_fn: Any, given: str | None) -> str:
    """The distribution whose negative log-likelihood a loss is: the one given, or known from PyTorch's own losses.

    >>> likelihood_of(nn.MSELoss(), None)
    'gaussian'
    """
    if given is not None:
        return checks.one_of("likelihood", given, ("categorical", "gaussian", "bernoulli"))
    known = {
        "categorical": (F.cross_entropy, nn.CrossEntropyLoss),
        "gaussian": (F.mse_loss, nn.MSELoss),
        "bernoulli": (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
    }
    for name, (function, module) in known.items():
        if loss_fn is function or isinstance(loss_fn, module):
            return name
    raise checks.InputError(
        f"likelihood: it cannot be known from the loss {checks.show(loss_fn)}; give 'categorical', 'gaussian' or 'bernoulli'"
    )


def draw(family: str, outputs: Tensor, targets: Tensor, seed: int, start: int) -> tuple[Tensor, int]:
    """Targets drawn from the model's own prediction, and how many positions the loss averages over.

    Each sample's come from its own place in the data, ``start`` for the first one here, so that they do not change with the batches; and on
    the CPU, so that a seed means the same on every device.
    """
    z = outputs.cpu()
    if family == "categorical":
        # PyTorch's losses have the classes second; a loss of the user's own may have them last, as language models do.
        last = tuple(targets.shape) == tuple(z.shape[:-1]) != (*z.shape[:1], *z.shape[2:])
        chances = (z if last else z.movedim(1, -1)).double().softmax(-1)
        below = chances.cumsum(-1)
        chosen = torch.searchsorted(below, _uniform(chances[..., :1], seed, start) * below[..., -1:])
        chosen = chosen.clamp_max(chances.shape[-1] - 1)[..., 0]
        return chosen.to(outputs.device), chances[0, ..., 0].numel()
    if family == "bernoulli":
        return (_uniform(z, seed, start) < z.sigmoid()).to(outputs), z[0].numel()
    # The mean over d entries of (z - y)² is the negative log-likelihood of a Gaussian with variance d / 2.
    spread = (z[0].numel() / 2) ** 0.5
    noise = torch.special.ndtri(_uniform(z, seed, start).clamp_min(2**-54)).to(z.dtype)
    return (z + spread * noise).to(outputs.device), 1


def _uniform(like: Tensor, seed: int, start: int) -> Tensor:
    """Numbers in [0, 1) of a tensor's shape, drawn in blocks that begin at fixed places of the data."""
    width = max(1, like[0].numel())
    block = max(1, 2**16 // width)
    first, last = start // block, (start + len(like) - 1) // block
    drawn = [
        torch.rand(
            block, width, generator=torch.Generator().manual_seed((seed + at) % 2**63), dtype=torch.float64
        )
        for at in range(first, last + 1)
    ]
    return torch.cat(drawn)[start - first * block :][: len(like)].reshape(like.shape)
