"""Which activations carry a behaviour, measured: activation patching, many nodes side by side as rows of one forward.

Rezaei Jafari et al. 2025 (arXiv 2508.21258), section 2. Every forward starts at the layer of its nodes; see :mod:`lineament.explain.patching.runs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core.batching import auto_batch
from lineament.core.checks import number, require, show
from lineament.core.models import frozen
from lineament.core.sites.hooks import Function
from lineament.core.sites.naming import Site
from lineament.explain.patching.components import DEFAULT, Component, Sites, flat, unflat
from lineament.explain.patching.experiment import Corruption, Direction, Experiment, Options, Positions
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import Prompts
from lineament.explain.patching.result import Node, PatchingResult
from lineament.explain.patching.runs import Values

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A node: the component's index, the position, and the head or feature; None is all of them.
_Place = tuple[int, int | None, int | None]


@torch.inference_mode(False)
def activation_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    *,
    sites: Sites = DEFAULT,
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
        model: a transformers language model, or any module whose ``sites`` are named.
        clean, corrupt: tokens (batch, positions), texts with a ``tokenizer``, or for other modules any inputs; of the same shape. ``corrupt=None``
            with ``corruption="mean"`` or ``"zero"`` needs ``normalise=False``.
        metric: a function from logits (batch, positions, vocabulary) to (batch,): see :mod:`lineament.explain.patching.metrics`.
        sites: kinds from :data:`lineament.explain.patching.components.KINDS`; for architectures that are not known, where they are, {kind: glob} (see
            :func:`lineament.explain.patching.components.find_components`).
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
    >>> result = activation_patching(net, torch.ones(1, 2), torch.zeros(1, 2), lambda y: y[:, 0], sites={"hidden": "[0]"})
    >>> result.scores["hidden"].tolist()
    [[1.0]]
    """
    experiment = Experiment(
        model, clean, corrupt, metric, sites=sites, direction=direction, corruption=corruption, positions=positions, normalise=normalise,
        tokenizer=tokenizer, attention_mask=attention_mask,
    )  # fmt: skip
    with frozen(model), torch.no_grad():
        effects, base_score, source_score = _prepared(experiment)
        nodes = [
            [(index, position, unit) for position, unit in experiment.nodes(component)]
            for index, component in enumerate(experiment.components)
        ]
        by_stage: dict[int | None, list[_Place]] = {}
        for component, members in zip(experiment.components, nodes):
            by_stage.setdefault(component.stage, []).extend(members)
        size = _rows(batch_size, experiment.runs.rows_at_once)
        found: dict[_Place, Tensor] = {}
        for stage, members in by_stage.items():
            patched = auto_batch(
                partial(effects, stage, [[member] for member in members]), len(members), most=size
            )
            found.update(zip(members, torch.cat(list(patched))))
        scores = []
        for component, members in zip(experiment.components, nodes):
            mine = torch.stack([found[node] - base_score for node in members], dim=-1)
            scores.append(mine.unflatten(-1, (len(experiment.picks), -1)) if component.units else mine)
    return experiment.result("activation patching", scores, base_score, source_score)


@torch.inference_mode(False)
def patch_nodes(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    nodes: Sequence[Node | Sequence[Node]],
    *,
    batch_size: int | str = "auto",
    **options: Unpack[Options],
) -> Float[Tensor, "nodes batch"]:
    """The measured effect of some nodes, such as those that an approximation ranks first: of each alone, or of several patched at once.

    Args:
        nodes: what :meth:`~lineament.explain.patching.result.PatchingResult.top` returns (its scores are not looked at); a list among them is patched together.
        options: as in :func:`activation_patching`; ``sites`` only where it maps kinds to the places of an architecture that is not known, and no ``positions``.

    Returns:
        (nodes, batch): each example's share, on the scale of ``activation_patching``'s ``per_example``.

    Raises:
        InputError: as :func:`activation_patching`; a node of a kind or layer that the model has not.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = [nn.init.ones_(layer.weight) for layer in net]
    >>> node = Node("hidden", 0, None, None, 0.0)
    >>> patch_nodes(net, torch.ones(1, 2), torch.zeros(1, 2), lambda y: y[:, 0], [node], sites={"hidden": "[0]"}).tolist()
    [[1.0]]
    """
    groups = [[entry] if isinstance(entry, Node) else list(entry) for entry in nodes]
    members = [node for group in groups for node in group]
    require(
        bool(groups) and all(groups) and all(isinstance(node, Node) for node in members),
        f"nodes: got {show(nodes)}, expected nodes as PatchingResult.top returns them, at least one in each group",
    )
    kinds: Any = list(dict.fromkeys(node.kind for node in members))
    experiment = Experiment(
        model, clean, corrupt, metric, **{"sites": kinds, **options, "positions": "together"}
    )
    index = {(c.kind, c.layer): k for k, c in enumerate(experiment.components)}
    for node in members:
        require(
            (node.kind, node.layer) in index,
            f"nodes: there is no {node.kind!r} in layer {node.layer}; expected layers from 0 to {max((at for _, at in index), default=0)}",
        )
    with frozen(model), torch.no_grad():
        effects, base_score, source_score = _prepared(experiment)
        places = [
            [(index[node.kind, node.layer], node.position, node.unit) for node in group] for group in groups
        ]
        found = torch.empty(
            len(places), experiment.runs.batch, dtype=base_score.dtype, device=base_score.device
        )
        by_stage: dict[int | None, list[int]] = {}
        for k, group in enumerate(places):
            stages = [experiment.components[at].stage for at, *_ in group]
            # A group begins where the first of its nodes does.
            known = [stage for stage in stages if stage is not None]
            by_stage.setdefault(min(known) if len(known) == len(stages) else None, []).append(k)
        size = _rows(batch_size, experiment.runs.rows_at_once)
        for stage, mine in by_stage.items():
            rows = auto_batch(partial(effects, stage, [places[k] for k in mine]), len(mine), most=size)
            found[mine] = torch.cat(list(rows))
    found = found - base_score
    if experiment.normalise and source_score is not None:
        found = found / (source_score.mean() - base_score.mean())
    return found


def _prepared(experiment: Experiment) -> tuple[_Effects, Tensor, Tensor | None]:
    """Both runs of an experiment: what patches its nodes, and the metric before and where the values come from."""
    source, source_score = experiment.source()
    base, base_score = experiment.base()
    experiment.settle(base, (base_score, source_score))
    return _Effects(experiment, experiment.ablated(source, base), base), base_score, source_score


class _Effects:
    """The metric of many patched groups of nodes at once: rows of one forward that starts at their layer."""

    def __init__(self, experiment: Experiment, source: Values, base: Values):
        self.experiment, self.source, self.base = experiment, source, base

    def __call__(
        self, stage: int | None, groups: Sequence[Sequence[_Place]], start: int, stop: int
    ) -> Tensor:
        groups = groups[start:stop]
        runs = self.experiment.runs
        stream = None if stage is None else runs.stream(stage, len(groups))
        writes: dict[tuple[int, str], tuple[Site, list[tuple[slice, Component, _Place]]]] = {}
        for k, node in ((k, node) for k, group in enumerate(groups) for node in group):
            component, rows = self.experiment.components[node[0]], slice(k * runs.batch, (k + 1) * runs.batch)
            if component.direct and component.stage == stage and stream is not None:
                self._patch(flat(stream)[rows], component, node, shift=True)
            else:
                site = component.write.whole
                writes.setdefault(site.key, (site, []))[1].append((rows, component, node))

        def changer(entries: list[tuple[slice, Component, _Place]]) -> Function:
            def change(value: Tensor) -> Tensor:
                new = flat(value).clone()
                for rows, component, node in entries:
                    self._patch(new[rows], component, node, shift=component.shift)
                return unflat(new, value.shape)

            return change

        changes = {site: changer(entries) for site, entries in writes.values()}
        return runs.patched(stage, len(groups), changes, stream)

    def _patch(self, rows: Tensor, component: Component, node: _Place, *, shift: bool) -> None:
        """Patch one node into its rows (batch, positions, features), in place."""
        _, position, unit = node
        source = flat(self.source[component.read.key])
        where: Any = slice(None) if position is None else position
        columns: Any = slice(None) if unit is None else unit
        if unit is not None and component.heads is not None:
            columns = component.heads.columns(rows.device).unflatten(0, (-1, component.heads.size))[unit]
        new = source[:, where, columns]
        if shift:
            rows[:, where, columns] += new - flat(self.base[component.read.key])[:, where, columns]
        else:
            rows[:, where, columns] = new.to(rows.dtype)


def _rows(batch_size: int | str, automatic: int) -> int:
    if batch_size == "auto":
        return automatic
    require(
        not isinstance(batch_size, str),
        f"batch_size: got {show(batch_size)}, expected 'auto' or an integer of at least 1",
    )
    return number("batch_size", batch_size, low=1, integer=True)
