"""The colormnet recipe: its films, what needs no network, a tiny run, and claims that can hold and fall."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lineament.core.checks import InputError
from lineament.data import coloured_films
from lineament.recipes.colormnet import Config, run
from lineament.recipes.colormnet.claims import all_claims
from lineament.recipes.colormnet.experiments import VARIANTS, WAYS, Coloured, decibels, parts

TINY = {
    "films": 2,
    "unseen": 2,
    "size": 32,
    "frames": 3,
    "epochs": 1,
    "steps": 1,
    "batch_size": 1,
    "long": 20,
}


def test_a_tiny_run(tmp_path):
    found = run(dataclasses.replace(Config.preset("quick"), **TINY), out=tmp_path)
    assert all(row[4] >= 0 for table in found.tables for row in table.rows)
    assert len(found.claims) == 9 and len(found.tables) == 2
    assert all((tmp_path / f.file).stat().st_size > 0 for f in found.figures) and len(found.figures) == 2
    with pytest.raises(InputError, match="size"):
        run(dataclasses.replace(Config.preset("quick"), size=40), out=tmp_path / "other")


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
        told += decibels(WAYS["a table from grey to colour"](*twice), ab)
        assert ab.abs().amax((1, 2, 3, 4)).min() > 0.1
    assert told[0] > 25 and told[1] < told[0] - 3


def test_claims_can_hold_and_fall():
    def outcome(good: bool) -> list[bool]:
        height = {
            "memory and local attention": 25, "memory": 22, "recurrent": 16, "a table from grey to colour": 20, "copied by position": 15, "grey": 14,
            "another's exemplar": 12,
        }  # fmt: skip
        curves = {name: [float(v if good else 40 - v)] * 23 for name, v in height.items()}
        elements = [1, 3, 3, 3] if good else [1, 2, 3, 4]
        found = Coloured(
            dict.fromkeys(VARIANTS, 0.1), curves, curves, {"own": curves, "shared": curves}, [20.0, 10.0] if good else [10.0, 20.0], 20.0, 28.0 if good else 20.0, elements
        )  # fmt: skip
        return [c.holds for c in all_claims([found], Config.preset("quick"))]

    assert all(outcome(True)) and not any(outcome(False)) and len(outcome(True)) == 9
