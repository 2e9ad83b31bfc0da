"""The colormnet recipe: its films, what needs no network, a tiny run, and claims that can hold and fall."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from lineament.core.checks import InputError
from lineament.data import coloured_films
from lineament.recipes.colormnet import Config, run
from lineament.recipes.colormnet.claims import all_claims
from lineament.recipes.colormnet.davis import Filmed, davis_films
from lineament.recipes.colormnet.experiments import WAYS, Coloured, decibels, flat, parts

TINY = {
    "films": 2,
    "unseen": 2,
    "choosing": 1,
    "rates": (1e-3, 3e-3),
    "davis_steps": 1,
    "size": 32,
    "frames": 3,
    "epochs": 1,
    "steps": 1,
    "batch_size": 1,
    "long": 20,
}


def test_a_tiny_run(tmp_path):
    found = run(dataclasses.replace(Config.preset("quick"), **TINY), out=tmp_path)
    rates, *tables = found.tables
    assert all(row[4] >= 0 for table in tables for row in table.rows)
    assert (
        len(found.claims) == 9 and len(tables) == 2 and {row[3] for row in rates.rows} <= {"0.001", "0.003"}
    )
    assert all((tmp_path / f.file).stat().st_size > 0 for f in found.figures) and len(found.figures) == 2
    with pytest.raises(InputError, match="size"):
        run(dataclasses.replace(Config.preset("quick"), size=40), out=tmp_path / "other")


def test_real_films_are_left_out_in_turn(tmp_path, monkeypatch):
    """Eight sequences of five frames, made here."""
    rng = np.random.default_rng(0)
    stored = {}
    for name in "abcdefgh":
        files = []
        for _ in range(5):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (36, 64, 3), np.uint8)).save(file, "JPEG")
            files.append(file.getvalue())
        stored[f"{name}.bytes"] = np.frombuffer(b"".join(files), np.uint8)
        stored[f"{name}.offsets"] = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "davis_val_216p.npz", **stored)
    films = davis_films(str(tmp_path), 32)
    assert list(films) == list("abcdefgh") and films["a"].shape == (5, 32, 64, 3)
    tiny = dataclasses.replace(Config.preset("quick"), **TINY, data_folder=str(tmp_path))
    found = run(dataclasses.replace(tiny, davis=4), out=tmp_path / "out")
    assert len(found.claims) == 12 and found.tables[-1].columns[1:5] == list("abcd")
    with pytest.raises(InputError, match="davis: got 3"):
        run(dataclasses.replace(tiny, davis=3), out=tmp_path / "odd")
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    with pytest.raises(InputError, match=r"no davis_val_216p\.npz there"):
        davis_films(None, 32)
    (tmp_path / "davis_val_216p.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged"):
        davis_films(str(tmp_path), 32)


def test_films_move_and_differ():
    films = coloured_films(3, frames=6, size=32, seed=1)
    assert torch.equal(films, coloured_films(3, frames=6, size=32, seed=1))
    assert not torch.equal(films[0], films[1]) and not torch.equal(films[0, 0], films[0, 5])


def test_grey_tells_the_colour_unless_two_surfaces_share_it():
    told = []
    for shared in (False, True):
        lightness, ab = parts(coloured_films(24, frames=1, size=64, shared=shared, seed=3))
        twice = lightness.expand(-1, 2, -1, -1, -1), ab.expand(-1, 2, -1, -1, -1)
        # A table of the frame's own colours: what grey can tell at all.
        told.append(np.mean(flat(decibels(WAYS["a table from grey to colour"](*twice), ab))))
        assert ab.abs().amax((1, 2, 3, 4)).min() > 0.1
    assert told[0] > 25 and told[1] < told[0] - 3


def test_claims_can_hold_and_fall():
    def outcome(good: bool) -> list[bool]:
        height = {
            "memory and local attention": 25, "memory": 22, "recurrent": 16, "a table from grey to colour": 20, "copied by position": 15, "grey": 14,
            "another's exemplar": 12,
        }  # fmt: skip
        levels = {name: v if good else 40 - v for name, v in height.items()}
        curves = {name: [[v + 0.1 * k] * 23 for k in range(3)] for name, v in levels.items()}
        near, far = [20.0, 21.0], [10.0, 11.0]
        elements = [1, 3, 3, 3] if good else [1, 2, 3, 4]
        turned = (near, far) if good else (far, near)
        found = Coloured(curves, curves, *turned, 20.0, 28.0 if good else 20.0, elements)
        return [c.holds for c in all_claims([found], [Filmed(list("abc"), curves)], Config.preset("quick"))]

    assert all(outcome(True)) and not any(outcome(False)) and len(outcome(True)) == 12
