"""The lenses for embeddings against planted truths: known strangers, one person under two labels, a group that looks alike, a layer that throws away."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lineament import audit, cli
from lineament.audit.run import AuditOptions
from lineament.core.checks import InputError
from lineament.learn.projection.export import UpTo, export
from lineament.learn.projection.layers import layers_worth
from lineament.measure import recognition, recognition_spread, retrieval

EMBEDDING = AuditOptions(task="embedding")


def people(count: int = 30, each: int = 6, spread: float = 0.6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count).repeat_interleave(each)
    centres = F.normalize(torch.randn(count, 16, generator=generator), dim=1)
    return centres[y] + spread * torch.randn(len(y), 16, generator=generator) / 4, y


def same(width: int = 16) -> nn.Module:
    net = nn.Sequential(nn.Linear(width, width, bias=False))
    nn.init.eye_(net[0].weight)
    return net


def looked(tmp_path: Path, net, data, **options):
    return audit(net, data, out=tmp_path / "r", options=EMBEDDING, **options)


def test_the_numbers_are_those_of_the_measure(tmp_path):
    x, y = people(spread=0.3)
    found = looked(tmp_path, same(), (x, y))
    assert [s.name for s in found.sections] == ["embeddings", "export"] and found[
        "embeddings"
    ].status == "good"
    numbers, expected = found["embeddings"].numbers, recognition(x, y, (1e-1, 1e-2, 1e-3))
    assert numbers["recognised"]["tar"] == pytest.approx(expected.tar) and numbers["far"] == 1e-3
    spread = recognition_spread(x, y, (1e-1, 1e-2, 1e-3))
    assert numbers["tar"] == pytest.approx([expected.tar[2], *spread.tar[2]], abs=1e-6)
    assert [finding.key for finding in found["embeddings"].findings] == ["recognises"]
    assert numbers["retrieved"] == pytest.approx(
        {str(k): share for k, share in zip((1, 5, 10), retrieval(x, y).recall)}
    )


def test_one_person_under_two_labels_leads_the_list(tmp_path):
    x, y = people()
    x[100] = x[7] * 1.01  # the same picture, of another label
    found = looked(tmp_path, same(), (x, y))
    i, j, score = found["embeddings"].numbers["alike"][0]
    assert (i, j) == (7, 100) and score > 0.999
    keys = [finding.key for finding in found["embeddings"].findings]
    assert "strangers alike" in keys
    assert "strangers alike" not in [
        f.key for f in looked(tmp_path / "c", same(), people(8, 6, 0.1))["embeddings"].findings
    ]


def test_a_group_that_looks_alike_is_found_at_the_common_threshold(tmp_path):
    x, y = people(60, 5)
    group = y % 2
    x[group == 1] += 1.5 * F.normalize(torch.ones(16), dim=0)
    found = looked(tmp_path, same(), (x, y), groups=group)
    worst, best = sorted(found["embeddings"].numbers["groups"], key=lambda g: -g["false_accepts"])
    assert worst["name"] == "1" and worst["low"] > best["high"]
    assert "groups accept strangers" in [f.key for f in found["embeddings"].findings]
    shuffled = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(0))]
    other = looked(tmp_path / "c", same(), (people(60, 5)[0], y), groups=shuffled)
    assert "groups accept strangers" not in [f.key for f in other["embeddings"].findings]


def thrown_away() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 4, bias=False))
    nn.init.eye_(net[0].weight)
    with torch.no_grad():
        net[1].weight.zero_()[0, 0] = 1.0
    return net


def test_a_layer_that_throws_away_is_named_and_exported(tmp_path):
    x, y = people(10, 20)
    net = thrown_away()
    found = looked(tmp_path, net, (x, y), lenses=["export"])["export"]
    assert found.findings[0].key == "earlier layer is worth more" and found.numbers["chosen"] in ("0", "1:in")
    assert (
        looked(tmp_path / "c", same(), (x, y), lenses=["export"])["export"].findings[0].key
        == "output keeps it"
    )
    for part in (export(net, layer="0"), export(net, layer="1:in")):
        assert part(x).equal(net[0](x)) and len(part) == 1
    assert layers_worth(net, (x, y), (x, y))["0"].logistic > 0.9


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 3, 3), nn.Linear(108, 2)
        self.calls = 0

    def forward(self, x):
        z = self.body(x).relu()
        self.calls += 1
        return self.head(z.flatten(1))


def test_export_of_any_network_ends_at_the_layer_and_has_gradients():
    net, x = Nested(), torch.randn(2, 1, 8, 8)
    part = export(net, layer="body")
    assert isinstance(part, UpTo) and part(x).equal(net.body(x).mean((2, 3)))
    part(x).sum().backward()
    assert part.model.body.weight.grad is not None and net.body.weight.grad is None
    assert part.model.calls == 0 and not part.model.body._forward_hooks
    with pytest.raises(InputError, match="names 2 sites"):
        export(net, layer="*")


def test_the_spread_over_people_is_that_of_other_people():
    """The interval's width beside the deviation of fresh draws of as many people."""
    fresh = torch.tensor([recognition(*people(40, 5, 1.0, seed), [1e-2]).tar[0] for seed in range(60)])
    widths = []
    for seed in range(8):
        low, high = recognition_spread(*people(40, 5, 1.0, seed), [1e-2]).tar[0]
        widths.append((high - low) / 3.92)
    assert 0.6 < torch.tensor(widths).mean() / fresh.std() < 1.6
    x, y = people(12, 4)
    assert recognition_spread(
        x[:, None].repeat(1, 2, 1).flatten(0, 1), y.repeat_interleave(2), seed=3
    ).recall == (1.0, 1.0)


def test_a_site_names_the_embedding_and_a_classifier_has_the_lenses_by_name(tmp_path):
    x, y = people(10, 12)
    net = nn.Sequential(same(), nn.Linear(16, 3))
    found = audit(net, (x, y), out=tmp_path / "r", options=AuditOptions(embedding="0"))
    assert found["embeddings"].numbers["site"] == "0"
    assert found["embeddings"].numbers["recognised"]["tar"] == pytest.approx(
        recognition(x, y, (1e-1, 1e-2, 1e-3)).tar
    )
    classifier = nn.Sequential(same(), nn.Linear(16, 10))
    found = audit(classifier, (x, y), out=tmp_path / "c", lenses=["embeddings", "accuracy"])
    assert {s.name: s.status for s in found.sections}["embeddings"] in ("good", "note", "warning")
    asked = audit(net, (x, y), out=tmp_path / "a", options=EMBEDDING, lenses=["collapse", "embeddings"])
    assert "asks about classes" in asked["collapse"].sentence
    with pytest.raises(InputError, match="'nowhere' is no site"):
        audit(net, (x, y), out=tmp_path / "n", options=AuditOptions(embedding="nowhere"))


NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
"""


@pytest.mark.parametrize("site", [[], ["--embedding", "1"]])
def test_what_train_writes_the_audit_opens_by_the_line_it_prints(tmp_path, monkeypatch, capsys, site):
    pytest.importorskip("accelerate", reason="needs the extra lm")
    import numpy as np

    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    x, y = people(20, 6)
    np.savez("people.npz", inputs=x.numpy(), labels=y.numpy())
    line = [
        "train",
        "net.py:make",
        "people.npz",
        "--out",
        "run",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--loss",
        "cosface",
        *site,
    ]
    assert cli.main(line) == 0
    said = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("Audit it: "))
    assert cli.main(shlex.split(said.removeprefix("Audit it: lineament "))) == 0
    report = json.loads((tmp_path / "run-report/report.json").read_text())
    assert report["task"] == "embedding"
    sections = {s["name"]: s for s in report["sections"]}
    assert set(sections) == {"embeddings", "export"} and sections["embeddings"]["numbers"]["width"] == (
        32 if site else 8
    )


def test_thresholds_of_an_embedding_that_crowds_are_told_apart(tmp_path):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    crowded = nn.Linear(6, 8)
    with torch.no_grad():
        crowded.bias.fill_(50.0)
    report = audit(
        crowded, (x, torch.arange(40) // 4), out=tmp_path, options=EMBEDDING, lenses=["embeddings"]
    )
    (section,) = report.sections
    thresholds = [row[2] for row in section.tables[0].rows]
    assert len(set(thresholds)) == len(thresholds) > 1 and all(0.99 < t < 1 for t in thresholds)
    unit = F.normalize(crowded(x).detach(), dim=1)
    cosines = unit @ unit.T
    others = torch.arange(40)[:, None] // 4 != torch.arange(40) // 4
    assert section.numbers["impostor_mean"] == pytest.approx(float(cosines[others].mean()), abs=1e-6)
    assert "crowds" in [finding.key for finding in section.findings]
