"""Small colorizers trained on generated films, judged on films that they have not seen, beside what needs no network."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
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
ANOTHER = "another's exemplar"
TABLE = "a table from grey to colour"
EVERY = 5  # frames between those that enter memory
SPANS = {"1-5": slice(0, 5), "6-15": slice(5, 15), "16-23": slice(15, 23)}
_LEVELS = 40


@dataclass(frozen=True)
class Learned:
    """A trained variant: its weights, the loss of its last epoch, the step size that was chosen for it, and for each step size the PSNR by which it was."""

    weights: dict[str, Tensor]
    loss: float
    rate: float
    by_rate: dict[str, float]


@dataclass(frozen=True)
class Coloured:
    """One seed.

    Attributes:
        own, shared: {way: for each film, the PSNR of ab (peak to peak 2) of each frame but the first}, where grey says which surface it is, and where two
            surfaces share it.
        turned, straight: PSNR of the full variant's answer to exemplars whose hues are turned by 90 degrees, to the turned truth and to the truth, by film.
        true, legacy: PSNR of its pictures, right and as published. elements: of memory, at each frame of a long film.
    """

    own: dict[str, list[list[float]]]
    shared: dict[str, list[list[float]]]
    turned: list[float]
    straight: list[float]
    true: float
    legacy: float
    elements: list[int]


def learned(config: Any, name: str, seed: int) -> Learned:
    """A tiny network of one variant at the best of the step sizes, by films of both kinds that judge nothing else."""
    half = config.films // 2
    films = _both(config, half, seed=1000 * seed)
    choosing = torch.stack(_both(config, config.choosing, seed=1000 * seed + 250))
    lightness, ab = parts(choosing)
    best: tuple[float, ColorMNet, float, float] | None = None
    by_rate = {}
    for rate in config.rates:
        model, loss = trained(config, fresh(config, name, seed), films, name, seed, rate=rate)
        reached = statistics.mean(flat(decibels(colours_of(model, lightness, ab[:, 0], name), ab[:, 1:])))
        by_rate[f"{rate:g}"] = reached
        if best is None or reached > best[0]:
            best = reached, model, loss, rate
    assert best is not None
    _, model, loss, rate = best
    return Learned({k: v.cpu() for k, v in model.state_dict().items()}, loss, rate, by_rate)


def _both(config: Any, count: int, *, seed: int) -> list[Tensor]:
    """So many films of each kind."""
    return [
        film
        for kind in (False, True)
        for film in coloured_films(count, frames=24, size=config.size, shared=kind, seed=seed + kind)
    ]


def coloured(config: Any, seed: int, found: dict[str, Learned]) -> Coloured:
    """What the trained networks of a seed, and what needs none, make of unseen films."""
    models = {name: restored(config, name, seed, held) for name, held in found.items()}
    kinds, truths = [], []
    for kind in (False, True):
        unseen = coloured_films(
            config.unseen, frames=24, size=config.size, shared=kind, seed=1000 * seed + 500 + kind
        )
        lightness, ab = parts(unseen)
        answers = answers_of(models, lightness, ab)
        truths.append((lightness, ab, answers[FULL]))
        answers[ANOTHER] = _with_first(models[FULL], lightness, ab)
        kinds.append({name: decibels(x, ab[:, 1:]) for name, x in answers.items()})
    lightness, ab, answer = truths[0]
    turned = torch.stack([-ab[:, :, 1], ab[:, :, 0]], 2)
    other = colours_of(models[FULL], lightness, turned[:, 0], FULL)
    to_turned, to_truth = (
        [statistics.mean(film) for film in decibels(other, x[:, 1:])] for x in (turned, ab)
    )
    pictures = [_bytes(lightness[:, 1:], x) for x in (answer, ab[:, 1:])]
    true = psnr(*(p.movedim(4, 2).flatten(0, 1).double() / 255 for p in pictures)).mean()
    own, shared = kinds
    elements = elements_of(models[FULL], config)
    return Coloured(own, shared, to_turned, to_truth, float(true), psnr_legacy(*pictures), elements)


def answers_of(models: dict[str, ColorMNet], lightness: Tensor, ab: Tensor) -> dict[str, Tensor]:
    """The chroma of all frames but the first, by each network and by each way without one."""
    answers = {name: colours_of(model, lightness, ab[:, 0], name) for name, model in models.items()}
    return answers | {name: way(lightness, ab) for name, way in WAYS.items()}


def fresh(config: Any, name: str, seed: int) -> ColorMNet:
    """A tiny network of one variant, not trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        window = VARIANTS[name][0]
        model = ColorMNet(ColorMNetConfig.tiny(window=window, hidden_width=0, encoder=config.encoder))
    on_card = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return (model.cuda() if on_card else model).eval()


def restored(config: Any, name: str, seed: int, found: Learned) -> ColorMNet:
    """A trained variant."""
    model = fresh(config, name, seed)
    model.load_state_dict(found.weights)
    return model


def trained(
    config: Any, model: ColorMNet, films: list[Tensor], name: str, seed: int, *, rate: float, **changes: Any
) -> tuple[ColorMNet, float]:
    """A network trained on films, and the loss of its last epoch."""
    options = ColorTraining(
        frames=config.frames, size=config.size, epochs=config.epochs, clips=config.batch_size * config.steps, batch_size=config.batch_size, lr=rate, deep=0.0, scale=1.0,
        affine=(0.0, 0.0), jitter=(0.0, 0.0, 0.0), jitter_frame=0.0, recurrent=VARIANTS[name][1],
    )  # fmt: skip
    done = train_colorizer(model, films, options=replace(options, **changes), seed=seed)
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
    TABLE: table,
    "copied by position": lambda lightness, ab: ab[:, :1].expand(-1, lightness.shape[1] - 1, -1, -1, -1),
    "grey": lambda lightness, ab: torch.zeros_like(ab[:, 1:]),
}


def decibels(found: Tensor, truth: Tensor) -> list[list[float]]:
    """PSNR of ab of each film's frames."""
    error = (found - truth).square().mean((2, 3, 4))
    return (10 * torch.log10(4 / error.clamp_min(1e-12))).tolist()


def flat(films: list[list[float]]) -> list[float]:
    """The frames of all films."""
    return [value for film in films for value in film]


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
