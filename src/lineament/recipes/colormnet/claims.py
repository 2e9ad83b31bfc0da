"""Claims of the colormnet recipe: predicates from the paper and its pitfalls, written before the first run."""

from __future__ import annotations

import statistics
from typing import Any

from lineament.recipes.colormnet.experiments import FULL, SPANS, Coloured
from lineament.recipes.kit.claims import judged
from lineament.report.outcome import Claim

ANOTHER = "another's exemplar"
LATE = "16-23"


def mean_over(found: list[Coloured], kind: str, name: str, span: str) -> float:
    """The mean PSNR of some frames, over seeds."""
    return statistics.mean(v for f in found for v in getattr(f, kind)[name][SPANS[span]])


def all_claims(found: list[Coloured], config: Any) -> list[Claim]:
    """Predicates: 2 dB late in a film, 1 dB against another's exemplar, the order of means elsewhere."""

    def late(name: str, kind: str = "own") -> float:
        return mean_over(found, kind, name, LATE)

    def whole(name: str, kind: str = "own") -> float:
        return statistics.mean(v for f in found for v in getattr(f, kind)[name])

    best = max(late(FULL), late("memory"))
    table = "a table from grey to colour"
    true, legacy = (statistics.mean(getattr(f, what) for f in found) for what in ("true", "legacy"))
    turned, straight = (statistics.mean(f.turned[k] for f in found) for k in (0, 1))
    half = [max(f.elements[: len(f.elements) // 2]) for f in found]
    rest = [max(f.elements[len(f.elements) // 2 :]) for f in found]
    simple = max(whole("copied by position"), whole("grey"))
    return [
        judged(
            f"Memory beats recurrence by 2 dB in frames {LATE} (the better of with and without local attention)",
            "DAVIS: 35.77 against 35.26 dB",
            f"{best:.1f} against {late('recurrent'):.1f} dB",
            best >= late("recurrent") + 2,
            "after this training neither carries colours well"
            if best < whole("grey") + 2
            else "recurrence hands colours on nearly as well",
        ),
        judged(
            "Local attention adds: memory with it is better than without, over all frames",
            "DAVIS: 35.77 against 35.44 dB",
            f"{whole(FULL):.1f} against {whole('memory'):.1f} dB",
            whole(FULL) > whole("memory"),
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
            f"{whole(FULL):.1f} against {whole('copied by position'):.1f} and {whole('grey'):.1f} dB",
            whole(FULL) > simple,
            "it has not learned to carry colours in so few steps",
        ),
        judged(
            "Control: it is better than a table from grey to colour, where grey says which surface it is",
            "not compared in the paper; expected to fail",
            f"{whole(FULL):.1f} against {whole(table):.1f} dB",
            whole(FULL) > whole(table),
            "in these films the table knows every surface it has seen",
        ),
        judged(
            "Control: it is better than the table where two shapes share a grey",
            "not compared in the paper",
            f"{whole(FULL, 'shared'):.1f} against {whole(table, 'shared'):.1f} dB",
            whole(FULL, "shared") > whole(table, "shared"),
            "it tells the two no better apart, or loses more on the rest",
        ),
        judged(
            "Control: with another film's exemplar it is at least 1 dB worse",
            "not compared in the paper",
            f"{whole(FULL):.1f} against {whole(ANOTHER):.1f} dB",
            whole(FULL) >= whole(ANOTHER) + 1,
            "it hardly looks at the exemplar",
        ),
        judged(
            "Control: it follows the exemplar: with hues turned by 90 degrees the answer is nearer to the turned truth",
            "not compared in the paper",
            f"{turned:.1f} dB to the turned truth, {straight:.1f} dB to the truth",
            turned > straight,
            "the colours are the network's own, not the exemplar's",
        ),
    ]


another = "another's exemplar"
