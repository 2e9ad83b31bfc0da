"""A classifier that gives one answer to all, or is at chance, is not praised for following nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit.run import audit


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    return x, (x.sum(1) > 0).long()


@pytest.mark.parametrize(
    ("weight", "bias", "why"),
    [
        (torch.ones(6), 0.0, ""),  # right for all
        (torch.ones(6), 50.0, "one answer to all"),
        (torch.tensor([1.0, -1, 1, -1, 1, -1]), 0.0, "more often than chance"),
    ],
    ids=["right", "constant", "chance"],
)
def test_praise_asks_for_answers(tmp_path, weight, bias, why):
    last = nn.Linear(6, 2)
    with torch.no_grad():
        last.weight[:] = torch.stack([-weight, weight])
        last.bias[:] = torch.tensor([0.0, bias])
    net = nn.Sequential(nn.Linear(6, 6), last)
    with torch.no_grad():
        net[0].weight[:], net[0].bias[:] = torch.eye(6), 0.0
    found = audit(net, data(), out=tmp_path / "r", lenses=["columns", "parts"])
    findings = [f for f in found.findings if f.key in ("no column", "parts used", "room to spare")]
    assert findings and {"Nothing follows" in f.sentence for f in findings} == {bool(why)}
    assert all(why in f.sentence for f in findings)
    if why:
        assert {f.severity for f in findings} == {"note"} and not any(f.advice for f in findings)
        assert {s.status for s in found.sections} <= {"note", "warning"}
    else:
        assert "good" in {f.severity for f in findings}
