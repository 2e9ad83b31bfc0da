"""Digits with a planted mark or pixel: they hold what they say."""

from __future__ import annotations

import pytest
import torch

from lineament.data.pixel_digits import pixel_digits
from lineament.data.planted_cues import CUES, planted_cues
from lineament.data.shortcut_digits import GROUPS, MARK, patterns, shortcut_digits


def test_shortcut_digits_plant_what_they_say():
    train, test = shortcut_digits("train"), shortcut_digits("test")
    marks = patterns()
    agree = (train.inputs[(slice(None), 0, *MARK)] == marks[train.targets]).flatten(1).all(1)
    assert 0.96 < float(agree.float().mean()) < 1
    assert test.groups is not None and test.group_names == GROUPS
    shown = test.inputs[(slice(None), 0, *MARK)]
    same = (shown[:, None] == marks[None]).flatten(2).all(2)
    for group, expected in enumerate(("own", "other", "none")):
        rows = test.groups == group
        found = same[rows]
        own = found.gather(1, test.targets[rows][:, None]).squeeze(1)
        assert bool((found.sum(1) == (expected != "none")).all())
        assert bool((own == (expected == "own")).all())
    digits = {tuple(x.flatten().tolist()) for x in train.inputs[:, 0, 5:17, 5:17]}
    assert not digits & {tuple(x.flatten().tolist()) for x in test.inputs[:, 0, 5:17, 5:17]}


def test_planted_pixels_tell_the_class():
    data = pixel_digits("test", noise=0.0)
    marked = data.groups == 0
    assert torch.equal(data.inputs[marked, 0, 0].argmax(1) - 1, data.targets[marked])
    assert data.inputs[~marked, 0, 0].abs().max() == 0
    assert not set(data.index.tolist()) & set(pixel_digits().index.tolist())


@pytest.mark.parametrize("cue", CUES)
def test_cues_are_where_and_in_whom_they_are_said_to_be(cue):
    """Beside the same images without strength: what differs is the cue, in the images that carry it."""
    rows = {"mark": 16, "moving mark": 16}.get(cue, 256)
    for options in ({}, {"one": 3}, {"one": 3, "agrees": False}, {"prevalence": 0.5}, {"agrees": False}):
        found, bare = (planted_cues(cue, "test", strength=s, **options) for s in (1.0, 0.0))
        carries = found.groups < 10
        if cue != "place":
            changed = (found.inputs != bare.inputs).any(1).flatten(1).sum(1)
            assert bool((changed[~carries] == 0).all()) and bool((changed[carries] <= rows).all())
            assert not bool(carries.any()) or int(changed[carries].min()) > 0
        own = found.groups[carries] == found.targets[carries]
        assert bool((own == options.get("agrees", True)).all())
        share = {"prevalence": 0.5}.get("".join(options), 1.0)
        expected = (
            0.0
            if cue == "none"
            else float((found.targets == 3).double().mean())
            if "one" in options
            else share
        )
        if options == {"one": 3, "agrees": False} and cue != "none":
            expected = 1 - expected
        assert abs(float(carries.double().mean()) - expected) < 0.06
