"""Stored images brought to the size that is asked for, whatever they are stored in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lineament.core.checks import InputError
from lineament.load.data import load_data


@pytest.mark.parametrize("shape", [(6, 8, 4), (6, 3, 8, 4), (6, 8, 4, 3)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_images_in_memory_and_in_files_are_brought_to_a_size(shape, kind, tmp_path):
    x = torch.arange(6).view(6, *[1] * (len(shape) - 1)).expand(shape).to(kind) * 40
    y = torch.arange(6) % 2
    wanted = tuple({8: 16, 4: 6}.get(side, side) for side in shape)
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=y.numpy())
    for found in (load_data((x, y), image_size=(16, 6)), load_data(tmp_path / "a.npz", image_size=(16, 6))):
        assert tuple(found.inputs.shape) == wanted and found.inputs.dtype == kind
        # An image of one brightness keeps it.
        assert torch.equal(found.inputs.flatten(1)[:, 0], x.flatten(1)[:, 0])
        assert "images of 8 x 4 pixels are brought to 16 x 6" in found.notes
    same = load_data((x, y), image_size=(8, 4))
    assert torch.equal(same.inputs, x) and not any("brought" in note for note in same.notes)


def test_what_has_no_size_to_change_is_refused():
    with pytest.raises(InputError, match=r"image_size: got 4 x 4, but the samples are .*expected images"):
        load_data((torch.rand(5, 7), torch.arange(5) % 2), image_size=4)
    with pytest.raises(InputError, match="belong to the images' pixels"):
        load_data((torch.rand(5, 3, 8, 8), torch.zeros(5, 8, 8).long()), image_size=4)


def test_smaller_images_are_smoothed_first():
    stripes = (torch.arange(64) % 2).float().expand(1, 8, 64)
    found = load_data((stripes.repeat(2, 1, 1), torch.tensor([0, 1])), image_size=(8, 8)).inputs
    torch.testing.assert_close(found, torch.full_like(found, 0.5), atol=0.05, rtol=0)
