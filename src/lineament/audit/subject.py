"""What every lens looks at: one model and one data set that fit each other, and where and how to look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lineament.load.model_and_data import ModelAndData


@dataclass(frozen=True)
class Subject(ModelAndData):
    """What a lens is given."""

    sites: tuple[str, ...] = ()
    method: str = "norm_grad"
    gaze_site: str | None = None
    faithfulness: str = "scores"
    fresh: Callable[[int], nn.Module] | None = None
    cache: dict[str, Any] = field(default_factory=dict)

    def affordable(self, work: float, passes: float, most: int, least: int = 16) -> int:
        """How many samples fit into ``work`` floating-point operations when each is passed forward ``passes`` times."""
        count = int(work / max(self.flops * passes, 1.0))
        return max(least, min(most, count, len(self)))
