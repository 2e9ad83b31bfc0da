"""Networks as they lie on disk or run in production: a checkpoint with other things in it, and a network that was quantised."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lineament.audit.run import AuditOptions, audit
from tests.independent.conftest import FEW, trained

SOURCE = """
from torch import nn


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
"""


@pytest.fixture(scope="module")
def dense(digits):
    x, y = (part[:FEW] for part in digits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        return trained(net, x, y, epochs=8), x, y


@pytest.mark.parametrize("name", ["best.pth", "last.ckpt"])
def test_a_checkpoint_with_other_things_and_prefixes_is_the_network_that_was_trained(dense, name, tmp_path):
    net, x, y = dense
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    if name == "best.pth":
        stored = {"epoch": 7, "arch": "dense", "state_dict": state, "best_prec1": torch.tensor(93.1)}
    else:
        stored = {"model": {f"_orig_mod.{key}": value for key, value in state.items()}, "args": {"lr": 0.1}}
    torch.save(stored, tmp_path / name)
    (tmp_path / "net.py").write_text(SOURCE, encoding="utf-8")
    options = AuditOptions(weights=tmp_path / name)
    told = []
    out = tmp_path / "report"
    audit(
        f"{tmp_path / 'net.py'}:build",
        (x, y),
        out=out,
        lenses=["accuracy"],
        options=options,
        note=told.append,
    )
    stored = json.loads((out / "report.json").read_text(encoding="utf-8"))
    (section,) = stored["sections"]
    with torch.no_grad():
        right = int((net(x).argmax(1) == y).sum())
    assert section["numbers"]["overall"]["accuracy"] == pytest.approx(right / len(y))
    assert f"It is right for {right} of {len(y)} samples" in section["sentence"] and right > 0.9 * len(y)
    assert "module." in json.dumps(stored) or any("module." in line for line in told), (
        "what was unwrapped is said"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_network_is_looked_at_as_far_as_it_goes(dense, tmp_path):
    net, x, y = dense
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    report = audit(quantised, (x, y), out=tmp_path, lenses=["accuracy", "collapse", "spectrum", "landscape"])
    with torch.no_grad():
        right = (torch.cat([quantised(part) for part in x.split(64)]).argmax(1) == y).double().mean()
        seen = nn.Sequential(*list(quantised)[:3])(x).double()
    assert report["accuracy"].numbers["overall"]["accuracy"] == pytest.approx(float(right), abs=2e-3)
    means = torch.stack([seen[y == k].mean(0) for k in range(10)])
    ratio = (seen - means[y]).square().sum(1).mean() / (means - means.mean(0)).square().sum(1).mean()
    # Each batch is quantised by its own range.
    assert report["collapse"].numbers["sites"][-1]["nc1_tilde"] == pytest.approx(float(ratio), rel=0.05)
    assert report["spectrum"].status in ("good", "note")
    assert report["landscape"].status == "skipped" and "quantised" in report["landscape"].sentence
