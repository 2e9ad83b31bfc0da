"""The blocks of the page on the audit from Python run, one after the other."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "audit-python.md"


def test_the_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, scope)
    assert "It is right for" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"report", "masked", "sites"}
