"""Small colorizers trained on generated films, judged on films that they have not seen, beside what needs no network."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.core.models import device_of, frozen
from lineament.core.pictures import lab_to_rgb, psnr, rgb_to_lab
from lineament.data.coloured_films import coloured_films
from lineament.modules.colormnet.colorize import Colorizer
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.film import Colorizing
from lineament.modules.colormnet.memory import MemoryOptions
from lineament.modules.colormnet.network import ColorMNet
from lineament.modules.colormnet.scores import psnr_legacy
from lineament.modules.colormnet.training import ColorTraining, clip_colours, train_colorizer

# What a variant has: the window of local attention, and whether memory is the previous frame alone.
VARIANTS = {"memory and local attention": (2, False), "memory": (0, False), "recurrent": (2, True)}
FULL = "memory and local attention"
EVERY = 5  # frames between those that enter memory
SPANS = {"1-5": slice(0, 5), "6-15": slice(5, 15), "16-23": slice(15, 23)}
_LEVELS = 40


@dataclass(frozen=True)
class Coloured:
    """One seed.

    Attributes:
        loss: {variant: the last epoch's}. own, shared: {way: PSNR of ab (peak to peak 2) of each frame but the first}, where grey says which surface it is,
            and where two surfaces share it; means over films. films: {"own" | "shared": {way: of each film, the mean over its frames}}.
        turned: PSNR of the full variant's answer to exemplars whose hues are turned by 90 degrees, to the turned truth and to the truth.
        true, legacy: PSNR of its pictures, right and as published. elements: of memory, at each frame of a long film.
    """

    loss: dict[str, float]
    own: dict[str, list[float]]
    shared: dict[str, list[float]]
    films: dict[str, dict[str, list[float]]]
    turned: list[float]
    true: float
    legacy: float
    elements: list[int]


def coloured(config: Any, seed: int) -> Coloured:
    half = config.films // 2
    films = [
        film
        for kind in (False, True)
        for film in coloured_films(half, frames=24, size=config.size, shared=kind, seed=1000 * seed + kind)
    ]
    models, loss = {}, {}
    for name in VARIANTS:
        models[name], loss[name] = trained(config, films, name, seed)
    found: dict[bool, dict[str, list[float]]] = {}
    each: dict[str, dict[str, list[float]]] = {}
    for kind in (False, True):
        unseen = coloured_films(
            config.unseen, frames=24, size=config.size, shared=kind, seed=1000 * seed + 500 + kind
        )
        lightness, ab = parts(unseen)
        answers = {name: colours_of(model, lightness, ab[:, 0], name) for name, model in models.items()}
        answers |= {name: way(lightness, ab) for name, way in WAYS.items()}
        other = _with_first(models[FULL], lightness, ab)
        answers["another's exemplar"] = other
        found[kind] = {name: decibels(x, ab[:, 1:]) for name, x in answers.items()}
        each["shared" if kind else "own"] = {
            name: [statistics.mean(decibels(x[k : k + 1], ab[k : k + 1, 1:])) for k in range(len(x))]
            for name, x in answers.items()
        }
        if not kind:
            first = lightness, ab, answers[FULL]
    lightness, ab, answer = first
    turned = torch.stack([-ab[:, :, 1], ab[:, :, 0]], 2)
    other = colours_of(models[FULL], lightness, turned[:, 0], FULL)
    psnrs = [sum(decibels(other, x[:, 1:])) / (ab.shape[1] - 1) for x in (turned, ab)]
    pictures = [_bytes(lightness[:, 1:], x) for x in (answer, ab[:, 1:])]
    true = psnr(*(p.movedim(4, 2).flatten(0, 1).double() / 255 for p in pictures)).mean()
    return Coloured(
        loss,
        found[False],
        found[True],
        each,
        psnrs,
        float(true),
        psnr_legacy(*pictures),
        elements_of(models[FULL], config),
    )


def trained(config: Any, films: list[Tensor], name: str, seed: int) -> tuple[ColorMNet, float]:
    """A tiny network of one variant, and the loss of its last epoch."""
    window, recurrent = VARIANTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ColorMNet(ColorMNetConfig.tiny(window=window, hidden_width=0, encoder=config.encoder))
    options = ColorTraining(
        frames=config.frames, size=config.size, epochs=config.epochs, clips=config.batch_size * config.steps, batch_size=config.batch_size, lr=config.lr, deep=0.0, scale=1.0,
        affine=(0.0, 0.0), jitter=(0.0, 0.0, 0.0), jitter_frame=0.0, recurrent=recurrent,
    )  # fmt: skip
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        model = model.cuda()
    done = train_colorizer(model, films, options=options, seed=seed)
    return model.eval(), done.curve("loss")[-1]


def parts(films: Tensor) -> tuple[Tensor, Tensor]:
    """Lightness and chroma of films, as the network takes them."""
    lab = rgb_to_lab(films.movedim(4, 2).float() / 255)
    return (lab[:, :, :1] - 50) / 50, lab[:, :, 1:] / 110


def colours_of(model: ColorMNet, lightness: Tensor, ab: Tensor, name: str) -> Tensor:
    """What a variant predicts of all frames but the first: from every fifth frame before, or from the previous one alone."""
    length = lightness.shape[1]
    held = [[t - 1] if VARIANTS[name][1] else list(range(0, t, EVERY)) for t in range(length)]
    device = device_of(model)
    with frozen(model), torch.no_grad():
        found = clip_colours(
            model, lightness.to(device), ab.to(device), deep=[False] * length, references=[[], *held[1:]]
        )
    return found.cpu()


def _with_first(model: ColorMNet, lightness: Tensor, ab: Tensor) -> Tensor:
    """The same films after another one's first frame."""
    shifted = lightness.clone()
    shifted[:, 0] = lightness[:, 0].roll(1, 0)
    return colours_of(model, shifted, ab[:, 0].roll(1, 0), FULL)


def table(lightness: Tensor, ab: Tensor) -> Tensor:
    """The mean chroma of each grey level of the first frame; of the nearest level where it has none."""
    levels = ((lightness + 1) / 2 * _LEVELS).long().clamp(0, _LEVELS - 1)[:, :, 0]
    answers = []
    for grey, colour in zip(levels, ab):
        count = torch.bincount(grey[0].flatten(), minlength=_LEVELS)
        sums = torch.zeros(2, _LEVELS).index_add_(1, grey[0].flatten(), colour[0].flatten(1))
        known = count.nonzero()[:, 0]
        nearest = known[(torch.arange(_LEVELS)[:, None] - known).abs().argmin(1)]
        means = (sums / count.clamp_min(1))[:, nearest]
        answers.append(means[:, grey[1:]].movedim(0, 1))
    return torch.stack(answers)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a table from grey to colour": table,
    "copied by position": lambda lightness, ab: ab[:, :1].expand(-1, lightness.shape[1] - 1, -1, -1, -1),
    "grey": lambda lightness, ab: torch.zeros_like(ab[:, 1:]),
}


def decibels(found: Tensor, truth: Tensor) -> list[float]:
    """PSNR of ab of each frame, over all films."""
    error = (found - truth).square().mean((0, 2, 3, 4))
    return (10 * torch.log10(4 / error.clamp_min(1e-12))).tolist()


def _bytes(lightness: Tensor, ab: Tensor) -> Tensor:
    rgb = lab_to_rgb(torch.cat([50 * lightness + 50, 110 * ab], 2))
    return (255 * rgb).round().to(torch.uint8).movedim(2, 4).contiguous()


def elements_of(model: ColorMNet, config: Any) -> list[int]:
    """How many elements memory holds, frame by frame, in a film that goes to and fro."""
    film = coloured_films(1, frames=24, size=config.size, seed=7)[0]
    places = (config.size // 16) ** 2
    options = Colorizing(
        memory=MemoryOptions(max_frames=6, min_frames=3, prototypes=places, max_long=4 * places), every=2, permanent=False,
    )  # fmt: skip
    colorizer, sizes = Colorizer(model, options), []
    for t in range(config.long):
        k = t % 46
        colorizer.frame(film[k if k < 24 else 46 - k], film[0] if t == 0 else None)
        sizes.append(sum(colorizer.films[0].memory.sizes))
    return sizes
