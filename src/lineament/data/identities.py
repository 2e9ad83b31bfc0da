"""People who are recognised, some seen in training and some never: generated ones of known spread, and the faces of ORL.

The generated task of open-set recognition (with ElasticFace and UNPG): a person is a prototype z ~ N(0, I_16) with a spread of its own, a picture is
tanh(tanh([z + spread · noise, v] A) B) + 0.05 · noise with a nuisance v ~ N(0, 0.25 I_32) that has nothing to do with the person.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lineament.core import checks
from lineament.data.formats import folder_of
from lineament.data.samples import Samples


def identities(
    people: int = 300,
    pictures: int = 12,
    *,
    strangers: int = 300,
    stranger_pictures: int = 8,
    wrong: float = 0.0,
    seed: int = 0,
) -> tuple[Samples, Samples]:
    """Generated people: (samples to train on, samples of people who are not among them), inputs (sample, 192).

    Args:
        wrong: the share of training samples whose label is another person's; ``extras["true"]`` holds the right ones.
        seed: of everything.

    >>> train, unseen = identities(5, 4, strangers=3, stranger_pictures=2)
    >>> tuple(train.inputs.shape), train.targets.bincount().tolist(), len(unseen)
    ((20, 192), [4, 4, 4, 4, 4], 6)
    """
    for name, value in (("people", people), ("strangers", strangers)):
        checks.number(name, value, low=2, integer=True)
    for name, value in (("pictures", pictures), ("stranger_pictures", stranger_pictures)):
        checks.number(name, value, low=1, integer=True)
    checks.number("wrong", wrong, low=0, high=1)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    A, B = 1.6 * normal(48, 96) / math.sqrt(48), 1.5 * normal(96, 192) / math.sqrt(96)

    def drawn(count: int, each: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count).repeat_interleave(each)
        spread = torch.exp(math.log(0.15) + math.log(4) * torch.rand(count, 1, generator=generator))
        z = normal(count, 16)[labels] + spread[labels] * normal(len(labels), 16)
        hidden = torch.tanh(torch.cat([z, 0.5 * normal(len(labels), 32)], 1) @ A)
        return torch.tanh(hidden @ B) + 0.05 * normal(len(labels), 192), labels

    (x, true), (other, names) = drawn(people, pictures), drawn(strangers, stranger_pictures)
    labels = true.clone()
    rows = torch.randperm(len(labels), generator=generator)[: round(wrong * len(labels))]
    # Another person: any but the right one.
    labels[rows] = (true[rows] + torch.randint(1, people, rows.shape, generator=generator)) % people
    return (
        Samples(x, labels, extras={"true": true}, source="generated people"),
        Samples(other, names, source="generated people, never seen in training"),
    )


def orl_photographs(data_folder: str | Path | None = None) -> Samples | None:
    """The 400 AT&T / ORL photographs, (400, 1, 112, 92) in [0, 1], and whose each is; ``None`` where they are not found.

    Args:
        data_folder: where ``orl_faces.npz`` is (arrays ``x``, ``y``); default: the environment's ``LINEAMENT_DATA``.

    >>> orl_photographs("a folder without them") is None
    True
    """
    place = folder_of(data_folder)
    path = None if place is None else place / "orl_faces.npz"
    if path is None or not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        images, labels = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"].astype(np.int64))
    return Samples(images[:, None].float() / 255, labels, source="ORL faces")


def orl_faces(
    people: int = 24,
    *,
    size: tuple[int, int] = (28, 23),
    data_folder: str | Path | None = None,
    seed: int = 0,
) -> tuple[Samples, Samples] | None:
    """The AT&T / ORL photographs of 40 people, 10 of each: so many random people to train on, and the others; ``None`` where they are not found.

    Args:
        size: the photographs' 112 x 92 pixels averaged down to these.
        data_folder: as :func:`orl_photographs` takes it.
        seed: of who is seen.

    >>> orl_faces(data_folder="a folder without them") is None
    True
    """
    checks.number("people", people, low=2, high=38, integer=True)
    whole = orl_photographs(data_folder)
    if whole is None:
        return None
    labels = whole.targets
    x = torch.nn.functional.adaptive_avg_pool2d(whole.inputs, size)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(40))
    new = torch.empty(40, dtype=torch.int64)
    new[order] = torch.arange(40)
    labels = new[labels]
    seen = labels < people
    return (
        Samples(x[seen], labels[seen], source="ORL faces"),
        Samples(x[~seen], labels[~seen] - people, source="ORL faces, people never seen in training"),
    )
