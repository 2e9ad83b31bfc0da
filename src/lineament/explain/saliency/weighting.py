"""How much each layer's map should count when several are combined: four ways to weigh a layer.

The paper (arXiv 2004.02866) combines maps with uniform and linear weights, by the spread of the features, by the accuracy of a linear probe, and by
the pointing accuracy of the single layer. How it computes the spread is not in its code; here it is how far the pooled features of
different images lie apart, relative to their size, which favours layers whose channels tell images apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import chunked
from lineament.core.sites.activations import record
from lineament.core.sites.naming import sites
from lineament.explain.saliency.layouts import layout, patch_of
from lineament.explain.saliency.maps import saliency
from lineament.explain.saliency.pointing import hits
from lineament.explain.scores import prepared

WEIGHTS = ("uniform", "linear", "spread", "accuracy", "pointing")


@torch.inference_mode(False)
def layer_weights(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, "batch"] | None = None,
    *,
    site: Iterable[str],
    by: str = "accuracy",
    masks: Any = None,
    tolerance: float = 15.0,
    folds: int = 5,
    batch_size: int | str = "auto",
    **options: Any,
) -> dict[str, float]:
    """A weight ≥ 0 for each site, summing to one, for :func:`~lineament.explain.saliency.maps.combined_saliency`.

    Args:
        images: what to measure on; not the images to be explained, if the result is to be judged on them.
        labels: their classes, for ``"accuracy"`` and ``"pointing"``.
        site: sites in depth order.
        by: ``"uniform"``; ``"linear"`` (1/L ... 1); ``"spread"``: the mean over channels of the standard deviation over images of the
            spatially pooled activation, over its root mean square; ``"accuracy"``: a cross-validated linear probe (logistic
            regression) on pooled activations; ``"pointing"``: how often the site's own map points at ``masks``.
        masks: for ``"pointing"``, where each image's class is, (batch, height, width).
        tolerance: of ``"pointing"``, in pixels.
        folds: of the cross-validation.
        options: for ``"pointing"``, as for :func:`~lineament.explain.saliency.maps.saliency` (``method``).

    Raises:
        InputError: missing labels or masks; fewer images of a class than folds; weights that are all zero.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    >>> weights = layer_weights(net, torch.rand(2, 1, 8, 8), site=["1", "3"], by="linear")
    >>> {name: round(weight, 3) for name, weight in weights.items()}
    {'1': 0.333, '3': 0.667}
    """
    checks.one_of("by", by, WEIGHTS)
    images = prepared(model, images)
    names = [name for pattern in site for name in sites(model, pattern)]
    checks.require(bool(names), "site: got none, expected at least one")
    if by in ("accuracy", "pointing"):
        checks.require(labels is not None, f"labels: by={by!r} needs the images' classes")
        labels = checks.labels("labels", labels, count=len(images))
    if by == "uniform":
        values = [1.0] * len(names)
    elif by == "linear":
        values = [(i + 1) / len(names) for i in range(len(names))]
    elif by == "pointing":
        checks.require(masks is not None, "masks: by='pointing' needs where each image's class is")
        maps = saliency(model, images, labels, site=names, batch_size=batch_size, **options)
        values = [float(hits(maps[n], masks, tolerance=tolerance).double().mean()) for n in names]
    else:
        pooled = _pooled(model, images, names, batch_size)
        if by == "spread":
            values = [_spread(pooled[n]) for n in names]
        else:
            assert labels is not None
            values = [_probe(pooled[n], labels, folds) for n in names]
    total = sum(values)
    checks.require(
        total > 0, f"by={by!r}: the weights of {names} are all zero, so that nothing can be combined"
    )
    return {name: value / total for name, value in zip(names, values)}


def _pooled(model: nn.Module, images: Tensor, names: list[str], batch_size: int | str) -> dict[str, Tensor]:
    size, patch = (images.shape[-2], images.shape[-1]), patch_of(model, images.shape[1])

    def pool(chunk: Tensor) -> dict[str, Tensor]:
        return {
            name: layout(x, name, size, patch=patch)(x).mean((2, 3))
            for name, x in record(model, chunk, names).items()
        }

    return chunked(pool, images, batch_size=batch_size)


def _spread(features: Float[Tensor, "batch channels"]) -> float:
    features = features.double()
    size = features.square().mean(0).sqrt()
    alive = size > 0
    if len(features) < 2 or not bool(alive.any()):
        return 0.0
    return float((features.std(0)[alive] / size[alive]).mean())


def _probe(features: Float[Tensor, "batch channels"], labels: Tensor, folds: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    checks.number("folds", folds, low=2, integer=True)
    counts = torch.bincount(labels)
    fewest = int(counts[counts > 0].min())
    checks.require(
        fewest >= folds and int((counts > 0).sum()) > 1,
        f"labels: the rarest class has {fewest} images, expected at least {folds} of each of two or more classes",
    )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    found = cross_val_score(probe, features.double().cpu().numpy(), labels.cpu().numpy(), cv=split)
    return float(np.mean(found))
