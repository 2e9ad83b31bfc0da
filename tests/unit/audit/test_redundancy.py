"""The lens redundancy: it finds copies that were planted, says what is left on samples that did not choose beta, and writes that network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit.run import audit
from lineament.measure import merge


def trained(copies: int) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A classifier of 12 features whose hidden units stand there ``copies`` times."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator)
    first, last = torch.randn(8, 12, generator=generator), torch.randn(3, 8, generator=generator)
    net = nn.Sequential(nn.Linear(12, 8 * copies), nn.ReLU(), nn.Linear(8 * copies, 3))
    with torch.no_grad():
        net[0].weight.copy_(first.repeat(copies, 1))
        net[0].bias.zero_()
        net[2].weight.copy_(last.repeat(1, copies) / copies)
        net[2].bias.zero_()
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("copies", [1, 4])
def test_planted_copies_are_found_and_distinct_channels_are_kept(copies, tmp_path):
    net, x, y = trained(copies)
    found = audit(net, (x, y), out=tmp_path, lenses=["redundancy"])
    section, (finding,) = found["redundancy"], [f for f in found.findings if f.section == "redundancy"]
    first = section.numbers["steps"][0]
    if copies == 1:
        assert finding.key in ("no repetition", "repeats little") and section.status == "good"
    else:
        assert section.status == "note" and finding.key == "repeats itself"
        assert first["sizes"] == {"0": 8} and first["kept"] == 1 > first["removed_kept"]
        assert "Layer 0 repeats itself most" in finding.sentence and "of its answers" in section.unit
        chosen = section.numbers["chosen"]
        step = next(s for s in section.numbers["steps"] if s["beta"] == chosen)
        again = merge(net, example=x[:2], beta=chosen)
        assert again.sizes["0"][1] == step["sizes"]["0"]
        rows = torch.tensor(section.numbers["rows"])
        same = float((again.model(x[rows]).argmax(1) == net(x[rows]).argmax(1)).double().mean())
        assert same == pytest.approx(step["kept"]) and not set(section.numbers["choosing"]) & set(
            rows.tolist()
        )


def test_what_it_cannot_compare_is_left_out(tmp_path):
    net, x, _ = trained(1)
    values = audit(net, (x, torch.randn(300, 3)), out=tmp_path, lenses=["redundancy", "accuracy"])
    assert values["redundancy"].status == "skipped"
