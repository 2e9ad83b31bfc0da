"""A TransformerEncoder in eval mode makes ragged (nested) tensors of a padding mask: all who hook a model see plain ones, and change nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.models import frozen
from lineament.core.sites.activations import capture, patch
from lineament.core.sites.hooks import replace, tap
from lineament.measure.collapse.profile import collapse

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0], [3, 1, 0, 0]])
LABELS = torch.tensor([0, 1, 0, 1])
INSIDE = ["encoder.layers.0", "encoder.layers.0.linear1", "encoder.layers.1"]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 2)

    def forward(self, ids):
        pad = ids == 0
        inner = self.encoder(self.embedding(ids), src_key_padding_mask=pad)
        return self.head(inner.masked_fill(pad[..., None], 0).sum(1))


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier().eval()


@pytest.fixture(autouse=True)
def without_gradients():
    # The ragged tensors are of inference only.
    with torch.no_grad():
        yield


def test_it_is_ragged_without_the_library(model):
    seen = []
    handle = model.encoder.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_nested))
    model(IDS)
    handle.remove()
    assert seen == [True]


def slow(model):
    """What passes where nothing is ragged: with gradients, as in training."""
    with torch.enable_grad(), frozen(model, requires_grad=True), capture(model, INSIDE) as acts:
        model(IDS)
    return {site: acts[site].detach().masked_fill((IDS == 0)[..., None], 0) for site in INSIDE}


def test_captured_tensors_are_plain_and_right(model):
    with capture(model, INSIDE) as acts:
        output = model(IDS)
    for site, expected in slow(model).items():
        torch.testing.assert_close(acts[site], expected, msg=site)
    torch.testing.assert_close(output, model(IDS))


@pytest.mark.parametrize("site", INSIDE)
def test_patching_what_is_there_changes_nothing_and_another_value_goes_on(model, site):
    before = model(IDS)
    with patch(model, {site: lambda x: x}):
        torch.testing.assert_close(model(IDS), before)
    with replace(model, {site: lambda x: x * 0}):
        empty = model(IDS)
    with patch(model, {site: 0.0}):
        torch.testing.assert_close(model(IDS), empty)
    assert (empty - before).abs().max() > 1e-3
    shapes = []
    with tap(model, {site: lambda x: shapes.append(x.shape)}):
        model(IDS)
    assert shapes[0][:2] == (4, 4)


def test_collapse_of_what_passes_inside(model):
    found = collapse(model, [(IDS, LABELS)], sites=[*INSIDE, "head:in"])
    by_hand = slow(model)["encoder.layers.1"].mean(1).double()
    means = torch.stack([by_hand[k == LABELS].mean(0) for k in (0, 1)])
    within = (by_hand - means[LABELS]).square().sum(1).mean()
    between = (means - means.mean(0)).square().sum(1).mean()
    assert found["encoder.layers.1"].nc1_tilde == pytest.approx(float(within / between), rel=1e-4)
