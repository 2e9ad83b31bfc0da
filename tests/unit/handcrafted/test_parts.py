"""A part of the images that does not fit the memory is done in halves, with the same numbers."""

from __future__ import annotations

import sys
import weakref
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lineament.core import batching
from lineament.handcrafted.gabor import gabor
from lineament.handcrafted.hog import hog
from lineament.handcrafted.ink import ink
from lineament.handcrafted.lbp import lbp, lbp_codes

EACH = {
    "hog": (hog, ("hog", "_blocks")),
    "hog of opencv": (partial(hog, like="opencv"), ("hog", "_opencv")),
    "lbp": (lbp, ("lbp", "_code")),
    "codes": (lbp_codes, ("lbp", "_code")),
    "gabor": (gabor, ("gabor", "responses")),
    "ink": (lambda images: ink(images).images, ("ink", "_sized")),
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


@pytest.mark.parametrize("name", EACH)
def test_neither_threads_nor_the_images_beside_them_change_features(name):
    describe = EACH[name][0]
    images = (255 * torch.rand(300, 32, 32)).to(torch.uint8)
    # One image at a time, and as the thread count of this machine is.
    few, threads = describe(images[:200]), torch.get_num_threads()
    torch.testing.assert_close(
        torch.cat([describe(images[k : k + 1]) for k in range(0, 200, 40)]), few[::40], rtol=1e-10, atol=1e-12
    )
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        other = describe(images)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(other[:200], few, rtol=1e-10, atol=1e-12)


def test_preparing_many_pictures_needs_no_more_memory_than_a_part_beside_the_result():
    images = (255 * torch.rand(20_000, 16, 16)).to(torch.uint8)
    images[:5000] //= 4
    largest = 0

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            # Views and the empty result are no working memory.
            if isinstance(made, torch.Tensor) and made._base is None and func is not torch.Tensor.new_empty:
                largest = max(largest, made.nbytes)
            return made

    with Watched():
        made = ink(images, size=16)
    assert made.images.shape == images.shape and made.images.nbytes > 4e7 and 1e6 < largest < 2**22


@pytest.mark.parametrize("name", ["hog", "hog of opencv", "gabor"])
def test_bytes_become_other_numbers_a_part_at_a_time(name):
    images = (255 * torch.rand(2000, 32, 32)).to(torch.uint8)
    whole = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.is_floating_point() and made.shape[:1] == (2000,):
                whole.append(made.ndim)
            return made

    with Watched():
        found = EACH[name][0](images)
    # The features alone.
    assert set(whole) <= {2} and len(found) == 2000
    precise = torch.float32 if "opencv" in name else torch.float64
    torch.testing.assert_close(found, EACH[name][0](images.to(precise)), rtol=1e-5, atol=1e-6)
