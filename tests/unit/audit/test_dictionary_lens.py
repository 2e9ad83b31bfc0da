"""The dictionary lens: only for those who ask, judged on other samples than it was trained on, with every feature on pages beside the report."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lineament.audit.catalogue import chosen
from lineament.audit.run import AuditOptions, audit


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 4)).eval()
    x = torch.rand(120, 1, 8, 8)
    out = tmp_path_factory.mktemp("report") / "r"
    return audit(
        net, (x, net(x).argmax(1)), out=out, lenses=["dictionary"], options=AuditOptions(sites=["1"])
    )


def test_it_looks_only_where_it_is_asked_for():
    assert "dictionary" not in [lens.name for lens in chosen(None, language=False)]
    assert [lens.name for lens in chosen(["dictionary"], language=False)] == ["dictionary"]


@pytest.mark.slow
def test_what_it_measures(report):
    section = report["dictionary"]
    found = section.numbers
    assert section.status in ("good", "note"), section.sentence
    assert found["trained_on"] + found["judged_on"] == 120 and found["judged_rows"] == 36 * found["judged_on"]
    names = [each["name"] for each in found["quality"]]
    assert names == ["dictionary", "principal components", "strongest units"]
    assert all(each["k"] <= found["k"] + 1e-9 for each in found["quality"])
    assert found["quality"][0]["fvu"] < found["quality"][2]["fvu"], "trained features beat units"
    assert found["importance"] == sorted(found["importance"], reverse=True) and len(found["important"]) == 12
    assert f"on {found['trained_on']} samples" in section.sentence and "standard error" in section.sentence
    (finding,) = section.findings
    assert finding.key in ("features", "features weak")


@pytest.mark.slow
def test_its_pages_lie_beside_the_report(report):
    ((words, address),) = report["dictionary"].links
    index = report.html.parent / address
    assert index.is_file() and f'<a href="{address}">{words}</a>' in report.html.read_text(encoding="utf-8")
    assert json.loads(report.json.read_text(encoding="utf-8"))["sections"][0]["links"] == [[words, address]]
    chunk = (index.parent / "data/features-00000.js").read_text()
    assert "data:image/jpeg;base64," in chunk


def test_what_it_cannot_look_at_is_said(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(20, 3)
    found = audit(net, (x, torch.arange(20) % 2), out=tmp_path / "few", lenses=["dictionary"])["dictionary"]
    assert found.status == "skipped" and "20 are too few" in found.sentence
