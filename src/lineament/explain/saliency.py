"""Where does a network look? Saliency maps at any site, as an extraction and an aggregation.

Rebuffi, Fong, Ji, Vedaldi, "There and Back Again: Revisiting Backpropagation Saliency Methods", CVPR 2020, arXiv 2004.02866. Gradient,
Grad-CAM, linear approximation, NormGrad and their relatives are settings of one function (:data:`METHODS`); one forward and one backward
give all sites. Maps explain the logit, not the probability; a positive gradient means that more of the feature raises the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import device_of, frozen, logits
from lineament.core.sites import Activations, capture, sites
from lineament.explain.aggregation import (
    AGGREGATES,
    EXTRACTS,
    Window,
    aggregate_contributions,
    combined,
    normalised,
    resized,
    smoothed,
)
from lineament.explain.backward_rules import ExcitationBackward, RectifiedBackward


@dataclass(frozen=True)
class Method:
    """A saliency method: how contributions are extracted and aggregated, and what is special about it."""

    extract: str
    aggregate: str
    rule: str = ""  # how the signal flows backwards: "", "guided", "deconvnet", "excitation", "contrastive"
    pooled: bool = False  # the gradient is replaced by its mean over the map
    rectified: bool = False  # the map keeps its positive part


METHODS: dict[str, Method] = {
    "gradient": Method("bias", "max_abs"),
    "gradient_sum": Method("bias", "sum"),
    "linear_approx": Method("scaling", "sum"),
    "cam": Method("scaling", "sum"),
    "grad_cam": Method("scaling", "sum", pooled=True, rectified=True),
    "norm_grad": Method("conv", "norm"),
    "norm_grad_selective": Method("scaling", "filter_norm"),
    "norm_grad_proper": Method("proper", "norm"),
    "guided_backprop": Method("bias", "max_abs", rule="guided"),
    "guided_backprop_sum": Method("bias", "sum", rule="guided"),
    "deconvnet": Method("bias", "max_abs", rule="deconvnet"),
    "excitation_backprop": Method("bias", "sum", rule="excitation"),
    "contrastive_excitation_backprop": Method("bias", "sum", rule="contrastive", rectified=True),
    "integrated_gradients": Method("", ""),
    "center": Method("", ""),
    "random": Method("", ""),
}


def saliency(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    targets: Int[Tensor, "batch"] | int | str | None = None,
    *,
    site: str | Iterable[str] | None = None,
    method: str = "norm_grad",
    extract: str | None = None,
    aggregate: str | None = None,
    kernel: int = 1,
    resize: bool = True,
    smooth: float = 0.0,
    normalise: bool = False,
    steps: int = 32,
    seed: int = 0,
) -> Any:
    """Maps of where the model looks for a class: one forward and one backward for all sites.

    Args:
        images: a batch, as the model takes it.
        targets: the class to explain: one for each image, one for all, ``None`` for the class the model predicts, or ``"all"`` for every class.
        site: where to take the maps; a module name with ``:in`` or ``:out`` (``":in"`` is the image itself). ``None`` takes the last site that
            still has a map (:func:`default_site`). Several sites give a dict. Token sites (batch, tokens, width) of vision transformers are
            reshaped, their class and register tokens left out.
        method: a name of :data:`METHODS`.
        extract, aggregate: choose the two phases instead: ``"bias"``, ``"scaling"``, ``"conv"``, ``"depthwise"`` or ``"proper"`` (the convolution at the
            site itself) with ``"sum"``, ``"norm"``, ``"filter_norm"``, ``"max"`` or ``"max_abs"``.
        kernel: N of the virtual N x N convolution.
        resize: bring the maps to the images' size (bilinear).
        smooth: sigma of a Gaussian blur, as a fraction of the map's longer side; 0.02 is usual for maps at the image.
        normalise: scale each map to [0, 1]; constant maps become zeros.
        steps: of the path of ``"integrated_gradients"``, which is taken at the image.
        seed: for ``"random"``.

    Returns:
        (batch, 1, height, width), or (batch, classes, height, width) for ``targets="all"``, or a dict {site: maps}.

    Raises:
        InputError: before any work for wrong images, targets, methods and sites; for a site without a map.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> saliency(net, torch.rand(2, 1, 8, 6), site="1", method="grad_cam").shape
    torch.Size([2, 1, 8, 6])
    """
    setting = METHODS[checks.one_of("method", method, METHODS)]
    if extract is not None or aggregate is not None:
        checks.one_of("extract", extract, (*EXTRACTS, "proper"))
        checks.one_of("aggregate", aggregate, AGGREGATES)
        setting = Method(str(extract), str(aggregate))
    checks.tensor("images", images, shape=("batch", "channels", "height", "width"), floating=True)
    images = images.detach().to(device_of(model))
    if not setting.extract:
        maps = _at_the_image(model, images, targets, method, steps, seed)
        return _finished(maps, images, resize, smooth, normalise)
    if site is None:
        site = default_site(model, images[:1])
    names = [site] if isinstance(site, str) else list(site)
    wanted = [name for pattern in names for name in sites(model, pattern)]
    with frozen(model):
        found = _maps(model, images, targets, wanted, setting, kernel)
    found = {name: _finished(maps, images, resize, smooth, normalise) for name, maps in found.items()}
    return found[wanted[0]] if isinstance(site, str) and len(wanted) == 1 else found


def normgrad(model: nn.Module, images: Tensor, targets: Any = None, **options: Any) -> Any:
    """NormGrad: ‖g_u‖ · ‖x_u‖ at each location, the norm of its contribution to a virtual 1 x 1 convolution's gradient.

    The arguments are those of :func:`saliency`; ``kernel=3`` takes a virtual 3 x 3 convolution.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> normgrad(net, torch.rand(2, 1, 8, 8), 0, site="1", resize=False).shape
    torch.Size([2, 1, 6, 6])
    """
    return saliency(model, images, targets, method="norm_grad", **options)


def combined_saliency(
    model: nn.Module,
    images: Tensor,
    targets: Any = None,
    *,
    site: Iterable[str],
    how: str = "product",
    weights: str | list[float] = "uniform",
    **options: Any,
) -> Float[Tensor, "batch 1 height width"]:
    """The maps of several sites as one: a weighted sum or geometric mean of maps scaled to [0, 1] per image.

    Args:
        site: sites in depth order.
        how, weights: as for :func:`~lineament.explain.aggregation.combined`.
        options: as for :func:`saliency`.
    """
    found = saliency(model, images, targets, site=list(site), **{**options, "resize": False})
    size = (images.shape[-2], images.shape[-1])
    return combined(list(found.values()), size, how=how, weights=weights)


def default_site(model: nn.Module, image: Float[Tensor, "1 channels height width"]) -> str:
    """The last site, in the order of the forward, that has a map on which the score depends.

    A map has more than one location: (1, C, H, W) with H·W > 1, or the tokens of a vision transformer. In a transformer that reads its class token,
    the last block's patch tokens have no effect on the score, so that the site is the input of its last attention.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> default_site(net, torch.rand(1, 1, 8, 8))
    '1'
    """
    order: list[str] = []
    names = {id(module): name for name, module in reversed(list(model.named_modules())) if name}
    handles = [
        module.register_forward_hook(lambda m, _a, _o: order.append(names[id(m)]) if id(m) in names else None)
        for module in model.modules()
    ]
    try:
        with frozen(model), capture(model, list(dict.fromkeys(names.values())), gradients=True) as acts:
            score = logits(model(image.to(device_of(model)))).amax(1).sum()
    finally:
        for handle in handles:
            handle.remove()
    for name in reversed(list(dict.fromkeys(order))):
        values = acts.calls(name) if order.count(name) == 1 else []
        if len(values) != 1 or values[0].ndim not in (3, 4) or not values[0].is_floating_point():
            continue
        try:
            shaped = as_map(values[0], image.shape[-2:], name)
        except checks.InputError:
            continue
        if shaped.shape[-2] * shaped.shape[-1] == 1 or not values[0].requires_grad:
            continue
        gradient = torch.autograd.grad(score, values[0], retain_graph=True, allow_unused=True)[0]
        if gradient is not None and bool((as_map(gradient, image.shape[-2:], name) != 0).any()):
            return name
    raise checks.InputError(
        "site: no site of this model has a map that the score depends on; name one, such as ':in'"
    )


def as_map(x: Tensor, image_size: Iterable[int], name: str) -> Float[Tensor, "batch channels height width"]:
    """A site's tensor as a map: unchanged when it is one, tokens laid out in the image's aspect without class or register tokens.

    >>> as_map(torch.zeros(1, 5, 8), (4, 4), "tokens").shape
    torch.Size([1, 8, 2, 2])
    """
    if x.ndim == 4:
        return x
    height, width = image_size
    if x.ndim == 3:
        # Class and register tokens come first; the patches make a grid of the image's aspect.
        for extra in range(min(9, x.shape[1])):
            patches = x.shape[1] - extra
            rows = round(math.sqrt(patches * height / width))
            if (
                rows > 0
                and patches % rows == 0
                and patches // rows == round(patches / rows)
                and (abs(rows / (patches // rows) - height / width) < 1e-6)
            ):
                return x[:, extra:].movedim(1, 2).unflatten(2, (rows, patches // rows))
    raise checks.InputError(
        f"site {name!r}: got {checks.show(x)}, expected a map (batch, channels, height, width) or patch tokens; "
        "choose a site before the pooling"
    )


def scores_of(model: nn.Module, images: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """The logits (batch, classes) and the class to explain for each image."""
    output = logits(model(images))
    checks.require(
        output.ndim == 2, f"model: its logits are {checks.show(output)}, expected shape (batch, classes)"
    )
    if targets is None or targets == "all" if not isinstance(targets, Tensor) else False:
        return output, output.argmax(1)
    if isinstance(targets, int):
        targets = torch.full((len(images),), targets)
    target = checks.labels("targets", targets, count=len(images), classes=output.shape[1])
    return output, target.to(output.device)


def _maps(
    model: nn.Module, images: Tensor, targets: Any, names: list[str], setting: Method, kernel: int
) -> dict[str, Tensor]:
    convs = _real_convolutions(model, names) if setting.extract == "proper" else {}
    asked = [*names, *(f"{name}:in" for name in convs)]
    if setting.rule == "contrastive":
        gradients, acts = _contrastive(model, images, targets, asked)
    else:
        rule = _rule(setting.rule)
        with rule or nullcontext(), capture(model, asked, gradients=True) as acts:
            output, target = scores_of(model, images, targets)
            if isinstance(targets, str) and targets == "all":
                every = [acts.gradients(output[:, k].sum()) for k in range(output.shape[1])]
                gradients = {name: torch.stack([g[name] for g in every]) for name in asked}
            else:
                gradients = acts.gradients(output.gather(1, target[:, None]).sum())
        if isinstance(rule, RectifiedBackward):
            rule.used(setting.rule)
    found: dict[str, Tensor] = {}
    for name in names:
        g = gradients[name].detach()
        if g.ndim > acts[name].ndim:
            columns = [_one_map(acts, name, each, setting, kernel, convs, images) for each in g]
            found[name] = torch.cat(columns, dim=1)
        else:
            found[name] = _one_map(acts, name, g, setting, kernel, convs, images)
    return found


def _one_map(
    acts: Activations,
    name: str,
    g: Tensor,
    setting: Method,
    kernel: int,
    convs: dict[str, nn.Conv2d],
    images: Tensor,
) -> Tensor:
    if setting.extract == "proper":
        conv = convs[name]
        x = acts[f"{name}:in"].detach()
        maps = aggregate_contributions(
            x, g, "conv", setting.aggregate, window=Window.of(conv), groups=conv.groups
        )
    else:
        size = images.shape[-2:]
        x, g = as_map(acts[name].detach(), size, name), as_map(g, size, name)
        if setting.pooled:
            g = g.mean((2, 3), keepdim=True).expand_as(g)
        maps = aggregate_contributions(x, g, setting.extract, setting.aggregate, window=Window.square(kernel))
    return maps.clamp_min(0) if setting.rectified else maps


def _rule(name: str) -> RectifiedBackward | ExcitationBackward | None:
    if name in ("guided", "deconvnet"):
        return RectifiedBackward(masked=name == "guided")
    return ExcitationBackward() if name == "excitation" else None


def _contrastive(
    model: nn.Module, images: Tensor, targets: Any, names: list[str]
) -> tuple[dict[str, Tensor], Activations]:
    """The signal that speaks for the class less the one that speaks against it, taken where the last linear layer begins."""
    with ExcitationBackward() as rule, capture(model, names, gradients=True) as acts:
        output, target = scores_of(model, images, targets)
    last = rule.last_input
    checks.require(last is not None, "contrastive_excitation_backprop: no linear layer ran behind the site")
    against = ExcitationBackward(negate=rule.calls - 1)
    with against, capture(model, names, gradients=True):
        negated, _ = scores_of(model, images, target)
    assert last is not None and against.last_input is not None
    for_class = torch.autograd.grad(output.gather(1, target[:, None]).sum(), last, retain_graph=True)[0]
    opposed = torch.autograd.grad(negated.gather(1, target[:, None]).sum(), against.last_input)[0]
    tensors = [acts[name] for name in names]
    found = torch.autograd.grad(
        last, tensors, for_class - opposed, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, found)), acts


def _real_convolutions(model: nn.Module, names: list[str]) -> dict[str, nn.Conv2d]:
    modules = dict(model.named_modules())
    found: dict[str, nn.Conv2d] = {}
    for name in names:
        module = modules.get(name.removesuffix(":out"))
        if not isinstance(module, nn.Conv2d):
            known = [n for n, m in modules.items() if isinstance(m, nn.Conv2d)]
            raise checks.InputError(
                f"site {name!r}: 'proper' needs a convolution there, got {type(module).__name__}{checks.suggest(name, known)}"
            )
        found[name] = module
    return found


def _at_the_image(
    model: nn.Module, images: Tensor, targets: Any, method: str, steps: int, seed: int
) -> Float[Tensor, "batch 1 height width"]:
    height, width = images.shape[-2:]
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(images), 1, height, width, generator=generator).to(images)
    if method == "center":
        rows = torch.linspace(-1, 1, height).to(images)[:, None]
        columns = torch.linspace(-1, 1, width).to(images)[None]
        return (-(rows**2 + columns**2)).expand(len(images), 1, height, width).contiguous()
    return integrated_gradients(model, images, targets, steps=steps).sum(1, keepdim=True)


def integrated_gradients(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    targets: Any = None,
    *,
    baseline: Tensor | float = 0.0,
    steps: int = 32,
    batch_size: int = 32,
) -> Float[Tensor, "batch channels height width"]:
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365): (x - b) ⊙ ∫ ∂S/∂x along the line from b to x.

    The integral is a Gauss-Legendre sum; points of the path run in chunks, so that memory does not grow with ``steps``. The entries sum to S(x) - S(b).

    Args:
        baseline: where the path starts; a number or a tensor that broadcasts to the images.
        steps: points on the path.
        batch_size: images times points that run at once.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> x = torch.rand(1, 1, 2, 2)
    >>> torch.allclose(integrated_gradients(net, x, 0).sum(), net(x)[0, 0], atol=1e-6)
    True
    """
    from numpy.polynomial.legendre import leggauss

    checks.number("steps", steps, low=1, integer=True)
    nodes, weights = leggauss(steps)
    images = images.detach()
    start = torch.as_tensor(baseline, dtype=images.dtype, device=images.device).expand_as(images)
    total = torch.zeros_like(images)
    with frozen(model):
        with torch.no_grad():
            _, target = scores_of(model, images, targets)
        at_once = max(1, batch_size // len(images))
        for first in range(0, steps, at_once):
            alpha = torch.as_tensor(
                (nodes[first : first + at_once] + 1) / 2, dtype=images.dtype, device=images.device
            )
            share = torch.as_tensor(
                weights[first : first + at_once] / 2, dtype=images.dtype, device=images.device
            )
            path = start + alpha.reshape(-1, 1, 1, 1, 1) * (images - start)
            points = path.flatten(0, 1).requires_grad_()
            score = logits(model(points)).gather(1, target.repeat(len(alpha))[:, None]).sum()
            slope = torch.autograd.grad(score, points)[0].reshape(len(alpha), *images.shape)
            total += (share.reshape(-1, 1, 1, 1, 1) * slope).sum(0)
    return (images - start) * total


def _finished(maps: Tensor, images: Tensor, resize: bool, smooth: float, normalise: bool) -> Tensor:
    batch, classes = maps.shape[:2]
    flat = maps.detach().flatten(0, 1)[:, None]
    if resize:
        flat = resized(flat, (images.shape[-2], images.shape[-1]))
    flat = smoothed(flat, smooth)
    if normalise:
        flat = normalised(flat)[0]
    return flat.reshape(batch, classes, *flat.shape[-2:])
