"""Sets of several seeds, side by side: what one set is worth depends on its draws, so that methods are compared over several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lineament.core import checks
from lineament.core.checks import require
from lineament.core.engines import side_by_side
from lineament.learn.condensation.condensed import Condensed
from lineament.learn.condensation.condensing import condense


def condensed_sets(
    images: Tensor, targets: Tensor, *, per_class: int, seeds: Sequence[int], jobs: int = 1, **settings: Any
) -> list[Condensed]:
    """One condensed set of each seed, each as :func:`condense` gives it with that seed.

    Args:
        images, targets, per_class: as for :func:`condense`, images [n, 1 or 3, height, width]. settings: its others, but for ``checkpoint``.
        seeds: of the sets. jobs: how many are made at a time, each in a process of its own (joblib; see :func:`lineament.core.engines.engine`).

    Raises:
        InputError: no seeds, one twice, or what :func:`condense` refuses.

    >>> import torch
    >>> x = torch.rand(20, 1, 8, 8); y = torch.arange(20) % 2
    >>> len(condensed_sets(x, y, per_class=1, seeds=(0, 1), method="random"))
    2
    """
    seeds = [checks.seed("seeds", seed) for seed in seeds]
    require(len(seeds) > 0, "seeds: got none, expected at least one")
    require(len(set(seeds)) == len(seeds), f"seeds: got {seeds}, expected each once")
    require(
        settings.get("checkpoint") is None, "checkpoint: is for one set; condense keeps one seed's networks"
    )
    checks.number("jobs", jobs, low=-1, integer=True)
    make = partial(_one, images, targets, {"per_class": per_class, **settings})
    return list(side_by_side(make, [(seed,) for seed in seeds], jobs=jobs))


def _one(images: Tensor, targets: Tensor, settings: dict[str, Any], seed: int) -> Condensed:
    return condense(images, targets, seed=seed, **settings)
