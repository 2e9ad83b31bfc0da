"""Claims of the colormnet recipe: predicates from the paper and its pitfalls, written before the first run."""

from __future__ import annotations

import statistics
from typing import Any

from lineament.recipes.colormnet.davis import Filmed
from lineament.recipes.colormnet.experiments import ANOTHER, FULL, SPANS, TABLE, Coloured
from lineament.recipes.kit.claims import Paired, judged
from lineament.report.outcome import Claim

LATE = "16-23"


def films_of(found: list[Coloured], kind: str, name: str, span: str | None = None) -> list[float]:
    """The mean PSNR of some frames of each film, over seeds."""
    part = slice(None) if span is None else SPANS[span]
    return [statistics.mean(film[part]) for f in found for film in getattr(f, kind)[name]]


def mean_over(found: list[Coloured], kind: str, name: str, span: str | None = None) -> float:
    """The mean PSNR of some frames, over films and seeds."""
    return statistics.mean(films_of(found, kind, name, span))


def error_over(found: list[Coloured], kind: str, name: str) -> float:
    """The standard error over films of their mean PSNR."""
    values = films_of(found, kind, name)
    return statistics.stdev(values) / len(values) ** 0.5


def all_claims(found: list[Coloured], real: list[Filmed], config: Any) -> list[Claim]:
    """Predicates: 2 dB late in a film, 1 dB against another's exemplar, the order of means elsewhere; on real films, two standard errors over sequences."""

    def late(name: str) -> list[float]:
        return films_of(found, "own", name, LATE)

    def whole(name: str, kind: str = "own") -> list[float]:
        return films_of(found, kind, name)

    mean = statistics.mean
    best = max(late(FULL), late("memory"), key=mean)
    true, legacy = (mean(getattr(f, what) for f in found) for what in ("true", "legacy"))
    turned, straight = ([v for f in found for v in getattr(f, k)] for k in ("turned", "straight"))
    half = [max(f.elements[: len(f.elements) // 2]) for f in found]
    rest = [max(f.elements[len(f.elements) // 2 :]) for f in found]
    simple = max(whole("copied by position"), whole("grey"), key=mean)
    return [
        judged(
            f"Memory beats recurrence by 2 dB in frames {LATE} (the better of with and without local attention)",
            "DAVIS: 35.77 against 35.26 dB",
            _against(best, late("recurrent")),
            mean(best) >= mean(late("recurrent")) + 2,
            "after this training neither carries colours well"
            if mean(best) < mean(whole("grey")) + 2
            else "recurrence hands colours on nearly as well",
        ),
        judged(
            "Local attention adds: memory with it is better than without, over all frames",
            "DAVIS: 35.77 against 35.44 dB",
            _against(whole(FULL), whole("memory")),
            mean(whole(FULL)) > mean(whole("memory")),
            "shapes jump by more than local attention sees at 1/16 of the size, or it was trained too briefly",
        ),
        judged(
            "The published PSNR says more than is true",
            "35.77 dB on DAVIS is by that formula",
            f"{legacy:.1f} against {true:.1f} dB",
            legacy > true,
            "no difference of bytes is beyond 15, so nothing wraps around",
        ),
        judged(
            f"Memory is bounded: in a film of {config.long} frames the second half never holds more than the first",
            "1.9 GB at any length",
            f"at most {max(rest)} elements against {max(half)}",
            all(b <= a for a, b in zip(half, rest)),
            "it was still filling when half of the film had passed",
        ),
        judged(
            "Control: the network is better than colours copied by position and than grey, over all frames",
            "not compared in the paper",
            _against(whole(FULL), simple),
            mean(whole(FULL)) > mean(simple),
            "it has not learned to carry colours in so few steps",
        ),
        judged(
            "Control: it is better than a table from grey to colour, where grey says which surface it is",
            "not compared in the paper; expected to fail",
            _against(whole(FULL), whole(TABLE)),
            mean(whole(FULL)) > mean(whole(TABLE)),
            "in these films the table knows every surface it has seen",
        ),
        judged(
            "Control: it is better than the table where two shapes share a grey",
            "not compared in the paper",
            _against(whole(FULL, "shared"), whole(TABLE, "shared")),
            mean(whole(FULL, "shared")) > mean(whole(TABLE, "shared")),
            "it tells the two no better apart, or loses more on the rest",
        ),
        judged(
            "Control: with another film's exemplar it is at least 1 dB worse",
            "not compared in the paper",
            _against(whole(FULL), whole(ANOTHER)),
            mean(whole(FULL)) >= mean(whole(ANOTHER)) + 1,
            "it hardly looks at the exemplar",
        ),
        judged(
            "Control: it follows the exemplar: with hues turned by 90 degrees the answer is nearer to the turned truth",
            "not compared in the paper",
            f"to the turned truth {_against(turned, straight)} to the truth",
            mean(turned) > mean(straight),
            "the colours are the network's own, not the exemplar's",
        ),
        *(_on_davis(real) if real else ()),
    ]


def _against(ours: list[float], theirs: list[float]) -> str:
    """Two means, and the error of their paired difference."""
    gain = Paired.of(ours, theirs)
    return f"{statistics.mean(ours):.1f} against {statistics.mean(theirs):.1f} dB ({gain.mean:+.1f} ± {gain.error:.1f}, {gain.count} films)"


def _on_davis(real: list[Filmed]) -> list[Claim]:
    """The paper's three comparisons on real films, and what needs no network."""

    def each(name: str) -> list[float]:
        return [statistics.mean(film) for pair in real for film in pair.decibels[name]]

    best = max(each(FULL), each("memory"), key=statistics.mean)
    simple = max((TABLE, "copied by position", "grey"), key=lambda name: statistics.mean(each(name)))
    pairs = [
        (
            "memory beats recurrence (the better of with and without local attention)",
            "35.77 against 35.26 dB",
            best,
            each("recurrent"),
        ),
        ("local attention adds", "35.77 against 35.44 dB", each(FULL), each("memory")),
        (
            f"the network is better than the best way without one ({simple})",
            "not compared",
            best,
            each(simple),
        ),
    ]
    return [
        judged(
            f"On DAVIS, two sequences out: {what}",
            paper,
            _against(ours, theirs),
            Paired.of(ours, theirs).above,
            "not by twice its standard error over sequences",
        )
        for what, paper, ours, theirs in pairs
    ]
