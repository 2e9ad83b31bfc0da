"""The lens parts: what is left when channels are taken out is measured again by hand, and the command that it names runs."""

from __future__ import annotations

import shlex

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lineament import cli
from lineament.audit.run import audit
from lineament.edit import PruneOptions, prune

NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
"""


@pytest.fixture(scope="module")
def copied():
    """A classifier of 8 features whose hidden units stand there four times, and samples."""
    g = torch.Generator().manual_seed(0)
    x, first, last = (torch.randn(*shape, generator=g) for shape in ((300, 12), (8, 12), (3, 8)))
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        net[0].weight.copy_(first.repeat(4, 1))
        net[0].bias.zero_()
        net[2].weight.copy_(last.repeat(1, 4) * torch.linspace(0.5, 1.5, 32))
        net[2].bias.zero_()
    return net, x, net(x).argmax(1)


def test_numbers_are_those_of_prune_on_the_samples_it_names(copied, tmp_path):
    net, x, y = copied
    section = audit(net, (x, y), out=tmp_path, lenses=["parts"])["parts"]
    told = section.numbers["removal"]
    rows, choosing = torch.tensor(told["rows"]), torch.tensor(told["choosing"])
    assert not set(told["rows"]) & set(told["choosing"]) and list(told["whole"])
    for step in told["steps"]:
        for name, repaired in (("", True), ("alone_", False)):
            how = {"compensate": "delta" if repaired else None, "recalibrate": repaired}
            model = prune(
                net, x[choosing], keep=step["keep"], options=PruneOptions(bias=repaired), **how
            ).model
            named = model(x[rows]).argmax(1)
            same = float((named == net(x[rows]).argmax(1)).double().mean())
            assert step[f"{name}same"] == pytest.approx(same)
            assert step[f"{name}accuracy"] == pytest.approx(float((named == y[rows]).double().mean()))
    kept = {}
    for step in told["steps"]:
        model = prune(net, x[choosing], keep=step["keep"]).model
        kept[step["keep"]] = float((model(x[choosing]).argmax(1) == y[choosing]).double().mean())
    assert told["chosen"] == min(share for share, same in kept.items() if same >= 0.95)
    more = prune(net, x[choosing], keep=1 - told["spare"]["0"] - 0.125).model
    assert float((more(x[rows]).argmax(1) == y[rows]).double().mean()) <= 0.99
    # Merging finds that the 32 are 8; by saliency alone, copies of one channel are kept before another's only one.
    assert told["merged"] == pytest.approx((12 * 8 + 8 + 8 * 3 + 3) / (12 * 32 + 32 + 32 * 3 + 3))
    assert "merging saves more" in section.sentence and "lineament.edit.prune(model" in section.sentence
    assert len(section.pictures) == 2 and len(section.tables) == 3


def test_the_command_that_it_names_writes_the_network(copied, tmp_path, monkeypatch, capsys):
    net, x, y = copied
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    save_file(net.state_dict(), "net.safetensors")
    torch.save({"x": x, "y": y}, "data.pt")
    words = ["audit", "net.py:make", "data.pt", "--weights", "net.safetensors", "--lens", "parts"]
    assert cli.main([*words, "--inputs", "x", "--targets", "y", "--out", "report"]) == 0
    page = (tmp_path / "report" / "report.json").read_text()
    line = page.split("To write it: ")[1].split(" . ")[0]
    assert line.startswith("lineament edit prune net.py:make data.pt --weights net.safetensors --inputs x")
    assert cli.main(shlex.split(line)[1:]) == 0 and (tmp_path / "smaller" / "network").is_dir()
    assert "Page: " in capsys.readouterr().out


def test_what_is_not_tried_says_why(tmp_path):
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(100, 12)
    found = audit(net, (x, net(x).argmax(1)), out=tmp_path, lenses=["parts"])["parts"]
    assert (
        "Nothing can be taken out" in found.numbers["removal"]["skipped"]
        and "To write it" not in found.sentence
    )
