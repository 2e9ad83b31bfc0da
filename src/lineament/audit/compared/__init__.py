"""What a comparison of two networks shows, section by section, from one pass over the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lineament.audit.compared.answers import answers, text_losses
from lineament.audit.compared.averaging import averaging
from lineament.audit.compared.recognised import recognised
from lineament.audit.compared.spaces import codes, maps_of, missing, spaces
from lineament.audit.compared.units import pairs, units
from lineament.load.model_and_data import ModelAndData
from lineament.measure.alignment.profile import Alignment
from lineament.report.section import Section
from lineament.report.text import plain, printable


def sections(
    subjects: Sequence[ModelAndData], found: Alignment, note: Callable[[str], None]
) -> list[Section]:
    """The sections for two classifiers (or regressions) of the same samples."""
    a, b = subjects

    def shown(row: int) -> Any:
        return a.display(row).numpy() if a.images else None

    def named(row: int) -> str:
        return f"sample {int(a.samples.index[row])}"

    embeddings = a.task == b.task == "embedding"
    made = [_timed("answers", lambda: (recognised if embeddings else answers)(a, b), note)]
    made += _units_and_spaces(found, shown if a.images else None, named, note)
    # What an embedding was trained on is not known, so that there is no loss between two.
    return made if embeddings else [*made, _timed("barrier", lambda: averaging(a, b), note)]


def language_sections(
    models: Sequence[nn.Module],
    tokenizers: Sequence[Any],
    texts: Sequence[str],
    found: Alignment,
    note: Callable[[str], None],
) -> list[Section]:
    """The sections for two language models."""

    def named(row: int) -> str:
        text = printable(texts[row], limit=60)
        return f"“{text}”"

    made = [_timed("answers", lambda: text_losses(models, tokenizers, texts), note)]
    return made + _units_and_spaces(found, None, named, note)


def _units_and_spaces(
    found: Alignment,
    shown: Callable[[int], Any] | None,
    named: Callable[[int], str],
    note: Callable[[str], None],
) -> list[Section]:
    maps = maps_of(found)
    return [
        _timed("units", lambda: units(found, maps), note),
        _timed("pairs", lambda: pairs(found, shown, named), note),
        _timed("missing", lambda: missing(found, maps, named), note),
        _timed("spaces", lambda: spaces(found), note),
        _timed("codes", lambda: codes(found, maps), note),
    ]


def _timed(name: str, make: Callable[[], Section], note: Callable[[str], None]) -> Section:
    note(name)
    start = time.perf_counter()
    section = make()
    return replace(
        section,
        name=name,
        numbers=plain(section.numbers),
        findings=[replace(finding, section=name) for finding in section.findings],
        seconds=time.perf_counter() - start,
    )
