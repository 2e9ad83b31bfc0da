"""The checked arguments of one patching call: its two runs, its nodes, the measured effect of each, and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require, show
from lineament.core.naming import Site
from lineament.explain.patching.engine import Engine, column_of
from lineament.explain.patching.inputs import pair
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.result import PatchingResult
from lineament.explain.patching.sites import Place, flat, places, unflat
from lineament.explain.relevance.context import Coverage

Direction = Literal["denoising", "noising"]
Corruption = Literal["resample", "mean", "zero"]
Positions = Literal["each", "together"] | Sequence[int]
# Rows of a batch beyond which larger batches no longer pay on a CPU, in tokens.
_TOKENS_AT_ONCE = 4096


class Work:
    """The checked arguments of one call, its two runs and its result."""

    def __init__(
        self, model: nn.Module, clean: Any, corrupt: Any, metric: Metric, sites: Any, layout: Any, direction: str, corruption: str,
        positions: Any, normalise: bool, tokenizer: Any, attention_mask: Tensor | None,
    ):  # fmt: skip
        one_of("direction", direction, ("denoising", "noising"))
        one_of("corruption", corruption, ("resample", "mean", "zero"))
        ablation = corruption != "resample"
        require(
            not ablation or direction == "noising",
            f"corruption: {corruption!r} is what noising puts in; give direction='noising'",
        )
        require(
            corrupt is not None or (ablation and not normalise),
            "corrupt: got None, which needs corruption='mean' or 'zero' and normalise=False (without a second metric there is nothing to divide by)",
        )
        inputs = pair(model, clean, corrupt, metric, tokenizer=tokenizer, attention_mask=attention_mask)
        found, blocks = places(model, sites, layout)
        self.model, self.corruption, self.direction, self.normalise = model, corruption, direction, normalise
        self.engine = Engine(model, inputs, metric, found, blocks, denoising=direction == "denoising")
        self.two = corrupt is not None
        self.positions = positions
        if not isinstance(positions, str):
            self.positions = [number("positions", int(p), integer=True) for p in positions]
            require(bool(self.positions), "positions: got none, expected at least one")
        else:
            one_of("positions", positions, ("each", "together"))
        self.picks: list[int | None] = []
        self.shapes: dict[tuple[int, str], torch.Size] = {}

    def runs(
        self,
    ) -> tuple[dict[tuple[int, str], Tensor], tuple[dict[tuple[int, str], Tensor], Tensor], Tensor | None]:
        """What is patched in, by site; the base run's activations and metric; the source run's metric."""
        sources, source = self.sources()
        base = self.engine.values(self.engine.base_inputs, keep=True)
        self.check(base[1], source)
        self.positioned(base[0])
        if self.corruption == "mean" and not self.two:
            sources = self.averaged(base[0])
        elif self.corruption == "zero":
            sources = {key: torch.zeros_like(value) for key, value in base[0].items()}
        return sources, base, source

    def sources(self) -> tuple[dict[tuple[int, str], Tensor], Tensor | None]:
        if not self.two:
            return {}, None
        values, score = self.engine.values(self.engine.source_inputs)
        return (self.averaged(values) if self.corruption == "mean" else values), score

    def averaged(self, values: Mapping[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
        """The mean over the batch at each position, padding apart."""
        mask = self.engine.pair.mask
        if mask is None:
            return {key: value.mean(0, keepdim=True).expand_as(value) for key, value in values.items()}
        weight = mask[..., None] / mask.sum(0).clamp_min(1)[:, None]
        return {
            key: (value * weight.to(value.dtype)).sum(0, keepdim=True).expand_as(value)
            for key, value in values.items()
        }

    def check(self, base: Tensor, source: Tensor | None) -> None:
        if self.normalise and source is not None:
            gap = float(source.mean()) - float(base.mean())
            require(
                abs(gap) >= 1e-4,
                f"metric: {float(source.mean()):.6g} on the {self.other} run and {float(base.mean()):.6g} on the base run are alike (less than 1e-4 apart), so "
                "that scores cannot be divided by their difference; choose pairs or a metric that tell them apart, or normalise=False",
            )

    @property
    def other(self) -> str:
        return "clean" if self.direction == "denoising" else "corrupt"

    def positioned(self, values: Mapping[tuple[int, str], Tensor]) -> None:
        """Settle which positions are asked for, once the forward has shown how many there are."""
        for key, value in values.items():
            self.shapes[key] = value.shape
        counts = {flat(value[:1]).shape[1] for value in values.values()}
        if self.positions == "together":
            self.picks = [None]
            return
        if self.positions == "each":
            require(
                len(counts) == 1,
                f"positions: the sites have {sorted(counts)} positions; patch them 'together', or kinds of one size at a time",
            )
            self.picks = list(range(max(counts)))
            return
        least = min(counts)
        for position in self.positions:
            require(
                -least <= position < least,
                f"positions: got {position}, expected positions from {-least} to {least - 1}",
            )
        self.picks = [position % least for position in self.positions]

    def nodes(self, index: int, place: Place) -> list[tuple[int, int | None, int | None]]:
        units: list[int | None] = [None]
        if place.units == "head":
            units = list(range(place.count))
        elif place.units == "feature":
            shape = self.shapes[id(place.read.module), place.read.side]
            units = list(range(shape[1] if len(shape) > 3 else shape[-1]))
        return [(index, position, unit) for position in self.picks for unit in units]

    def picked(self, scores: Tensor) -> Tensor:
        """The asked-for positions of (batch, positions, ...)."""
        return scores.sum(1, keepdim=True) if self.picks == [None] else scores[:, self.picks]

    def result(
        self,
        method: str,
        per_place: Sequence[Tensor],
        base: Tensor,
        source: Tensor | None,
        coverage: Coverage | None,
        settings: dict[str, Any],
    ) -> PatchingResult:
        """Scores by kind, divided by the difference of the two runs, padding set to zero."""
        per_example: dict[str, Tensor] = {}
        by_kind: dict[str, list[Tensor]] = {}
        for place, scores in zip(self.engine.places, per_place):
            by_kind.setdefault(place.kind, []).append(scores)
        for kind, layers in by_kind.items():
            shapes = {tuple(layer.shape) for layer in layers}
            require(
                len(shapes) == 1,
                f"sites: the layers of {kind!r} have scores of shapes {sorted(shapes)}; give each shape a kind of its own",
            )
            per_example[kind] = torch.stack(layers, 1)
        mask = self.engine.pair.mask
        if mask is not None and self.picks != [None]:
            kept = mask[:, None, self.picks]
            per_example = {
                kind: s * (kept if s.ndim == 3 else kept[..., None]) for kind, s in per_example.items()
            }
        if self.normalise and source is not None:
            gap = source.mean() - base.mean()
            per_example = {kind: scores / gap for kind, scores in per_example.items()}
        settings = {"corruption": self.corruption, "normalise": self.normalise, **settings}
        settings["positions"] = self.positions if isinstance(self.positions, str) else self.picks
        return PatchingResult(
            method,
            {kind: scores.mean(0) for kind, scores in per_example.items()},
            per_example,
            self.direction,
            float(base.mean()),
            float("nan") if source is None else float(source.mean()),
            self.engine.pair.labels(),
            {} if coverage is None else coverage.active(),
            settings,
        )


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
