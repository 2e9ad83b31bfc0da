"""A user's network with fewer channels, or without a class: written as weights, beside a page that says what it cost.

The samples are split: one half calibrates or is forgotten, the other measures. Beside every edit stands what an edit without the method does: as many
channels by chance with the same repairs, or a head that never answers the class.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.audit.edit_doubts import UNTRAINED, doubt, harm, pays, price, shares_tried
from lineament.audit.phrases import sentence
from lineament.audit.stages import STAGES, Report, command, fresh, opened, said_again, unused
from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require, show, suggest
from lineament.core.models import called, decided, device_of, frozen, logits
from lineament.edit import PruneOptions, forgotten, mute, prune, save, unlearn
from lineament.edit.pruned import Pruned
from lineament.edit.saved import BUILT_FROM
from lineament.edit.targets import Timing, check_target, timed
from lineament.load.data import load_data
from lineament.load.language_models import is_language_model, load_language_model
from lineament.load.model_and_data import bring_together
from lineament.load.models import load_model
from lineament.load.token_sequences import token_sequences
from lineament.load.weights import digest
from lineament.papers import search
from lineament.report import page
from lineament.report.outcome import Table, versions
from lineament.report.section import Finding, Section

NETWORK = "network"  # the folder beside the page that holds the edited network
_NAME = "edit"


@dataclass(frozen=True)
class EditOptions:
    """How an edited network's model and data are read.

    ``weights``: of a factory's network; ``samples``: read at most so many; ``length``: positions of a sequence of a text; ``share``: of the pairs that
    unlearning changes, by default the smallest that forgets; ``widths``: see :class:`lineament.edit.PruneOptions`; ``classes``, ``inputs``, ``targets``, ``split``, ``image_size``, ``normalize``: as for an audit.

    >>> EditOptions().samples
    2000
    """

    weights: str | Path | None = None
    samples: int = 2000
    length: int = 128
    share: float | None = None
    widths: str | None = None
    seed: int = 0
    device: str | None = None
    classes: Sequence[str] | None = None
    inputs: str | None = None
    targets: str | None = None
    split: str | None = None
    image_size: Any = None
    normalize: Any = None


@dataclass(frozen=True)
class _Subject:
    """A model, and two halves of its data as it takes them; labels where there are classes."""

    model: nn.Module
    source: str
    data: str
    halves: tuple[list[Any], list[Any]]
    labels: tuple[Tensor, Tensor] | None
    classes: tuple[str, ...]
    tokenizer: Any = None
    notes: tuple[str, ...] = ()
    named: bool = False  # whether a command line can name the model
    doubt: str = ""  # why its answers as it was say little of what an edit costs


def pruned_report(
    model: Any,
    data: Any,
    *,
    out: str | Path,
    overwrite: bool = False,
    options: EditOptions = EditOptions(),
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
    subject = _subject(model, data, options)
    for line in subject.notes:
        note(line)
    checkpoint = _checkpoint(
        folder, subject, {"target": given, "samples": options.samples, "widths": options.widths}
    )
    if checkpoint.resumed:
        note("an earlier run of the same pruning was cut off; going on where it stopped")
    note("pruning")
    calibration, measuring = subject.halves
    with unused(folder):
        found = prune(
            subject.model,
            calibration,
            **given,
            options=PruneOptions(checkpoint=checkpoint, widths=options.widths),
        )
    note("measuring it beside as many channels by chance")
    share = min(1.0, sum(a for _, a in found.sizes.values()) / sum(b for b, _ in found.sizes.values()))
    controls = {
        "pruned": found.model,
        "norms alone, no repair": _same(
            subject, share, criterion="magnitude", compensate=None, recalibrate=False
        ),
        "by chance, the same repairs": _same(subject, share, criterion="random"),
    }
    scores = {"as it was": _score(subject, subject.model)}
    scores |= {name: _score(subject, each) for name, each in controls.items()}
    example = calibration[0]
    times = timed(subject.model, found.model, example)
    unit = "perplexity" if subject.tokenizer is not None else "accuracy" if subject.labels is not None else ""
    sections = [_pruned_section(found, scores, times, unit, len(measuring), subject)]
    if subject.labels is not None:
        sections.append(_classes(subject, found.model))
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
    options: EditOptions = EditOptions(),
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
    subject = _subject(model, data, options)
    for line in subject.notes:
        note(line)
    if subject.labels is None:
        raise InputError(
            "data: it has no classes to forget; unlearning takes a classifier and labelled samples"
        )
    number = _class_number(subject, label)
    (forgetting, stay), (forgotten_ones, others) = (
        _parts(x, y, number) for x, y in zip(subject.halves, subject.labels)
    )
    for name, part in (("calibrating", forgetting), ("measuring", forgotten_ones)):
        require(
            len(part[0]) >= 8,
            f"label: class {label!r} has {len(part[0])} samples in the {name} half, expected at least 8; read more samples",
        )
    if retain is not None:
        try:
            kept = _subject(model, retain, options)
        except InputError as error:
            raise InputError(str(error).replace("data: ", "retain: ", 1)) from error
        others = _others(kept, subject, number)
    checkpoint = _checkpoint(
        folder,
        subject,
        {"class": number, "share": options.share, "retain": None if retain is None else str(retain)},
    )
    note("forgetting")
    with unused(folder):
        # The samples that are measured are others: half of what may be left of the class, a tenth or chance, is asked for here.
        most = None if options.share is not None else max(0.1, 1 / _width(subject)) / 2
        found = unlearn(
            subject.model, forgetting, share=options.share, target=most, retain=stay if len(stay[1]) else None
        )
    note("asking what is left")
    told = forgotten(subject.model, found.model, forgotten_ones, others, seed=options.seed)
    control = forgotten(
        subject.model, mute(subject.model, number, forgetting[0]), forgotten_ones, others, seed=options.seed
    )
    rows = []
    for name, each in (
        ("as it was", told.before),
        ("edited", told.after),
        ("head alone: the class is never answered", control.after),
    ):
        rows.append(
            [name, each.forget, each.retain, max(each.probe.values()), each.samples if each.samples is not None else "not within the steps"]
        )  # fmt: skip
    columns = [
        "network",
        "answered, the class",
        "right, the others",
        "linear probe of the class",
        "samples to learn it again",
    ]
    harmed, advice = harm(told, control.after)
    severity = "warning" if told.verdict == "kept" or harmed or subject.doubt else "note"
    text = " ".join(part for part in (subject.doubt, harmed, told.sentence, price(found)) if part)
    advice = UNTRAINED if subject.doubt else advice
    section = Section(
        "forgotten",
        "Was the class forgotten?",
        severity,
        f"{100 * told.after.forget:.1f} %",
        f"of class {_name(subject, number)} still answered",
        text,
        numbers={"verdict": told.verdict, "edit": found.to_dict()},
        method="modhifi",
        tables=[
            Table(f"On {len(forgotten_ones[0])} samples of the class and {len(others[0])} others that the edit did not see", columns, rows),
            *shares_tried(found, len(forgetting[0]), len(stay[0])),
        ],
        findings=[Finding(severity, text, "forgotten", advice, key=told.verdict)],
    )  # fmt: skip
    network = _save(folder, found.model, subject)
    facts = [("Network", type(subject.model).__name__), ("Data", subject.data), ("Written", f"{NETWORK}/")]
    opening = _opening(subject, network, data, options)
    note(opening)
    erased = "a class is called erased only beside a network that was trained without it: pass that as `retrained` to lineament.edit.forgotten"
    notes = [*subject.notes, erased, opening]
    return _written(folder, checkpoint, subject, facts, [section], notes, found.to_dict())


def _subject(model: Any, data: Any, options: EditOptions) -> _Subject:
    checks.number("samples", options.samples, low=4, integer=True)
    if is_language_model(model):
        own, tokenizer = load_language_model(str(model), device=options.device)
        ids = token_sequences(tokenizer, data, length=options.length, most=options.samples)
        require(
            len(ids) >= 4,
            f"data: {show(data)} holds {len(ids)} sequences of {options.length} tokens, expected at least 4",
        )
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(options.seed))]
        first, second = ([{"input_ids": part} for part in half.split(8)] for half in ids.chunk(2))
        return _Subject(
            own, str(model), f"{data}, {len(ids)} sequences", (first, second), None, (), tokenizer
        )
    loaded = load_model(model, weights=options.weights)
    require(
        loaded.kind != "export" and loaded.batch is None,
        "model: an exported network cannot be edited; pass the module that it was made from",
    )
    size = loaded.size if options.image_size is None else options.image_size
    samples = load_data(
        data, samples=options.samples, seed=options.seed, inputs=options.inputs, targets=options.targets,
        classes=options.classes, split=options.split, image_size=size, tokenizer=loaded.tokenizer,
    )  # fmt: skip
    if options.classes is not None:
        loaded = replace(loaded, classes=())
    with bring_together(
        loaded, samples, normalize=options.normalize, device=options.device, seed=options.seed
    ) as both:
        require(len(both) >= 4, f"data: {len(both)} samples, expected at least 4")
        order = torch.randperm(len(both), generator=torch.Generator().manual_seed(options.seed))
        rows = order.chunk(2)
        halves = tuple([both.inputs(part) for part in half.split(64)] for half in rows)
        labels = (both.targets[rows[0]], both.targets[rows[1]]) if both.task == "classification" else None
        return _Subject(
            loaded.model, loaded.source, f"{samples.source}, {len(both)} samples", halves, labels, both.classes,  # pyright: ignore[reportArgumentType]
            notes=both.notes, named=isinstance(model, str), doubt=doubt(both, () if options.classes else samples.classes),
        )  # fmt: skip


def _others(retain: _Subject, subject: _Subject, number: int) -> tuple[Tensor, Tensor]:
    """The samples of all classes but one."""
    if retain.labels is None:
        raise InputError(
            "retain: it has no classes; expected labelled samples of the classes that are to stay"
        )
    require(
        not (retain.classes and subject.classes) or list(retain.classes) == list(subject.classes),
        f"retain: its classes are {', '.join(map(str, retain.classes[:6]))}, those of the data {', '.join(map(str, subject.classes[:6]))}; expected the same",
    )
    parts = [_parts(x, y, number)[1] for x, y in zip(retain.halves, retain.labels)]
    inputs, labels = (torch.cat(each) for each in zip(*parts))
    require(
        len(labels) >= 8,
        f"retain: it holds {len(labels)} samples of classes that are to stay, expected at least 8",
    )
    return inputs, labels


def _same(subject: _Subject, share: float, **how: Any) -> nn.Module:
    return prune(subject.model, subject.halves[0], keep=share, **how).model


def _score(subject: _Subject, model: nn.Module) -> float:
    """Perplexity of texts, accuracy of classes, else the mean squared distance from the network's own answers; on the measuring half."""
    if subject.tokenizer is not None:
        total, count = 0.0, 0
        for batch in subject.halves[1]:
            ids = batch["input_ids"].to(device_of(model))
            with frozen(model), torch.no_grad():
                scores = logits(model(input_ids=ids))[:, :-1].float()
            total += float(F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
        return math.exp(min(total / count, 700))
    answers = _answers(model, subject.halves[1])
    if subject.labels is None:
        return float((answers - _answers(subject.model, subject.halves[1])).square().mean())
    return float((decided(answers) == subject.labels[1].cpu()).double().mean())


def _answers(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    found = []
    for batch in batches:
        with frozen(model), torch.no_grad():
            found.append(logits(called(model, batch)).float().cpu())
    return torch.cat(found)


def _pruned_section(
    found: Pruned, scores: dict[str, float], times: Timing, unit: str, batches: int, subject: _Subject
) -> Section:  # fmt: skip
    what = {"perplexity": "Perplexity", "accuracy": "Accuracy"}.get(
        unit, "Squared distance from the own answers"
    )
    form = "{:.2f}" if unit == "perplexity" else "{:.3f}"
    was, now = scores["as it was"], scores["pruned"]
    lost = was - now if unit == "accuracy" else now / max(was, 1e-12) - 1 if unit else now
    bad = lost > (0.02 if unit else 0.1)
    text = (
        f"With {100 * found.share:.0f} % of the parameters and {found.flops[1] / max(found.flops[0], 1):.2f} times the operations, {what.lower()} is "
        f"{form.format(now)} where it was {form.format(was)}; as many channels taken out by chance with the same repairs give "
        f"{form.format(scores['by chance, the same repairs'])}, by their norms without repair {form.format(scores['norms alone, no repair'])}. "
        f"{times.sentence}"
    )
    severity = "warning" if bad or subject.doubt else "good" if _knows(subject, unit, was) else "note"
    text = f"{subject.doubt} {text}".strip()
    sizes = [[name, *size, size[1] / size[0]] for name, size in found.sizes.items()]
    layers = [[name, cut, repaired] for name, (cut, repaired) in found.errors.items()]
    return Section(
        "network",
        "What does the smaller network cost?",
        severity,
        f"{100 * found.share:.0f} %",
        "of the parameters left",
        text,
        numbers={"scores": scores, "unit": unit or "squared distance", "seconds": list(times.seconds), "times as fast": list(times.parts)},
        method="modhifi",
        tables=[
            Table(what + " on the half that did not calibrate", ["network", what.lower()], [[k, v] for k, v in scores.items()]),
            Table("Channels", ["group", "before", "after", "share"], sizes),
            Table("Share of each layer's output lost", ["layer", "channels gone", "after compensation"], layers),
        ],
        findings=[Finding(severity, text, "network", UNTRAINED if subject.doubt else "")],
    )  # fmt: skip


def _knows(subject: _Subject, unit: str, accuracy: float) -> bool:
    """Whether there was much to lose: classes are answered at least halfway from always naming the most frequent one to always right."""
    if unit != "accuracy" or subject.labels is None:
        return True
    labels = subject.labels[1].cpu()
    return accuracy >= (1 + float(labels.bincount().max()) / len(labels)) / 2


def _classes(subject: _Subject, model: nn.Module) -> Section:
    assert subject.labels is not None
    labels = subject.labels[1].cpu()
    before, after = (decided(_answers(m, subject.halves[1])) == labels for m in (subject.model, model))
    present = labels.unique().tolist()
    rows = []
    for number in present:
        there = labels == number
        rows.append(
            [_name(subject, number), int(there.sum()), float(before[there].double().mean()), float(after[there].double().mean())]
        )  # fmt: skip
    at = min(range(len(rows)), key=lambda at: rows[at][3] - rows[at][2])
    worst, there = rows[at], labels == present[at]
    text = f"The class that changes most for the worse is {worst[0]}: right in {100 * worst[3]:.1f} % where it was {100 * worst[2]:.1f} % (of {worst[1]} samples)."
    table = Table("Accuracy by class", ["class", "samples", "before", "after"], rows)
    told = pays(before[there], after[there], len(rows))
    findings = [Finding("warning", text, "classes", "Compare classes before you use it, or take fewer channels out.", key="class pays")] if told else []  # fmt: skip
    return Section(
        "classes", "Which classes pay?", "warning" if told else "note", f"{100 * (worst[3] - worst[2]):+.1f}", f"points for class {worst[0]}", text,
        numbers={"classes": rows}, tables=[table], findings=findings,
    )  # fmt: skip


def _parts(batches: Sequence[Any], labels: Tensor, number: int) -> list[tuple[Any, Any]]:
    require(
        isinstance(batches[0], Tensor),
        "model: unlearning takes networks of one input, a tensor",
    )
    x, y = torch.cat(list(batches)), labels.cpu()
    there = y == number
    return [(x[there.to(x.device)], y[there]), (x[~there.to(x.device)], y[~there])]


def _class_number(subject: _Subject, label: str) -> int:
    known = [str(name) for name in subject.classes]
    if label in known:
        return known.index(label)
    highest = _width(subject) - 1
    require(
        label.isdigit() and int(label) <= highest,
        f"label: no class {label!r}{suggest(label, known or map(str, range(highest + 1)))}",
    )
    return int(label)


def _width(subject: _Subject) -> int:
    """How many classes there are."""
    assert subject.labels is not None
    return max(len(subject.classes), int(torch.cat(subject.labels).max()) + 1)


def _name(subject: _Subject, number: int) -> str:
    return subject.classes[number] if number < len(subject.classes) else str(number)


def _checkpoint(folder: Path, subject: _Subject, key: dict[str, Any]) -> Checkpoint:
    opened(folder, _NAME)
    key = {"model": digest(subject.model), "data": subject.data, **key, "versions": versions()}
    return Checkpoint(folder / STAGES / "steps", key)


def _save(folder: Path, model: nn.Module, subject: _Subject) -> Path:
    network = save(model, folder / NETWORK)
    if subject.tokenizer is not None:
        with suppress(AttributeError):
            subject.tokenizer.save_pretrained(network)
    return network


def _opening(subject: _Subject, network: Path, data: Any, options: EditOptions) -> str:
    """How the edited network is opened and audited, from where this was run."""
    place, held = str(network), str(data) if isinstance(data, str | Path) else "DATA"
    again = said_again(
        options.classes, options.inputs, options.targets, options.split, options.image_size, options.normalize
    )
    if (network / "config.json").is_file():
        shown = ["PROMPTS", "--text", held] if subject.tokenizer is not None else [held, *again]
        return (
            f"to open it: from_pretrained({place!r}), or {shlex.join(['lineament', 'audit', place, *shown])}"
        )
    if (network / BUILT_FROM).is_file():
        return f"its layers have several widths, which from_pretrained cannot open; to open it: lineament.edit.load({place!r})"
    opens = f"lineament.edit.load({place!r}, build), where build() makes the network as it was"
    if not subject.named:
        return f"to open it: {opens}"
    words = ["lineament", "audit", subject.source, held, "--weights", place, *again]
    return f"to audit it: {shlex.join(words)} ; to open it in Python: {opens}"


def _written(
    folder: Path, checkpoint: Checkpoint, subject: _Subject, facts: Any, sections: list[Section], notes: Any, extra: dict[str, Any]
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
