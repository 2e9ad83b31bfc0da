"""Two networks on the same data, unit by unit: would another training find the same features?

Each batch passes both networks once; what they answer and the joint moments of their units are kept, and everything in the page follows from
these. A run that was cut off goes on in the middle of that pass.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament.audit import compared
from lineament.audit.data_options import DataOptions
from lineament.audit.phrases import places, sentence, several
from lineament.audit.stages import STAGES, Report, command, in_processes, opened, threads
from lineament.core import checks, shards
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require, show
from lineament.core.models import device_of
from lineament.data.samples import Samples
from lineament.load.data import Data, load_data
from lineament.load.input_layout import find_layout, with_arguments
from lineament.load.language_models import is_language_model, load_language_model
from lineament.load.loaded import Loaded
from lineament.load.model_and_data import bring_together, place
from lineament.load.models import load_model
from lineament.load.prompts import Prompts, is_prompts, load_prompts
from lineament.load.weights import digest
from lineament.measure.alignment.profile import Sites, aligned
from lineament.measure.alignment.steps import Parts, Step
from lineament.measure.alignment.units import Reading
from lineament.measure.alignment.word_ends import text_steps
from lineament.papers import search
from lineament.report import page
from lineament.report.outcome import versions
from lineament.report.section import Section

_NAME = "compare"
_QUESTION = "Do the two networks hold the same features, and do they give the same answers?"
_CALL = "lineament.compare(model_a, model_b, data, out=...)"


@dataclass(frozen=True)
class CompareOptions(DataOptions):
    """What a comparison rarely needs to be told, beside how the data are read: :class:`~lineament.audit.data_options.DataOptions`.

    Attributes:
        weights_a, weights_b: checkpoints for networks that a factory makes.
        positions, blocks: see :func:`lineament.measure.alignment.profile.alignment`.

    >>> CompareOptions().positions
    64
    """

    weights_a: str | Path | None = None
    weights_b: str | Path | None = None
    positions: int = 64
    blocks: int = 10


def compare(
    model_a: nn.Module | str,
    model_b: nn.Module | str,
    data: Data,
    *,
    out: str | Path,
    sites: Sites = None,
    classes: Sequence[str] | None = None,
    groups: Any = None,
    samples: int = 1000,
    device: str | torch.device | None = None,
    seed: int = 0,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda line: None,
    options: CompareOptions = CompareOptions(),
) -> Report:
    """Which units of one network does the other have too, what has only one of them, and where do their answers part?

    Args:
        model_a, model_b: modules, or what :func:`lineament.load.models.load_model` takes: two seeds, two checkpoints, a fine-tuned copy, other
            architectures; or two language models, by their Hugging Face directories or names.
        data: what :func:`lineament.load.data.load_data` takes; for language models prompts.
        out: the folder for `compare.html` and `compare.json`.
        sites: as for :func:`lineament.measure.alignment.profile.alignment`.
        classes, groups, samples, device, seed, overwrite, note: as for :func:`lineament.audit.run.audit`.

    Raises:
        InputError: whatever cannot be used, before the pass.

    >>> import tempfile
    >>> nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)) for _ in range(2)]
    >>> found = compare(*nets, "digits", out=tempfile.mkdtemp(), samples=60)
    >>> [section.name for section in found.sections][:3]
    ['answers', 'units', 'pairs']
    """
    checks.number("samples", samples, low=2 * options.blocks, integer=True)
    checks.number("batch_size", options.batch_size, low=2, integer=True)
    checks.seed("seed", seed)
    checks.one_of("task", options.task, ("auto", "classification", "multi-label", "regression", "embedding"))
    asked = (model_a, model_b, data, sites, classes, groups, samples, device, seed, note, options)
    return in_processes(out, overwrite, lambda folder: _compared(folder, Path(out), *asked), _NAME)


def _compared(
    folder: Path,
    out: Path,
    model_a: nn.Module | str,
    model_b: nn.Module | str,
    data: Data,
    sites: Sites,
    classes: Sequence[str] | None,
    groups: Any,
    samples: int,
    device: Any,
    seed: int,
    note: Callable[[str], None],
    options: CompareOptions,
) -> Report:
    note, device = shards.noted(note), shards.own_device(device)
    note("reading the models and the data")
    language = [is_language_model(model) for model in (model_a, model_b)]
    if any(language):
        require(
            all(language),
            f"model_b: {show(model_a)} and {show(model_b)} are not both language models; expected two of a kind",
        )
        require(
            is_prompts(data),
            f"data: got {show(data)} for language models, expected a .txt or .jsonl file of prompts, or a task",
        )
        names = str(model_a), str(model_b)
        return _language(folder, out, *names, str(data), sites, samples, device, seed, note, options)
    loaded = [_loaded(model_a, options.weights_a, "a"), _loaded(model_b, options.weights_b, "b")]
    for which, each in zip("ab", loaded):
        for line in each.notes:
            note(f"{which.upper()}: {line}")
        require(
            each.batch is None and each.kind != "export",
            f"model_{which}: no module inside an exported network can be watched; compare the PyTorch modules that it was made from",
        )
        place(each.model, device)
    held = _held(data, loaded, samples, classes, groups, seed, options)
    require(
        held[0].targets.ndim < 3,
        f"data: targets are {show(held[0].targets)}, expected one answer a sample; networks that answer each pixel are not compared",
    )
    held = [with_arguments(each.model, some) for each, some in zip(loaded, held)]
    if classes is not None:
        loaded = [replace(each, classes=()) for each in loaded]
    layouts = [
        find_layout(each.model, some, *_normalization(each, options), 2)[0]
        for each, some in zip(loaded, held)
    ]
    require(
        all(layout.classes is None for layout in layouts),
        f"data: targets are {show(held[0].targets)}, expected one answer a sample; networks that answer each pixel or token are not compared",
    )
    models = [each.model for each in loaded]
    steps = _Steps(held, layouts, models, options.batch_size, seed)
    key = {
        "models": [digest(model) for model in models],
        "data": [_digest(some.inputs, some.targets, some.groups) for some in held],
        "layouts": [str(layout) for layout in layouts],
        "options": [str(sites), options.positions, options.blocks, options.batch_size, seed, str(device)],
        "versions": versions(),
    }
    checkpoint = _checkpoint(folder, out, key, note)
    note("one pass of both networks over the data")
    reading = Reading(options.positions, options.blocks, seed=seed, answers=True)
    found, answers = aligned(models, sites, steps, reading, checkpoint)
    with ExitStack() as stack:
        subjects = [
            stack.enter_context(
                bring_together(
                    each,
                    some,
                    task=options.task,
                    normalize=options.normalize,
                    batch_size=options.batch_size,
                    seed=seed,
                    answers=answer,
                )
            )
            for each, some, answer in zip(loaded, held, answers)
        ]
        with threads(min(subject.flops for subject in subjects) * options.batch_size):
            sections = compared.sections(subjects, found, note)
    used = f"{len(held[0]):,}" + (f" of {held[0].total:,}" if held[0].total > len(held[0]) else "")
    facts = _facts(models, held[0].source, used, found)
    notes = [f"{name}: {line}" for name, subject in zip("AB", subjects) for line in subject.notes]
    return _written(folder, checkpoint, [each.source for each in loaded], facts, sections, notes, found)


def _loaded(model: nn.Module | str, weights: str | Path | None, which: str) -> Loaded:
    """One of the two networks; what is wrong with it is said by its own argument."""
    try:
        return load_model(model, weights=weights)
    except InputError as error:
        argument, colon, rest = str(error).partition(":")
        if argument not in ("model", "weights"):
            raise
        raise InputError(f"{argument}_{which}{colon}{rest}") from error


def _checkpoint(folder: Path, out: Path, key: dict[str, Any], note: Callable[[str], None]) -> Checkpoint:
    """Where this process keeps its share of the pass."""
    for name in ("models", "data"):
        shards.alike(name, str(key[name]))
    opened(folder, _NAME)
    rank, count = shards.place()
    share = "pass" if count == 1 else f"pass-{rank}-of-{count}"
    checkpoint = Checkpoint(out / STAGES / share, key)
    if checkpoint.resumed:
        note("an earlier run of the same comparison was cut off; going on where it stopped")
    return checkpoint


def _held(
    data: Any,
    loaded: Sequence[Loaded],
    samples: int,
    classes: Sequence[str] | None,
    groups: Any,
    seed: int,
    options: CompareOptions,
) -> list[Samples]:
    """The same samples for each network, at the size that it names."""
    found: list[Samples] = []
    sizes = [each.size if options.image_size is None else options.image_size for each in loaded]
    for size in sizes:
        if found and size == sizes[0]:
            found.append(found[0])
            continue
        found.append(
            load_data(
                data,
                samples=samples,
                seed=seed,
                inputs=options.inputs,
                targets=options.targets,
                groups=groups,
                classes=classes,
                split=options.split,
                image_size=size,
            )
        )
    require(
        torch.equal(found[0].index, found[1].index) and len(found[0]) == len(found[1]),
        "data: the two networks were given other samples; pass data that can be read twice in the same order",
    )
    return found


def _normalization(loaded: Loaded, options: CompareOptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if options.normalize is None:
        return loaded.mean, loaded.std
    mean, std = (
        tuple(float(v) for v in ([part] if isinstance(part, (int, float)) else part))
        for part in options.normalize
    )
    return mean, std


class _Steps(Parts):
    """The samples for both networks, in an order drawn from the seed."""

    def __init__(self, held: Sequence[Samples], layouts: Any, models: Any, batch_size: int, seed: int):
        self.held, self.layouts, self.models = held, layouts, models
        order = torch.randperm(len(held[0]), generator=torch.Generator().manual_seed(seed))
        lengths = held[0].lengths
        # Texts of one length go together; nothing is padded.
        alike = (
            [order] if lengths is None else [order[lengths[order] == n] for n in lengths.unique().tolist()]
        )
        self.parts = [part for rows in alike for part in rows.split(batch_size)]

    def __getitem__(self, number: Any) -> Any:
        rows = self.parts[number]
        given = zip(self.held, self.layouts, self.models)
        return Step([layout.given(some[rows], model) for some, layout, model in given], rows)


def _language(
    folder: Path,
    out: Path,
    name_a: str,
    name_b: str,
    data: str,
    sites: Sites,
    samples: int,
    device: Any,
    seed: int,
    note: Callable[[str], None],
    options: CompareOptions,
) -> Report:
    """Two language models: units at the ends of the words that both tokenizers cut, and how well each predicts the texts."""
    prompts: Prompts = load_prompts(data, samples=samples, seed=seed)
    if prompts.left_out:
        note(f"left out: {several(prompts.left_out)}")
    require(
        len(prompts) >= 2 * options.blocks,
        f"data: {show(data)} holds {len(prompts)} prompts of {prompts.total} lines, expected at least {2 * options.blocks}",
    )
    where = None if device is None else str(device)
    pairs = [
        load_language_model(name, device=where, argument=f"model_{which}")
        for which, name in (("a", name_a), ("b", name_b))
    ]
    models, tokenizers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    steps = text_steps(list(prompts.prompts), tokenizers, positions=options.positions, seed=seed)
    text = "\n".join(prompts.prompts)
    key = {
        "models": [digest(model) for model in models],
        "tokenizers": [
            hashlib.sha256(repr(sorted(t.get_vocab().items())).encode()).hexdigest() for t in tokenizers
        ],
        "data": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "options": [str(sites), options.positions, options.blocks, seed, str(device)],
        "versions": versions(),
    }
    checkpoint = _checkpoint(folder, out, key, note)
    note("one pass of both networks over the texts")
    found, _ = aligned(
        models, sites, steps, Reading(options.positions, options.blocks, seed=seed), checkpoint
    )
    sections = compared.language_sections(models, tokenizers, prompts.prompts, found, note)
    facts = _facts(models, prompts.source, f"{found.images:,} texts", found)
    return _written(folder, checkpoint, [name_a, name_b], facts, sections, [], found)


def _facts(models: Sequence[nn.Module], source: str, samples: str, found: Any) -> list[tuple[str, Any]]:
    return [
        ("A", f"{type(models[0]).__name__}, {sum(p.numel() for p in models[0].parameters()):,} weights"),
        ("B", f"{type(models[1]).__name__}, {sum(p.numel() for p in models[1].parameters()):,} weights"),
        ("Data", source),
        ("Samples", samples),
        ("Places compared", len(found.sites)),
        *([("Processes", shards.count())] if shards.count() > 1 else []),
        ("Device", " and ".join(dict.fromkeys(str(device_of(model)) for model in models))),
    ]


def _written(
    folder: Path,
    checkpoint: Checkpoint,
    sources: Sequence[str],
    facts: Sequence[tuple[str, Any]],
    sections: Sequence[Section],
    notes: Sequence[str],
    found: Any,
) -> Report:
    title = f"{sources[0]} (A) and {sources[1]} (B)"
    findings = [finding for section in sections for finding in section.findings]
    paper = next(paper for paper in search() if paper.slug == "convergent-learning")
    notes = [*map(sentence, [*notes, *found.notes]), *places(list(found.sites))]

    def report() -> Report:
        html, json = page.write(
            folder,
            title,
            _QUESTION,
            facts,
            findings,
            sections,
            command=command(_CALL),
            methods={paper.slug: {"title": paper.title, "year": paper.year, "url": paper.url}},
            versions=versions(),
            notes=notes,
            extra={"sites": {name: site.site_b for name, site in found.sites.items()}},
            name=_NAME,
            kicker="Lineament comparison",
        )
        return Report(title, findings, sections, html, json)

    made = shards.agreed("the page", report)
    checkpoint.finish()
    if shards.first():
        shutil.rmtree(folder / STAGES, ignore_errors=True)
    return made


def _digest(*tensors: Tensor | None) -> str:
    found = hashlib.sha256()
    for value in tensors:
        if value is not None:
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
