"""A dictionary's features as a static site that works from disk: an index that sorts and searches, and a page for each feature.

Numbers, tokens and pictures come as plain :class:`FeatureCard`. They lie in scripts of a few features each, because a page opened from disk may not fetch
JSON. Everything is written as ASCII JSON and shown as text, never as markup; a content security policy forbids whatever else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lineament.core.checks import InputError, require
from lineament.core.files import output_folder, write_json, write_text
from lineament.report.page import environment
from lineament.report.text import printable

MANIFEST = "dashboard.json"
LARGEST = 12_000  # bytes a feature may take
CHUNK = 32  # features in a script
# What the index shows and sorts by, where it was measured.
COLUMNS = {
    "density": "on in",
    "maximum": "maximum",
    "importance": "importance",
    "complexity": "complexity",
    "effect": "KL without it",
}


@dataclass(frozen=True)
class Snippet:
    """An example: tokens with the feature's value at each, or a picture as a ``data:`` URL; ``centre`` is the place of ``value``."""

    value: float
    tokens: Sequence[str] = ()
    values: Sequence[float] = ()
    centre: int = 0
    picture: str = ""


@dataclass(frozen=True)
class FeatureCard:
    """What is shown of one feature. ``None`` is what was not measured.

    Attributes:
        density: the share of activations it is on in. maximum: its largest value. mean: where it is on.
        importance, complexity, effect: as the page that the numbers come from says; ``effect`` is the mean KL in nats when it is turned off.
        histogram: counts; edges: one more. raises, lowers: outputs and by how much. nearest: other features and the cosine of their atoms.
        groups: titles with snippets.
    """

    number: int
    density: float
    maximum: float
    mean: float
    importance: float | None = None
    complexity: float | None = None
    effect: float | None = None
    histogram: Sequence[int] = ()
    edges: Sequence[float] = ()
    raises: Sequence[tuple[str, float]] = ()
    lowers: Sequence[tuple[str, float]] = ()
    nearest: Sequence[tuple[int, float]] = ()
    groups: Sequence[tuple[str, Sequence[Snippet]]] = ()

    def words(self) -> str:
        """What a search finds it by: the token of each of its strongest examples, each once."""
        found = (s.tokens[s.centre] for _, many in self.groups[:1] for s in many if s.centre < len(s.tokens))
        return " ".join(dict.fromkeys(printable(word.strip(), limit=24) for word in found if word.strip()))[
            :160
        ]


def write(
    out: str | Path,
    cards: Iterable[FeatureCard],
    *,
    title: str,
    facts: Sequence[tuple[str, Any]] = (),
    notes: Sequence[str] = (),
    command: str = "",
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write the site into a folder and return its index.

    Args:
        out: a new or empty folder, or one with an earlier dashboard, which is replaced.
        cards: in any order; read once, a chunk at a time.
        notes: what a reader must know before trusting the numbers.

    Raises:
        InputError: no card, or a folder that holds something else.

    >>> import tempfile
    >>> index = write(tempfile.mkdtemp(), [FeatureCard(0, 0.1, 2.0, 1.0)], title="<b>")
    >>> sorted(path.name for path in index.parent.iterdir())
    ['dashboard.js', 'dashboard.json', 'data', 'feature.html', 'index.html']
    """
    site = output_folder(out)
    old = _earlier(site)
    write_json(site / MANIFEST, {"files": sorted(old)})
    written = ["index.html", "feature.html", "dashboard.js"]
    rows: dict[str, list[Any]] = {key: [] for key in ("number", "words", *COLUMNS)}
    places: dict[int, int] = {}
    for number, chunk in enumerate(_chunks(cards)):
        name = f"data/features-{number:05d}.js"
        inside = ",".join(f'"{card.number}":{text}' for card, text in chunk)
        write_text(site / name, f"lineamentChunk({number},{{{inside}}})\n")
        written.append(name)
        for card, _ in chunk:
            require(
                card.number not in places, f"cards: feature {card.number} comes twice, expected each once"
            )
            places[card.number] = number
            rows["number"].append(card.number)
            rows["words"].append(card.words())
            for key in COLUMNS:
                rows[key].append(_rounded(getattr(card, key)))
    if not places:
        raise InputError("cards: got none, expected at least one feature (was none ever on?)")
    columns = {key: name for key, name in COLUMNS.items() if any(value is not None for value in rows[key])}
    index = {
        "title": printable(title),
        "columns": columns,
        "rows": {k: v for k, v in rows.items() if k in ("number", "words", *columns)},
    }
    index["chunks"] = [places[n] for n in rows["number"]]
    write_text(site / "data/index.js", f"lineamentIndex({_ascii(index)})\n")
    written.append("data/index.js")
    env = environment()
    shared = {
        "title": title, "facts": facts, "notes": notes, "command": command, "versions": versions or {}, "count": len(places), "columns": columns,
    }  # fmt: skip
    for page in ("index", "feature"):
        write_text(site / f"{page}.html", env.get_template(f"dashboard_{page}.html.j2").render(**shared))
    script = (Path(__file__).parent / "templates" / "dashboard.js").read_text(encoding="utf-8")
    write_text(site / "dashboard.js", script)
    write_json(site / MANIFEST, {"files": sorted(written)})
    for name in sorted(old - set(written)):
        (site / name).unlink(missing_ok=True)
    return site / "index.html"


def _earlier(site: Path) -> set[str]:
    """The files of an earlier dashboard; an error if the folder holds anything but one."""
    if (site / MANIFEST).exists():
        try:
            names = json.loads((site / MANIFEST).read_text(encoding="utf-8"))["files"]
            return {
                n
                for n in map(str, names)
                if n.startswith("data/features-") and n.count("/") == 1 and n.endswith(".js")
            }
        except (OSError, ValueError, KeyError, TypeError):
            return set()
    others = sorted(entry.name for entry in site.iterdir() if not entry.name.startswith("."))
    require(
        not others,
        f"out: {str(site)!r} holds other files ({', '.join(map(repr, others[:3]))}); choose an empty or new folder",
    )
    return set()


def _chunks(cards: Iterable[FeatureCard]) -> Iterator[list[tuple[FeatureCard, str]]]:
    """The cards with what is written of each."""
    held: list[tuple[FeatureCard, str]] = []
    for card in cards:
        held.append((card, _small(card)))
        if len(held) == CHUNK:
            yield held
            held = []
    if held:
        yield held


def _small(card: FeatureCard) -> str:
    """What is written of a card: with fewer examples, from the end of the longest group, until it takes no more than :data:`LARGEST` bytes."""
    shown = _shown(card)
    groups = [many for _, many in shown["groups"]]
    while len(text := _ascii(shown)) > LARGEST and any(groups):
        max(groups, key=len).pop()
    return text


def _shown(card: FeatureCard) -> dict[str, Any]:
    """The card as the page's script reads it."""

    def snippet(s: Snippet) -> dict[str, Any]:
        own: dict[str, Any] = {"v": _rounded(s.value), "c": s.centre}
        if s.picture:
            own["p"] = s.picture
        if s.tokens:
            own["t"] = [printable(token, limit=60) for token in s.tokens]
            own["a"] = [_rounded(value, 3) for value in s.values]
        return own

    return {
        "density": _rounded(card.density),
        "maximum": _rounded(card.maximum),
        "mean": _rounded(card.mean),
        **{key: _rounded(getattr(card, key)) for key in ("importance", "complexity", "effect")},
        "histogram": list(card.histogram),
        "edges": [_rounded(e, 3) for e in card.edges],
        "raises": [[printable(word, limit=40), _rounded(by, 3)] for word, by in card.raises],
        "lowers": [[printable(word, limit=40), _rounded(by, 3)] for word, by in card.lowers],
        "nearest": [[n, _rounded(by, 3)] for n, by in card.nearest],
        "groups": [[printable(name), [snippet(s) for s in many]] for name, many in card.groups],
    }


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return (
        None
        if value is None or value != value or abs(value) == float("inf")
        else float(f"{value:.{digits}g}")
    )


def _ascii(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
