"""How ColorMNet is trained: clips of a few frames, each coloured from the ones before, mean |ab - true ab| over all but the first.

The network stays in evaluation mode (statistics frozen, no dropout); memory holds the first frame and two random earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import number, require, show
from lineament.modules.colormnet.clips import Clips
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.memory import read_all
from lineament.modules.colormnet.network import ColorMNet
from lineament.modules.colormnet.scores import score_colours
from lineament.train.callbacks import Accumulate, Schedule
from lineament.train.loop import Trained, fit


@dataclass(frozen=True)
class ColorTraining:
    """The published training; ``epochs`` and ``clips`` an epoch make its iterations.

    Args:
        frames: of a clip. size: of its crop. batch_size, lr, weight_decay: of AdamW; the rate falls to a tenth after three quarters.
        deep: how often a remembered frame updates the hidden state. jitter: brightness and contrast, saturation, hue of a clip; a frame's own is ``jitter_frame``.
        affine: degrees of rotation and of shear of each frame, until ``affine_until`` of the training; none is (0, 0).
        scale: smallest part of a picture that is cut out, along each side.
        recurrent: memory holds the previous frame alone (an ablation). Of ``frames`` references, it holds all earlier ones (frame stacking).
        accumulate: parts of a batch that are passed one after the other. recompute: keep no activations inside a frame, but compute them again for
            the gradient (both for small memories: the published batch at 448 pixels needs more than 16 GB).

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
    accumulate: int = 1
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "epochs", "clips", "batch_size", "references", "accumulate"):
            number(name, getattr(self, name), low=1, integer=True)
        number("frames", self.frames, low=2, integer=True)
        number("deep", self.deep, low=0, high=1)
        number("scale", self.scale, low=0, high=1, open_low=True)

    def check(self, config: ColorMNetConfig) -> None:
        """Refuse crops that a network of this configuration cannot take."""
        require(
            self.size % config.multiple == 0,
            f"size: got {self.size}, expected a multiple of {config.multiple}",
        )


def train_colorizer(
    model: ColorMNet,
    films: Sequence[Tensor],
    *,
    options: ColorTraining | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    callbacks: Sequence[Any] = (),
    validation: Sequence[Tensor] = (),
) -> Trained:
    """Train a network on films in colour, bytes [frames, height, width, 3]; killed and started again, it ends with the same bits.

    ``loss`` of an epoch is the sum over a clip's frames of mean |ab - true ab|, as published. Every frame of the films of ``validation`` is coloured from
    their first after each epoch: :func:`score_colours` gives ``psnr_validation`` and the others. Further callbacks as for :func:`lineament.train.fit`:
    ``Autocast``, ``ClipGradients``, ``KeepBest("psnr_validation")``.

    >>> from lineament.modules import ColorMNetConfig
    >>> films = [torch.zeros(4, 32, 32, 3, dtype=torch.uint8)]
    >>> told = ColorTraining(frames=3, size=32, epochs=1, clips=1, batch_size=1)
    >>> len(train_colorizer(ColorMNet(ColorMNetConfig.tiny()), films, options=told).history)
    1
    """
    options = options or ColorTraining()
    require(bool(films), "films: got none, expected at least one, bytes of shape (frames, height, width, 3)")
    for name, given in (("films", films), ("validation", validation)):
        for index, film in enumerate(given):
            require(
                film.ndim == 4 and film.shape[3] == 3 and film.dtype == torch.uint8 and len(film) > 1,
                f"{name}: number {index} is {show(film)}, expected bytes of shape (frames, height, width, 3), two frames at least",
            )
    options.check(model.config)
    clips = Clips(films, options)

    def steps(optimizer: Any, total: int) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, round(0.75 * total))], gamma=0.1)

    def optimizer(wrapped: nn.Module) -> torch.optim.Optimizer:
        weights = [p for p in wrapped.parameters() if p.requires_grad]
        return torch.optim.AdamW(weights, lr=options.lr, weight_decay=options.weight_decay)

    class Scores:
        def on_epoch_end(self, run: Any) -> dict[str, float]:
            found = score_colours(model, validation)
            return {f"{name}_validation": value for name, value in found.items()}

    scores = [Scores()] if validation else []
    return fit(
        _Training(model, options), clips, optimizer=optimizer, epochs=options.epochs, batch_size=options.batch_size,
        loss=lambda losses, _: losses.sum(), callbacks=[clips, Schedule(steps), Accumulate(options.accumulate), *scores, *callbacks], seed=seed,
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
        return clip_losses(
            self.model, lightness, ab, deep=deep, references=held, recompute=self.options.recompute
        )


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


def clip_losses(
    model: ColorMNet,
    lightness: Float[Tensor, "batch frames 1 height width"],
    ab: Float[Tensor, "batch frames 2 height width"],
    *,
    deep: Sequence[bool],
    decoder: Sequence[bool] | None = None,
    references: Sequence[Sequence[int]] | None = None,
    recompute: bool = False,
) -> Float[Tensor, "frames_but_one"]:
    """The loss of each frame but the first, mean |ab - true ab| of what :func:`clip_colours` predicts, with its arguments.

    >>> from lineament.modules import ColorMNetConfig
    >>> model = ColorMNet(ColorMNetConfig.tiny()).eval()
    >>> clip_losses(model, torch.zeros(1, 3, 1, 32, 32), torch.zeros(1, 3, 2, 32, 32), deep=[True, False, False]).shape
    torch.Size([2])
    """
    colours = clip_colours(
        model, lightness, ab[:, 0], deep=deep, decoder=decoder, references=references, recompute=recompute
    )
    return torch.stack([(colours[:, t - 1] - ab[:, t]).abs().mean() for t in range(1, ab.shape[1])])


def clip_colours(
    model: ColorMNet,
    lightness: Float[Tensor, "batch frames 1 height width"],
    ab: Float[Tensor, "batch 2 height width"],
    *,
    deep: Sequence[bool],
    decoder: Sequence[bool] | None = None,
    references: Sequence[Sequence[int]] | None = None,
    recompute: bool = False,
) -> Float[Tensor, "batch frames_but_one 2 height width"]:
    """The chroma of each frame but the first, whose own is given; what was predicted enters memory, and gradients pass through it.

    Args:
        deep: for each frame, whether its value updates the hidden state.
        decoder: for each frame, whether the decoder does, which comes before; default: all but the last.
        references: for each frame, which earlier ones its memory holds; default: all.
        recompute: what lies inside a frame's encoders, read and decoder is computed again in the backward pass, not kept.
    """

    def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return (
            recomputed(function, *args, use_reentrant=False, **kwargs)
            if recompute
            else function(*args, **kwargs)
        )

    length = lightness.shape[1]
    frames = lightness.expand(-1, -1, 3, -1, -1)
    features = [called(model.encode_frame, frames[:, t]) for t in range(length)]
    hidden = model.empty_hidden(features[0].key)
    value, hidden = called(model.encode_value, frames[:, 0], features[0].f16, hidden, ab, deep=deep[0])
    values, colours = [value], []
    for t in range(1, length):
        now = features[t]
        earlier = range(t) if references is None else references[t]
        key, shrinkage = (
            torch.cat([getattr(features[s], name).flatten(2) for s in earlier], 2)
            for name in ("key", "shrinkage")
        )
        stored = torch.cat([values[s].flatten(1, 2).flatten(2) for s in earlier], 2)
        answer = called(read_all, key, shrinkage, now.key.flatten(2), now.selection.flatten(2), stored)
        answer = answer.unflatten(1, values[0].shape[1:3]).unflatten(3, now.key.shape[2:])
        answer = answer + called(model.near, now.key, features[t - 1].key, values[t - 1])
        update = t < length - 1 if decoder is None else decoder[t]
        hidden, predicted = called(model.decode, now, answer, hidden, update=update)
        colours.append(predicted)
        if t < length - 1:
            value, hidden = called(model.encode_value, frames[:, t], now.f16, hidden, predicted, deep=deep[t])
            values.append(value)
    return torch.stack(colours, 1)
