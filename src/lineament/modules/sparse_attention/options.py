"""The budget of a model's layers, read anew at each call, and where it is kept: on the attention modules or in the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from lineament.core.checks import number, one_of, require, show
from lineament.modules.sparse_attention.selection import (
    SCORINGS,
    check_budget,
    check_released,
    one_of_selections,
)

MODES = ("sparse", "full")
# Of an attention module, and of a configuration.
ON_MODULE, IN_CONFIG = "_lineament_sparse", "lineament_sparse"


class LayerBudget(NamedTuple):
    """What one layer does in one call."""

    block_size: int
    blocks: int
    mode: str
    scoring: Literal["group_softmax", "dot"]
    sinks: int
    recent: int
    selection: Literal["exact", "released"] = "exact"

    def choosing(self) -> dict[str, Any]:
        """The options of :func:`select`."""
        return {key: value for key, value in self._asdict().items() if key != "mode"}


@dataclass
class Budget:
    """``block_size``, ``blocks`` and ``mode`` may be one value, or one a layer; all may be changed between calls.

    ``kept``: the layers that stay as they are, for they attend within a sliding window.
    """

    block_size: int | Sequence[int] = 64
    blocks: int | Sequence[int] = 8
    mode: str | Sequence[str] = "sparse"
    scoring: str = "group_softmax"
    sinks: int = 0
    recent: int = 0
    kept: tuple[int, ...] = ()
    selection: str = "exact"

    def of(self, layer: int) -> LayerBudget:
        """The budget of a layer."""
        size, blocks, mode = (
            self._at(name, getattr(self, name), layer) for name in ("block_size", "blocks", "mode")
        )
        number("block_size", size, low=1, integer=True)
        check_budget(blocks, self.sinks, self.recent)
        one_of("mode", mode, MODES)
        one_of("scoring", self.scoring, SCORINGS)
        scoring = "dot" if self.scoring == "dot" else "group_softmax"
        selection = one_of_selections(self.selection)
        if selection == "released":
            check_released(size, blocks, scoring, self.sinks + self.recent)
        return LayerBudget(size, blocks, mode, scoring, self.sinks, self.recent, selection)

    def for_config(self) -> dict[str, Any]:
        """As a configuration keeps it."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @staticmethod
    def _at(name: str, value: Any, layer: int) -> Any:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return value
        require(
            layer < len(value),
            f"{name}: got {show(value)}, {len(value)} values, expected one for each layer, also for layer {layer}",
        )
        return value[layer]


def budget_of(module: nn.Module) -> Budget | None:
    """The module's own budget, else its configuration's; None where the configuration is another model's too."""
    own = getattr(module, ON_MODULE, None)
    if own is not None:
        return own
    kept = getattr(module.config, IN_CONFIG, {})
    return None if kept is None else Budget(**kept)
