"""How ColorMNet is trained: clips of a few frames, each coloured from the ones before, mean |ab - true ab| over all but the first.

The network stays in evaluation mode (statistics frozen, no dropout); memory holds the first frame and two random earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import number, require, show
from lineament.core.pictures import rgb_to_lab
from lineament.modules.colormnet.memory import read_all
from lineament.modules.colormnet.network import ColorMNet
from lineament.train.callbacks import Schedule
from lineament.train.loop import Trained, fit


@dataclass(frozen=True)
class ColorTraining:
    """The published training; ``epochs`` and ``clips`` an epoch make its iterations.

    Args:
        frames: of a clip. size: of its crop. batch_size, lr, weight_decay: of AdamW; the rate falls to a tenth after three quarters.
        deep: how often a remembered frame updates the hidden state. jitter: brightness and contrast, saturation, hue of a clip; a frame's own is ``jitter_frame``.
        affine: degrees of rotation and of shear of each frame, until ``affine_until`` of the training; none is (0, 0).
        scale: smallest part of a picture that is cut out, along each side.
        recurrent: memory holds the previous frame alone (an ablation).

    >>> told = ColorTraining()
    >>> told.epochs * told.clips // told.batch_size
    160000
    """

    frames: int = 8
    size: int = 448
    epochs: int = 160
    clips: int = 2000
    batch_size: int = 2
    lr: float = 2e-5
    weight_decay: float = 0.05
    deep: float = 0.2
    references: int = 3
    scale: float = 0.36
    jitter: tuple[float, float, float] = (0.1, 0.03, 0.03)
    jitter_frame: float = 0.01
    affine: tuple[float, float] = (15.0, 10.0)
    affine_until: float = 150 / 160
    recurrent: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "epochs", "clips", "batch_size", "references"):
            number(name, getattr(self, name), low=1, integer=True)
        number("frames", self.frames, low=2, integer=True)
        number("deep", self.deep, low=0, high=1)
        number("scale", self.scale, low=0, high=1, open_low=True)


def train_colorizer(
    model: ColorMNet,
    films: Sequence[Tensor],
    *,
    options: ColorTraining | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    callbacks: Sequence[Any] = (),
) -> Trained:
    """Train a network on films in colour, bytes [frames, height, width, 3]; killed and started again, it ends with the same bits.

    ``loss`` of an epoch is the sum over a clip's frames of mean |ab - true ab|, as published. Further callbacks as for :func:`lineament.train.fit`:
    ``Autocast``, ``ClipGradients``, validation.

    >>> from lineament.modules import ColorMNetConfig
    >>> films = [torch.zeros(4, 32, 32, 3, dtype=torch.uint8)]
    >>> told = ColorTraining(frames=3, size=32, epochs=1, clips=1, batch_size=1)
    >>> len(train_colorizer(ColorMNet(ColorMNetConfig.tiny()), films, options=told).history)
    1
    """
    options = options or ColorTraining()
    require(bool(films), "films: got none, expected at least one, bytes of shape (frames, height, width, 3)")
    for index, film in enumerate(films):
        require(
            film.ndim == 4 and film.shape[3] == 3 and film.dtype == torch.uint8 and len(film) > 1,
            f"films: number {index} is {show(film)}, expected bytes of shape (frames, height, width, 3), two frames at least",
        )
    require(
        options.size % model.config.multiple == 0,
        f"size: got {options.size}, expected a multiple of {model.config.multiple}",
    )
    clips = Clips(films, options)

    def steps(optimizer: Any, total: int) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, round(0.75 * total))], gamma=0.1)

    def optimizer(wrapped: nn.Module) -> torch.optim.Optimizer:
        weights = [p for p in wrapped.parameters() if p.requires_grad]
        return torch.optim.AdamW(weights, lr=options.lr, weight_decay=options.weight_decay)

    return fit(
        _Training(model, options), clips, optimizer=optimizer, epochs=options.epochs, batch_size=options.batch_size,
        loss=lambda losses, _: losses.sum(), callbacks=[clips, Schedule(steps), *callbacks], seed=seed,
        checkpoint=checkpoint,
    )  # fmt: skip


class _Training(nn.Module):
    """The losses of a batch of clips, as a model's outputs."""

    def __init__(self, model: ColorMNet, options: ColorTraining):
        super().__init__()
        self.model, self.options = model, options

    def train(self, mode: bool = True) -> _Training:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, lightness: Tensor, ab: Tensor) -> Tensor:
        length = lightness.shape[1]
        deep = [True, *(torch.rand(length - 1) < self.options.deep).tolist()]
        held = references(length, self.options.references)
        if self.options.recurrent:
            held = [[t - 1] if t else [] for t in range(length)]
        return clip_losses(self.model, lightness, ab, deep=deep, references=held)


def references(length: int, most: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """For each frame which earlier ones memory holds: the first, and random others, all while there are no more than ``most``.

    >>> [len(held) for held in references(6, 3)]
    [0, 1, 2, 3, 3, 3]
    """
    found = []
    for t in range(length):
        others = 1 + torch.randperm(max(0, t - 1), generator=generator)[: most - 1]
        found.append([0, *sorted(others.tolist())][: min(t, most)])
    return found


def largest_jump(done: float) -> int:
    """The largest gap between frames of a clip after a share of the training: 5, 10, 15, and 5 again at the end.

    >>> [largest_jump(share) for share in (0, 0.1, 0.5, 0.95)]
    [5, 10, 15, 5]
    """
    return 5 if done < 0.1 or done >= 0.9 else 10 if done < 0.3 else 15


class Clips:
    """Batches of clips from films, drawn anew each epoch; as a callback it widens the gaps between frames over the training."""

    def __init__(self, films: Sequence[Tensor], options: ColorTraining):
        self.films, self.options, self.done = list(films), options, 0.0

    def __len__(self) -> int:
        return math.ceil(self.options.clips / self.options.batch_size)

    def on_epoch(self, run: Any) -> None:
        self.done = run.done

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for _ in range(len(self)):
            lab = torch.stack([self.one() for _ in range(self.options.batch_size)])
            lightness, ab = (lab[:, :, :1] - 50) / 50, lab[:, :, 1:] / 110
            yield {"lightness": lightness, "ab": ab}, ab[:, 1:]

    def one(self) -> Float[Tensor, "frames 3 size size"]:
        """The Lab of one clip."""
        told = self.options
        film = self.films[_below(len(self.films))]
        rgb = film[self.places(len(film))].movedim(3, 1).float() / 255
        rgb = jittered(rgb, *told.jitter)
        rgb = torch.cat([jittered(frame[None], *(told.jitter_frame,) * 3) for frame in rgb])
        return rgb_to_lab(self._cut(rgb))

    def places(self, length: int) -> Tensor:
        """Which frames of a film a clip takes: random gaps, backwards in half of the clips; a short film's ends repeat."""
        gaps = torch.randint(1, largest_jump(self.done) + 1, (self.options.frames - 1,))
        while int(gaps.sum()) >= length and int(gaps.max()) > 1:
            gaps = (gaps - 1).clamp_min(1)
        places = torch.cat([torch.zeros(1, dtype=torch.long), gaps.cumsum(0)])
        places = places + _below(max(1, length - int(places[-1])))
        places = places.clamp_max(length - 1)
        return places.flip(0) if _below(2) else places

    def _cut(self, rgb: Tensor) -> Tensor:
        """One window of all frames, mirrored in half of the clips, and each frame turned and sheared a little about its middle."""
        told, count = self.options, len(rgb)
        part = told.scale + (1 - told.scale) * torch.rand(())
        centre = (1 - part) * (2 * torch.rand(2) - 1)
        mirror = 1.0 if _below(2) else -1.0
        window = torch.tensor([[mirror * part, 0, centre[0]], [0, part, centre[1]], [0, 0, 1]])
        turn, shear = torch.zeros(count), torch.zeros(count)
        if self.done < told.affine_until:
            turn, shear = (math.radians(a) * (2 * torch.rand(count) - 1) for a in told.affine)
        own = torch.zeros(count, 3, 3)
        own[:, 0, 0], own[:, 0, 1] = turn.cos(), -turn.sin() + shear.tan()
        own[:, 1, 0], own[:, 1, 1], own[:, 2, 2] = turn.sin(), turn.cos(), 1
        grid = F.affine_grid(
            (own @ window)[:, :2].to(rgb), [count, 3, told.size, told.size], align_corners=False
        )
        fill = rgb.new_tensor((124, 116, 104))[:, None, None] / 255
        return F.grid_sample(rgb - fill, grid, align_corners=False) + fill


def jittered(
    rgb: Float[Tensor, "frames 3 height width"], light: float, saturation: float, hue: float
) -> Tensor:
    """Brightness and contrast, saturation and hue of all frames changed alike, each by a random amount up to these."""
    bright, contrast, strong = (
        1 + amount * (2 * torch.rand(()) - 1) for amount in (light, light, saturation)
    )
    weights = rgb.new_tensor((0.299, 0.587, 0.114))[:, None, None]
    rgb = (rgb * bright).clamp(0, 1)
    middle = (rgb * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    rgb = (middle + contrast * (rgb - middle)).clamp(0, 1)
    grey = (rgb * weights).sum(1, keepdim=True)
    colour = strong * (rgb - grey)
    # Hue is turned about the grey axis.
    angle = 2 * math.pi * hue * (2 * torch.rand(()) - 1)
    across = torch.cross(torch.full_like(colour, 3**-0.5), colour, dim=1)
    return (grey + angle.cos() * colour + angle.sin() * across).clamp(0, 1)


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def clip_losses(
    model: ColorMNet,
    lightness: Float[Tensor, "batch frames 1 height width"],
    ab: Float[Tensor, "batch frames 2 height width"],
    *,
    deep: Sequence[bool],
    decoder: Sequence[bool] | None = None,
    references: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, "frames_but_one"]:
    """The loss of each frame but the first, mean |ab - true ab| of what :func:`clip_colours` predicts, with its arguments.

    >>> from lineament.modules import ColorMNetConfig
    >>> model = ColorMNet(ColorMNetConfig.tiny()).eval()
    >>> clip_losses(model, torch.zeros(1, 3, 1, 32, 32), torch.zeros(1, 3, 2, 32, 32), deep=[True, False, False]).shape
    torch.Size([2])
    """
    colours = clip_colours(model, lightness, ab[:, 0], deep=deep, decoder=decoder, references=references)
    return torch.stack([(colours[:, t - 1] - ab[:, t]).abs().mean() for t in range(1, ab.shape[1])])


def clip_colours(
    model: ColorMNet,
    lightness: Float[Tensor, "batch frames 1 height width"],
    ab: Float[Tensor, "batch 2 height width"],
    *,
    deep: Sequence[bool],
    decoder: Sequence[bool] | None = None,
    references: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, "batch frames_but_one 2 height width"]:
    """The chroma of each frame but the first, whose own is given; what was predicted enters memory, and gradients pass through it.

    Args:
        deep: for each frame, whether its value updates the hidden state.
        decoder: for each frame, whether the decoder does, which comes before; default: all but the last.
        references: for each frame, which earlier ones its memory holds; default: all.
    """
    length = lightness.shape[1]
    frames = lightness.expand(-1, -1, 3, -1, -1)
    features = [model.encode_frame(frames[:, t]) for t in range(length)]
    hidden = model.empty_hidden(features[0].key)
    value, hidden = model.encode_value(frames[:, 0], features[0].f16, hidden, ab, deep=deep[0])
    values, colours = [value], []
    for t in range(1, length):
        now = features[t]
        earlier = range(t) if references is None else references[t]
        key, shrinkage = (
            torch.cat([getattr(features[s], name).flatten(2) for s in earlier], 2)
            for name in ("key", "shrinkage")
        )
        stored = torch.cat([values[s].flatten(1, 2).flatten(2) for s in earlier], 2)
        answer = read_all(key, shrinkage, now.key.flatten(2), now.selection.flatten(2), stored)
        answer = answer.unflatten(1, values[0].shape[1:3]).unflatten(3, now.key.shape[2:])
        answer = answer + model.near(now.key, features[t - 1].key, values[t - 1])
        update = t < length - 1 if decoder is None else decoder[t]
        hidden, predicted = model.decode(now, answer, hidden, update=update)
        colours.append(predicted)
        if t < length - 1:
            value, hidden = model.encode_value(frames[:, t], now.f16, hidden, predicted, deep=deep[t])
            values.append(value)
    return torch.stack(colours, 1)
