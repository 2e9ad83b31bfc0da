"""What the documentation's examples import is there, under the names that they use."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
IMPORT = re.compile(r"^\s*((?:from|import) lineament[^\n#]*)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_imports_of_the_examples(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in IMPORT.findall(block):
            exec(line.strip(), {})
