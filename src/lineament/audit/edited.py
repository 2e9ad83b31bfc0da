"""A user's network with fewer channels, or without a class: written as weights, beside a page that says what it cost.

The samples are split: one half calibrates or is forgotten, the other measures. Beside every edit stands what an edit without the method does: as many
channels by chance with the same repairs, or a head that never answers the class.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from lineament.audit.edit_sections import (
    CHANCE,
    NORMS,
    NOW,
    WAS,
    classes_section,
    forgotten_section,
    pruned_section,
    score,
)
from lineament.audit.edit_subject import (
    USUAL,
    EditOptions,
    EditSubject,
    class_number,
    edit_subject,
    name_of,
    others_of,
    parts_of,
    width_of,
)
from lineament.audit.phrases import sentence
from lineament.audit.stages import STAGES, Report, command, fresh, opened, said_again, unused
from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require
from lineament.edit import PruneOptions, forgotten, mute, prune, save, unlearn
from lineament.edit.targets import check_target, timed
from lineament.load.narrowed import BUILT_FROM
from lineament.load.weights import digest
from lineament.papers import search
from lineament.report import page
from lineament.report.outcome import versions
from lineament.report.section import Section

NETWORK = "network"  # the folder beside the page that holds the edited network
_NAME = "edit"
_READS = "preprocessor_config.json"


def pruned_report(
    model: Any,
    data: Any,
    *,
    out: str | Path,
    overwrite: bool = False,
    options: EditOptions = USUAL,
    note: Callable[[str], None] = lambda line: None,
    **target: float | None,
) -> Report:
    """Prune a network on half of some data, measure it on the other half, and write both.

    Args:
        model, data: as for :func:`lineament.audit`; for a language model's folder a text file.
        out: the folder for ``edit.html``, ``edit.json`` and ``network/``.
        target: one of ``keep``, ``params``, ``flops``, ``latency``, or ``remove``, see :func:`lineament.edit.prune`.

    Raises:
        InputError: whatever cannot be used.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    >>> found = pruned_report(net, "digits", out=tempfile.mkdtemp(), keep=0.5, options=EditOptions(samples=60))
    >>> found.sections[0].name
    'network'
    """
    given: dict[str, Any] = {name: value for name, value in target.items() if value is not None}
    check_target(**given)
    folder = fresh(out, overwrite, _NAME, also=(NETWORK,))
    note("reading the model and the data")
    subject = edit_subject(model, data, options)
    for line in subject.notes:
        note(line)
    checkpoint = _checkpoint(
        folder, subject, {"target": given, "samples": options.samples, "widths": options.widths}
    )
    if checkpoint.resumed:
        note("an earlier run of the same pruning was cut off; going on where it stopped")
    note("pruning")
    with unused(folder):
        found = prune(
            subject.model,
            _calibration(subject),
            **given,
            options=PruneOptions(checkpoint=checkpoint, widths=options.widths),
        )
    note("measuring it beside as many channels by chance")
    share = min(1.0, sum(a for _, a in found.sizes.values()) / sum(b for b, _ in found.sizes.values()))
    norms = _same(subject, share, criterion="magnitude", compensate=None, recalibrate=False)
    scores = {
        name: score(subject, each)
        for name, each in {
            WAS: subject.model,
            NOW: found.model,
            NORMS: norms,
            CHANCE: _same(subject, share, criterion="random"),
        }.items()
    }
    times = timed(subject.model, found.model, subject.halves[0][0])
    sections = [pruned_section(subject, found, scores, times)]
    if subject.labels is not None:
        sections.append(classes_section(subject, scores[WAS].each, scores[NOW].each))
    network = _save(folder, found.model, subject)
    facts = [
        ("Network", f"{type(subject.model).__name__}, {found.parameters[0]:,} weights"),
        ("Data", subject.data),
        ("Written", f"{NETWORK}/"),
    ]
    opening = _opening(subject, network, data, options)
    note(opening)
    notes = [*subject.notes, opening]
    return _written(folder, checkpoint, subject, facts, sections, notes, found.to_dict())


def unlearned_report(
    model: Any,
    data: Any,
    label: str,
    *,
    out: str | Path,
    retain: Any = None,
    overwrite: bool = False,
    options: EditOptions = USUAL,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Take a class out of a classifier with half of its samples, say what is left of it, and write both.

    Args:
        label: the class, by its name or number.
        retain: further labelled samples, on which the other classes are measured; by default those of ``data``.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    >>> found = unlearned_report(net, "digits", "3", out=tempfile.mkdtemp(), options=EditOptions(samples=400))
    >>> found.sections[0].name
    'forgotten'
    """
    if options.share is not None:
        checks.number("share", options.share, low=0, high=1, open_low=True, open_high=True)
    folder = fresh(out, overwrite, _NAME, also=(NETWORK,))
    note("reading the model and the data")
    subject = edit_subject(model, data, options)
    for line in subject.notes:
        note(line)
    if subject.labels is None:
        raise InputError(
            "data: it has no classes to forget; unlearning takes a classifier and labelled samples"
        )
    number = class_number(subject, label)
    (forgetting, stay), (forgotten_ones, others) = (
        parts_of(x, y, number) for x, y in zip(subject.halves, subject.labels)
    )
    for name, part in (("calibrating", forgetting), ("measuring", forgotten_ones)):
        require(
            len(part[0]) >= 8,
            f"label: class {label!r} has {len(part[0])} samples in the {name} half, expected at least 8; read more samples",
        )
    if retain is not None:
        try:
            kept = edit_subject(model, retain, options)
        except InputError as error:
            raise InputError(str(error).replace("data: ", "retain: ", 1)) from error
        others = others_of(kept, subject, number)
    checkpoint = _checkpoint(
        folder,
        subject,
        {"class": number, "share": options.share, "retain": None if retain is None else str(retain)},
    )
    note("forgetting")
    with unused(folder):
        # The samples that are measured are others: half of what may be left of the class, a tenth or chance, is asked for here.
        most = None if options.share is not None else max(0.1, 1 / width_of(subject)) / 2
        found = unlearn(
            subject.model, forgetting, share=options.share, target=most, retain=stay if len(stay[1]) else None
        )
    note("asking what is left")
    told = forgotten(subject.model, found.model, forgotten_ones, others, seed=options.seed)
    control = forgotten(
        subject.model, mute(subject.model, number, forgetting[0]), forgotten_ones, others, seed=options.seed
    )
    section = forgotten_section(
        subject, name_of(subject, number), found, told, control.after,
        (len(forgotten_ones[0]), len(others[0])), (len(forgetting[0]), len(stay[0])),
    )  # fmt: skip
    network = _save(folder, found.model, subject)
    facts = [("Network", type(subject.model).__name__), ("Data", subject.data), ("Written", f"{NETWORK}/")]
    opening = _opening(subject, network, data, options)
    note(opening)
    erased = "a class is called erased only beside a network that was trained without it: pass that as `retrained` to lineament.edit.forgotten"
    notes = [*subject.notes, erased, opening]
    return _written(folder, checkpoint, subject, facts, [section], notes, found.to_dict())


def _calibration(subject: EditSubject) -> list[Any]:
    """The batches of the calibrating half; each is inputs alone, so that two of them are not taken for inputs and targets."""
    return [(batch,) for batch in subject.halves[0]]


def _same(subject: EditSubject, share: float, **how: Any) -> nn.Module:
    return prune(subject.model, _calibration(subject), keep=share, **how).model


def _checkpoint(folder: Path, subject: EditSubject, key: dict[str, Any]) -> Checkpoint:
    opened(folder, _NAME)
    key = {"model": digest(subject.model), "data": subject.data, **key, "versions": versions()}
    return Checkpoint(folder / STAGES / "steps", key)


def _save(folder: Path, model: nn.Module, subject: EditSubject) -> Path:
    """Write the network beside the page, in place of one that an earlier edit left there whole."""
    network, new = folder / NETWORK, folder / STAGES / NETWORK
    shutil.rmtree(new, ignore_errors=True)
    save(model, new)
    words = subject.words if subject.tokenizer is None else subject.tokenizer
    if words is not None:
        with suppress(AttributeError):
            words.save_pretrained(new)
    # How images are read is written beside a Hugging Face model, and is not part of it.
    reads = Path(subject.source) / _READS
    if subject.named and reads.is_file():
        shutil.copy(reads, new / _READS)
    shutil.rmtree(network, ignore_errors=True)
    return new.rename(network)


def _opening(subject: EditSubject, network: Path, data: Any, options: EditOptions) -> str:
    """How the edited network is opened and audited, from where this was run."""
    place, held = str(network), str(data) if isinstance(data, str | Path) else "DATA"
    again = said_again(
        options.classes, options.inputs, options.targets, options.split, options.image_size, options.normalize
    )
    narrowed = (network / BUILT_FROM).is_file()
    if narrowed or (network / "config.json").is_file():
        shown = ["PROMPTS", "--text", held] if subject.tokenizer is not None else [held, *again]
        how = (
            f"lineament.edit.load({place!r}) (its layers have several widths, which from_pretrained cannot open)"
            if narrowed
            else f"from_pretrained({place!r})"
        )
        return f"to open it: {how}, or {shlex.join(['lineament', 'audit', place, *shown])}"
    opens = f"lineament.edit.load({place!r}, build), where build() makes the network as it was"
    if not subject.named:
        return f"to open it: {opens}"
    words = ["lineament", "audit", subject.source, held, "--weights", place, *again]
    return f"to audit it: {shlex.join(words)} ; to open it in Python: {opens}"


def _written(
    folder: Path, checkpoint: Checkpoint, subject: EditSubject, facts: Any, sections: list[Section], notes: Any, extra: dict[str, Any]
) -> Report:  # fmt: skip
    paper = next(paper for paper in search() if paper.slug == "modhifi")
    findings = [finding for section in sections for finding in section.findings]
    html, json = page.write(
        folder, subject.source, "What was taken out of the network, and what did it cost?", facts, findings, sections,
        command=command("lineament.edit.prune(model, data, ...)"),
        methods={paper.slug: {"title": paper.title, "year": paper.year, "url": paper.url}},
        versions=versions(), notes=[sentence(n) for n in notes], extra={"edit": extra}, name=_NAME, kicker="Lineament edit",
    )  # fmt: skip
    checkpoint.finish()
    shutil.rmtree(folder / STAGES, ignore_errors=True)
    return Report(subject.source, findings, sections, html, json)


__all__ = ["EditOptions", "pruned_report", "unlearned_report"]
