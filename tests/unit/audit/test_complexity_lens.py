"""The complexity lens: where features become readable, and simple ones that decide, on networks whose features are known."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.audit.run import audit

_SAMPLES = 400


class Known(nn.Module):
    """Its head reads x0 + 1 and |x1| + |x2|; only the second needs the second layer, as the first passes x on."""

    def __init__(self, decisive: int):
        super().__init__()
        first, second = nn.Linear(6, 6), nn.Linear(6, 12)
        self.blocks = nn.Sequential(
            nn.Sequential(first, nn.Hardtanh(-9, 9)), nn.Sequential(second, nn.ReLU())
        )
        self.mix, self.head = nn.Linear(12, 3), nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            first.weight.copy_(torch.eye(6))
            second.weight.copy_(torch.cat([torch.eye(6), -torch.eye(6)]))
            self.mix.weight[0, 0], self.mix.weight[0, 6], self.mix.bias[0] = 1, -1, 1
            self.mix.weight[1, [1, 2, 7, 8]] = 1
            self.head.weight[1, decisive] = 1
            self.head.bias[1] = -1

    def forward(self, x):
        return self.head(self.mix(self.blocks(x)))


def samples():
    """Between -1 and 1, so that each feature comes near 0 without the other: the factorisation is then unique."""
    return 2 * torch.rand(_SAMPLES, 6, generator=torch.Generator().manual_seed(0)) - 1


@pytest.mark.parametrize("decisive", [0, 1])
def test_a_simple_feature_is_a_suspect_where_it_decides(decisive, tmp_path):
    net = Known(decisive).eval()
    x = samples()
    with unchanged(net):
        found = audit(net, (x, net(x).argmax(1)), out=tmp_path / "r", lenses=["complexity"])
    section, (finding,) = found["complexity"], [f for f in found.findings if f.section == "complexity"]
    assert section.status in ("good", "note"), section.sentence
    first, last = section.numbers["features"][0], section.numbers["features"][-1]
    assert first["information"][0] > 0.9 and last["information"][0] < 0.3
    assert first["complexity"] < last["complexity"] <= 1 and last["information"][-1] > 0.9
    assert finding.key == ("simple feature decides" if decisive == 0 else "no simple feature")
    assert first["suspect"] == (decisive == 0) and not last["suspect"]
    assert section.numbers["fitted_on"] + section.numbers["judged_on"] == _SAMPLES


class Bent(Known):
    """The same, with something between the linear layer and the answers, so that features are removed in a forward."""

    def forward(self, x):
        return super().forward(x).tanh()


def test_removing_in_a_forward_says_the_same(tmp_path):
    x = samples()
    found = []
    for kind in (Known, Bent):
        net = kind(0).eval()
        report = audit(net, (x, net(x).argmax(1)), out=tmp_path / kind.__name__, lenses=["complexity"])
        found.append(report["complexity"].numbers["features"][0]["changed"])
    assert found[0] == pytest.approx(found[1]) and found[0][0] > 0.05


@pytest.mark.parametrize(
    ("net", "targets", "why"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), torch.arange(90) % 2, "but one"),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(90), "decide between classes"),
    ],
)  # fmt: skip
def test_what_it_cannot_compare_is_said(net, targets, why, tmp_path):
    found = audit(net.eval(), (torch.randn(90, 6), targets), out=tmp_path / "r", lenses=["complexity"])
    assert found["complexity"].status == "skipped" and why in found["complexity"].sentence


def test_images_show_where_a_feature_is_read(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(6 * 64, 3)).eval()  # fmt: skip
    x = torch.rand(120, 1, 8, 8)
    section = audit(net, (x, net(x).argmax(1)), out=tmp_path / "r", lenses=["complexity"])["complexity"]
    assert section.status in ("good", "note"), section.sentence
    assert len(section.pictures) == 2 and "Strongest images" in section.pictures[1].alt
    assert len(section.tables[0].rows) == len(section.numbers["features"]) == 20
