"""Which columns a network relies on: by weights set by hand, so that the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit.run import audit


def linear(*weights: float, outputs: int = 2) -> nn.Module:
    """Class 1 where the weighted sum is above zero; or that sum itself."""
    net = nn.Sequential(nn.Linear(len(weights), outputs)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
        net[0].weight[-1] = torch.tensor(weights)
    return net


def table(path, count=120):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    rows = [f"{a:.4f},{b:.4f},{c:.4f},{('no', 'yes')[int(a > 0)]}" for a, b, c in x.tolist()]
    path.write_text("\n".join(["age,income,height,label", *rows]))
    return path


def section(net, data, out):
    found = audit(net, data, out=out, lenses=["columns"])
    return found["columns"], {finding.key for finding in found.findings}


def test_the_column_that_decides_is_named(tmp_path):
    """By hand: only `age` has a weight, and with another's every answer is that other's."""
    found, said = section(linear(5.0, 0.0, 0.0), table(tmp_path / "people.csv"), tmp_path / "r")
    top = found.numbers["best"]
    assert top["name"] == "column “age”" and top["followed"][0] == 1 and top["control"] == 0
    assert said == {"column decides"} and "relies on column “age”" in found.findings[0].sentence
    assert [part["followed"][0] for part in found.numbers["parts"]][1:] == [0, 0]


def test_where_columns_count_alike_none_decides(tmp_path):
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    y = (x.sum(1) > 0).long()
    found, said = section(linear(*[1.0] * 8), (x, y), tmp_path / "r")
    assert "column decides" not in said and found.numbers["of"] == 8


def test_values_move_by_the_column_s_share(tmp_path):
    """Of a sum of independent columns, the share of the difference is the share of the variance."""
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(2))
    net = linear(2.0, 1.0, 0.0, outputs=1)
    found, said = section(net, (x, net(x).detach()), tmp_path / "r")
    shares = {part["name"]: part["followed"] for part in found.numbers["parts"]}
    for name, expected in (("column “0”", 0.8), ("column “1”", 0.2), ("column “2”", 0.0)):
        _, low, high = shares[name]
        assert low - 0.02 <= expected <= high + 0.02 and high - low < 0.3
    assert said == {"column decides"}


def test_stretches_and_channels_of_signals(tmp_path):
    """By hand: the answer is the sign of channel 1 over steps 20 to 23."""

    class Late(nn.Module):
        def forward(self, x):
            score = x[:, 1, 20:24].mean(1)
            return torch.stack([-score, score], 1)

    x = torch.randn(120, 2, 40, generator=torch.Generator().manual_seed(3))
    found, said = section(Late(), (x, Late()(x).argmax(1)), tmp_path / "r")
    parts = {part["name"]: part["followed"][0] for part in found.numbers["parts"]}
    assert (
        parts["channel 1"] == parts["steps 20 to 23"] == 1
        and parts["channel 0"] == parts["steps 0 to 3"] == 0
    )
    assert said == {"column decides"}


@pytest.mark.parametrize(
    "inputs", [torch.zeros(40, 1, 8, 8), torch.zeros(40, 300)], ids=["images", "too many columns"]
)
def test_other_inputs_have_no_such_section_unless_asked_for(inputs, tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 2))
    y = torch.arange(40) % 2
    found, _ = section(net, (torch.randn(inputs.shape), y), tmp_path / "r")
    assert found.status == "skipped"
    names = [
        s.name for s in audit(net, (torch.randn(inputs.shape), y), out=tmp_path / "s", samples=20).sections
    ]
    assert "columns" not in names and "accuracy" in names
