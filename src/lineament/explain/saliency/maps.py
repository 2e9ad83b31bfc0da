"""Where does a network look? Saliency maps at any site, as an extraction and an aggregation.

Rebuffi, Fong, Ji, Vedaldi, "There and Back Again: Revisiting Backpropagation Saliency Methods", CVPR 2020, arXiv 2004.02866. Gradient,
Grad-CAM, linear approximation, NormGrad and their relatives are settings of one function (:data:`~lineament.explain.saliency.methods.METHODS`); one forward and one backward
give all sites and methods. Maps explain the logit, not the probability; a positive gradient means that more of the feature raises it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import chunked
from lineament.core.sites.activations import capture
from lineament.core.sites.naming import sites
from lineament.explain.inputs import takes_all
from lineament.explain.saliency import layouts
from lineament.explain.saliency.aggregation import (
    Window,
    aggregate_contributions,
    combined,
    is_constant,
    normalised,
    resized,
    smoothed,
)
from lineament.explain.saliency.backward_rules import ExcitationBackward, GuidedBackward
from lineament.explain.saliency.baselines import (
    centre_map,
    class_activation,
    integrated_gradients,
    random_map,
)
from lineament.explain.saliency.methods import Method, settings_of
from lineament.explain.scores import cotangent, differentiable, labels_of, prepared, scores_of

_CLASSES_AT_ONCE = 8


@dataclass(frozen=True)
class SaliencyOptions:
    """What a saliency map rarely needs.

    Attributes:
        grid: (rows, columns) of a vision transformer's patch tokens, where they are not found from the model.
        layout: ``"channels_first"``, ``"channels_last"`` or ``"tokens"`` where ``"auto"`` guesses wrong.
        baseline, steps: of ``"integrated_gradients"``, which is taken at the image.

    Raises:
        InputError: an unknown layout.

    >>> SaliencyOptions(layout="tokens").steps
    50
    """

    grid: tuple[int, int] | None = None
    layout: str = "auto"
    baseline: Tensor | float = 0.0
    steps: int = 50

    def __post_init__(self) -> None:
        checks.one_of("layout", self.layout, layouts.LAYOUTS)


@takes_all
@torch.inference_mode(False)
def saliency(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    targets: Int[Tensor, "batch"] | Sequence[int] | int | str | None = None,
    *,
    site: str | Iterable[str] | None = None,
    method: str | Method | Sequence[str | Method] = "norm_grad",
    resize: bool | tuple[int, int] = True,
    smooth: float = 0.0,
    normalise: bool = False,
    seed: int = 0,
    batch_size: int | str = "auto",
    options: SaliencyOptions | None = None,
) -> Any:
    """Maps of where the model looks for a class: one forward and one backward for all sites and methods.

    A virtual identity layer behind the activation x at the site would have a weight gradient that is a sum over locations u;
    the map at u aggregates the entries of its contribution (see :mod:`lineament.explain.saliency.aggregation`), made of x and g = ∂S_c/∂x.

    Args:
        images: a batch, as the model takes it; also signals (batch, channels, steps) and rows (batch, features), whose maps are (batch, 1, steps), and tuples or dicts
            of what the model takes, of which the first batch of real numbers is explained.
        targets: the class to explain: one for each image, one for all, ``None`` for the class the model predicts, or ``"all"``
            for every class.
        site: where to take the maps: a module name, with ``:in`` or ``:out``; ``":in"`` is the image itself. ``None`` takes the
            last convolutional block's output (:func:`lineament.explain.saliency.layouts.default_site` has the rule). Several sites, or a
            glob that matches several, give a dict {site: maps}.
        method: a name of :data:`~lineament.explain.saliency.methods.METHODS` (``"norm_grad_5x5"`` and the like too), or the two phases as a
            :class:`~lineament.explain.saliency.methods.Method`. Several give a dict {method: ...}.
        resize: bring the maps to the images' size, or to this (height, width), bilinearly; ``False`` leaves the site's size.
        smooth: sigma of a Gaussian blur, as a fraction of the map's longer side; 0.02 is usual for maps at the image.
        normalise: scale each map to [0, 1]; constant maps become zeros, with a warning.
        seed: for ``"random"``.
        batch_size: images at a time, or ``"auto"``: all at once, halved when memory runs out.
        options: what is rarely needed.

    Returns:
        (batch, 1, height, width), or (batch, classes, height, width) for ``targets="all"``, in dicts for several sites and methods.

    Raises:
        InputError: wrong images, targets, methods or sites; a site without a map, that is not reached or is reached twice;
            a guided method on a network without ReLUs; excitation backpropagation through an operation it has no rule for.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> saliency(net, torch.rand(2, 1, 8, 6), site="1", method="grad_cam").shape
    torch.Size([2, 1, 8, 6])
    """
    rare = options or SaliencyOptions()
    settings = settings_of(method)
    images = prepared(model, images)
    given = labels_of(targets, len(images))
    checks.number("smooth", smooth, low=0)
    if not isinstance(resize, bool):
        pair = isinstance(resize, (tuple, list)) and len(resize) == 2
        checks.require(pair, f"resize: got {checks.show(resize)}, expected True, False or (height, width)")
        for pixels in resize:
            checks.number("resize", pixels, low=1, integer=True)
    if site is None:
        placed = any(m.extract for m in settings.values()) or "cam" in settings
        site = layouts.default_site(model, images) if placed else ":in"
    patterns = [site] if isinstance(site, str) else site
    names = list(dict.fromkeys(name for pattern in patterns for name in sites(model, pattern)))
    checks.require(len(names) > 0, "site: got none, expected at least one")
    single = isinstance(site, str) and len(names) == 1
    shape = _Shape(images, layouts.patch_of(model, images.shape[1]), rare.grid, rare.layout)

    def one(chunk: Tensor, *labels: Tensor) -> dict[Any, dict[str, Tensor]]:
        wanted = labels[0] if labels else targets
        made: dict[Any, dict[str, Tensor]] = {}
        for rule in dict.fromkeys(m.rule for m in settings.values() if m.extract):
            group = {key: m for key, m in settings.items() if m.extract and m.rule == rule}
            made.update(_maps(model, chunk, wanted, names, group, rule, shape))
        for key in (key for key, m in settings.items() if not m.extract):
            made[key] = {name: _baseline(str(key), model, chunk, wanted, name, rare, seed) for name in names}
        return {
            key: {n: _finished(m, shape.size, resize, smooth) for n, m in found.items()}
            for key, found in made.items()
        }

    tensors = [images] if given is None else [images, given.to(images.device)]
    # Noise and a baseline for each image are drawn for the batch as a whole.
    start = rare.baseline
    whole = "random" in settings or (isinstance(start, Tensor) and start.ndim == 4 and len(start) > 1)
    found = one(*tensors) if whole and batch_size == "auto" else chunked(one, *tensors, batch_size=batch_size)
    if normalise:
        found = {key: {n: _scaled(m, key, n) for n, m in each.items()} for key, each in found.items()}
    answer = {key: each[names[0]] if single else each for key, each in found.items()}
    return next(iter(answer.values())) if isinstance(method, (str, Method)) else answer


def normgrad(
    model: nn.Module, images: Tensor, targets: Any = None, *, kernel: int = 1, **options: Any
) -> Any:
    """NormGrad: ‖g_u‖ · ‖x_u‖ at each location, the norm of its contribution to a virtual 1 x 1 convolution's gradient.

    Args:
        kernel: N of the virtual N x N convolution.
        options: as for :func:`saliency`.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> normgrad(net, torch.rand(2, 1, 8, 8), 0, site="1", resize=False).shape
    torch.Size([2, 1, 6, 6])
    """
    return saliency(model, images, targets, method=Method("conv", "norm", kernel), **options)


def combined_saliency(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    targets: Any = None,
    *,
    site: str | Iterable[str],
    how: str = "product",
    weights: str | Sequence[float] = "uniform",
    **options: Any,
) -> Float[Tensor, "batch 1 height width"]:
    """The maps of several sites as one: a weighted sum or geometric mean of maps scaled to [0, 1] per image.

    Args:
        site: sites in depth order, or a glob.
        how: ``"product"``, ``"sum"`` or ``"plain_product"``.
        weights: ``"uniform"``, ``"linear"``, or a number for each site (:mod:`lineament.explain.saliency.weighting` measures some).
        options: as for :func:`saliency`, one method.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    >>> maps = combined_saliency(net, torch.rand(2, 1, 8, 8), 0, site=["1", "3"])
    >>> maps.shape, bool((maps >= 0).all() and (maps <= 1).all())
    (torch.Size([2, 1, 8, 8]), True)
    """
    checks.require(
        targets != "all" if isinstance(targets, str) else True, "targets: 'all' cannot be combined"
    )
    names = [site] if isinstance(site, str) else list(site)
    found = saliency(model, images, targets, site=names, **{**options, "resize": False, "normalise": False})
    size = (images.shape[-2], images.shape[-1])
    return combined(list(found.values()), size, how=how, weights=weights)


@dataclass(frozen=True)
class _Shape:
    """How the images decide the layout of what passes at a site."""

    images: Tensor
    patch: tuple[int, int] | None
    grid: tuple[int, int] | None
    kind: str

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    def at(self, x: Tensor, site: str) -> Callable[[Tensor], Tensor]:
        return layouts.layout(x, site, self.size, patch=self.patch, grid=self.grid, kind=self.kind)


def _maps(
    model: nn.Module,
    images: Tensor,
    targets: Any,
    names: list[str],
    settings: dict[Any, Method],
    rule_name: str,
    shape: _Shape,
) -> dict[Any, dict[str, Tensor]]:
    """{method: {site: (batch, 1 or classes, h, w)}} for methods that share how the signal flows backwards."""
    proper = any(m.extract == "proper" for m in settings.values())
    convs = {name: layouts.convolution_at(model, name) for name in names} if proper else {}
    inputs = {name: f"{name.removesuffix(':out')}:in" for name in convs}
    rule = _rule(rule_name)
    with differentiable(model):
        with rule or nullcontext(), capture(model, [*names, *inputs.values()], gradients=True) as acts:
            # Excitation shares each sum among all its parts, so that all of them must be in the graph.
            source = images.clone().requires_grad_() if isinstance(rule, ExcitationBackward) else images
            scores, target = scores_of(model, source, targets)
        tensors = {name: acts[name] for name in names}
        if isinstance(rule, GuidedBackward):
            rule.check(str(next(iter(settings))))
        every = isinstance(targets, str)
        classes = [torch.full_like(target, c) for c in range(scores.shape[1])] if every else [target]
        columns: dict[Any, dict[str, list[Tensor]]] = {key: {n: [] for n in names} for key in settings}
        silent: set[str] = set()
        for signals in _signals(scores, classes, list(tensors.values()), rule, rule_name):
            for (name, x), g in zip(tensors.items(), signals):
                if g is None:
                    silent.add(name)
                view = shape.at(x, name)
                x, g = view(x.detach()), view(torch.zeros_like(x) if g is None else g)
                source_x = acts[inputs[name]].detach() if name in inputs else x
                for key, m in settings.items():
                    columns[key][name].append(_one_map(m, x, g, source_x, convs.get(name)))
    for name in sorted(silent):
        warnings.warn(
            f"site {name!r}: the score does not depend on it, so that its map is zero", stacklevel=4
        )
    return {key: {n: torch.cat(c, dim=1) for n, c in each.items()} for key, each in columns.items()}


def _one_map(m: Method, x: Tensor, g: Tensor, conv_input: Tensor, conv: nn.Conv2d | None) -> Tensor:
    if m.extract == "proper" and conv is not None:
        arguments: dict[str, Any] = {"window": Window.of(conv), "groups": conv.groups}
        return aggregate_contributions(conv_input, g, "conv", m.aggregate, **arguments)
    if m.pooled:
        # Σ_k mean(g_k) x_k(u), without a gradient of the activation's size.
        maps = torch.einsum("bk,bkhw->bhw", g.mean((2, 3)), x)[:, None]
    else:
        maps = aggregate_contributions(x, g, m.extract, m.aggregate, window=Window.square(m.kernel))
    return maps.clamp_min(0) if m.rectified else maps


def _rule(name: str) -> GuidedBackward | ExcitationBackward | None:
    if name in ("guided", "deconvnet"):
        return GuidedBackward(masked=name == "guided")
    return ExcitationBackward() if name in ("excitation", "contrastive") else None


def _signals(
    scores: Tensor, classes: list[Tensor], tensors: list[Tensor], rule: Any, rule_name: str
) -> Iterator[Sequence[Tensor | None]]:
    """For each column of classes, what arrives at each tensor; ``None`` where the score does not depend on it."""
    if not scores.requires_grad:
        yield from ([None] * len(tensors) for _ in classes)
        return
    if rule_name == "contrastive":
        checks.require(
            rule.last is not None,
            "method 'contrastive_excitation_backprop': no linear layer ran behind the site",
        )
        for target in classes:
            yield rule.last.contrast(scores, cotangent(scores, target), tensors)
        return
    keep: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    # The rules' own backward functions have no batching rule, and one class needs none.
    step = 1 if rule is not None or len(classes) == 1 else _CLASSES_AT_ONCE
    for first in range(0, len(classes), step):
        starts = [cotangent(scores, target) for target in classes[first : first + step]]
        if step == 1:
            keep["retain_graph"] = first + 1 < len(classes)
            yield torch.autograd.grad(scores, tensors, starts[0], **keep)
            continue
        found = torch.autograd.grad(scores, tensors, torch.stack(starts), is_grads_batched=True, **keep)
        for k in range(len(starts)):
            yield [None if g is None else g[k] for g in found]


def _baseline(
    key: str, model: nn.Module, images: Tensor, targets: Any, site: str, rare: SaliencyOptions, seed: int
) -> Float[Tensor, "batch columns height width"]:
    """The methods that are no extraction and aggregation."""
    if key in ("integrated_gradients", "cam") and isinstance(targets, str):
        classes = _class_count(model, images)
        return torch.cat([_baseline(key, model, images, c, site, rare, seed) for c in range(classes)], dim=1)
    if key == "integrated_gradients":
        found = integrated_gradients(model, images, targets, baseline=rare.baseline, steps=rare.steps)
        return found.sum(1, keepdim=True)
    if key == "cam":
        return class_activation(model, images, targets, site)[0]
    maps = centre_map(images) if key == "center" else random_map(images, seed)
    return maps.expand(-1, _class_count(model, images), -1, -1) if isinstance(targets, str) else maps


def _class_count(model: nn.Module, images: Tensor) -> int:
    with differentiable(model), torch.no_grad():
        return scores_of(model, images[:1], None)[0].shape[1]


def _finished(maps: Tensor, size: tuple[int, int], resize: bool | tuple[int, int], smooth: float) -> Tensor:
    maps = maps.detach()
    if resize is not False:
        maps = resized(maps, size if resize is True else (int(resize[0]), int(resize[1])))
    flat = smoothed(maps.flatten(0, 1)[:, None], smooth)
    return flat.reshape(*maps.shape[:2], *flat.shape[-2:])


def _scaled(maps: Tensor, method: Any, site: str) -> Tensor:
    flat = maps.flatten(0, 1)[:, None]
    constant = int(is_constant(flat).sum())
    if constant:
        warnings.warn(
            f"method {method!r} at site {site!r}: {constant} of {len(flat)} maps are constant and become zeros",
            stacklevel=3,
        )
    return normalised(flat)[0].reshape(maps.shape)
