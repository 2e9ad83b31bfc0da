"""Coloured tokens on one self-contained page: hover a token, or reach it with the Tab key, to read its value.

No script: values are in the page as text that shows under the pointer and the focus, and once more in a table. Everything from the user is
escaped, and what is invisible is made visible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lineament.core.files import write_text
from lineament.report.page import environment
from lineament.report.text import cell, printable


@dataclass(frozen=True)
class TokenBlock:
    """One explained token: its text, a line about it, and the context with a score a token.

    ``scored`` says which tokens have a score at all; ``marked`` which belong to the rationale; ``breaks`` positions before which the source of
    an encoder-decoder ends.
    """

    target: str
    line: str
    tokens: Sequence[str]
    scores: Sequence[float]
    scored: Sequence[bool]
    marked: Sequence[int] = ()
    breaks: Sequence[int] = ()

    def shown(self) -> list[dict[str, Any]]:
        """What the page needs of each token: text, share of the largest score, sign, rank, value."""
        order = sorted((i for i, s in enumerate(self.scored) if s), key=lambda i: -self.scores[i])
        rank = {i: place for place, i in enumerate(order, 1)}
        most = max((abs(self.scores[i]) for i in order), default=0.0) or 1.0
        return [
            {
                "text": printable(token),
                "share": round(abs(score) / most, 3) if i in rank else 0.0,
                "sign": "against" if score < 0 else "for",
                "rank": rank.get(i),
                "value": cell(float(score)) if i in rank else "not scored",
                "marked": i in self.marked,
                "breaks": i in self.breaks,
            }
            for i, (token, score) in enumerate(zip(self.tokens, self.scores))
        ]

    def summary(self) -> str:
        """The most important tokens in a sentence.

        >>> TokenBlock(" are", "", ["The", " keys", " on"], [0.1, 0.9, -0.4], [True] * 3).summary()
        'Most for it: “ keys” (0.9), then “The” (0.1). Most against it: “ on” (−0.4).'
        """
        order = sorted((i for i, s in enumerate(self.scored) if s), key=lambda i: -self.scores[i])
        named = {i: f"“{printable(self.tokens[i], limit=40)}” ({cell(float(self.scores[i]))})" for i in order}
        most = [named[i] for i in order[:2] if self.scores[i] > 0]
        least = [named[i] for i in order[:-2:-1] if self.scores[i] < 0]
        parts = [f"Most for it: {', then '.join(most)}."] if most else []
        return " ".join(parts + [f"Most against it: {least[0]}." for _ in least])


def render(
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, Any]],
    blocks: Sequence[TokenBlock],
    *,
    command: str,
    notes: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
) -> str:
    """The page as HTML.

    Args:
        title, subtitle, facts: as of :func:`lineament.report.page.render`.
        blocks: one for each token that is explained.
        command: the command line that makes this page again.
        notes: what a reader must know before trusting the values; one sentence each.
        versions: package versions for the foot of the page.

    >>> block = TokenBlock("<b>", "probability 0.5", ["<i>", " x"], [0.9, -0.1], [True, True])
    >>> html = render("net", "", [], [block], command="lineament explain net '<i> x'")
    >>> "&lt;i&gt;" in html, "<i>" in html, "<script" in html
    (True, False, False)
    """
    return (
        environment()
        .get_template("tokens.html.j2")
        .render(
            title=title,
            subtitle=subtitle,
            facts=facts,
            blocks=[(block, block.shown()) for block in blocks],
            marked=any(len(block.marked) for block in blocks),
            command=command,
            notes=notes,
            versions=versions or {},
        )
    )


def write(path: str | Path, *arguments: Any, **options: Any) -> Path:
    """Write :func:`render`'s page atomically."""
    write_text(path, render(*arguments, **options))
    return Path(path)
