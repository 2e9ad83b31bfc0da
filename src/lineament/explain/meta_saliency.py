"""Saliency after one step of learning the image: the meta-learning step that makes any map more specific to its class.

Rebuffi et al. 2020 (arXiv 2004.02866): take one SGD step on the image's own cross-entropy, then compute the map with the changed weights. Every image
gets a step of its own: one step from a whole batch would be another method. The weights come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import device_of, frozen
from lineament.explain.saliency import saliency, scores_of


def meta_saliency(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    targets: Int[Tensor, "batch"] | int | None = None,
    *,
    eps: float = 2.5e-3,
    order: int = 1,
    negate: bool = False,
    **options: Any,
) -> Any:
    """Maps computed with θ_order, where θ_{j+1} = θ_j - eps · ∂/∂θ CE(f_θj(x), c), separately for each image.

    Args:
        targets: the class c of each image; the class that the unchanged model predicts by default.
        eps: step size; too large a step destroys the map, so compare a few.
        order: inner steps; 0 is the plain map.
        negate: ascend instead, for what speaks against c.
        options: as for :func:`~lineament.explain.saliency.saliency`.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> x = torch.rand(2, 1, 8, 8)
    >>> torch.equal(meta_saliency(net, x, 0, eps=0.0, site="1"), saliency(net, x, 0, site="1"))
    True
    """
    checks.number("eps", eps, low=0)
    checks.number("order", order, low=0, integer=True)
    checks.tensor("images", images, shape=("batch", "channels", "height", "width"), floating=True)
    checks.require(
        targets != "all" if isinstance(targets, str) else True, "targets: 'all' needs a step for each class"
    )
    images = images.to(device_of(model))
    with frozen(model), torch.no_grad():
        _, target = scores_of(model, images, targets)
    found: list[Any] = []
    for image, label in zip(images.split(1), target.split(1)):
        with _stepped(model, image, label, -eps if negate else eps, order):
            found.append(saliency(model, image, label, **options))
    if isinstance(found[0], dict):
        return {name: torch.cat([maps[name] for maps in found]) for name in found[0]}
    return torch.cat(found)


@contextmanager
def _stepped(model: nn.Module, image: Tensor, label: Tensor, eps: float, order: int) -> Iterator[None]:
    """The model after ``order`` steps on one image, and as it was afterwards."""
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    try:
        for _ in range(order):
            with frozen(model, requires_grad=True):
                output, target = scores_of(model, image, label)
                grads = torch.autograd.grad(F.cross_entropy(output, target), parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, grad in zip(parameters, grads):
                    if grad is not None:
                        parameter.sub_(grad, alpha=eps)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)
