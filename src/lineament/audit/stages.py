"""What every audit does around its lenses: the output folder, the lenses one after the other with resume, the report.

Each lens's section is a stage of a checkpoint in the output folder, so that a killed run goes on where it stopped and gives the same
report. A lens that fails says so in its section, and the rest goes on.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lineament.audit.catalogue import Lens
from lineament.core import checks, shards
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require
from lineament.core.files import output_folder, possible_folder
from lineament.core.results import Readable
from lineament.papers import search
from lineament.report import page
from lineament.report.outcome import versions
from lineament.report.section import SEVERITIES, Finding, Section

STAGES = ".stages"


@dataclass(frozen=True)
class Report(Readable):
    """What an audit found: the verdict, one section a lens, and where the page is."""

    title: str
    findings: Sequence[Finding]
    sections: Sequence[Section]
    html: Path
    json: Path

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "findings": [finding.to_dict() for finding in self.findings],
            "sections": [section.to_dict() for section in self.sections],
            "html": str(self.html),
            "json": str(self.json),
        }

    def __getitem__(self, name: str) -> Section:
        """The section of a lens."""
        for section in self.sections:
            if section.name == name:
                return section
        raise InputError(
            f"report: no section {name!r}{checks.suggest(name, [s.name for s in self.sections])}"
        )


def sections(
    folder: Path, key: Mapping[str, Any], chosen: Sequence[Lens], subject: Any, note: Callable[[str], None]
) -> tuple[list[Section], Checkpoint | None]:
    """The sections of the chosen lenses, each looked at once however often the run is cut off.

    Of several processes all look together, and the first has the sections and the checkpoint.

    Args:
        key: everything that decides a section; a stored one with another key is not used.
    """
    checkpoint = None
    if shards.first():
        checkpoint = Checkpoint(opened(folder) / STAGES / "lenses", dict(key))
        if checkpoint.resumed:
            note("an earlier run of the same audit was cut off; going on where it stopped")
    found = []
    for number, lens in enumerate(chosen, 1):
        note(f"{number}/{len(chosen)} {lens.name}: {lens.help}")
        stored = shards.agreed(
            "what is stored", lambda lens=lens: checkpoint and checkpoint.finished(lens.name, Section)
        )
        if checkpoint is not None:
            found.append(checkpoint.stage(lens.name, lambda lens=lens: look(lens, subject), Section))
        elif not stored:
            look(lens, subject)
    return found, checkpoint


def verdict(chosen: Sequence[Lens], sections: Sequence[Section]) -> list[Finding]:
    """What the sections found, worst first; among equals what the network relies on, then how it holds it."""
    ranked = sorted(zip(chosen, sections), key=lambda pair: pair[0].verdict_order)
    found = [finding for _, section in ranked for finding in section.findings]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def written(
    folder: Path,
    checkpoint: Checkpoint | None,
    chosen: Sequence[Lens],
    title: str,
    facts: Sequence[tuple[str, Any]],
    findings: Sequence[Finding],
    found: Sequence[Section],
    extra: Mapping[str, Any],
) -> Report:
    """Write the report; the stages are no longer needed then."""
    html, json = page.write(
        folder,
        title,
        "What does this network rely on, and how does it hold it?",
        facts,
        findings,
        found,
        command=command("lineament.audit(model, data, out=...)"),
        methods=_methods(chosen),
        versions=versions(),
        notes=extra.get("notes", ()),
        extra={name: value for name, value in extra.items() if name != "notes"},
    )
    if checkpoint is not None:
        checkpoint.finish()
    shutil.rmtree(folder / STAGES, ignore_errors=True)
    return Report(title, findings, found, html, json)


def look(lens: Lens, subject: Any) -> Section:
    """The lens's section; one that fails or does not apply says so in its own."""
    module, name, start = lens.module(), lens.name, time.perf_counter()
    frame = Section(name, lens.title)
    dense = getattr(subject, "task", "") == "dense" and not lens.dense
    reason = (
        f"This network answers for every {subject.unit}, and this lens asks about one answer a sample."
        if dense
        else "This network answers with an embedding, and this lens asks about classes or values."
        if getattr(subject, "task", "") == "embedding" and not lens.embedding
        else module.applies(subject)
    )
    if reason:
        return replace(frame, status="skipped", sentence=reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            section = shards.guarded(f"the end of {name}", lambda: module.look(subject))
    except shards.LostProcess:
        raise
    except Exception as error:
        # One lens that fails must not take the others' answers away.
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        told = f"This lens failed, which stopped no other. {kind}{error}"
        return replace(frame, status="failed", sentence=told, seconds=time.perf_counter() - start)
    return replace(
        section,
        name=name,
        title=lens.title,
        method=lens.method if section.method is None else section.method,
        numbers=page.plain(section.numbers),
        findings=[replace(finding, section=name) for finding in section.findings],
        seconds=time.perf_counter() - start,
    )


@contextmanager
def threads(work: float) -> Iterator[None]:
    """One thread where a batch is little work: several would wait for each other longer than they work."""
    before = torch.get_num_threads()
    if work < 5e8:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_processes(
    out: str | Path, overwrite: bool, work: Callable[[Path], Report], report: str = "report"
) -> Report:
    """``work(folder)`` in all processes that were started together, an error of one raised in all.

    The first has the output folder and writes the report; the others have one that is thrown away.
    """

    def whole() -> Report:
        if shards.first():
            return work(fresh(out, overwrite, report))
        with tempfile.TemporaryDirectory() as place:
            return work(Path(place))

    with shards.shared():
        return shards.guarded("the end of the audit", whole)


def fresh(out: str | Path, overwrite: bool, report: str = "report", also: Sequence[str] = ()) -> Path:
    """The output folder for ``REPORT.html`` (and ``also``): new, empty, or of an unfinished run; another only with ``overwrite``."""
    folder = possible_folder(out)
    if folder.is_dir():
        present = {p.name for p in folder.iterdir()}
        finished = f"{report}.html" in present
        require(
            overwrite or not finished,
            f"out: {str(out)!r} already holds a finished run ({report}.html); pass overwrite=True to replace it, or choose another folder",
        )
        own = {
            name
            for name in present
            if name in (f"{report}.html", f"{report}.json", STAGES, *also)
            or name.startswith((f".{report}-", f"{report}-"))
        }
        foreign = sorted(present - own)
        require(
            not foreign,
            f"out: {str(out)!r} holds files that are no report's ({checks.show(foreign[0]) if foreign else ''} ...); choose an empty or new folder",
        )
    return folder


def opened(folder: Path, report: str = "report") -> Path:
    """Make the folder, now that there is something to write; without what a killed run had half written."""
    for leftover in output_folder(folder).glob(f".{report}-*"):
        leftover.unlink(missing_ok=True)
    return folder


@contextmanager
def unused(folder: Path) -> Iterator[None]:
    """Leave no trace in the output folder of work that is refused."""
    try:
        yield
    except InputError:
        shutil.rmtree(folder / STAGES, ignore_errors=True)
        with suppress(OSError):  # it holds something else
            folder.rmdir()
        raise


def _methods(chosen: Sequence[Lens]) -> dict[str, dict[str, Any]]:
    """The papers behind the lenses, by slug: Lineament's own, or those that the lenses name."""
    found = {}
    for lens in chosen:
        if lens.source is not None:
            title, year, number = lens.source
            found[lens.method] = {"title": title, "year": year, "url": f"https://arxiv.org/abs/{number}"}
    papers = {paper.slug: {"title": paper.title, "year": paper.year, "url": paper.url} for paper in search()}
    return {**found, **{lens.method: papers[lens.method] for lens in chosen if lens.method in papers}}


def command(call: str) -> str:
    """The command line of this process, or the call that it was made by."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    if name in ("lineament", "__main__.py"):
        return shlex.join(["lineament", *sys.argv[1:]])
    return call


def said_again(
    classes: Sequence[str] | None,
    inputs: str | None,
    targets: str | None,
    split: str | None,
    size: Any,
    scale: Any,
) -> list[str]:
    """The options of a command that read the same data again.

    >>> said_again(["cat", "dog"], None, "label", None, (8, 8), None)
    ['--classes', 'cat,dog', '--targets', 'label', '--image-size', '8,8']
    """
    said = {
        "--classes": None if classes is None else ",".join(classes),
        "--inputs": inputs,
        "--targets": targets,
        "--split": split,
        "--image-size": None if size is None else ",".join(map(str, size)),
        "--normalize": None if scale is None else ",".join(f"{value:g}" for part in scale for value in part),
    }
    return [word for name, value in said.items() if value is not None for word in (name, str(value))]
