"""Scores that see through a small move, ranks among other pictures, and which guess is whose."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lineament.core.checks import InputError
from lineament.core.pictures import psnr, ssim
from lineament.data.digits import digit_images
from lineament.privacy import (
    Judge,
    Search,
    cw_ssim,
    fisher_features,
    identified,
    lpips_distance,
    registered_psnr,
)
from lineament.privacy.defences import Defence
from lineament.privacy.leakage import LeakageOptions, leakage

LIMITS = (torch.zeros(1), torch.ones(1))


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Twelve digits of 32 x 32."""
    x = digit_images().inputs[:12].float()
    return F.interpolate(x / x.max(), size=(32, 32), mode="bilinear", antialias=True)


def turned(x: torch.Tensor, angle: float, dx: float = 0.0, dy: float = 0.0) -> torch.Tensor:
    cos, sin = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    affine = torch.tensor([[cos, -sin, dx], [sin, cos, dy]]).expand(len(x), 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def test_registration_undoes_moves_and_never_lowers_a_score(pictures):
    for moved in (pictures.roll((2, -1), (2, 3)), turned(pictures, 0.1), turned(pictures, 0.05, 0.07, -0.04)):
        plain, found = psnr(moved, pictures), registered_psnr(moved, pictures)
        assert bool((found >= plain).all()) and float((found - plain).mean()) > 6
    others = pictures.roll(1, 0)
    gain = registered_psnr(others, pictures) - psnr(others, pictures)
    assert float(gain.min()) >= 0 and float(gain.mean()) < 4  # no move makes another digit this one
    assert bool(registered_psnr(pictures, pictures).isinf().all())


def test_complex_wavelets_look_past_a_shift_and_see_another_picture(pictures):
    assert torch.allclose(cw_ssim(pictures, pictures), torch.ones(12), atol=1e-5)
    moved, others = pictures.roll(1, 3), pictures.roll(1, 0)
    near, far = cw_ssim(pictures, moved), cw_ssim(pictures, others)
    assert float(near.min()) > float(far.max()) and torch.allclose(near, cw_ssim(moved, pictures), atol=1e-5)
    # A shift by a pixel is a small loss here, and a large one by places.
    assert float((1 - near).mean()) < 0.2 * float((1 - ssim(pictures, moved)).mean())
    # Brighter and of other contrast is the same structure as the coefficients' phases see it, not their sizes.
    assert float(cw_ssim(pictures, pictures + 0.1).mean()) > 0.999
    with pytest.raises(InputError, match="too many for pictures of side 6"):
        cw_ssim(pictures[..., :6, :6], pictures[..., :6, :6])


def test_fisher_features_part_people_whom_pixels_confuse():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    people, nuisance = draw(30, 1, 4, 4), draw(3, 1, 4, 4)

    def shots(who: torch.Tensor) -> torch.Tensor:
        return 0.3 * people[who] + 2 * torch.einsum("nk,kchw->nchw", draw(len(who), 3), nuisance) + 0.05 * draw(len(who), 1, 4, 4)  # fmt: skip

    known, asked = torch.arange(20).repeat(6), torch.arange(20, 30)
    public, truth, gallery = shots(known), shots(asked), shots(asked.repeat(3))
    judge = Judge(groups=asked, public_groups=known, gallery=(gallery, asked.repeat(3)))
    found = identified(truth, truth, public, judge, control=truth.roll(1, 0))
    assert found.rank1 == 1 and found.field == 10 + 120
    assert found.person_rank1 is not None and found.person_rank1 >= 0.9 > found.chance == pytest.approx(0.1)
    assert found.control is not None and float((found.control == 1).double().mean()) <= 0.1
    pixels = identified(truth, truth, public, Judge(groups=asked, gallery=judge.gallery, encoder=lambda x: x.flatten(1)))  # fmt: skip
    assert pixels.person_rank1 is not None and pixels.person_rank1 < found.person_rank1 - 0.2
    assert fisher_features(public, known)(truth).shape == (10, min(19, 16))
    alone = torch.cat([public, draw(1, 1, 4, 4)]), torch.cat([known, torch.tensor([77])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(fisher_features(*alone)(truth), fisher_features(public, known)(truth))
    with pytest.raises(InputError, match=r"no picture of the groups \[29\]"):
        keep = asked.repeat(3) != 29
        identified(truth, truth, public, Judge(groups=asked, gallery=(gallery[keep], asked.repeat(3)[keep])))
    with pytest.raises(InputError, match="one for each of 10"):
        identified(truth, truth, public, Judge(groups=asked[:3]))


def test_guesses_are_ordered_by_error_or_as_published_by_labels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(384, 5))
    x, public = torch.rand(4, 1, 8, 8), torch.rand(20, 1, 8, 8)
    y = torch.tensor([4, 1, 0, 2])
    told = {
        order: leakage(
            net, x, y, public=public, prior=None, options=LeakageOptions([Defence()], ["idlg"], Search(steps=120, restarts=1), 4, judge=Judge(order=order)),
            held_out=(public, torch.arange(20) % 5), bounds=LIMITS,
        ).attacked[0]
        for order in ("mse", "labels")
    }  # fmt: skip
    assert told["mse"].labels_right == told["labels"].labels_right == 1
    # Labels are told apart here, so that both orders are the same; by place, as the search has them (0, 1, 2, 4), two of four would be swapped.
    assert torch.allclose(told["mse"].pictures, told["labels"].pictures)
    assert float(told["mse"].psnr.mean()) > 15
    assert told["mse"].wrong is not None and told["mse"].wrong.shape == (4,)  # of a public batch's message
    with pytest.raises(InputError, match="order"):
        Judge(order="label")


def test_lpips_is_the_packages_own_or_a_line_that_says_why_not(pictures):
    import importlib.util

    x = pictures[:2]
    seen = []

    class Judge(nn.Module):
        def forward(self, a, b):
            seen.append((a, b))
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    found = lpips_distance(x, 1 - x, model=Judge())
    assert found.shape == (2,) and seen[0][0].shape[1] == 3  # grey as colours, in [-1, 1]
    torch.testing.assert_close(seen[0][0][:, :1], 2 * x[:, :1] - 1)
    if importlib.util.find_spec("lpips") is None:
        with pytest.raises(InputError, match="lpips: the package cannot be imported"):
            lpips_distance(x, x)
