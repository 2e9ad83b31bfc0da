"""`docs/audit.md` says of each kind of finding what is measured and when it is said: every key is there, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from lineament.audit import correctness, cue_exchange, leak_section, lenses, settled

# The lenses, and what they share with others.
FOLDERS = (lenses.__path__[0], correctness.__path__[0])
FILES = [
    *(file for folder in FOLDERS for file in sorted(Path(folder).glob("[a-z]*.py"))),
    Path(leak_section.__file__),
    Path(settled.__file__),
]
DOCS = Path(__file__).parents[3] / "docs" / "audit.md"


def texts(node: ast.expr) -> list[str]:
    """The texts that an expression can be; of an f-string the constant beginning."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp(body=body, orelse=other):
            return texts(body) + texts(other)
        case ast.JoinedStr(values=[ast.Constant(value=start), *_]):
            return [f"{start}*"]
    raise AssertionError(f"a key that cannot be read: {ast.unparse(node)}")


def keys(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
            given = [word.value for word in node.keywords if word.arg == "key"]
            assert given, f"{file.name}:{node.lineno}: a finding without a key"
            found |= set(texts(given[0]))
    return found


def test_every_kind_of_finding_is_documented():
    said = {
        key
        for line in DOCS.read_text(encoding="utf-8").partition("| key |")[2].splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    own = {key for file in FILES for key in keys(file)}
    cues = {key for key in said if key.startswith("cue ")}
    assert own - {"cue *"} == said - cues
    source = Path(cue_exchange.__file__).read_text(encoding="utf-8")
    assert all(f'"{key.removeprefix("cue ")}"' in source for key in cues) and len(cues) == 6
