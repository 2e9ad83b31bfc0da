"""Saliency and its scores on signals and rows: the same numbers as on images one pixel high, by hand where the network is linear."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.faithfulness.deletion import deletion_insertion
from lineament.explain.faithfulness.pixel_scores import infidelity, score_maps
from lineament.explain.saliency.maps import saliency
from lineament.explain.saliency.meta import meta_saliency
from lineament.explain.saliency.methods import METHODS

X = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(0))


def pair():
    """A network of signals and the same one of images one pixel high."""
    torch.manual_seed(0)
    ours = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )
    flat = nn.Sequential(
        nn.Conv2d(2, 4, (1, 3), padding=(0, 1)),
        nn.ReLU(),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )
    with torch.no_grad():
        for one, other in zip(ours.parameters(), flat.parameters()):
            other.copy_(one[:, :, None] if one.ndim == 3 else one)
    return ours.eval(), flat.eval()


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("cam", "norm_grad_proper") and "excitation" not in m]
)
@pytest.mark.parametrize("site", [None, ":in", "1"])
def test_signals_have_the_maps_of_images_one_pixel_high(method, site):
    ours, flat = pair()
    with unchanged(ours):
        found = saliency(ours, X, 1, site=site, method=method)
    assert found.shape == (3, 1, 12)
    torch.testing.assert_close(
        found, saliency(flat, X[:, :, None], 1, site=site, method=method)[:, :, 0], rtol=1e-4, atol=1e-6
    )


def test_rows_by_hand():
    """At the input of a linear network the gradient is its weight, and gradient times input the account of each feature."""
    net = nn.Sequential(nn.Linear(5, 3)).eval()
    rows = X[:, 0, :5]
    weight = net[0].weight.detach()[2]
    maps = saliency(net, rows, 2, method=["gradient_sum", "linear_approx", "integrated_gradients"])
    torch.testing.assert_close(maps["gradient_sum"][:, 0], weight.expand(3, 5))
    for name in ("linear_approx", "integrated_gradients"):
        torch.testing.assert_close(maps[name][:, 0], weight * rows, rtol=1e-4, atol=1e-6)
    told = infidelity(net, rows, weight.expand(3, 5)[:, None], 2, perturb="noise")
    assert float(told.value.max()) < 1e-9, "a linear account of a linear network is exact"
    with pytest.raises(InputError, match="choose ':in'"):
        saliency(net, rows, 2, site="0")


def test_the_scores_are_those_of_images_one_pixel_high():
    ours, flat = pair()
    maps = saliency(ours, X, 1)
    found = deletion_insertion(ours, X, maps, 1, steps=6)
    same = deletion_insertion(flat, X[:, :, None], maps[:, :, None], 1, steps=6)
    torch.testing.assert_close(found.deletion, same.deletion, rtol=1e-4, atol=1e-6)
    with unchanged(ours):
        told = score_maps(
            ours, X, {"ours": maps, "again": lambda x: saliency(ours, x, 1)}, 1, steps=4, samples=4
        )
    other = score_maps(flat, X[:, :, None], {"ours": maps[:, :, None]}, 1, steps=4, samples=4)
    for name, value in other.rows["ours"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(told.rows["ours"][name], value, rtol=1e-3, atol=1e-5)


def test_sequences_with_their_steps_first():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv1d(2, 6, 1)
            self.mix = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.mix(self.embed(x).transpose(1, 2)).mean(1))

    torch.manual_seed(0)
    found = saliency(Steps().eval(), X, 0, site="mix")
    assert found.shape == (3, 1, 12)


class Gated(nn.Module):
    """A network that also takes how much of each sample counts, and which of two biases to add."""

    def __init__(self, body):
        super().__init__()
        self.body, self.bias = body, nn.Embedding(2, 3)

    def forward(self, x, gate=None, which=None):
        return self.body(x * gate.reshape(-1, *[1] * (x.ndim - 1))) + self.bias(which)


@pytest.mark.parametrize("named", [False, True], ids=["tuple", "dict"])
@pytest.mark.parametrize("height", [0, 1], ids=["signals", "images"])
def test_of_several_tensors_the_first_real_one_is_explained(named, height):
    """Each sample as the network of one tensor gives it, whose other tensors are constants."""
    net = Gated(pair()[height]).eval()
    x = X[:, :, None] if height else X
    gate, which = torch.tensor([1.0, 0.5, -2.0]), torch.tensor([0, 1, 1])
    inputs = {"x": x, "gate": gate, "which": which} if named else (x, gate, which)
    options = {"method": ["norm_grad", "integrated_gradients"], "site": ":in"}
    with unchanged(net):
        found = saliency(net, inputs, torch.tensor([0, 2, 1]), **options)
        curves = deletion_insertion(net, inputs, found["norm_grad"], 1, steps=4)
        stepped = meta_saliency(net, inputs, 1, site="body.1", eps=1e-3)
        scored = score_maps(net, inputs, {"ours": found["norm_grad"]}, 1, steps=4, samples=3)
    assert stepped.shape == found["norm_grad"].shape and len(scored.rows["ours"]["gain"]) == 3
    for at, target in enumerate([0, 2, 1]):

        class Alone(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, x, at=at):
                return self.net(x, gate[at : at + 1].expand(len(x)), which[at : at + 1].expand(len(x)))

        own = saliency(Alone().eval(), x[at : at + 1], target, **options)
        for name, maps in own.items():
            torch.testing.assert_close(found[name][at : at + 1], maps)
        alone = deletion_insertion(
            Alone().eval(), x[at : at + 1], found["norm_grad"][at : at + 1], 1, steps=4
        )
        torch.testing.assert_close(curves.deletion[at : at + 1], alone.deletion)


def test_tensors_that_cannot_be_explained_are_named():
    net = Gated(pair()[0]).eval()
    with pytest.raises(InputError, match="none is a batch of real numbers"):
        saliency(net, {"ids": torch.ones(2, 3, dtype=torch.long)})
    with pytest.raises(InputError, match="gate and x hold different numbers of samples"):
        saliency(net, {"x": X, "gate": torch.ones(2), "which": torch.zeros(3, dtype=torch.long)})
