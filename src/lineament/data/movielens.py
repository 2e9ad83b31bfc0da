"""Ratings by who rated what: MovieLens 1M, MovieLens 100K where the user has it, or generated features of the same kind.

Six categorical features (user, film, gender, age, occupation, post code), and whether the rating is 3 or more. Ages fall into MovieLens-1M's seven bins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lineament.core import checks
from lineament.core.checks import InputError, require
from lineament.data.click_logs import Numbered, file_of
from lineament.data.formats import folder_of, read_npz
from lineament.data.samples import Samples

COLUMNS = ("user", "film", "gender", "age", "occupation", "post code")
_AGES = (18, 25, 35, 45, 50, 56)


def movielens(data_folder: str | Path | None = None) -> Samples | None:
    """MovieLens 100K: inputs int64 (100000, 6), each column numbered from 0; ``None`` where ``movielens_100k.npz`` is not found.

    ``extras["time"]`` says when each rating was made.

    Args:
        data_folder: where the file is (arrays ``ratings``, ``users``, ``zipcodes``); default: the environment's ``LINEAMENT_DATA``.

    >>> movielens("a folder without it") is None
    True
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


def movielens_1m(
    data_folder: str | Path | None = None, *, labels: Literal["without 3", "3 or more"] = "without 3"
) -> Samples:
    """MovieLens 1M as GroupLens gives it (`ratings.dat`, `users.dat`, `movies.dat`): inputs int64 (rating, 6), each column numbered from 0.

    ``extras["time"]`` says when each rating was made, in seconds since 1970. Of ``movies.dat`` only that it knows every rated film is used.

    Args:
        data_folder: holds the three files, or a folder ``ml-1m`` with them; default: the environment's ``LINEAMENT_DATA``.
        labels: ``"without 3"`` leaves ratings of 3 out, and 4 and 5 are 1 (with which the paper's figures were replicated); by ``"3 or more"``,
            the rule in the paper's text, a 3 is 1 too.

    Raises:
        InputError: a file is missing, a line has another form, or a rating is of an unknown user or film.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> for name, text in (("ratings", "1::9::5::978300760"), ("users", "1::F::1::10::48067"), ("movies", "9::Heat (1995)::Action")):
    ...     _ = (folder / f"{name}.dat").write_text(text)
    >>> movielens_1m(folder).inputs.tolist()
    [[0, 0, 0, 0, 0, 0]]
    """
    checks.one_of("labels", labels, ("without 3", "3 or more"))
    users = {row[0]: row[1:] for row in _dat(data_folder, "users.dat", 5)}
    films = {row[0] for row in _dat(data_folder, "movies.dat", 3)}
    rows = [row for row in _dat(data_folder, "ratings.dat", 4) if labels == "3 or more" or row[2] != "3"]
    require(len(rows) > 0, "ratings.dat: has no rating that is left, expected some of 1, 2, 4 or 5")
    odd = next((row for row in rows if row[0] not in users or row[1] not in films), None)
    require(odd is None, f"ratings.dat: {odd} is of a user or film that users.dat and movies.dat do not have")
    joined = zip(*((user, film, *users[user]) for user, film, _, _ in rows))
    try:
        ratings, times = (torch.tensor([int(row[k]) for row in rows]) for k in (2, 3))
    except ValueError as error:
        raise InputError(f"ratings.dat: expected whole numbers ({error})") from error
    return Samples(
        torch.from_numpy(np.stack([Numbered().of(column) for column in joined], 1).astype(np.int64)),
        (ratings >= 3).long(),
        classes=("1 or 2", "4 or 5" if labels == "without 3" else "3 to 5"),
        columns=COLUMNS,
        extras={"time": times},
        source="MovieLens 1M",
        notes=(f"labels: {labels}",),
    )


def _dat(data_folder: str | Path | None, name: str, fields: int) -> list[list[str]]:
    """A file's lines, divided at ``::``."""
    path = file_of(data_folder, "ml-1m", (name,))
    rows = [line.split("::") for line in path.read_text(encoding="latin-1").splitlines() if line]
    odd = next((row for row in rows if len(row) != fields), None)
    require(odd is None, f"{path}: a line has the fields {odd}, expected {fields}, divided by ::")
    return rows


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
