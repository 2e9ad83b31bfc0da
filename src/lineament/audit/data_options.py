"""How a look at a user's network reads the data: what the options of an audit and of a comparison share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DataOptions:
    """How the samples are read and given to a network.

    Attributes:
        inputs, targets, split: which arrays or columns of the data to read, and which part, see :func:`lineament.load.data.load_data`.
        image_size: bring images to this (height, width), in pixels; by default the size that the model names.
        normalize: (mean, deviation) per channel, for images scaled to [0, 1]; by default the model's own.
        task: ``"classification"``, ``"multi-label"``, ``"regression"`` or ``"auto"``; audits and comparisons also take ``"embedding"``, audits ``"dense"``.
        batch_size: samples at a time, but for an exported network of a fixed batch.

    >>> DataOptions().task
    'auto'
    """

    inputs: str | None = None
    targets: str | None = None
    split: str | None = None
    image_size: int | tuple[int, int] | None = None
    normalize: tuple[Sequence[float], Sequence[float]] | None = None
    task: str = "auto"
    batch_size: int = 64
