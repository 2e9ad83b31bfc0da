"""Write a paper's claims, as they fell in a run, into its page: `python scripts/claims_table.py runs/SLUG-small/outcome.json`.

The table below "## The claims, as they fell" in `docs/papers/SLUG.md` is replaced; what the page says around it stays.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HEADING = "## The claims, as they fell"
PAGES = Path(__file__).resolve().parent.parent / "docs" / "papers"


def table(outcome: dict) -> str:
    """The claims as a Markdown table, with the reason where one does not hold."""
    rows = ["| claim | the paper | ours | holds |", "| --- | --- | --- | --- |"]
    for claim in outcome["claims"]:
        ours = claim["observed"] + (f" ({claim['reason']})" if claim.get("reason") else "")
        cells = (claim["name"], claim["paper"], ours, "yes" if claim["holds"] else "**no**")
        rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def main(path: str) -> None:
    outcome = json.loads(Path(path).read_text(encoding="utf-8"))
    page = PAGES / f"{outcome['slug']}.md"
    text = page.read_text(encoding="utf-8")
    before, heading, after = text.partition(HEADING)
    if not heading:
        sys.exit(f"{page} has no section {HEADING!r}")
    found = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    if found is None:
        sys.exit(f"{page}: no table stands below {HEADING!r}")
    after = after[: found.start()] + table(outcome) + "\n" + after[found.end() :]
    page.write_text(before + heading + after, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
