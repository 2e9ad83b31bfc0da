"""The clips that ColorMNet is trained on: frames of a film at random gaps, cut, mirrored, jittered and turned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lineament.core.pictures import rgb_to_lab

if TYPE_CHECKING:
    from lineament.modules.colormnet.training import ColorTraining


def largest_jump(done: float) -> int:
    """The largest gap between frames of a clip after a share of the training: 5, 10, 15, and 5 again at the end.

    >>> [largest_jump(share) for share in (0, 0.1, 0.5, 0.95)]
    [5, 10, 15, 5]
    """
    return 5 if done < 0.1 or done >= 0.9 else 10 if done < 0.3 else 15


class Clips:
    """Batches of clips from films, drawn anew each epoch; as a callback it widens the gaps between frames over the training.

    Each clip has a stream of random numbers of its own, so that what one network draws besides does not change what another one sees.
    """

    def __init__(self, films: Sequence[Tensor], options: ColorTraining, *, seed: int = 0):
        self.films, self.options, self.done = list(films), options, 0.0
        self.seeds, self.random = (seed, 0, 0), torch.Generator()

    def __len__(self) -> int:
        return math.ceil(self.options.clips / self.options.batch_size)

    def on_epoch(self, run: Any) -> None:
        self.done, self.seeds = run.done, (run.seed, run.epoch, run.processes.rank)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        size = self.options.batch_size
        for batch in range(len(self)):
            lab = torch.stack([self.one(batch * size + place) for place in range(size)])
            lightness, ab = (lab[:, :, :1] - 50) / 50, lab[:, :, 1:] / 110
            yield {"lightness": lightness, "ab": ab}, ab[:, 1:]

    def one(self, index: int = 0) -> Float[Tensor, "frames 3 size size"]:
        """The Lab of one clip of the epoch."""
        told, draw = self.options, self.random
        draw.manual_seed(
            int(np.random.SeedSequence((*self.seeds, index)).generate_state(1, np.uint64)[0] >> 1)
        )
        film = self.films[_below(len(self.films), draw)]
        rgb = film[self.places(len(film))].movedim(3, 1).float() / 255
        rgb = jittered(rgb, *told.jitter, draw)
        own = told.jitter_frame
        rgb = torch.cat([jittered(frame[None], own, own, own, draw) for frame in rgb])
        return rgb_to_lab(self._cut(rgb))

    def places(self, length: int) -> Tensor:
        """Which frames of a film a clip takes: random gaps, backwards in half of the clips; a short film's ends repeat."""
        gaps = torch.randint(
            1, largest_jump(self.done) + 1, (self.options.frames - 1,), generator=self.random
        )
        while int(gaps.sum()) >= length and int(gaps.max()) > 1:
            gaps = (gaps - 1).clamp_min(1)
        places = torch.cat([torch.zeros(1, dtype=torch.long), gaps.cumsum(0)])
        places = places + _below(max(1, length - int(places[-1])), self.random)
        places = places.clamp_max(length - 1)
        return places.flip(0) if _below(2, self.random) else places

    def _cut(self, rgb: Tensor) -> Tensor:
        """One window of all frames, mirrored in half of the clips, and each frame turned and sheared a little about its middle."""
        told, count, draw = self.options, len(rgb), self.random
        part = told.scale + (1 - told.scale) * torch.rand((), generator=draw)
        centre = (1 - part) * (2 * torch.rand(2, generator=draw) - 1)
        mirror = 1.0 if _below(2, draw) else -1.0
        window = torch.tensor([[mirror * part, 0, centre[0]], [0, part, centre[1]], [0, 0, 1]])
        turn, shear = torch.zeros(count), torch.zeros(count)
        if self.done < told.affine_until:
            turn, shear = (math.radians(a) * (2 * torch.rand(count, generator=draw) - 1) for a in told.affine)
        own = torch.zeros(count, 3, 3)
        own[:, 0, 0], own[:, 0, 1] = turn.cos(), -turn.sin() + shear.tan()
        own[:, 1, 0], own[:, 1, 1], own[:, 2, 2] = turn.sin(), turn.cos(), 1
        grid = F.affine_grid(
            (own @ window)[:, :2].to(rgb), [count, 3, told.size, told.size], align_corners=False
        )
        fill = rgb.new_tensor((124, 116, 104))[:, None, None] / 255
        return F.grid_sample(rgb - fill, grid, align_corners=False) + fill


def jittered(
    rgb: Float[Tensor, "frames 3 height width"],
    light: float,
    saturation: float,
    hue: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Brightness and contrast, saturation and hue of all frames changed alike, each by a random amount up to these."""
    bright, contrast, strong = (
        1 + amount * (2 * torch.rand((), generator=generator) - 1) for amount in (light, light, saturation)
    )
    weights = rgb.new_tensor((0.299, 0.587, 0.114))[:, None, None]
    rgb = (rgb * bright).clamp(0, 1)
    middle = (rgb * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    rgb = (middle + contrast * (rgb - middle)).clamp(0, 1)
    grey = (rgb * weights).sum(1, keepdim=True)
    colour = strong * (rgb - grey)
    # Hue is turned about the grey axis.
    angle = 2 * math.pi * hue * (2 * torch.rand((), generator=generator) - 1)
    across = torch.cross(torch.full_like(colour, 3**-0.5), colour, dim=1)
    return (grey + angle.cos() * colour + angle.sin() * across).clamp(0, 1)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
