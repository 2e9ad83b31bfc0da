"""Which activations carry a behaviour, approximated in one backward pass: attribution patching, and what relevance patching shares with it.

Nanda, "Attribution patching", 2023. The effect of a node is the difference of its activations times a coefficient, here the gradient. The coefficient is
multiplied inside the backward pass and never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lineament.core.checks import require
from lineament.core.models import frozen
from lineament.core.sites.hooks import tap
from lineament.core.sites.naming import Site
from lineament.explain.patching.atp_star import GradDrop, QKFix
from lineament.explain.patching.experiment import Experiment, Options
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import Prompts
from lineament.explain.patching.result import PatchingResult
from lineament.explain.patching.runs import Values, check_once, check_reached, receiving
from lineament.explain.relevance.functions import wide
from lineament.explain.relevance.hooks import Coverage
from lineament.explain.relevance.rules import Rules, relevance_rules

if TYPE_CHECKING:
    from typing_extensions import Unpack


@torch.inference_mode(False)
def attribution_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    *,
    qk_fix: bool = False,
    grad_drop: bool = False,
    **options: Unpack[Options],
) -> PatchingResult:
    """The effect of every node, approximated with the plain gradient: Σ (a_source - a_base)·∂L/∂a on the base run.

    Two forwards and one backward for all nodes together. With both fixes it is AtP* (:mod:`lineament.explain.patching.atp_star`).

    Args:
        qk_fix: at queries and keys, recompute the attention of the base run with that one query or key from the other run, and be linear only behind it; a
            forward of the attention alone for each key position.
        grad_drop: the mean of \\|score\\| over one backward pass for each block, in which that block hands the gradient on by the residual stream alone.
            Scores are then sizes; a node's own block does not count among its passes.
        options: ``sites``, ``direction``, ``corruption``, ``positions``, ``normalise``, ``tokenizer``, ``attention_mask``, as in
            :func:`lineament.explain.patching.activation.activation_patching`.

    Source: Nanda 2023; Kramár et al. 2024 (arXiv 2403.00745), sections 3.1 and 3.2, for the fixes.

    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = [nn.init.ones_(net[k].weight) for k in (0, 2)]
    >>> result = attribution_patching(net, torch.ones(1, 2), torch.full((1, 2), 0.5), lambda y: y[:, 0], sites={"hidden": "[0]"})
    >>> result.scores["hidden"].tolist()
    [[1.0]]
    """
    return first_order(
        Experiment(model, clean, corrupt, metric, **options), "gradient", qk_fix=qk_fix, grad_drop=grad_drop
    )


def first_order(experiment: Experiment, rules: Rules, *, qk_fix: bool, grad_drop: bool) -> PatchingResult:
    """Difference times coefficient at every node, from one backward pass on the base run, or from one for each block dropped."""
    runs, components = experiment.runs, experiment.components
    differences: Values = {}
    # By component, the scores that the backward pass running now has made.
    scores: list[Tensor | None] = [None] * len(components)

    with frozen(runs.model):
        fix = QKFix(runs.model, components) if qk_fix else None
        drop = GradDrop(runs.blocks) if grad_drop else None
        source, source_score = experiment.source()
        if experiment.corruption == "mean" and not experiment.two:
            source = experiment.ablated(source, experiment.base()[0])
        with torch.enable_grad(), relevance_rules(runs.model, rules) as coverage, ExitStack() as stack:
            stack.enter_context(tap(runs.model, _taps(experiment, source, differences, scores)))
            for part in (fix, drop):
                if part is not None:
                    stack.enter_context(part.watching())
            base_score = runs.judge(runs.pair.call(runs.model, runs.base_inputs))[0]
            for component in components:
                check_reached(component.read, differences)
            experiment.settle(differences, (base_score.detach(), source_score))
            require(
                base_score.requires_grad,
                "metric: it does not depend on what passes at the sites; is it computed under no_grad, or from detached tensors?",
            )
            passes, mixed = [], []
            for last in _dropped_in_turn(drop):
                scores[:] = [None] * len(scores)
                base_score.sum().backward(retain_graph=not last)
                # Nothing flows back to some components (queries under the AH-rule, say): the coefficient is zero.
                zeros = (component.contracted(torch.zeros_like(differences[component.read.key])) if each is None else each
                         for component, each in zip(components, scores))  # fmt: skip
                passes.append([experiment.picked(each) for each in zeros])
                mixed += [] if fix is None else [fix.coefficients()]
        check_rules_acted(coverage)
        by_component = [torch.stack(each) for each in zip(*passes)]
        if fix is not None:
            for index, found in fix.scores(mixed, differences, experiment.picks).items():
                by_component[index] = found
    if drop is None:
        final = [each[0] for each in by_component]
    else:
        final = [each.abs().sum(0) / drop.passes(c) for each, c in zip(by_component, components)]
    name = "attribution patching" if rules == "gradient" else "relevance patching"
    name += f"{', QK fix' if qk_fix else ''}{', GradDrop' if grad_drop else ''}"
    settings: dict[str, Any] = {"rules": rules if isinstance(rules, str) else [str(rule) for rule in rules]}
    settings |= {"qk_fix": qk_fix, "grad_drop": grad_drop}
    return experiment.result(name, final, base_score.detach(), source_score, coverage, settings)


def _dropped_in_turn(drop: GradDrop | None) -> Any:
    """One backward pass, or one for each block dropped: yields whether it is the last."""
    if drop is None:
        yield True
        return
    for k in range(len(drop.blocks)):
        drop.dropped = k
        yield k == len(drop.blocks) - 1


def _taps(
    experiment: Experiment, source: Values, differences: Values, scores: list[Tensor | None]
) -> dict[Any, Callable[[Tensor], Tensor | None]]:
    """What each site does: note how its activation differs from the source's, and when the coefficient comes back, multiply them."""
    components = experiment.components
    reads = {component.read.key: component.read.whole for component in components}
    writes: dict[tuple[int, str], list[int]] = {}
    sites: dict[tuple[int, str], Site] = dict(reads)
    for index, component in enumerate(components):
        writes.setdefault(component.write.key, []).append(index)
        sites.setdefault(component.write.key, component.write.whole)

    def see(site: Site) -> Callable[[Tensor], Tensor | None]:
        members = writes.get(site.key, ())

        def receive(coefficient: Tensor) -> None:
            for index in members:
                difference = differences[components[index].read.key]
                scores[index] = components[index].contracted(wide(difference) * wide(coefficient))

        def at_site(tensor: Tensor) -> Tensor | None:
            if site.key in reads:
                check_once(site, differences)
                here = tensor.detach()
                change = -here if experiment.corruption == "zero" else source[site.key] - here
                differences[site.key] = experiment.runs.masked(change)
            return receiving(tensor, receive) if members else None

        return at_site

    return {site: see(site) for site in sites.values()}


def check_rules_acted(coverage: Coverage) -> None:
    """Refuse coefficients of another set of rules than the one asked for."""
    idle = coverage.idle()
    require(
        not idle,
        f"rules: {', '.join(map(repr, idle))} matched modules ({', '.join(n for r in idle for n in coverage.modules[r])}) none of which ran in the forward "
        "behind the sites, so that the coefficients would be those of another set of rules",
    )
