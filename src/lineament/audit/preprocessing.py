"""Would the network be right more often if samples reached it otherwise? The usual normalisations, scales and channel orders, tried on a few hundred samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lineament.audit.phrases import compact, mean_interval, percent
from lineament.core.statistics.shares import wilson
from lineament.load.model_and_data import ModelAndData

SAMPLES = 300
_USUAL = {
    "ImageNet normalisation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "values from -1 to 1": ((0.5,), (0.5,)),
    "values from 0 to 1": ((), ()),
    "values from 0 to 255": ((0.0,), (1 / 255,)),
}
# No usual normalisation gives values beyond it.
_HUGE = 16.0


@dataclass(frozen=True)
class Preprocessing:
    """What was tried, and how often the network is right with it and as it is, of the same ``count`` samples; with a 95 % interval.

    ``loss`` and ``loss_now``: the mean losses, where these and not the accuracy tell the two apart.
    """

    name: str
    accuracy: float
    low: float
    high: float
    now: float
    count: int
    tried: int
    loss: float | None = None
    loss_now: float | None = None

    @property
    def words(self) -> str:
        """What it would give, as a sentence without its end."""
        right = f"right for {percent(self.accuracy)} instead of {percent(self.now)} of {self.count} samples"
        interval = (
            f"(95 % interval {percent(self.low)} to {percent(self.high)}; the best of {self.tried} tried)"
        )
        if self.loss is None or self.loss_now is None:
            return f"With {self.name} it would be {right} {interval}"
        return f"With {self.name} its loss would be {compact(self.loss)} instead of {compact(self.loss_now)} and it would be {right} {interval}"


def better_preprocessing(subject: ModelAndData) -> Preprocessing | None:
    """The preprocessing under which the network is right most often, where its interval lies above that of the one in use; images only.

    Values as large as bytes reach a network that is nearly linear without changing its answers much: where such do, a preprocessing under which it
    is right no less often and its loss falls below that of a uniform guess is as good a sign. All are compared on the same samples; ``tried`` says of how many this is the best.
    """
    if not subject.images or subject.task != "classification":
        return None
    rows = subject.subset(SAMPLES, salt=7)
    targets = subject.targets[rows]

    def outputs(inputs: Tensor | None = None) -> Tensor:
        def change(x: Tensor, part: Tensor) -> Tensor:
            return x if inputs is None else inputs[torch.searchsorted(rows, part)].to(x)

        return subject.answer(rows, change).double()

    def judged(outputs: Tensor) -> tuple[int, Tensor]:
        return int((outputs.argmax(1) == targets).sum()), subject.losses(outputs, targets)

    now, losses = judged(outputs())
    found = {name: judged(outputs(inputs)) for name, inputs in _others(subject, rows)}
    count, tried = len(rows), len(found)

    def of(name: str, *loss: float) -> Preprocessing:
        right = found[name][0]
        return Preprocessing(name, right / count, *wilson(right, count), now / count, count, tried, *loss)

    best = max(found, key=lambda name: found[name][0], default=None)
    if best is None:
        return None
    if of(best).low > wilson(now, count)[1]:
        return of(best)
    if float(subject.inputs(rows).abs().max()) < _HUGE:
        return None
    able = [name for name, (right, _) in found.items() if right >= now]
    best = min(able, key=lambda name: float(found[name][1].mean()), default=None)
    if best is None:
        return None
    loss, fall = float(found[best][1].mean()), mean_interval(losses - found[best][1])
    if fall[1] <= 0 or loss >= math.log(subject.outputs.shape[1]):
        return None
    return of(best, loss, float(losses.mean()))


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
