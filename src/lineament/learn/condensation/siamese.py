"""Which augmentations, drawn once for real and synthetic pictures alike, or anew for each picture.

Zhao, Bilen, ICML 2021 (differentiable siamese augmentation); arXiv 2202.02916, section 1.5. A strategy is words between underscores; mode "S" draws one of them a
call, mode "M" applies all in their order, and mode "old" draws one a picture, as networks were trained before (DC, 2021). All draws come from a generator, so that the same state gives the same augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lineament.core.checks import InputError, one_of, suggest
from lineament.learn.condensation import augmentation

DSA = "color_crop_cutout_flip_scale_rotate"
DIGITS = "color_crop_cutout_scale_rotate"  # a mirrored digit is none
WORDS = (
    "color",
    "brightness",
    "saturation",
    "contrast",
    "crop",
    "cutout",
    "flip",
    "scale",
    "rotate",
    "noise",
)
_RATIO, _ANGLE, _NOISE = 1.2, math.radians(15), 0.001
_OLD_SIDES, _OLD_ANGLE = (0.8, 1.2), math.radians(45)
Mode = Literal["S", "M", "old"]


@dataclass(frozen=True)
class Strategy:
    """Augmentations by name; call it on pictures [n, channels, height, width] with a generator.

    Args:
        words: of :data:`WORDS`, with underscores between them. mode: ``"S"``, one a call, ``"M"``, all in order, or ``"old"``, one a picture where each has draws
            of its own, with sides of 0.8 to 1.2 and turns of 45 degrees.
        align_corners: of resampling; the published results had it on, through the PyTorch of their day.

    >>> x = torch.rand(2, 1, 8, 8)
    >>> twice = [Strategy("crop_rotate")(x, torch.Generator().manual_seed(0)) for _ in range(2)]
    >>> bool((twice[0] == twice[1]).all())
    True
    """

    words: str
    mode: Mode = "S"
    align_corners: bool = False

    def __post_init__(self) -> None:
        one_of("mode", self.mode, ("S", "M", "old"))
        for word in self.words.split("_"):
            if word not in WORDS:
                raise InputError(
                    f"strategy: got {self.words!r}, of which {word!r} is no augmentation{suggest(word, WORDS)}"
                )

    def __call__(self, x: Tensor, generator: torch.Generator, *, each: bool = False) -> Tensor:
        """Augmented pictures: one set of numbers for the whole batch, or with ``each`` one a picture."""
        words = self.words.split("_")
        if self.mode == "old" and each:
            chosen = torch.randint(len(words), (len(x),), generator=generator).to(x.device)
            changed = [self._applied([word], x, generator, each) for word in words]
            return torch.stack(changed)[chosen, torch.arange(len(x), device=x.device)]
        if self.mode != "M":
            words = [words[int(torch.randint(len(words), (), generator=generator))]]
        return self._applied(words, x, generator, each)

    def _applied(self, words: list[str], x: Tensor, generator: torch.Generator, each: bool) -> Tensor:
        for word in words:
            draws = _Draws(len(x) if each else 1, generator, x, self.mode == "old")
            x = _OPERATIONS[word](x, draws, self.align_corners)
        return x


@dataclass(frozen=True)
class _Draws:
    count: int
    generator: torch.Generator
    like: Tensor
    old: bool = False

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        drawn = torch.rand(self.count, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return drawn.to(self.like.device, self.like.dtype)

    def whole(self, low: int, high: int) -> Tensor:
        """Integers from low to high, both included."""
        return torch.randint(low, high + 1, (self.count,), generator=self.generator).to(self.like.device)


def _color(x: Tensor, draws: _Draws, _: bool) -> Tensor:
    return augmentation.color(x, *(draws.uniform() for _ in range(3)))


def _crop(x: Tensor, draws: _Draws, _: bool) -> Tensor:
    rows, columns = (int(side / 8 + 0.5) for side in x.shape[2:])
    return augmentation.shift(x, draws.whole(-rows, rows), draws.whole(-columns, columns))


def _cutout(x: Tensor, draws: _Draws, _: bool) -> Tensor:
    height, width = (int(side / 2 + 0.5) for side in x.shape[2:])
    row, column = (draws.whole(0, side - h % 2) for side, h in zip(x.shape[2:], (height, width)))
    return augmentation.cutout(x, row, column, (height, width))


def _scale(x: Tensor, draws: _Draws, corners: bool) -> Tensor:
    sides = _OLD_SIDES if draws.old else (1 / _RATIO, _RATIO)
    return augmentation.scale(x, *(draws.uniform(*sides) for _ in range(2)), align_corners=corners)


def _rotate(x: Tensor, draws: _Draws, corners: bool) -> Tensor:
    angle = _OLD_ANGLE if draws.old else _ANGLE
    return augmentation.rotate(x, draws.uniform(-angle, angle), align_corners=corners)


def _noise(x: Tensor, draws: _Draws, _: bool) -> Tensor:
    drawn = torch.randn(draws.count, *x.shape[1:], generator=draws.generator, dtype=torch.float64)
    return x + _NOISE * drawn.to(x.device, x.dtype)


_OPERATIONS: dict[str, Callable[[Tensor, _Draws, bool], Tensor]] = {
    "color": _color,
    "brightness": lambda x, draws, _: augmentation.color(x, draws.uniform(), 0.5, 0.5),
    "saturation": lambda x, draws, _: augmentation.color(x, 0.5, draws.uniform(), 0.5),
    "contrast": lambda x, draws, _: augmentation.color(x, 0.5, 0.5, draws.uniform()),
    "crop": _crop,
    "cutout": _cutout,
    "flip": lambda x, draws, _: augmentation.flip(x, draws.uniform()),
    "scale": _scale,
    "rotate": _rotate,
    "noise": _noise,
}
