"""The checked arguments of one patching call: its two runs, its nodes, the measured effect of each, and its result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require, suggest
from lineament.explain.patching.engine import Engine
from lineament.explain.patching.inputs import pair
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.result import PatchingResult
from lineament.explain.patching.sites import DEFAULT, Layout, Place, flat, places
from lineament.explain.relevance.context import Coverage

if TYPE_CHECKING:
    from typing_extensions import Unpack

Direction = Literal["denoising", "noising"]
Corruption = Literal["resample", "mean", "zero"]
Positions = Literal["each", "together"] | Sequence[int]


class Options(TypedDict, total=False):
    """What every way of patching can be told besides model, prompts and metric; see :func:`lineament.explain.patching.activation_patching`."""

    sites: str | Iterable[str]
    layout: Layout | None
    direction: Direction
    corruption: Corruption
    positions: Positions
    normalise: bool
    tokenizer: Any
    attention_mask: Tensor | None


_DEFAULTS: Options = {
    "sites": DEFAULT,
    "layout": None,
    "direction": "denoising",
    "corruption": "resample",
    "positions": "each",
    "normalise": True,
    "tokenizer": None,
    "attention_mask": None,
}


class Work:
    """The checked arguments of one call, its two runs and its result."""

    def __init__(
        self, model: nn.Module, clean: Any, corrupt: Any, metric: Metric, **options: Unpack[Options]
    ):
        for name in options:
            require(
                name in _DEFAULTS,
                f"{name}: is no option of patching{suggest(name, _DEFAULTS)}; expected {', '.join(_DEFAULTS)}",
            )
        chosen: dict[str, Any] = {**_DEFAULTS, **options}
        direction, corruption, positions = (chosen[k] for k in ("direction", "corruption", "positions"))
        one_of("direction", direction, ("denoising", "noising"))
        one_of("corruption", corruption, ("resample", "mean", "zero"))
        ablation = corruption != "resample"
        require(
            not ablation or direction == "noising",
            f"corruption: {corruption!r} is what noising puts in; give direction='noising'",
        )
        require(
            corrupt is not None or (ablation and not chosen["normalise"]),
            "corrupt: got None, which needs corruption='mean' or 'zero' and normalise=False (without a second metric there is nothing to divide by)",
        )
        inputs = pair(
            model,
            clean,
            corrupt,
            metric,
            tokenizer=chosen["tokenizer"],
            attention_mask=chosen["attention_mask"],
        )
        found, blocks = places(model, chosen["sites"], chosen["layout"])
        self.model, self.corruption, self.direction = model, corruption, direction
        self.normalise = chosen["normalise"]
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
        if self.picks == [None]:
            return scores.sum(1, keepdim=True)
        return scores if self.picks == list(range(scores.shape[1])) else scores[:, self.picks]

    def result(
        self,
        method: str,
        per_place: Sequence[Tensor],
        base: Tensor,
        source: Tensor | None,
        coverage: Coverage | None,
        settings: dict[str, Any],
        *,
        sizes: bool = False,
    ) -> PatchingResult:
        """Scores by kind, divided by the difference of the two runs (by its size for ``sizes``), padding set to zero."""
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
            gap = gap.abs() if sizes else gap
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
