"""Which activations carry a behaviour, measured: activation patching, many nodes side by side as rows of one forward.

Rezaei Jafari et al. 2025 (arXiv 2508.21258), section 2. Every forward starts at the layer of its nodes; see :mod:`lineament.explain.patching.engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.batching import auto_batch
from lineament.core.checks import number, require, show
from lineament.core.models import frozen
from lineament.core.sites.naming import Site
from lineament.explain.patching.engine import Engine, column_of
from lineament.explain.patching.inputs import Prompts
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.result import PatchingResult
from lineament.explain.patching.sites import DEFAULT, Layout, Place, flat, unflat
from lineament.explain.patching.work import Corruption, Direction, Positions, Work

# Rows of a batch beyond which larger batches no longer pay on a CPU, in tokens.
_TOKENS_AT_ONCE = 4096


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
        model, clean, corrupt, metric, sites=sites, layout=layout, direction=direction, corruption=corruption, positions=positions, normalise=normalise,
        tokenizer=tokenizer, attention_mask=attention_mask,
    )  # fmt: skip
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


class Effects:
    """The metric of many patched nodes at once: rows of one forward that starts at their layer."""

    def __init__(
        self, work: Work, sources: Mapping[tuple[int, str], Tensor], base: Mapping[tuple[int, str], Tensor]
    ):
        self.work, self.sources, self.base = work, sources, base

    def __call__(self, stage: int | None, nodes: Sequence[tuple[int, int | None, int | None]]) -> Tensor:
        engine = self.work.engine
        times, batch = len(nodes), engine.batch
        stream = None
        if stage is not None:
            one = engine.stages[stage]
            stream = one.repeat(times, *[1] * (one.ndim - 1))
        writes: dict[tuple[int, str], tuple[Site, list[tuple[int, int | None, int | None, Place]]]] = {}
        for row, (index, position, unit) in enumerate(nodes):
            place = engine.places[index]
            if place.direct and stream is not None:
                rows = flat(stream)[row * batch : (row + 1) * batch]
                self.write(rows, place, position, unit, shift=True)
                continue
            key = (id(place.write.module), place.write.side)
            writes.setdefault(key, (place.write, []))[1].append((row, position, unit, place))

        def changer(
            entries: Sequence[tuple[int, int | None, int | None, Place]],
        ) -> Callable[[Tensor], Tensor]:
            def change(value: Tensor) -> Tensor:
                new = flat(value).clone()
                for row, position, unit, place in entries:
                    self.write(new[row * batch : (row + 1) * batch], place, position, unit, shift=place.shift)
                return unflat(new, value.shape)

            return change

        changes = {key: (site, changer(entries)) for key, (site, entries) in writes.items()}
        return engine.forward(stage, times, stream, changes)

    def write(
        self, rows: Tensor, place: Place, position: int | None, unit: int | None, *, shift: bool
    ) -> None:
        """Patch one node into its rows (batch, positions, features), in place."""
        key = (id(place.read.module), place.read.side)
        source = flat(self.sources[key])
        where: Any = slice(None) if position is None else position
        columns: Any = slice(None)
        if unit is not None:
            heads = column_of(place, rows.device)
            columns = unit if heads is None else heads[unit]
        if shift:
            rows[:, where, columns] += source[:, where, columns] - flat(self.base[key])[:, where, columns]
        else:
            rows[:, where, columns] = source[:, where, columns].to(rows.dtype)


def nodes_at_once(batch_size: int | str, engine: Engine) -> int:
    if batch_size != "auto":
        require(
            not isinstance(batch_size, str),
            f"batch_size: got {show(batch_size)}, expected 'auto' or an integer of at least 1",
        )
        return number("batch_size", batch_size, low=1, integer=True)
    shape = engine.base_inputs.shape
    tokens = shape[0] * (shape[1] if engine.pair.language else 1)
    return max(1, _TOKENS_AT_ONCE // tokens)
