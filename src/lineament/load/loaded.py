"""A network as it was loaded, and what its files say about its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lineament.core.results import Readable


@dataclass(frozen=True)
class Loaded(Readable):
    """A network and what its files say about its inputs.

    ``size`` is the (height, width) it wants, ``mean`` and ``std`` what images are normalised with (after scaling to [0, 1]), ``classes``
    its names of the classes, ``batch`` the only batch size it takes (``None``: any), ``tokenizer`` what makes ids of texts for a text classifier,
    ``text_task`` what has a target then, see :func:`lineament.load.data.load_data`.
    """

    model: nn.Module
    source: str
    kind: str
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    batch: int | None = None
    notes: tuple[str, ...] = ()
    tokenizer: Any = None
    text_task: str = "classes"
