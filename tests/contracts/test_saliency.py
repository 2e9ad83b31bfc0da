"""What every saliency method keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.saliency.maps import normgrad, saliency
from lineament.explain.saliency.methods import METHODS, Method
from tests.contracts.unchanged import unchanged

PLACED = [m for m in METHODS if METHODS[m].extract or m == "cam"]


def network(inplace: bool = False, method: str = "") -> nn.Sequential:
    torch.manual_seed(0)
    if method == "cam":  # which is for one kind of head only
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3),
        nn.ReLU(inplace), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6), nn.ReLU(inplace),
        nn.Linear(6, 4),
    )  # fmt: skip


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def explain(net, x, method, targets=1, **options):
    return saliency(
        net, x, targets, site="0" if method == "norm_grad_proper" else "2", method=method, **options
    )


@pytest.mark.parametrize("method", METHODS)
class TestContract:
    def test_a_map_for_each_image_of_any_shape(self, method):
        maps = explain(network(method=method), torch.rand(3, 2, 12, 9), method)
        assert maps.shape == (3, 1, 12, 9) and torch.isfinite(maps).all() and not maps.requires_grad

    def test_a_batch_is_its_images(self, method):
        net, x = network(method=method).double(), torch.rand(3, 2, 12, 9).double()
        if method != "random":
            alone = torch.cat([explain(net, x[i : i + 1], method) for i in range(3)])
            torch.testing.assert_close(explain(net, x, method), alone)
        assert explain(net, x, method).dtype == torch.float64

    def test_memory_layout_and_in_place_relus_change_nothing(self, method):
        x = torch.rand(2, 9, 12, 2).permute(0, 3, 2, 1)
        reference = explain(network(method=method), x.contiguous(), method)
        torch.testing.assert_close(explain(network(method=method), x, method), reference)
        torch.testing.assert_close(
            explain(network(inplace=True, method=method), x.contiguous(), method), reference
        )

    def test_the_model_is_left_as_it_was_also_after_an_error(self, method):
        net = network(method=method)
        net.train()
        net[0].bias.requires_grad_(False)
        with unchanged(net):
            explain(net, torch.rand(2, 2, 12, 9, generator=torch.Generator().manual_seed(0)), method)
        broken = nn.Sequential(net, Broken())
        with unchanged(broken), pytest.raises((RuntimeError, InputError), match=r"broken|NaN"):
            site = "0.0" if method == "norm_grad_proper" else "0.2"
            saliency(broken, torch.ones(2, 2, 12, 9), "all", site=site, method=method)

    def test_the_callers_modes_change_nothing(self, method):
        net, x = network(method=method), torch.rand(2, 2, 12, 9)
        reference = explain(net, x, method)
        with torch.no_grad():
            assert torch.equal(explain(net, x, method), reference)
        with torch.inference_mode():
            assert torch.equal(explain(net, x.clone(), method), reference)
        assert torch.equal(explain(net, x.double(), method), reference)
        torch.testing.assert_close(explain(net, x, method, batch_size=1)[:1], reference[:1])

    def test_all_classes_are_the_single_classes_side_by_side(self, method):
        net, x = network(method=method), torch.rand(2, 2, 12, 9)
        every = explain(net, x, method, targets="all")
        assert every.shape == (2, 4, 12, 9)
        torch.testing.assert_close(every[:, 3:4], explain(net, x, method, targets=3), rtol=1e-4, atol=1e-6)

    def test_the_same_call_gives_the_same_map(self, method):
        net, x = network(method=method), torch.rand(2, 2, 12, 9)
        assert torch.equal(explain(net, x, method), explain(net, x, method))

    def test_bad_images_are_named(self, method):
        net = network(method=method)
        for bad, message in [
            (torch.rand(2, 12, 9), "expected a tensor of shape"),
            (torch.rand(0, 2, 12, 9), "empty"),
            (torch.full((1, 2, 12, 9), float("nan")), "NaN"),
            (torch.ones(1, 2, 12, 9, dtype=torch.int64), "floating-point"),
        ]:
            with pytest.raises(InputError, match=f"images: .*{message}"):
                explain(net, bad, method)


@pytest.mark.parametrize("method", PLACED)
def test_wrong_sites_and_targets_are_named(method):
    net, x = network(method=method), torch.rand(2, 2, 12, 9)
    with pytest.raises(InputError, match="no site"):
        saliency(net, x, 1, site="layer4", method=method)
    with pytest.raises(InputError, match="targets: got label 4"):
        explain(net, x, method, targets=4)
    with pytest.raises(InputError, match="targets"):
        explain(net, x, method, targets=torch.tensor([1, 2, 3]))
    if method not in ("norm_grad_proper", "cam"):
        with pytest.raises(InputError, match="expected a map"):
            saliency(net, x, 1, site="9", method=method)


def test_unknown_methods_and_phases_name_the_nearest():
    net, x = network(), torch.rand(1, 2, 12, 9)
    with pytest.raises(InputError, match="nearest: 'grad_cam'"):
        saliency(net, x, method="gradcam")
    with pytest.raises(InputError, match="aggregate"):
        saliency(net, x, site="2", method=Method("conv", "mean"))
    with pytest.raises(InputError, match="odd"):
        normgrad(net, x, site="2", kernel=2)
