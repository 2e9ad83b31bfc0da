"""Which activations carry a behaviour, approximated in one backward pass: attribution patching and relevance patching.

Rezaei Jafari, Eberle, Khakzar, Nanda, "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching", 2025 (arXiv
2508.21258); Nanda 2023 for attribution patching; Kramár et al. 2024 for AtP*. All share one formula, activation difference times coefficient; the
coefficient is a gradient or an LRP coefficient. It is contracted inside the backward pass and never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show
from lineament.core.models import frozen
from lineament.core.sites import main_tensor
from lineament.core.sites.hooks import eagerly, watch
from lineament.core.sites.naming import Site
from lineament.explain.patching.atp_star import GradDrop, QKFix
from lineament.explain.patching.engine import contracted, tapped
from lineament.explain.patching.inputs import Prompts
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.result import PatchingResult
from lineament.explain.patching.work import Options, Work
from lineament.explain.relevance.context import Coverage, Rules, relevance_rules
from lineament.explain.relevance.functions import wide

if TYPE_CHECKING:
    from typing_extensions import Unpack


@torch.inference_mode(False)
def relevance_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    *,
    rules: Rules = "relp",
    modules: Mapping[Any, str] | None = None,
    qk_fix: bool = False,
    grad_drop: bool = False,
    **options: Unpack[Options],
) -> PatchingResult:
    """The effect of every node, approximated: Σ (a_source - a_base)·c with c the LRP coefficient of the metric on the base run.

    Two forwards and one backward for all nodes together. The other arguments are those of :func:`lineament.explain.patching.activation_patching`.

    Args:
        rules, modules: see :func:`lineament.explain.relevance.context.relevance_rules`; the default is the paper's (ln, identity, half where there are gates).
        qk_fix: at queries and keys recompute the attention of the base run with that one query or key from the other run, and be linear only behind it
            (AtP*); a forward of the attention alone for each key position.
        grad_drop: the mean of |score| over one backward pass for each block, in which that block hands the coefficient on by the residual stream alone
            (AtP*). Scores are then sizes; a node's own block does not count among its passes.
        options: ``sites``, ``layout``, ``direction``, ``corruption``, ``positions``, ``normalise``, ``tokenizer``, ``attention_mask``.

    Raises:
        InputError: as :func:`activation_patching`; also a rule that matches no module, or whose modules did not run.

    Source: Rezaei Jafari et al. 2025, section 3; Kramár et al. 2024, sections 3.1 and 3.2.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.SiLU(), nn.Linear(2, 1, bias=False))
    >>> _ = [nn.init.ones_(net[k].weight) for k in (0, 2)]
    >>> layout = {"hidden": "[0]"}
    >>> result = relevance_patching(net, torch.ones(1, 2), torch.zeros(1, 2), lambda y: y[:, 0], sites="hidden", layout=layout)
    >>> round(float(result.scores["hidden"]), 4), result.coverage  # silu(x)/x is 1/2 at the base run's 0
    (0.5677, {'identity': 1})
    """
    work = Work(model, clean, corrupt, metric, **options)
    settings: dict[str, Any] = {"rules": rules if isinstance(rules, str) else [str(rule) for rule in rules]}
    settings |= {"qk_fix": qk_fix, "grad_drop": grad_drop}
    with frozen(model):
        fix = QKFix(model, work.engine.places) if qk_fix else None
        drop = GradDrop(work.engine.blocks) if grad_drop else None
        per_place, base, source, coverage = _linear(work, rules, modules, fix, drop)
    name = "attribution patching" if rules == "gradient" and not modules else "relevance patching"
    name += f"{', QK fix' if qk_fix else ''}{', GradDrop' if grad_drop else ''}"
    return work.result(name, per_place, base, source, coverage, settings, sizes=grad_drop)


def attribution_patching(
    model: nn.Module, clean: Prompts, corrupt: Prompts | None, metric: Metric, **options: Any
) -> PatchingResult:
    """The effect of every node, approximated with the plain gradient: Σ (a_source - a_base)·∂L/∂a on the base run.

    Relevance patching without rules, and with its options; with ``qk_fix=True, grad_drop=True`` it is AtP*.

    Source: Nanda, "Attribution patching", 2023; Kramár et al. 2024 (arXiv 2403.00745).

    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = [nn.init.ones_(net[k].weight) for k in (0, 2)]
    >>> options = {"sites": "hidden", "layout": {"hidden": "[0]"}}
    >>> attribution_patching(net, torch.ones(1, 2), torch.full((1, 2), 0.5), lambda y: y[:, 0], **options).scores["hidden"].tolist()
    [[1.0]]
    """
    require("rules" not in options, "rules: attribution patching has none; use relevance_patching")
    return relevance_patching(model, clean, corrupt, metric, rules="gradient", **options)


def _linear(
    work: Work, rules: Rules, modules: Mapping[Any, str] | None, fix: QKFix | None, drop: GradDrop | None
) -> tuple[list[Tensor], Tensor, Tensor | None, Coverage]:
    """Per-example scores of each place from one backward pass on the base run, or from one for each block dropped."""
    engine = work.engine
    with torch.no_grad():
        sources, source = work.sources()
        if work.corruption == "mean" and not work.two:
            sources = work.averaged(engine.values(engine.base_inputs)[0])
    differences: dict[tuple[int, str], Tensor] = {}
    scores: list[Tensor | None] = [None] * len(engine.places)
    with (
        torch.enable_grad(),
        relevance_rules(work.model, rules, modules=modules) as coverage,
        ExitStack() as stack,
    ):
        read = {(id(p.read.module), p.read.side): p.read for p in engine.places}
        write: dict[tuple[int, str], tuple[Site, list[int]]] = {}
        for index, place in enumerate(engine.places):
            write.setdefault((id(place.write.module), place.write.side), (place.write, []))[1].append(index)
        for key in {**read, **write}:
            site = read[key] if key in read else write[key][0]
            members = write[key][1] if key in write else []
            see = _tap(work, key, key in read, members, sources, differences, scores)
            watch(Site(site.name, site.module, site.side), see, stack, last=True)
        for part in (fix, drop):
            if part is not None:
                part.watch(stack)
        stack.enter_context(eagerly())
        base = engine.judge(engine.pair.call(work.model, engine.base_inputs))[0]
        for place in engine.places:
            key = (id(place.read.module), place.read.side)
            require(
                key in differences,
                f"sites: {place.read.name!r} was not reached in the forward, or passed no tensor",
            )
        work.positioned({key: differences[key] for key in read})
        work.check(base.detach(), source)
        require(
            base.requires_grad,
            "metric: it does not depend on what passes at the sites; is it computed under no_grad, or from detached tensors?",
        )
        passes, mixed = [], []
        dropped = [None] if drop is None else range(len(drop.blocks))
        for block in dropped:
            if drop is not None:
                drop.dropped = block
            scores[:] = [None] * len(scores)
            base.sum().backward(retain_graph=block is not None and block < len(dropped) - 1)
            # Nothing flows back to some places (queries under the AH-rule, say): the coefficient is zero.
            passes.append(
                [
                    work.picked(
                        contracted(p, torch.zeros_like(differences[id(p.read.module), p.read.side]))
                        if s is None
                        else s
                    )
                    for p, s in zip(engine.places, scores)
                ]
            )
            mixed += [] if fix is None else [fix.coefficients()]
    idle = coverage.idle()
    require(
        not idle,
        f"rules: {', '.join(map(repr, idle))} matched modules ({', '.join(n for r in idle for n in coverage.modules[r])}) none of which ran in the forward "
        "behind the sites, so that the coefficients would be those of another set of rules",
    )
    if fix is None and drop is None:
        return passes[0], base.detach(), source, coverage
    by_place = [torch.stack(each) for each in zip(*passes)]
    if fix is not None:
        for index, found in fix.scores(mixed, differences, work.picks).items():
            by_place[index] = found
    if drop is None:
        return [each[0] for each in by_place], base.detach(), source, coverage
    means = [each.abs().sum(0) / drop.passes(place) for each, place in zip(by_place, engine.places)]
    return means, base.detach(), source, coverage


def _tap(
    work: Work, key: tuple[int, str], reads: bool, members: Sequence[int], sources: Mapping[tuple[int, str], Tensor],
    differences: dict[tuple[int, str], Tensor], scores: list[Tensor | None],
) -> Callable[[Any], Any]:  # fmt: skip
    """Passes a node of its own on; when the coefficient comes back, contracts it with the difference of the activations."""

    def contract(gradient: Tensor) -> None:
        for index in members:
            place = work.engine.places[index]
            difference = differences[id(place.read.module), place.read.side]
            scores[index] = contracted(place, wide(difference) * wide(gradient))

    def see(value: Any) -> Any:
        found = main_tensor.find(value)
        if found is None:
            raise InputError(f"sites: a site passed {show(value)}, which holds no tensor")
        if reads:
            require(
                key not in differences,
                "sites: a module ran twice in one forward, so that it is no one place; patch a module inside it",
            )
            here = found[1].detach()
            difference = -here if work.corruption == "zero" else sources[key] - here
            mask = work.engine.pair.mask
            differences[key] = difference if mask is None else difference * mask[..., None]
        if not members:
            return None
        return tapped(value, contract)

    return see
