"""The checked arguments of one patching call: its runs, what is patched in, its nodes, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require, suggest
from lineament.explain.patching.components import DEFAULT, Component, Sites, find_components, flat
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import pair_prompts
from lineament.explain.patching.result import PatchingResult
from lineament.explain.patching.runs import Runs, Values
from lineament.explain.relevance.hooks import Coverage

if TYPE_CHECKING:
    from typing_extensions import Unpack

Direction = Literal["denoising", "noising"]
Corruption = Literal["resample", "mean", "zero"]
Positions = Literal["each", "together"] | Sequence[int]


class Options(TypedDict, total=False):
    """What every way of patching can be told; see :func:`lineament.explain.patching.activation.activation_patching`."""

    sites: Sites
    direction: Direction
    corruption: Corruption
    positions: Positions
    normalise: bool
    tokenizer: Any
    attention_mask: Tensor | None


_DEFAULTS: Options = {
    "sites": DEFAULT, "direction": "denoising", "corruption": "resample", "positions": "each", "normalise": True, "tokenizer": None, "attention_mask": None,
}  # fmt: skip


class Experiment:
    """One patching call: the runs, the components to patch and at which positions."""

    def __init__(
        self, model: nn.Module, clean: Any, corrupt: Any, metric: Metric, **options: Unpack[Options]
    ):
        for name in options:
            require(
                name in _DEFAULTS,
                f"{name}: is no option of patching{suggest(name, _DEFAULTS)}; expected {', '.join(_DEFAULTS)}",
            )
        chosen: dict[str, Any] = {**_DEFAULTS, **options}
        self.normalise, positions = chosen["normalise"], chosen["positions"]
        self.direction: str = one_of("direction", chosen["direction"], ("denoising", "noising"))
        self.corruption: str = one_of("corruption", chosen["corruption"], ("resample", "mean", "zero"))
        ablation = self.corruption != "resample"
        require(
            not ablation or self.direction == "noising",
            f"corruption: {self.corruption!r} is what noising puts in; give direction='noising'",
        )
        require(
            corrupt is not None or (ablation and not self.normalise),
            "corrupt: got None, which needs corruption='mean' or 'zero' and normalise=False (without a second metric there is nothing to divide by)",
        )
        if isinstance(positions, str):
            self.positions: str | list[int] = one_of("positions", positions, ("each", "together"))
        else:
            self.positions = [number("positions", int(p), integer=True) for p in positions]
            require(bool(self.positions), "positions: got none, expected at least one")
        pair = pair_prompts(
            model,
            clean,
            corrupt,
            metric,
            tokenizer=chosen["tokenizer"],
            attention_mask=chosen["attention_mask"],
        )
        self.components, blocks = find_components(model, chosen["sites"])
        self.runs = Runs(model, pair, metric, blocks, denoising=self.direction == "denoising")
        self.two = corrupt is not None
        self.picks: list[int | None] = []
        self._widths: dict[tuple[int, str], int] = {}

    def base(self) -> tuple[Values, Tensor]:
        """The base run's activations and metric; the residual stream is kept for later starts."""
        return self.runs.values(self.runs.base_inputs, self._reads(), keep=True)

    def source(self) -> tuple[Values, Tensor | None]:
        """What is patched in, where that comes from the second run, and that run's metric."""
        if not self.two:
            return {}, None
        values, score = self.runs.values(self.runs.source_inputs, self._reads())
        return (self._averaged(values) if self.corruption == "mean" else values), score

    def ablated(self, source: Values, base: Values) -> Values:
        """What is patched in, where that comes from the base run or is zero."""
        if self.corruption == "zero":
            return {key: torch.zeros_like(value) for key, value in base.items()}
        return self._averaged(base) if self.corruption == "mean" and not self.two else source

    def settle(self, base: Values, scores: tuple[Tensor, Tensor | None]) -> None:
        """Check the metrics of base and source, and settle which positions are asked for, now that a run has shown how many there are."""
        if self.normalise and scores[1] is not None:
            self.runs.check_apart(scores[0], scores[1])
        shapes = {key: flat(value[:1]).shape for key, value in base.items()}
        self._widths = {key: shape[2] for key, shape in shapes.items()}
        counts = sorted({shape[1] for shape in shapes.values()})
        if self.positions == "together":
            self.picks = [None]
        elif self.positions == "each":
            require(
                len(counts) == 1,
                f"positions: the sites have {counts} positions; patch them 'together', or kinds of one size at a time",
            )
            self.picks = list(range(counts[0]))
        else:
            for position in self.positions:
                require(
                    -counts[0] <= int(position) < counts[0],
                    f"positions: got {position}, expected positions from {-counts[0]} to {counts[0] - 1}",
                )
            self.picks = [int(position) % counts[0] for position in self.positions]

    def nodes(self, component: Component) -> list[tuple[int | None, int | None]]:
        """(position, head or feature) of every node of a component; ``None`` is all of them."""
        count = {"head": component.count, "feature": self._widths[component.read.key]}.get(component.units)
        units: list[int | None] = [None] if count is None else list(range(count))
        return [(position, unit) for position in self.picks for unit in units]

    def picked(self, scores: Tensor) -> Tensor:
        """The asked-for positions of (batch, positions, ...)."""
        if self.picks == [None]:
            return scores.sum(1, keepdim=True)
        return scores if self.picks == list(range(scores.shape[1])) else scores[:, self.picks]

    def result(
        self,
        method: str,
        scores: Sequence[Tensor],
        base: Tensor,
        source: Tensor | None,
        coverage: Coverage | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> PatchingResult:
        """Scores of each component by kind, divided by the difference of the two runs (by its size where GradDrop made them sizes), zero at padding."""
        settings = {"corruption": self.corruption, "normalise": self.normalise, **(settings or {})}
        settings["positions"] = self.positions if isinstance(self.positions, str) else self.picks
        by_kind: dict[str, list[Tensor]] = {}
        for component, each in zip(self.components, scores):
            by_kind.setdefault(component.kind, []).append(each)
        per_example: dict[str, Tensor] = {}
        mask = self.runs.pair.mask
        for kind, layers in by_kind.items():
            shapes = {tuple(layer.shape) for layer in layers}
            require(
                len(shapes) == 1,
                f"sites: the layers of {kind!r} have scores of shapes {sorted(shapes)}; give each shape a kind of its own",
            )
            stacked = torch.stack(layers, 1)
            if mask is not None and self.picks != [None]:
                kept = mask[:, None, self.picks]
                stacked = stacked * (kept if stacked.ndim == 3 else kept[..., None])
            if self.normalise and source is not None:
                gap = source.mean() - base.mean()
                stacked = stacked / (gap.abs() if settings.get("grad_drop") else gap)
            per_example[kind] = stacked
        return PatchingResult(
            method,
            {kind: each.mean(0) for kind, each in per_example.items()},
            per_example,
            self.direction,
            float(base.mean()),
            float("nan") if source is None else float(source.mean()),
            self.runs.pair.labels(),
            {} if coverage is None else coverage.active(),
            settings,
        )

    def _reads(self) -> list[Any]:
        return [component.read for component in self.components]

    def _averaged(self, values: Values) -> Values:
        """The mean over the batch at each position, without padding."""
        mask = self.runs.pair.mask
        if mask is None:
            return {key: value.mean(0, keepdim=True).expand_as(value) for key, value in values.items()}
        count = mask.sum(0).clamp_min(1)[:, None]
        return {
            key: ((value * mask[..., None]).sum(0, keepdim=True) / count).expand_as(value)
            for key, value in values.items()
        }
