"""A lens is one file: dropped into the folder it is listed, run, in the report and in the verdict, and nothing else is touched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from lineament.audit import lenses as package
from lineament.audit.catalogue import all_lenses
from lineament.audit.run import audit

# The lens that CONTRIBUTING shows.
DEAD = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text(), re.S)
(DEAD,) = (code for code in DEAD if "TITLE" in code)


@pytest.fixture
def dropped(tmp_path, monkeypatch):
    """The folder of lenses with one more file in it, as far as Python can tell."""
    (tmp_path / "lenses").mkdir()
    (tmp_path / "lenses" / "dead_units.py").write_text(DEAD)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "lenses")])
    yield
    sys.modules.pop(f"{package.__name__}.dead_units", None)


def test_a_file_dropped_in_is_a_lens_of_the_audit(dropped, tmp_path):
    assert list(all_lenses(language=False))[-2:] == ["parts", "dead_units"], "in the order that it states"
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.copy_(torch.tensor([0.0, 0.0, -99.0]))
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    said: list[str] = []
    found = audit(
        model,
        (x, torch.arange(40) % 3),
        out=tmp_path / "r",
        lenses=["accuracy", "dead_units"],
        note=said.append,
    )
    assert "2/2 dead_units: how many outputs never rise above zero" in said
    section, (finding,) = found["dead_units"], [f for f in found.findings if f.section == "dead_units"]
    assert (
        section.numbers == {"outputs": 3, "dead": 1}
        and finding.sentence == "1 of 3 outputs never rise above zero."
    )
    assert section.method == "dead-units" and section.title == "Which outputs are dead?"
    page = found.html.read_text(encoding="utf-8")
    assert (
        "Which outputs are dead?" in page
        and "1 of 3 outputs never rise above zero." in page
        and "1903.06733" in page
    )
    stored = json.loads(found.json.read_text(encoding="utf-8"))
    assert finding.to_dict() in stored["findings"]


def test_the_command_lists_it_and_listing_imports_no_torch(tmp_path):
    (tmp_path / "dead_units.py").write_text(DEAD)
    code = f"""
        import sys
        from lineament.audit import lenses
        lenses.__path__.append({str(tmp_path)!r})
        from lineament import cli
        assert cli.main(["audit", "--help"]) == 0
        assert "torch" not in sys.modules and "numpy" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dead_units" in done.stdout and "how many outputs never rise above zero" in done.stdout


def test_every_lens_states_where_it_stands():
    found = list(all_lenses().values())
    assert len({lens.order for lens in found}) == len(found) >= 8
    for lens in found:
        module = lens.module()
        assert callable(module.applies) and callable(module.look) and module.TITLE.endswith("?")


def test_a_file_that_states_nothing_is_named(tmp_path, monkeypatch):
    (tmp_path / "empty.py").write_text("def look(subject): ...\n")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"lens 'empty'.*states no TITLE, HELP, ORDER, METHOD"):
        all_lenses()
