"""Which activations carry a behaviour: activation patching, and attribution and relevance patching that approximate it in one backward pass.

Rezaei Jafari, Eberle, Khakzar, Nanda, "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching", 2025 (arXiv
2508.21258); Nanda 2023 for attribution patching; Hanna et al. 2024 and Marks et al. 2024 for integrated gradients. All share one formula, activation
difference times coefficient; the coefficient is a gradient or an LRP coefficient. It is contracted inside the backward pass and never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import payload
from lineament.core.batching import auto_batch
from lineament.core.checks import InputError, require, show
from lineament.core.hooks import eagerly, watch
from lineament.core.models import frozen
from lineament.core.naming import Site
from lineament.explain.patching.engine import contracted
from lineament.explain.patching.inputs import Prompts
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.result import PatchingResult
from lineament.explain.patching.sites import DEFAULT, Layout
from lineament.explain.patching.work import Corruption, Direction, Effects, Positions, Work, nodes_at_once
from lineament.explain.relevance.context import Coverage, Rules, relevance_rules
from lineament.explain.relevance.functions import wide


@torch.inference_mode(False)
def activation_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    *,
    sites: str | Iterable[str] = DEFAULT,
    layout: Layout | None = None,
    direction: Direction = "denoising",
    corruption: Corruption = "resample",
    positions: Positions = "each",
    normalise: bool = True,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    batch_size: int | str = "auto",
) -> PatchingResult:
    """The effect of every node, measured: the base run with that one activation taken from the other run.

    (L(patched) - L(base)) / (L(source) - L(base)), the mean over the examples; with ``"denoising"`` the base is the corrupt run, so that 1 is the clean
    metric. Nodes are patched side by side as rows of a batch, and every forward starts at the layer of its nodes.

    Args:
        model: a transformers language model, or any module with a ``layout``.
        clean, corrupt: tokens (batch, positions), texts with a ``tokenizer``, or for other modules any inputs; of the same shape. ``corrupt=None``
            with ``corruption="mean"`` or ``"zero"`` needs ``normalise=False``.
        metric: a function from logits (batch, positions, vocabulary) to (batch,): see :mod:`lineament.explain.patching.metrics`.
        sites: kinds of sites, from :data:`lineament.explain.patching.sites.KINDS`.
        layout: where the sites are, for architectures that are not known (:func:`lineament.explain.patching.sites.places`).
        direction: patch clean activations into the corrupt run, or corrupt ones into the clean run (``"noising"``).
        corruption: what noising puts in: the corrupt run's activations, their mean over the batch, or zero.
        positions: each by itself, all together, or these.
        normalise: divide by the difference of the two runs' metrics; otherwise scores are in units of the metric.
        attention_mask: ones at tokens, zeros at padding; padding gets the score zero.
        batch_size: nodes in one forward.

    Returns:
        A :class:`~lineament.explain.patching.result.PatchingResult`.

    Raises:
        InputError: prompts of unequal length (both tokenisations are shown), metrics of both runs that differ by less than 1e-4, an unknown kind,
            architecture or option, a metric that does not return one number for each example.

    Source: Rezaei Jafari et al. 2025, section 2.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = [nn.init.ones_(layer.weight) for layer in net]
    >>> layout = {"hidden": "[0]"}
    >>> result = activation_patching(net, torch.ones(1, 2), torch.zeros(1, 2), lambda y: y[:, 0], sites="hidden", layout=layout)
    >>> result.scores["hidden"].tolist()
    [[1.0]]
    """
    work = Work(
        model,
        clean,
        corrupt,
        metric,
        sites,
        layout,
        direction,
        corruption,
        positions,
        normalise,
        tokenizer,
        attention_mask,
    )
    with frozen(model), torch.no_grad():
        sources, base, source = work.runs()
        nodes = [node for index, place in enumerate(work.engine.places) for node in work.nodes(index, place)]
        effects = Effects(work, sources, base[0])
        groups: dict[int | None, list[tuple[int, int | None, int | None]]] = {}
        for node in nodes:
            groups.setdefault(work.engine.places[node[0]].stage, []).append(node)
        found: dict[tuple[int, int | None, int | None], Tensor] = {}
        for stage, members in groups.items():
            size = nodes_at_once(batch_size, work.engine)
            for first in range(0, len(members), size):
                part = members[first : first + size]
                scores = list(
                    auto_batch(
                        lambda a, b, part=part, stage=stage: effects(stage, part[a:b]),
                        len(part),
                        batch_size="auto",
                    )
                )
                found.update(zip(part, torch.cat(scores)))
        per_place = []
        for index, place in enumerate(work.engine.places):
            mine = torch.stack([found[node] - base[1] for node in work.nodes(index, place)], dim=-1)
            per_place.append(mine.reshape(len(mine), len(work.picks), -1) if place.units else mine)
    return work.result("activation patching", per_place, base[1], source, None, {})


@torch.inference_mode(False)
def relevance_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    *,
    rules: Rules = "relp",
    modules: Mapping[Any, str] | None = None,
    sites: str | Iterable[str] = DEFAULT,
    layout: Layout | None = None,
    direction: Direction = "denoising",
    corruption: Corruption = "resample",
    positions: Positions = "each",
    normalise: bool = True,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> PatchingResult:
    """The effect of every node, approximated: Σ (a_source - a_base)·c with c the LRP coefficient of the metric on the base run.

    Two forwards and one backward for all nodes together. The arguments are those of :func:`activation_patching`.

    Args:
        rules, modules: see :func:`lineament.explain.relevance.context.relevance_rules`; the default is the paper's (ln, identity, half where there are gates).

    Raises:
        InputError: as :func:`activation_patching`; also a rule that matches no module, or whose modules did not run.

    Source: Rezaei Jafari et al. 2025, section 3.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.SiLU(), nn.Linear(2, 1, bias=False))
    >>> _ = [nn.init.ones_(net[k].weight) for k in (0, 2)]
    >>> layout = {"hidden": "[0]"}
    >>> result = relevance_patching(net, torch.ones(1, 2), torch.zeros(1, 2), lambda y: y[:, 0], sites="hidden", layout=layout)
    >>> round(float(result.scores["hidden"]), 4), result.coverage  # silu(x)/x is 1/2 at the base run's 0
    (0.5677, {'identity': 1})
    """
    work = Work(
        model,
        clean,
        corrupt,
        metric,
        sites,
        layout,
        direction,
        corruption,
        positions,
        normalise,
        tokenizer,
        attention_mask,
    )
    settings: dict[str, Any] = {"rules": rules if isinstance(rules, str) else [str(rule) for rule in rules]}
    with frozen(model):
        per_place, base, source, coverage = _linear(work, rules, modules)
    name = "attribution patching" if rules == "gradient" and not modules else "relevance patching"
    return work.result(name, per_place, base, source, coverage, settings)


def attribution_patching(
    model: nn.Module, clean: Prompts, corrupt: Prompts | None, metric: Metric, **options: Any
) -> PatchingResult:
    """The effect of every node, approximated with the plain gradient: Σ (a_source - a_base)·∂L/∂a on the base run.

    Relevance patching without rules, and with its options.

    Source: Nanda, "Attribution patching", 2023.

    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> _ = [nn.init.ones_(net[k].weight) for k in (0, 2)]
    >>> options = {"sites": "hidden", "layout": {"hidden": "[0]"}}
    >>> attribution_patching(net, torch.ones(1, 2), torch.full((1, 2), 0.5), lambda y: y[:, 0], **options).scores["hidden"].tolist()
    [[1.0]]
    """
    require("rules" not in options, "rules: attribution patching has none; use relevance_patching")
    return relevance_patching(model, clean, corrupt, metric, rules="gradient", **options)


def _linear(
    work: Work, rules: Rules, modules: Mapping[Any, str] | None
) -> tuple[list[Tensor], Tensor, Tensor | None, Coverage]:
    """Per-example scores of each place from one backward pass on the base run."""
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
        base.sum().backward()
    idle = coverage.idle()
    require(
        not idle,
        f"rules: {', '.join(map(repr, idle))} matched modules ({', '.join(n for r in idle for n in coverage.modules[r])}) none of which ran in the forward "
        "behind the sites, so that the coefficients would be those of another set of rules",
    )
    filled = []
    for place, found in zip(engine.places, scores):
        if found is None:
            # Nothing flows back here (queries under the AH-rule, say): the coefficient is zero.
            found = contracted(place, torch.zeros_like(differences[id(place.read.module), place.read.side]))
        filled.append(work.picked(found))
    return filled, base.detach(), source, coverage


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
        found = payload.find(value)
        if found is None:
            raise InputError(f"sites: a site passed {show(value)}, which holds no tensor")
        path, tensor = found
        if reads:
            require(
                key not in differences,
                "sites: a module ran twice in one forward, so that it is no one place; patch a module inside it",
            )
            here = tensor.detach()
            difference = -here if work.corruption == "zero" else sources[key] - here
            mask = work.engine.pair.mask
            differences[key] = difference if mask is None else difference * mask[..., None]
        if not members:
            return None
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
        onward = tensor.clone()
        onward.register_hook(contract)
        return payload.replace(value, path, onward)

    return see
