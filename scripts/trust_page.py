"""Write the audit's rates into their page: `lineament bench audit --json FILE`, then `python scripts/trust_page.py FILE`.

The tables of `docs/how-far-to-trust-it.md` are replaced, one below each heading that it has a table for; what the page says around them stays.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "how-far-to-trust-it.md"
# Below each heading: which rates, and what is counted.
HEADINGS = {
    "## Found where it is": (lambda what: " found: " in what, "found, of networks with it"),
    "## Found where it is not": (
        lambda what: "where it is not" in what or "nothing to find" in what,
        "found, of checks without it",
    ),
    "## Numbers within their intervals": (lambda what: "within the interval" in what, "within, of numbers"),
}


def percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def table(rates: list[dict[str, Any]], counted: str) -> str:
    """Rates as a Markdown table."""
    lines = [f"| what | {counted} | rate (95 % interval) | target |", "| --- | --- | --- | --- |"]
    for rate in rates:
        what = re.sub(
            r" found where it is not| found:|: the true value lies within the interval", "", rate["what"]
        )
        share = f"{percent(rate['hits'] / rate['count'])} ({percent(rate['low'])} to {percent(rate['high'])})"
        asked = (
            ""
            if rate["target"] is None
            else f"{'at most' if rate['at_most'] else 'at least'} {percent(rate['target'])}"
        )
        met = {True: ": met", False: ": **missed**", None: ": too few to tell" if asked else ""}[rate["met"]]
        lines.append(f"| {what} | {rate['hits']} of {rate['count']} | {share} | {asked}{met} |")
    return "\n".join(lines)


def written(text: str, rows: list[dict[str, Any]]) -> str:
    """The page's text with the tables of these rows."""
    rates = [row for row in rows if row.get("row") == "rate"]
    trials = [row for row in rows if row.get("row") == "trial"]
    minutes = sum(row["ours_s"] for row in trials) / 60
    text = re.sub(
        r"\*\*\d+ networks\*\* in \d+ minutes", f"**{len(trials)} networks** in {minutes:.0f} minutes", text
    )
    for heading, (belongs, counted) in HEADINGS.items():
        before, found, after = text.partition(heading + "\n")
        if not found:
            sys.exit(f"{PAGE.name} has no section {heading!r}")
        there = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
        if there is None:
            sys.exit(f"{PAGE.name}: no table stands below {heading!r}")
        made = table([rate for rate in rates if belongs(rate["what"])], counted)
        text = before + found + after[: there.start()] + made + "\n" + after[there.end() :]
    return text


def main(path: str) -> None:
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
