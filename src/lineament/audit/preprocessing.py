"""Would the network be right more often if samples reached it otherwise? The usual normalisations, scales and channel orders, tried on a few hundred samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lineament.core.statistics.shares import wilson
from lineament.load.model_and_data import ModelAndData

SAMPLES = 300
_USUAL = {
    "ImageNet normalisation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "values from -1 to 1": ((0.5,), (0.5,)),
    "values from 0 to 1": ((), ()),
    "values from 0 to 255": ((0.0,), (1 / 255,)),
}


@dataclass(frozen=True)
class Preprocessing:
    """What was tried, and how often the network is right with it and as it is, of the same ``count`` samples; with a 95 % interval."""

    name: str
    accuracy: float
    low: float
    high: float
    now: float
    count: int
    tried: int


def better_preprocessing(subject: ModelAndData) -> Preprocessing | None:
    """The preprocessing under which the network is right most often, where its interval lies above that of the one in use; images only.

    All are compared on the same samples; ``tried`` says of how many this is the best.
    """
    if not subject.images or subject.task != "classification":
        return None
    rows = subject.subset(SAMPLES, salt=7)
    targets = subject.targets[rows]

    def right(inputs: Tensor | None = None) -> int:
        def change(x: Tensor, part: Tensor) -> Tensor:
            return x if inputs is None else inputs[torch.searchsorted(rows, part)].to(x)

        return int((subject.answer(rows, change).argmax(1) == targets).sum())

    now = right()
    found = {name: right(inputs) for name, inputs in _others(subject, rows)}
    best = max(found, key=lambda name: found[name], default=None)
    if best is None:
        return None
    low, high = wilson(found[best], len(rows))
    if low <= wilson(now, len(rows))[1]:
        return None
    return Preprocessing(best, found[best] / len(rows), low, high, now / len(rows), len(rows), len(found))


def _others(subject: ModelAndData, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    raw, layout = subject.samples.inputs[rows], subject.layout
    plain = replace(layout, mean=(), std=())
    pictures = plain.picture(raw)
    # Real values outside [0, 1] were scaled by someone: bytes as numbers are the one case that is undone here.
    bytes_as_numbers = raw.dtype != torch.uint8 and float(pictures.min()) >= 0 and float(pictures.max()) > 1.5
    shown = raw.float() / 255 if bytes_as_numbers else raw
    for backwards in (False, True):
        for name, (mean, std) in _USUAL.items():
            x = replace(layout, mean=mean, std=std).apply(shown)
            if backwards:
                if x.ndim != 4 or x.shape[1] != 3:
                    return
                x = (
                    x.flip(1)
                    if len(mean) < 3
                    else replace(layout, mean=mean[::-1], std=std[::-1]).apply(shown).flip(1)
                )
            if not torch.equal(x, layout.apply(raw)):
                yield f"{name}{' and channels in the order blue, green, red' if backwards else ''}", x
