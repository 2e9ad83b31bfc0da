"""What saliency maps are compared with: integrated gradients, class activation mapping, the image's centre, chance.

Sundararajan et al. 2017 (arXiv 1703.01365); Zhou et al. 2016 (arXiv 1512.04150). Points on the path of integrated gradients run in chunks and
are summed as they come, so that memory does not grow with their number.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from numpy.polynomial.legendre import leggauss
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import device_of
from lineament.core.sites.activations import capture
from lineament.explain.inputs import takes_all
from lineament.explain.scores import cotangent, differentiable, labels_of, prepared, scores_of

# On a CPU more images bring no speed beyond these, only memory.
_POINTS_AT_ONCE = {"cpu": 16, "accelerator": 64}


@takes_all
@torch.inference_mode(False)
def integrated_gradients(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    targets: Any = None,
    *,
    baseline: Tensor | float = 0.0,
    steps: int = 50,
    batch_size: int | str = "auto",
) -> Float[Tensor, "batch channels height width"]:
    """Integrated gradients: (x - b) ⊙ ∫₀¹ ∂S/∂x (b + t(x - b)) dt, whose entries sum to S(x) - S(b).

    The integral is a Gauss-Legendre sum, exact for gradients that are polynomials of degree below 2·steps in t.

    Args:
        images: a batch, as the model takes it.
        targets: one class for each image, one for all, or ``None`` for what the model predicts.
        baseline: where the path starts; a number or a tensor that broadcasts to the images.
        steps: points on the path.
        batch_size: images times points that run at once; ``"auto"`` is 16 on a CPU and 64 elsewhere.

    Raises:
        InputError: wrong images, targets, baseline or steps.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> x = torch.rand(1, 1, 2, 2)
    >>> torch.allclose(integrated_gradients(net, x, 0).sum(), net(x)[0, 0], atol=1e-6)
    True
    """
    checks.number("steps", steps, low=1, integer=True)
    at_once = _POINTS_AT_ONCE["cpu" if device_of(model).type == "cpu" else "accelerator"]
    if batch_size != "auto":
        at_once = checks.number("batch_size", batch_size, low=1, integer=True)
    images = prepared(model, images)
    start = torch.as_tensor(baseline, dtype=images.dtype, device=images.device)
    checks.tensor("baseline", start)
    fits = start.ndim <= 4 and all(a in (1, b) for a, b in zip(start.shape[::-1], images.shape[::-1]))
    checks.require(
        fits, f"baseline: got {checks.show(start)}, expected one that broadcasts to {tuple(images.shape)}"
    )
    nodes, weights = leggauss(steps)
    times = torch.from_numpy((nodes + 1) / 2).to(images)
    shares = torch.from_numpy(weights / 2).to(images)
    change = images - start
    total = torch.zeros_like(images)
    with differentiable(model):
        # Given targets are checked with the first chunk's scores; only unknown ones need a forward of their own.
        target = labels_of(targets, len(images))
        if target is None:
            with torch.no_grad():
                _, target = scores_of(model, images, targets)
        target = target.to(images.device)
        # One long list of (point, image) pairs, cut where memory asks for it.
        points = torch.arange(steps * len(images), device=images.device)
        for pairs in points.split(at_once):
            moment, image = pairs // len(images), pairs % len(images)
            path = torch.addcmul(
                start.expand_as(images)[image], times[moment, None, None, None], change[image]
            )
            path.requires_grad_()
            scores, chosen = scores_of(model, path, target[image])
            (slope,) = torch.autograd.grad(scores, path, cotangent(scores, chosen))
            total.index_add_(0, image, slope * shares[moment, None, None, None])
    return change * total


def class_activation(
    model: nn.Module, images: Float[Tensor, "batch channels height width"], targets: Any, site: str
) -> tuple[Float[Tensor, "batch 1 h w"], Tensor]:
    """Class activation mapping Σ_k W_ck x_k(u), for a network whose head is global average pooling and one linear layer.

    Returns:
        The maps at the site, and the explained classes.

    Raises:
        InputError: the site is not what the network pools, or its head is not one linear layer.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> x = torch.rand(2, 1, 8, 8)
    >>> maps, classes = class_activation(net, x, 1, "1")
    >>> torch.allclose(maps.mean((1, 2, 3)) + net[4].bias[1], net(x)[:, 1], atol=1e-6)
    True
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    checks.require(
        bool(linear), "method 'cam': the model has no linear head; use 'linear_approx' or 'grad_cam'"
    )
    name, head = linear[-1]
    with differentiable(model), torch.no_grad(), capture(model, [site, f"{name}:in", name]) as acts:
        scores, target = scores_of(model, images, targets)
    x, pooled = acts[site], acts[f"{name}:in"].flatten(1)
    last = scores.shape == acts[name].shape and torch.equal(scores, acts[name])
    relative, absolute = (1e-9, 1e-12) if x.dtype == torch.float64 else (1e-3, 1e-5)
    averaged = (
        x.ndim == 4
        and pooled.shape == x.shape[:2]
        and torch.allclose(pooled, x.mean((2, 3)), relative, absolute)
    )
    checks.require(
        last and averaged,
        f"method 'cam': the head behind site {site!r} is not global average pooling and one linear layer; "
        "use 'linear_approx' or 'grad_cam', which need no particular head",
    )
    weights = head.weight.detach()[target]
    return torch.einsum("bk,bkhw->bhw", weights, x)[:, None], target


def centre_map(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 height width"]:
    """A map that is largest at the image's centre and falls off with the squared distance, whatever the image.

    >>> centre_map(torch.zeros(1, 3, 3, 3))[0, 0, 1].tolist()
    [-1.0, 0.0, -1.0]
    """
    height, width = images.shape[-2:]

    def offsets(count: int) -> Tensor:
        return torch.arange(count, dtype=images.dtype, device=images.device) - (count - 1) / 2

    rows, columns = offsets(height)[:, None], offsets(width)[None]
    return (0 - (rows**2 + columns**2)).expand(len(images), 1, height, width).clone()


def random_map(
    images: Float[Tensor, "batch channels height width"], seed: int = 0
) -> Float[Tensor, "batch 1 height width"]:
    """Uniform noise, the same for the same seed on every device.

    >>> random_map(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 1, 4, 4])
    """
    checks.number("seed", seed, integer=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(images), 1, *images.shape[-2:], generator=generator).to(images)
