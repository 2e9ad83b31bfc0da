"""The lens leakage: what it says of an update that shows its picture, and why it does not look elsewhere."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

from lineament.audit.catalogue import chosen
from lineament.audit.lenses import leakage
from lineament.audit.run import AuditOptions, audit


def small(channels: int = 1, side: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * (side // 2) ** 2, 10)
    ).eval()  # fmt: skip


def test_it_shows_what_an_update_gives_away_and_leaves_the_audited_out_of_its_prior(tmp_path, monkeypatch):
    monkeypatch.setattr(leakage, "SEARCH", dataclasses.replace(leakage.SEARCH, steps=8))
    monkeypatch.setattr(leakage, "_PRIOR_STEPS", 5)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(128, 10))
    section = audit(net, "digits", out=tmp_path / "r", lenses=["leakage"], samples=60)["leakage"]
    told = {(a["defence"], a["attack"]): a for a in section.numbers["attacked"]}
    assert len(told) == 4 and all(len(a["psnr"]) == leakage.PICTURES for a in told.values())
    assert section.status == "warning" and section.findings[0].key == "pictures leak"
    assert "a prior trained on the 52 other samples" in section.sentence and section.pictures
    plain = max(sum(told["nothing", attack]["psnr"]) / 8 for attack in ("gifd", "ig"))
    assert f"{plain:.1f} dB" in section.sentence
    assert plain > max(sum(v) / 8 for v in section.numbers["without"].values()) + 1
    assert "leakage" not in [lens.name for lens in chosen(None, language=False)], "asked for by name"


@pytest.mark.parametrize(
    ("model", "data", "samples", "says"),
    [
        (small(1, 72), (torch.rand(40, 1, 72, 72), torch.arange(40) % 10), 40, "72 x 72 pixels.*lineament leak MODEL DATA"),
        (small(), "digits", 31, "31 samples are too few: 8 are audited, and 24"),
        (small().requires_grad_(False), "digits", 40, "No weight of this network can be trained"),
        (nn.Sequential(small(), nn.Linear(10, 600_000), nn.Linear(600_000, 10)), "digits", 40, "gradients of 12,6.*lineament leak MODEL DATA"),
        (nn.Sequential(nn.Linear(6, 2)), (torch.rand(40, 6), torch.arange(40) % 2), 40, "no classifier of images"),
    ],
    ids=["large", "few", "frozen", "many weights", "rows"],
)  # fmt: skip
def test_why_it_does_not_look(tmp_path, model, data, samples, says):
    options = AuditOptions(batch_size=8)
    found = audit(model, data, out=tmp_path / "r", lenses=["leakage"], samples=samples, options=options)
    assert found["leakage"].status == "skipped" and re.search(says, found["leakage"].sentence)


def test_more_work_than_a_report_has_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(leakage, "_WORK", 1e6)
    found = audit(small(), "digits", out=tmp_path / "r", lenses=["leakage"], samples=40)["leakage"]
    assert (
        found.status == "skipped"
        and "operations, where a report has 1e+06; run lineament leak" in found.sentence
    )
