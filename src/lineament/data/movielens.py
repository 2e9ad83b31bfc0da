"""Ratings by who rated what: MovieLens 100K where the user has it, or generated features of the same kind.

Six categorical features (user, film, gender, age, occupation, post code), and whether the rating is 3 or more. Ages fall into MovieLens-1M's seven bins.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lineament.core import checks
from lineament.data.formats import folder_of, read_npz
from lineament.data.samples import Samples

COLUMNS = ("user", "film", "gender", "age", "occupation", "post code")
_AGES = (18, 25, 35, 45, 50, 56)


def movielens(data_folder: str | Path | None = None) -> Samples | None:
    """MovieLens 100K: inputs int64 (100000, 6), each column numbered from 0; ``None`` where ``movielens_100k.npz`` is not found.

    ``extras["time"]`` says when each rating was made.

    Args:
        data_folder: where the file is (arrays ``ratings``, ``users``, ``zipcodes``); default: the environment's ``LINEAMENT_DATA``.
    """
    place = folder_of(data_folder)
    path = None if place is None else place / "movielens_100k.npz"
    if path is None or not path.is_file():
        return None
    stored = read_npz(path, ("ratings", "users", "zipcodes"))
    ratings, users = stored["ratings"], stored["users"]
    codes = np.unique(stored["zipcodes"], return_inverse=True)[1]
    who = np.searchsorted(users[:, 0], ratings[:, 0])
    inputs = np.stack(
        [
            *(np.unique(ratings[:, k], return_inverse=True)[1] for k in (0, 1)),
            users[who, 2],
            np.digitize(users[who, 1], _AGES),
            users[who, 3],
            codes[who],
        ],
        1,
    ).astype(np.int64)
    return Samples(
        torch.from_numpy(inputs),
        torch.from_numpy((ratings[:, 2] >= 3).astype(np.int64)),
        classes=("1 or 2", "3 to 5"),
        columns=COLUMNS,
        extras={"time": torch.from_numpy(ratings[:, 3].astype(np.int64))},
        source="MovieLens 100K",
    )


def categorical_features(count: int = 120_000, *, seed: int = 0) -> Samples:
    """Eight features whose values are Zipf-distributed, and a label that depends on latent vectors of the values: inputs int64 (count, 8).

    The logit is half the sum of the values' first coordinates, plus a quarter of the dot products between the four largest features, minus 1.

    >>> found = categorical_features(100)
    >>> tuple(found.inputs.shape), found.targets.unique().tolist()
    ((100, 8), [0, 1])
    """
    checks.number("count", count, low=1, integer=True)
    draw = np.random.default_rng(checks.seed("seed", seed))
    sizes = (4000, 2500, 1500, 600, 100, 20, 5, 2)
    columns, latents = [], []
    for size in sizes:
        shares = 1 / np.arange(1, size + 1) ** 1.05
        columns.append(draw.choice(size, count, p=shares / shares.sum()))
        latents.append(draw.standard_normal((size, 4))[columns[-1]])
    logit = 0.5 * sum(z[:, 0] for z in latents) - 1
    for a in range(4):
        for b in range(a):
            logit = logit + 0.25 * (latents[a] * latents[b]).sum(1)
    targets = draw.random(count) < 1 / (1 + np.exp(-logit))
    return Samples(
        torch.from_numpy(np.stack(columns, 1)),
        torch.from_numpy(targets.astype(np.int64)),
        columns=tuple(f"feature {k + 1}" for k in range(len(sizes))),
        extras={"time": torch.arange(count)},
        source="generated categorical features",
    )
