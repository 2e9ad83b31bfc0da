"""A part of the images that does not fit the memory is done in halves, with the same numbers."""

from __future__ import annotations

import sys
import weakref
from functools import partial

import pytest
import torch

from lineament.core import batching
from lineament.handcrafted.gabor import gabor
from lineament.handcrafted.hog import hog
from lineament.handcrafted.lbp import lbp, lbp_codes

EACH = {
    "hog": (hog, ("hog", "_blocks")),
    "hog of opencv": (partial(hog, like="opencv"), ("hog", "_opencv")),
    "lbp": (lbp, ("lbp", "_code")),
    "codes": (lbp_codes, ("lbp", "_code")),
    "gabor": (gabor, ("gabor", "responses")),
}


@pytest.mark.parametrize("name", EACH)
def test_a_part_is_halved_when_memory_runs_out(name, monkeypatch):
    describe, inside = EACH[name]
    images = torch.rand(40, 16, 16, dtype=torch.float64)
    expected = describe(images)
    monkeypatch.setattr(batching, "_fitted", weakref.WeakKeyDictionary())
    module, function = sys.modules[f"lineament.handcrafted.{inside[0]}"], inside[1]
    original, sizes = getattr(module, function), []

    def scarce(some, *others, **settings):
        sizes.append(len(some))
        found = original(some, *others, **settings)
        if len(some) > 7:
            raise torch.OutOfMemoryError("out of memory")
        return found

    monkeypatch.setattr(module, function, scarce)
    torch.testing.assert_close(describe(images), expected, rtol=1e-12, atol=1e-12)
    assert sizes == [40, 20, 10, *[5] * 8]
    sizes.clear()
    describe(images)
    assert sizes == [5] * 8
