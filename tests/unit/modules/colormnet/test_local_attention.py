"""Attention to a window: four forms, one answer."""

import pytest
import torch
from torch.nn import functional as F

from lineament.core.checks import InputError
from lineament.modules.colormnet.local_attention import FORMS, local_attention


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("size", [(5, 7), (2, 3), (1, 1)])
def test_all_forms_agree(size, heads):
    q, k, v = (random(2, 4, *size, seed=seed) for seed in range(3))
    relative = random(2, heads * 25, *size, seed=3)
    found = {
        form: local_attention(q, k, v, relative, 2, heads=heads, form=form)
        for form in FORMS
        if form != "flex"
    }
    for form in ("shifts", "unfold"):
        assert (found[form] - found["dense"]).abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_agrees():
    q, k, v, relative = (
        x.float()
        for x in (
            random(1, 16, 4, 5),
            random(1, 16, 4, 5, seed=1),
            random(1, 16, 4, 5, seed=2),
            random(1, 9, 4, 5, seed=3),
        )
    )
    torch.testing.assert_close(
        local_attention(q, k, v, relative, 1, form="flex"),
        local_attention(q, k, v, relative, 1, form="dense"),
    )


def test_constant_keys_give_the_mean_of_valid_neighbours():
    v, k = random(1, 2, 6, 5), torch.ones(1, 3, 6, 5, dtype=torch.float64)
    found = local_attention(random(1, 3, 6, 5, seed=1), k, v, torch.zeros(1, 9, 6, 5, dtype=torch.float64), 1)
    torch.testing.assert_close(found, F.avg_pool2d(v, 3, 1, 1, count_include_pad=False))


def test_the_interior_moves_with_the_picture():
    parts = [random(1, 3, 9, 9, seed=seed) for seed in range(3)] + [random(1, 9, 9, 9, seed=4)]
    moved = local_attention(*(x.roll((1, 1), (2, 3)) for x in parts), 1)
    torch.testing.assert_close(
        moved[..., 2:-1, 2:-1], local_attention(*parts, 1).roll((1, 1), (2, 3))[..., 2:-1, 2:-1]
    )


def test_unknown_form():
    with pytest.raises(InputError, match="'dense'"):
        local_attention(*(random(1, 2, 2, 2) for _ in range(3)), random(1, 9, 2, 2), 1, form="dence")
