"""Integrated gradients between the two runs: coefficients averaged along the way, where one gradient is taken at its beginning only.

Sundararajan et al. 2017; at the activations Marks et al. 2024 (arXiv 2403.19647), at the inputs Hanna et al. 2024 (arXiv 2403.17806). At the activations the steps of one layer are
rows of one forward that starts at that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require
from lineament.core.models import frozen
from lineament.core.sites.heads import plain
from lineament.core.sites.hooks import watch
from lineament.core.sites.naming import Site
from lineament.explain.patching.engine import contracted, tapped
from lineament.explain.patching.inputs import Prompts
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.result import PatchingResult
from lineament.explain.patching.sites import Place
from lineament.explain.patching.work import Options, Work
from lineament.explain.relevance.context import Coverage, Rules, relevance_rules
from lineament.explain.relevance.functions import wide

if TYPE_CHECKING:
    from typing_extensions import Unpack

Rule = Literal["left", "midpoint", "right"]
# Steps side by side in one forward, in tokens.
_TOKENS_AT_ONCE = 4096


@torch.inference_mode(False)
def integrated_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    *,
    steps: int = 10,
    rule: Rule = "left",
    path: Literal["site", "input"] = "site",
    rules: Rules = "gradient",
    modules: Mapping[Any, str] | None = None,
    **options: Unpack[Options],
) -> PatchingResult:
    """The effect of every node, approximated: Σ (a_source - a_base)·c with c the coefficient's mean at a_base + α (a_source - a_base).

    With ``path="site"`` each site in turn goes from base to source and the rest follows: ``steps`` forwards and backwards a site and layer. With ``path="input"`` the
    input embeddings go, and all sites share those ``steps`` forwards and backwards. The other arguments are those of
    :func:`lineament.explain.patching.activation_patching` and :func:`lineament.explain.patching.relevance_patching`.

    Args:
        options: ``sites``, ``layout``, ``direction`` ... of activation patching.
        steps: N. rule: α = 0, 1/N ... (``"left"``, as Marks et al.), the middles of those intervals, or their right ends.

    Raises:
        InputError: as relevance patching; ``path="input"`` with ``corruption`` other than ``"resample"``.

    >>> net = nn.Sequential(nn.Identity(), nn.SiLU())
    >>> options = {"sites": "hidden", "layout": {"hidden": "[0]"}, "steps": 50, "rule": "midpoint"}
    >>> result = integrated_patching(net, torch.ones(1, 1), torch.zeros(1, 1), lambda y: y[:, 0], **options)
    >>> round(float(result.scores["hidden"]), 3)
    1.0
    """
    number("steps", steps, low=1, integer=True)
    offset = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[one_of("rule", rule, ("left", "midpoint", "right"))]
    one_of("path", path, ("site", "input"))
    require(
        path == "site" or options.get("corruption", "resample") == "resample",
        f"corruption: {options.get('corruption')!r} is at the sites, where there is no way between two inputs; give path='site'",
    )
    work = Work(model, clean, corrupt, metric, **options)
    alphas = [(k + offset) / steps for k in range(steps)]
    with frozen(model):
        with torch.no_grad():
            sources, base, source = work.runs()
        differences = {key: sources[key] - value for key, value in base[0].items()}
        mask = work.engine.pair.mask
        if mask is not None:
            differences = {key: value * mask[..., None] for key, value in differences.items()}
        with relevance_rules(model, rules, modules=modules) as coverage:
            run = _along_sites if path == "site" else _along_inputs
            means = run(work, base[0], differences, alphas)
    scores = []
    for place, mean in zip(work.engine.places, means):
        difference = differences[id(place.read.module), place.read.side]
        product = torch.zeros_like(wide(difference)) if mean is None else wide(difference) * wide(mean)
        scores.append(work.picked(contracted(place, product)))
    settings: dict[str, Any] = {"steps": steps, "rule": rule, "path": path}
    settings["rules"] = rules if isinstance(rules, str) else [str(r) for r in rules]
    name = "integrated gradients" if rules == "gradient" and not modules else "integrated relevance"
    return work.result(name, scores, base[1], source, _checked(coverage), settings)


def _checked(coverage: Coverage) -> Coverage:
    idle = coverage.idle()
    require(
        not idle,
        f"rules: {', '.join(map(repr, idle))} matched modules none of which ran in the forwards behind the sites",
    )
    return coverage


def _along_sites(
    work: Work,
    base: Mapping[tuple[int, str], Tensor],
    differences: Mapping[tuple[int, str], Tensor],
    alphas: list[float],
) -> list[Tensor | None]:
    engine = work.engine
    shape = engine.base_inputs.shape
    tokens = shape[0] * (shape[1] if engine.pair.language else 1)
    size = max(1, _TOKENS_AT_ONCE // tokens)
    means: list[Tensor | None] = []
    for place in engine.places:
        total = None
        for first in range(0, len(alphas), size):
            part = alphas[first : first + size]
            gradient = _at(work, place, differences[id(place.read.module), place.read.side], part)
            if gradient is not None:
                total = gradient if total is None else total + gradient
        means.append(None if total is None else total / len(alphas))
    return means


def _at(work: Work, place: Place, difference: Tensor, alphas: list[float]) -> Tensor | None:
    """The sum over some steps of the coefficient at one place, shaped like the place."""
    engine, times = work.engine, len(alphas)
    weights = torch.tensor(alphas, dtype=difference.dtype, device=difference.device).repeat_interleave(
        engine.batch
    )
    moved = weights.reshape(-1, *[1] * (difference.ndim - 1)) * difference.repeat(
        times, *[1] * (difference.ndim - 1)
    )
    leaves: list[Tensor] = []

    def change(value: Tensor) -> Tensor:
        if place.units == "head" and place.read.view is not None:
            # Queries, keys and values may share one tensor: only this part goes.
            view = place.read.view
            part = view.write(torch.zeros_like(moved), view.read(moved))
        else:
            part = moved
        leaves.append((value.detach() + part).requires_grad_())
        return leaves[0].clone()

    stream = None
    if place.stage is not None:
        one = engine.stages[place.stage]
        stream = one.repeat(times, *[1] * (one.ndim - 1))
    with torch.enable_grad():
        if place.direct and stream is not None:
            leaves.append((stream + moved).requires_grad_())
            score = engine.forward(place.stage, times, leaves[0].clone(), {})
        else:
            key = (id(place.write.module), place.write.side)
            score = engine.forward(place.stage, times, stream, {key: (place.write, change)})
        if not score.requires_grad:
            return None
        gradient = torch.autograd.grad(score.sum(), leaves[0], allow_unused=True)[0]
    return None if gradient is None else gradient.unflatten(0, (times, -1)).sum(0)


def _along_inputs(
    work: Work,
    base: Mapping[tuple[int, str], Tensor],
    differences: Mapping[tuple[int, str], Tensor],
    alphas: list[float],
) -> list[Tensor | None]:
    """Coefficients at all places while the inputs (a language model's token embeddings) go from base to source."""
    engine = work.engine
    sums: list[Tensor | None] = [None] * len(engine.places)
    embedding: Any = plain(work.model)
    embedding = embedding.get_input_embeddings() if engine.pair.language else None
    if embedding is not None:
        with torch.no_grad():
            ends = embedding(engine.base_inputs), embedding(engine.source_inputs)
    else:
        ends = engine.base_inputs, engine.source_inputs

    def tap(members: list[int]) -> Callable[[Any], Any]:
        def add(gradient: Tensor) -> None:
            for index in members:
                before = sums[index]
                sums[index] = gradient if before is None else before + gradient

        return lambda value: tapped(value, add)

    write: dict[tuple[int, str], tuple[Site, list[int]]] = {}
    for index, place in enumerate(engine.places):
        write.setdefault((id(place.write.module), place.write.side), (place.write, []))[1].append(index)
    for alpha in alphas:
        middle = ends[0] + alpha * (ends[1] - ends[0])
        with torch.enable_grad(), ExitStack() as stack:
            for site, members in write.values():
                watch(Site(site.name, site.module, site.side), tap(members), stack, last=True)
            if embedding is not None:
                watch(Site("embeddings", embedding, "out"), lambda _, x=middle: x, stack, last=False)
                logits = engine.pair.call(work.model, engine.base_inputs)
            else:
                logits = engine.pair.call(work.model, middle)
            engine.judge(logits)[0].sum().backward()
    return [None if total is None else total / len(alphas) for total in sums]
