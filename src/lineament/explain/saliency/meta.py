"""Saliency after a step of learning the image: the meta-learning step that makes any map more specific to its class.

Rebuffi et al. 2020 (arXiv 2004.02866): take an SGD step on the image's own cross-entropy, then compute the map with the changed weights. Every
image gets steps of its own (one step from a whole batch would be another method), on a copy of the model: its weights are never touched.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import frozen
from lineament.core.redrawing import copied
from lineament.explain.inputs import takes_all
from lineament.explain.saliency.checks import Similarity
from lineament.explain.saliency.layouts import default_site
from lineament.explain.saliency.maps import saliency
from lineament.explain.scores import class_scores, differentiable, prepared, scores_of


@takes_all
@torch.inference_mode(False)
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

    All parameters take the step, the model is in eval mode (batch norm keeps its statistics), and c stays the same.

    Args:
        images: a batch, as the model takes it.
        targets: the class c of each image; by default the class that the unchanged model predicts.
        eps: step size, ≥ 0. Too large a step destroys the map, so compare a few: 2.5e-3 is the paper's for VGG and ResNet, a
            small network with batch norm wanted a tenth of it.
        order: inner steps; 0 is the plain map, 1 the paper's method.
        negate: ascend instead, for what speaks against c.
        options: as for :func:`~lineament.explain.saliency.maps.saliency`.

    Returns:
        What :func:`~lineament.explain.saliency.maps.saliency` returns for these options.

    Raises:
        InputError: as there; a negative ``eps`` or ``order``; ``targets="all"``; a model with a single output, which has no
            cross-entropy; a step so large that the logits are no longer finite.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> x = torch.rand(2, 1, 8, 8)
    >>> torch.allclose(meta_saliency(net, x, 0, eps=0.0, site="1"), saliency(net, x, 0, site="1"), atol=1e-5)
    True
    """
    checks.number("eps", eps, low=0)
    checks.number("order", order, low=0, integer=True)
    checks.require(
        not isinstance(targets, str), "targets: 'all' would need a step for each class; pass one class"
    )
    images = prepared(model, images)
    with differentiable(model), torch.no_grad():
        output, target = scores_of(model, images, targets)
    checks.require(
        output.shape[1] > 1,
        "model: a single output has no cross-entropy over classes, so that no step can be taken",
    )
    if options.get("site") is None:
        options["site"] = default_site(model, images)
    if order == 0:
        return saliency(model, images, target, **options)
    twin = copied(model)
    found: list[Any] = []
    for image, label in zip(images.split(1), target.split(1)):
        _step(model, twin, image, label, -eps if negate else eps, order)
        found.append(saliency(twin, image, label, **options))
    return _joined(found)


def still_to_learn(
    model: nn.Module, images: Tensor, targets: Any = None, *, eps: float = 2.5e-3, **options: Any
) -> Similarity:
    """Spearman's rank correlation between an image's plain map and its map after one step: low where much was left to learn.

    Args:
        eps, options: as for :func:`meta_saliency`, one method and one site.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> round(still_to_learn(net, torch.rand(2, 1, 8, 8), eps=0.0, site="1").mean, 6)
    1.0
    """
    plain = meta_saliency(model, images, targets, order=0, **options)
    return Similarity.of(plain, meta_saliency(model, images, targets, eps=eps, **options))


def _step(model: nn.Module, twin: nn.Module, image: Tensor, label: Tensor, eps: float, order: int) -> None:
    """Give ``twin`` the weights of ``model`` after ``order`` steps on one image."""
    with torch.inference_mode(False):
        origin = [p.detach() for p in model.parameters()]
        weights = list(twin.parameters())
        for j in range(order):
            source = model if j == 0 else twin
            with frozen(source, requires_grad=True), torch.enable_grad():
                output, target = scores_of(source, image, label)
                loss = F.cross_entropy(class_scores(output), target)
                slopes = torch.autograd.grad(loss, list(source.parameters()), allow_unused=True)
            with torch.no_grad():
                for start, weight, slope in zip(origin if j == 0 else weights, weights, slopes):
                    if slope is None:
                        weight.copy_(start)
                    else:
                        torch.add(start, slope, alpha=-eps, out=weight.data)


def _joined(found: list[Any]) -> Any:
    if isinstance(found[0], dict):
        return {key: _joined([each[key] for each in found]) for key in found[0]}
    return torch.cat(found)
