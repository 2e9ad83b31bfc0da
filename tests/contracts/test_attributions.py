"""What every attribution that DiffROAR and the pixel scores judge keeps: input gradients, and a saliency map (whose own contract is test_saliency.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.faithfulness.input_gradients import KINDS, attribution, input_gradient
from lineament.explain.faithfulness.pixel_scores import score_maps
from lineament.explain.faithfulness.unmasking import Unmasked, rank
from lineament.explain.saliency.maps import saliency
from tests.contracts.unchanged import unchanged

LABELLED = ("logit_true", "softmax_true", "loss")
GRADIENTS = [f"gradient {k}" for k in KINDS]
FAMILY = [*GRADIENTS, *[f"{g} x input" for g in GRADIENTS], "saliency grad_cam"]


def network(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3),
        nn.ReLU(inplace), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6), nn.ReLU(inplace),
        nn.Linear(6, 4),
    )  # fmt: skip


def explain(net, x, name):
    family, rest = name.split(" ", 1)
    if family == "saliency":
        return saliency(net, x, site="2", method=rest)
    kind = rest.removesuffix(" x input")
    labels = torch.arange(len(x)) % 4 if kind in LABELLED else None
    return input_gradient(net, x, labels, kind=kind, times_input=rest.endswith(" x input"))


def images(dtype=torch.float32):
    return torch.rand(3, 2, 12, 9, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", FAMILY)
class TestContract:
    def test_scores_for_each_image_that_can_be_ranked_by_pixel(self, name):
        x = images()
        scores = explain(network(), x, name)
        assert scores.shape in ((3, 2, 12, 9), (3, 1, 12, 9))
        assert bool(torch.isfinite(scores).all()) and not scores.requires_grad
        order = rank(scores, group="pixel", shape=x.shape[1:])
        view = Unmasked(x, order, 0.25, "top", torch.zeros(()))
        assert int(order.keeps(slice(None), 0.25, "top").sum()) == 3 * 2 * 27
        assert torch.equal(view[torch.tensor([2])], view.whole()[2:])

    def test_precision_layout_and_in_place_layers_change_nothing(self, name):
        net = network().double()
        reference = explain(net, images(torch.float64), name)
        assert reference.dtype == torch.float64
        strided = images(torch.float64).permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
        torch.testing.assert_close(explain(net, strided, name), reference)
        torch.testing.assert_close(explain(network(True).double(), images(torch.float64), name), reference)

    def test_a_batch_is_its_images(self, name):
        if "random" in name:
            pytest.skip("noise is drawn for the batch as a whole")
        if any(k in name for k in LABELLED):
            pytest.skip("the labels of this test belong to positions in the batch")
        net, x = network().double(), images(torch.float64)
        alone = torch.cat([explain(net, x[k : k + 1], name) for k in range(3)])
        torch.testing.assert_close(explain(net, x, name), alone)

    def test_the_model_is_left_as_it_was_and_modes_change_nothing(self, name):
        net = network()
        net.train()
        net[0].bias.requires_grad_(False)
        with unchanged(net):
            reference = explain(net, images(), name)
        with torch.no_grad():
            assert torch.equal(explain(net, images(), name), reference)
        with torch.inference_mode():
            assert torch.equal(explain(net, images().clone(), name), reference)

    def test_bad_images_are_named(self, name):
        for bad, message in [(images()[:0], "empty"), (images() * float("nan"), "NaN")]:
            with pytest.raises(InputError, match=message):
                explain(network(), bad, name)


@pytest.mark.parametrize("name", ["gradient logit_predicted", "gradient random", "saliency grad_cam"])
def test_any_member_is_judged_in_one_table(name):
    net = network()
    with unchanged(net):
        found = score_maps(
            net, images(), {"this": lambda x: explain(net, x, name)}, steps=4, samples=3, perturbations=2
        )
    assert [line[0] for line in found.table()[1]] == ["this", "random"]
    assert all(len(v) == 3 for row in found.rows.values() for v in row.values())


def test_wrong_kinds_and_labels_are_named():
    net = network()
    with pytest.raises(InputError, match="nearest: 'logit_predicted'"):
        input_gradient(net, images(), kind="logit_predict")
    with pytest.raises(InputError, match="targets: got None, expected the true classes"):
        input_gradient(net, images(), kind="loss")
    with pytest.raises(InputError, match="targets: got label 4 at position 0, expected labels from 0 to 3"):
        input_gradient(net, images(), torch.full((3,), 4), kind="loss")
    with pytest.raises(InputError, match="kind: got none"):
        input_gradient(net, images(), kind=[])
    with pytest.raises(InputError, match="looks at the true label"):
        attribution(net, "loss")
    infinite = nn.Sequential(nn.Flatten(), nn.Linear(216, 4))
    infinite[1].weight.data.fill_(float("inf"))
    with pytest.raises(InputError, match="NaN or infinite"):
        input_gradient(infinite, images())
