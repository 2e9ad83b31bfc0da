"""TorchScript networks, whose modules take no hooks: audited from outside, and refused where a place inside is asked for."""

import pytest
import torch
from torch import nn

import lineament
from lineament.core.checks import InputError
from lineament.core.sites.activations import record
from lineament.load.models import load_model


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()


@pytest.mark.parametrize(
    "script", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(1, 1, 8, 8))]
)
def test_what_cannot_be_watched_is_said_before_it_is_tried_and_the_rest_is_measured(
    script, network, tmp_path
):
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 2
    report = lineament.audit(script(network), (x, y), out=tmp_path)
    found = {section.name: section for section in report.sections}
    assert {name for name, section in found.items() if section.status == "skipped"} == {
        "collapse",
        "spectrum",
        "complexity",
        "parts",
    }
    assert "TorchScript" in found["parts"].sentence
    right = float((network(x).argmax(1) == y).double().mean())
    assert found["accuracy"].numbers["overall"]["accuracy"] == pytest.approx(right)
    assert found["landscape"].status in ("good", "note") and found["landscape"].numbers["samples"] > 0


def test_a_site_inside_is_refused_by_name(network):
    model = load_model(torch.jit.script(network)).model
    with pytest.raises(InputError, match=r"'network\.1' is a TorchScript module"):
        record(model, torch.zeros(1, 1, 8, 8), "network.1")
