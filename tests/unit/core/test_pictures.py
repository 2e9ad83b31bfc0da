"""Pictures compared, and their colours written in Lab."""

import pytest
import torch

from lineament.core.checks import InputError
from lineament.core.pictures import lab_to_rgb, psnr, rgb_to_lab, ssim


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_lab_comes_back():
    rgb = random(2, 3, 20, 20)
    assert (lab_to_rgb(rgb_to_lab(rgb)) - rgb).abs().max() < 1e-3


def test_grey_has_no_chroma():
    grey = random(1, 1, 8, 8).expand(1, 3, 8, 8)
    assert rgb_to_lab(grey)[:, 1:].abs().max() < 1e-2


def test_known_colours():
    white, black = (rgb_to_lab(torch.full((3, 1, 1), value, dtype=torch.float64)) for value in (1.0, 0.0))
    assert abs(white[0, 0, 0] - 100) < 1e-2 and black[0, 0, 0] == 0


def test_lab_has_a_gradient_at_black():
    rgb = torch.zeros(3, 2, 2, dtype=torch.float64, requires_grad=True)
    lab_to_rgb(rgb_to_lab(rgb), clip=False).sum().backward()
    assert rgb.grad is not None and rgb.grad.isfinite().all()


@pytest.mark.parametrize("form", ["gaussian", "uniform"])
def test_ssim_is_symmetric_and_one_of_equal_pictures(form):
    a, b = random(2, 3, 16, 16), random(2, 3, 16, 16, seed=1)
    torch.testing.assert_close(ssim(a, a, form=form), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(ssim(a, b, form=form), ssim(b, a, form=form))
    assert (ssim(a, b, form=form) < 0.9).all()


def test_bytes_do_not_wrap_around():
    a, b = (torch.full((1, 3, 8, 8), value, dtype=torch.uint8) for value in (0, 255))
    assert psnr(a, b, peak=255).item() == 0
    assert psnr(a, a, peak=255).item() == float("inf")


def test_a_small_picture_has_no_whole_window():
    with pytest.raises(InputError, match="smaller side is 5"):
        ssim(random(1, 3, 5, 9), random(1, 3, 5, 9), form="uniform")
