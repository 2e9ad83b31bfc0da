"""One self-contained page: the verdict first, then what each section measured, with its pictures and tables.

The page needs no script and no network: style and pictures are inside it. A script is in it only where a picture can be turned
(:mod:`~lineament.report.interactive`), and adds to what reads without. Every string is untrusted: Jinja escapes
it, :func:`~lineament.report.text.printable` makes what is invisible visible, and a content security policy in the
page forbids whatever might slip through. The page knows sections, not the methods that made them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lineament.core.checks import one_of, require
from lineament.core.files import write_json, write_text
from lineament.report.interactive import drawings, kinds, library
from lineament.report.section import SEVERITIES, Finding, Picture, Section
from lineament.report.text import cell, duration, plain, printable

# A state is a word and a shape before it is a colour.
STATES = {
    "warning": ("Warning", "▲"),
    "note": ("Note", "◆"),
    "good": ("Good", "●"),
    "failed": ("Failed", "✕"),
    "skipped": ("Does not apply", "–"),
}


def render(
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, Any]],
    findings: Sequence[Finding],
    sections: Sequence[Section],
    *,
    command: str,
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    versions: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    kicker: str = "Lineament audit",
) -> str:
    """The page as HTML.

    Args:
        title, subtitle: what was looked at, and in one sentence how.
        facts: pairs of a label and a value, shown below the title (data, samples, device ...).
        findings: the verdict; shown worst first, in the given order among equals.
        sections: what was measured; a failed or skipped one is shown with its reason.
        command: the command line that makes this page again.
        methods: for each slug that a section's ``method`` names, ``{"title", "year", "url"}`` of its paper.
        versions: package versions for the foot of the page.
        notes: what was decided on the way, such as how the data became the network's input; one sentence each.
        kicker: the small line above the title.

    Raises:
        InputError: a finding with an unknown severity, or two sections with the same name.

    >>> page = render("net", "", [], [Finding("warning", "It looks at <the mark>.")], [], command="lineament audit")
    >>> "It looks at &lt;the mark&gt;." in page, "<script" in page
    (True, False)
    """
    for finding in findings:
        one_of("severity of a finding", finding.severity, SEVERITIES)
    names = [section.name for section in sections]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"sections: got the name {twice[:1]} more than once, expected each name once")
    anchors = {section.name: f"section-{position}" for position, section in enumerate(sections, 1)}
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            subtitle=subtitle,
            kicker=kicker,
            facts=facts,
            findings=sorted(findings, key=lambda f: SEVERITIES.index(f.severity)),
            sections=sections,
            anchors=anchors,
            unanswered=[s for s in sections if s.status in ("failed", "skipped")],
            command=command,
            methods=methods or {},
            versions=versions or {},
            notes=notes,
            seconds=sum(section.seconds for section in sections),
            library=library(picture.surfaces for section in sections for picture in section.pictures),
        )
    )


def write(
    folder: str | Path,
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, Any]],
    findings: Sequence[Finding],
    sections: Sequence[Section],
    *,
    command: str,
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    versions: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    name: str = "report",
    kicker: str = "Lineament audit",
) -> tuple[Path, Path]:
    """Write ``NAME.html`` and ``NAME.json`` into ``folder``, each whole or not at all; returns their paths.

    The JSON file holds ``title``, ``subtitle``, ``facts``, ``findings``, ``sections``, ``command``, ``versions``,
    ``notes`` and whatever ``extra`` adds; NaN and infinities are ``null`` there. The other arguments are those of :func:`render`.

    Raises:
        InputError: as :func:`render`.

    >>> import tempfile
    >>> [p.name for p in write(tempfile.mkdtemp(), "net", "", [], [], [], command="lineament audit")]
    ['report.html', 'report.json']
    """
    page = render(
        title,
        subtitle,
        facts,
        findings,
        sections,
        command=command,
        methods=methods,
        versions=versions,
        notes=notes,
        kicker=kicker,
    )
    record = {
        "title": title,
        "subtitle": subtitle,
        "command": command,
        "facts": [{"name": str(name), "value": value} for name, value in facts],
        "findings": [finding.to_dict() for finding in findings],
        "sections": [section.to_dict() for section in sections],
        "versions": dict(versions or {}),
        "notes": list(notes),
        **(extra or {}),
    }
    html, json = Path(folder) / f"{name}.html", Path(folder) / f"{name}.json"
    write_json(json, plain(record))
    write_text(html, page)
    return html, json


def environment() -> Environment:
    """The Jinja environment of all pages: everything escaped, nothing invisible, no undefined name passed over."""
    env = Environment(
        loader=PackageLoader("lineament.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    env.filters.update(
        cell=cell, duration=duration, source=_source, numeric=_numeric, drawings=drawings, kinds=kinds
    )
    env.globals.update(STATES=STATES)
    return env


def _shown(value: Any) -> Any:
    """What ``{{ ... }}`` prints: escaped markup passes, text becomes printable."""
    return value if isinstance(value, (Markup, int, float)) else printable(value, keep="\n")


def _source(picture: Picture, theme: str) -> Markup:
    """A picture as a data URL; base64, so that nothing in the bytes can end the attribute."""
    data = picture.light if theme == "light" else picture.dark
    kind = {"svg": "image/svg+xml", "png": "image/png"}[one_of("kind", picture.kind, ["svg", "png"])]
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def _numeric(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
