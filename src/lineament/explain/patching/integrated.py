"""Integrated gradients between the two runs: coefficients averaged along the way, where one gradient is taken at its beginning only.

Sundararajan et al. 2017; at the activations Marks et al. 2024 (arXiv 2403.19647), at the inputs Hanna et al. 2024 (arXiv 2403.17806). At the activations the steps of one layer are
rows of one forward that starts at that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require
from lineament.core.models import frozen, unwrapped
from lineament.core.sites.hooks import replace, tap
from lineament.core.sites.naming import Site
from lineament.explain.patching.attribution import check_rules_acted
from lineament.explain.patching.components import Component
from lineament.explain.patching.experiment import Experiment, Options
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import Prompts
from lineament.explain.patching.result import PatchingResult
from lineament.explain.patching.runs import Runs, receiving
from lineament.explain.relevance.functions import wide
from lineament.explain.relevance.rules import Rules, relevance_rules

if TYPE_CHECKING:
    from typing_extensions import Unpack


@torch.inference_mode(False)
def integrated_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    *,
    steps: int | Sequence[float] = 10,
    path: Literal["site", "input"] = "site",
    rules: Rules = "gradient",
    **options: Unpack[Options],
) -> PatchingResult:
    """The effect of every node, approximated: Σ (a_source - a_base)·c with c the coefficient's mean at a_base + α (a_source - a_base).

    With ``path="site"`` each site in turn goes from base to source and the rest follows: ``steps`` forwards and backwards a site and layer. With ``path="input"`` the
    input embeddings go, and all sites share those ``steps`` forwards and backwards. The other arguments are those of
    :func:`lineament.explain.patching.relevance.relevance_patching`.

    Args:
        steps: N, for α = 0, 1/N ... (N - 1)/N, as Marks et al. take them; or the values of α.
        options: ``sites``, ``direction`` ... as in :func:`lineament.explain.patching.activation.activation_patching`.

    Raises:
        InputError: as relevance patching; ``path="input"`` with ``corruption`` other than ``"resample"``.

    >>> net = nn.Sequential(nn.Identity(), nn.SiLU())
    >>> steps = [(k + 0.5) / 50 for k in range(50)]
    >>> result = integrated_patching(net, torch.ones(1, 1), torch.zeros(1, 1), lambda y: y[:, 0], sites={"hidden": "[0]"}, steps=steps)
    >>> round(float(result.scores["hidden"]), 3)
    1.0
    """
    if isinstance(steps, Sequence):
        alphas = [float(number("steps", alpha, low=0, high=1)) for alpha in steps]
        require(bool(alphas), "steps: got none, expected at least one")
    else:
        number("steps", steps, low=1, integer=True)
        alphas = [k / steps for k in range(steps)]
    one_of("path", path, ("site", "input"))
    require(
        path == "site" or options.get("corruption", "resample") == "resample",
        f"corruption: {options.get('corruption')!r} is at the sites, where there is no way between two inputs; give path='site'",
    )
    experiment = Experiment(model, clean, corrupt, metric, **options)
    runs = experiment.runs
    with frozen(model):
        source, source_score = experiment.source()
        base, base_score = experiment.base()
        experiment.settle(base, (base_score, source_score))
        source = experiment.ablated(source, base)
        differences = {key: runs.masked(source[key] - value) for key, value in base.items()}
        with relevance_rules(model, rules) as coverage:
            if path == "input":
                totals = _along_inputs(runs, experiment.components, alphas)
            else:
                totals = [
                    _along_site(runs, c, differences[c.read.key], alphas) for c in experiment.components
                ]
        check_rules_acted(coverage)
    scores = []
    for component, total in zip(experiment.components, totals):
        difference = wide(differences[component.read.key])
        product = torch.zeros_like(difference) if total is None else difference * wide(total) / len(alphas)
        scores.append(experiment.picked(component.contracted(product)))
    settings = {
        "steps": len(alphas),
        "path": path,
        "rules": rules if isinstance(rules, str) else [str(rule) for rule in rules],
    }
    name = "integrated gradients" if rules == "gradient" else "integrated relevance"
    return experiment.result(name, scores, base_score, source_score, coverage, settings)


def _along_site(
    runs: Runs, component: Component, difference: Tensor, alphas: Sequence[float]
) -> Tensor | None:
    """The sum over the steps of the coefficient at one component while that alone goes from base to source."""
    total = None
    for first in range(0, len(alphas), runs.rows_at_once):
        part = _at(runs, component, difference, alphas[first : first + runs.rows_at_once])
        if part is not None:
            total = part if total is None else total + part
    return total


def _at(runs: Runs, component: Component, difference: Tensor, alphas: Sequence[float]) -> Tensor | None:
    times = len(alphas)
    weights = difference.new_tensor(alphas).repeat_interleave(runs.batch)
    moved = weights.reshape(-1, *[1] * (difference.ndim - 1)) * difference.repeat(
        times, *[1] * (difference.ndim - 1)
    )
    if component.heads is not None:
        # Queries, keys and values may share one tensor: only this part goes.
        moved = component.heads.write(torch.zeros_like(moved), component.heads.read(moved))
    leaves: list[Tensor] = []

    def change(value: Tensor) -> Tensor:
        leaves.append((value.detach() + moved).requires_grad_())
        return leaves[0].clone()

    with torch.enable_grad():
        if component.direct and component.stage is not None:
            stream = change(runs.stream(component.stage, times))
            score = runs.patched(component.stage, times, {}, stream)
        else:
            score = runs.patched(component.stage, times, {component.write.whole: change})
        if not score.requires_grad:
            return None
        gradient = torch.autograd.grad(score.sum(), leaves[0], allow_unused=True)[0]
    return None if gradient is None else gradient.unflatten(0, (times, -1)).sum(0)


def _along_inputs(
    runs: Runs, components: Sequence[Component], alphas: Sequence[float]
) -> list[Tensor | None]:
    """The sums of the coefficients at all components while the inputs (a language model's token embeddings) go from base to source."""
    sums: dict[tuple[int, str], Tensor] = {}
    ends = runs.base_inputs, runs.source_inputs
    inner: Any = unwrapped(runs.model)
    embedding = inner.get_input_embeddings() if runs.pair.language else None
    if embedding is not None:
        with torch.no_grad():
            ends = embedding(ends[0]), embedding(ends[1])

    def add(site: Site, coefficient: Tensor) -> None:
        sums[site.key] = sums[site.key] + coefficient if site.key in sums else coefficient

    def see(site: Site, tensor: Tensor) -> Tensor:
        return receiving(tensor, partial(add, site))

    sites = {component.write.key: component.write.whole for component in components}
    taps = {site: partial(see, site) for site in sites.values()}
    for alpha in alphas:
        middle = ends[0] + alpha * (ends[1] - ends[0])
        with torch.enable_grad(), tap(runs.model, taps):
            if embedding is None:
                logits = runs.pair.call(runs.model, middle)
            else:
                with replace(embedding, {Site("embeddings", embedding): lambda _, x=middle: x}):
                    logits = runs.pair.call(runs.model, runs.base_inputs)
            runs.judge(logits)[0].sum().backward()
    return [sums.get(component.write.key) for component in components]
