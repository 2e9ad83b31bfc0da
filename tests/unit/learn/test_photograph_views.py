"""Views of photographs: hue, greys and blur by hand, and that each picture gets a draw of its own."""

from __future__ import annotations

import colorsys

import pytest
import torch
from PIL import Image, ImageFilter

from lineament.core.checks import InputError
from lineament.learn.projection.photograph_views import (
    _turned,
    blurred,
    grey,
    jittered,
    photograph_view,
    resized_crop,
)

X = torch.rand(6, 3, 20, 16, generator=torch.Generator().manual_seed(0))


def test_a_turned_hue_is_colorsys():
    found = _turned(X, torch.full((6, 1, 1), 0.23))
    for at in ((0, 1, 2), (3, 4, 5), (5, 19, 15)):
        n, i, j = at
        h, s, v = colorsys.rgb_to_hsv(*X[n, :, i, j].tolist())
        assert found[n, :, i, j].tolist() == pytest.approx(colorsys.hsv_to_rgb((h + 0.23) % 1, s, v), abs=1e-5)  # fmt: skip
    flat = X[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(_turned(flat, torch.full((6, 1, 1), 0.4)), flat)


def test_grey_and_blur_are_pillows():
    pixels = (X[0] * 255).byte().movedim(0, -1).numpy()
    pillow = torch.tensor(list(Image.fromarray(pixels).convert("L").tobytes())).view(20, 16)
    assert float((grey((X[0] * 255).floor()[None])[0, 0] - pillow).abs().max()) <= 1
    # Pillow's is a chain of box filters, close to the Gaussian away from the border.
    spike = torch.zeros(1, 1, 41, 41)
    spike[0, 0, 20, 20] = 1
    ours = blurred(spike, (2.0, 2.0))[0, 0]
    image = Image.fromarray((spike[0, 0] * 255).byte().numpy()).filter(ImageFilter.GaussianBlur(2))
    assert float(ours.sum()) == pytest.approx(1, abs=1e-5)
    assert float((ours - torch.tensor(list(image.tobytes())).view(41, 41) / 255).abs().max()) < 0.006


def test_crops_are_parts_within_the_picture_and_each_has_its_own():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 60), indexing="ij")
    places = torch.stack([rows, columns, rows]).expand(500, -1, -1, -1)
    found = resized_crop(places, 12, area=(0.2, 1.0))
    assert float(found.min()) >= 0 and float(found.max()) <= 1 and found.shape == (500, 3, 12, 12)
    # Centres of the outer pixels lie 11/12 of a side apart.
    tall, wide = ((found[:, 0, -1, 0] - found[:, 0, 0, 0]), (found[:, 1, 0, -1] - found[:, 1, 0, 0]))
    area, ratio = tall * wide * (12 / 11) ** 2, tall / wide
    assert 0.19 < float(area.min()) < 0.25 and 0.95 < float(area.max()) < 1.05 and len(area.unique()) > 400
    assert 0.72 < float(ratio.min()) < 0.8 and 1.25 < float(ratio.max()) < 1.38
    with pytest.raises(InputError, match="images: got"):
        resized_crop(X[0], 8)
    with pytest.raises(InputError, match="area: got"):
        resized_crop(X, 8, area=(0.0, 1.0))


def test_views_are_drawn_from_the_global_state_in_the_shares_of_moco():
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(photograph_view((X * 255).byte(), 8))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].min() >= 0 and made[0].max() <= 1 and made[0].dtype == torch.float32
    views = photograph_view(X[:1].expand(2000, -1, -1, -1), 8)
    share = float(((views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-5).float().mean())
    assert share == pytest.approx(0.2, abs=0.03)
    bright = jittered(torch.full((2000, 3, 2, 2), 0.5), (0.4, 0.0, 0.0, 0.0))[:, 0, 0, 0]
    assert 0.3 <= float(bright.min()) < 0.31 and 0.69 < float(bright.max()) <= 0.7
