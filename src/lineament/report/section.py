"""What a lens returns and the report shows: one question answered by a number, a sentence, pictures and tables."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lineament.report.outcome import Table
from lineament.report.surface_plot import SurfacePlot

Status = Literal["good", "note", "warning", "skipped", "failed"]
Severity = Literal["warning", "note", "good"]
SEVERITIES = ("warning", "note", "good")  # worst first


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict; ``section`` is the name of the section that shows it, or "".

    ``advice`` says what a reader can do about it, or is "" where there is nothing to do; ``key`` names what was found for programs, whatever
    the words ("place", "overconfident"), or is "".
    """

    severity: Severity
    sentence: str
    section: str = ""
    advice: str = ""
    key: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Picture:
    """One picture, drawn for light and for dark pages; ``kind`` is ``"svg"`` or ``"png"``.

    ``surfaces`` are its values, which a page with scripts lets the reader turn and read in the picture's place.
    """

    light: bytes
    dark: bytes
    kind: Literal["svg", "png"]
    caption: str
    alt: str
    surfaces: Sequence[SurfacePlot] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "caption": self.caption,
            "alt": self.alt,
            "light": base64.b64encode(self.light).decode(),
            "dark": base64.b64encode(self.dark).decode(),
            **({"surfaces": [each.to_dict() for each in self.surfaces]} if self.surfaces else {}),
        }


@dataclass(frozen=True)
class Section:
    """A lens's answer.

    ``number`` is the one figure a reader should remember, as text ("31.4 %"), and ``unit`` what it counts ("accuracy
    in the worst group"). ``sentence`` says what it means, in plain words. ``method`` is the slug of the paper behind
    it, or "" where there is none. The audit fills in ``name`` and ``title``, and a ``method`` that is ``None``, from the lens's file. ``numbers`` is everything measured, for `report.json` (JSON values only), ``findings`` what it means for the verdict, and
    ``seconds`` how long the lens took. ``links`` are (words, address) of pages beside the report, or of another of its sections, as ``#NAME``.

    >>> Section("accuracy", "How often is it right?", "good", "98 %", "of samples right", "It is right for 98 of 100.").to_dict()["number"]
    '98 %'
    """

    name: str = ""
    title: str = ""
    status: Status = "good"
    number: str = ""
    unit: str = ""
    sentence: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    method: str | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    seconds: float = 0.0
    links: Sequence[tuple[str, str]] = ()

    def to_dict(self) -> dict[str, Any]:
        texts = ("name", "title", "status", "number", "unit", "sentence")
        return {
            **{name: getattr(self, name) for name in texts},
            "method": self.method or "",
            "numbers": self.numbers,
            "tables": [
                {"title": t.title, "columns": list(t.columns), "rows": [list(r) for r in t.rows]}
                for t in self.tables
            ],
            "pictures": [p.to_dict() for p in self.pictures],
            "seconds": self.seconds,
            **({"links": [list(link) for link in self.links]} if self.links else {}),
        }
