"""What can a data set do without? A condensed set, and a page that says what it is worth: by architecture, beside what it must beat, in storage and in time."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament.audit.stages import STAGES, Report, command, fresh, opened, unused
from lineament.core import checks, models
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require
from lineament.data.samples import Samples
from lineament.learn.condensation.condensed import Condensed
from lineament.learn.condensation.condensing import METHODS, earlier_set, ready, scale_of
from lineament.learn.condensation.continual import Continual, class_tasks, continual
from lineament.learn.condensation.evaluating import Evaluation, evaluate, labels_of_test
from lineament.learn.condensation.networks import POOL
from lineament.learn.condensation.options import Condensation
from lineament.learn.condensation.trials import Protocol
from lineament.load.data import Data, load_data, training_part
from lineament.papers import search as papers
from lineament.report import page
from lineament.report.figures import picture
from lineament.report.outcome import Table, versions
from lineament.report.section import Finding, Section
from lineament.report.text import plain

_NAME, _WRITTEN = "condense", ("condensed.npz", "condensed.json", "pictures", "dataset")
# The share of the samples that is held out where no test data are given.
_HELD = 0.2


@dataclass(frozen=True)
class CondenseOptions:
    """What condensing a user's data rarely needs to be told.

    Attributes:
        inputs, targets, classes, split, image_size: as for :func:`~lineament.load.load_data`; where there is a part ``train``, it is condensed by default.
        test: data to evaluate on; by default a fifth of the samples, which are then not condensed.
        network: of the pool, on which gradients are matched. networks: on which the set is tried.
        learning, protocol: of the learning, and of the trainings that judge it: fewer and shorter by default than the published ones, which are ``Protocol()`` on all of the pool.

    >>> CondenseOptions().network
    'convnet'
    """

    inputs: str | None = None
    targets: str | None = None
    classes: Sequence[str] | None = None
    split: str | None = None
    image_size: int | tuple[int, int] | None = None
    test: Data | None = None
    network: str = "convnet"
    networks: Sequence[str] = ("convnet", "mlp", "lenet")
    learning: Condensation = field(default_factory=Condensation)
    protocol: Protocol = field(default_factory=lambda: Protocol(networks=5, epochs=100))


def condense_data(
    data: Data,
    *,
    out: str | Path,
    per_class: int,
    method: str = "dsac",
    start: str = "real",
    judged: bool = False,
    steps: int | None = None,
    samples: int = 60_000,
    seed: int = 0,
    options: CondenseOptions = CondenseOptions(),
    overwrite: bool = False,
    device: str | torch.device | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Condense a user's images into ``out``: the set (``condensed.npz``, ``pictures``, ``condensed.json``) and a page.

    Args:
        data: labelled images, as :func:`~lineament.load.load_data` reads them, at most ``samples``.
        per_class, method, start: see :func:`lineament.learn.condense`.
        judged: train networks on the set and on what it must beat. steps: also use it as the memory of a learner that meets the classes in so many parts.
        overwrite: replace a finished set in that folder.

    Raises:
        InputError: whatever cannot be used, before the first step.

    >>> import tempfile
    >>> found = condense_data("digits", out=tempfile.mkdtemp(), per_class=1, method="random")
    >>> [section.name for section in found.sections]
    ['set']
    """
    checks.one_of("method", method, METHODS)
    checks.one_of("network", options.network, POOL)
    for name in options.networks:
        checks.one_of("networks", name, POOL)
    require(len(options.networks) > 0, f"networks: got none, expected some of {', '.join(POOL)}")
    require(
        options.test is None or judged or steps is not None,
        "test: got data, but nothing is to be tested; ask for `judged` or `steps` too, or leave it out",
    )
    checks.number("per_class", per_class, low=1, integer=True)
    # What classes are there is not known yet.
    replace(options.learning, groups="all").resolved(per_class, 1)
    if start not in ("real", "noise"):
        earlier_set(start)
    folder = fresh(out, overwrite, _NAME, also=_WRITTEN)
    note("reading the data")
    reading = {
        "samples": samples, "seed": seed, "inputs": options.inputs, "targets": options.targets, "classes": options.classes,
        "split": options.split or training_part(data, inputs=options.inputs), "image_size": options.image_size,
    }  # fmt: skip
    held = load_data(data, **reading)
    with _own_words(options):
        x, y = pictures_of(held)
        top = scale_of(x)
        y = checks.labels("targets", y, count=len(x))
    test = None
    if judged or steps is not None:
        if options.test is not None:
            try:
                test = pictures_of(load_data(options.test, **{**reading, "split": None}))
            except InputError as error:
                raise InputError(re.sub("^data:", "test:", str(error))) from error
            test = (test[0], labels_of_test(test, tuple(x.shape[1:]), top, int(y.max()) + 1))
        else:
            x, y, test = _held_out(x, y, seed)
        if steps is not None:
            checks.number("steps", steps, low=2, high=(int(y.max()) + 1) // 2, integer=True)
    if device is not None:
        with models.usable(device):
            x, y = x.to(device), y.to(device)
            test = None if test is None else (test[0].to(device), test[1].to(device))
    key = {
        "data": held.source, "shape": list(x.shape), "settings": [per_class, method, start, seed, samples, str(asdict(options.learning)), options.network],
        "values": float(x.double().mean()), "versions": versions(),
    }  # fmt: skip
    with _own_words(options):
        begin = ready(
            x, y, per_class=per_class, method=method, network=options.network, start=start, options=options.learning, classes=held.classes,
            seed=seed,
        )  # fmt: skip
    # Hours of work are not thrown away for another option.
    checkpoint = Checkpoint(opened(folder, _NAME) / STAGES / "condensing", key, discard=overwrite)
    if checkpoint.resumed:
        note("an earlier run of the same condensing was cut off; going on where it stopped")
    note(f"condensing {len(x):,} pictures to {per_class} a class by {method}")
    begun = time.monotonic()
    with unused(folder):
        made = begin(checkpoint)
    made.save(folder)
    sections = [_set(made, x, time.monotonic() - begun)]
    # Another way to judge does not find what an earlier one left, but the set.
    told = [
        options.networks,
        asdict(options.protocol),
        str(options.test),
        *([] if test is None else [len(test[1]), float(test[0].double().mean())]),
    ]
    judging = checkpoint.within(hashlib.sha256(repr(told).encode()).hexdigest()[:16])
    if judged and test is not None:
        found = evaluate(
            made,
            test,
            real=(x, y),
            networks=list(options.networks),
            protocol=options.protocol,
            checkpoint=judging,
            note=note,
            seed=seed,
        )
        sections += [_worth(found, options.protocol, len(test[1])), _anonymous(found)]
    if steps is not None and test is not None:
        note(f"learning the classes in {steps} parts")
        tasks = class_tasks(x, y, *test, steps, seed=seed)
        ways = tuple(dict.fromkeys((method, "random")))
        remembered = continual(
            tasks, per_class=per_class, methods=ways, network=options.network, options=options.learning,
            protocol=options.protocol, seed=seed, checkpoint=judging.within(f"{steps} parts"), note=note,
        )  # fmt: skip
        sections.append(_memory(remembered))
    findings = [finding for section in sections for finding in section.findings]
    paper = next(paper for paper in papers() if paper.slug == "dcc")
    facts = [
        ("Data", held.source), ("Pictures", f"{len(x):,}"), ("Kept for testing", 0 if test is None else f"{len(test[1]):,}"),
        ("The set", f"{len(made.labels):,} pictures, {per_class} a class"), ("Method", method), *([("Matched on", options.network)] if len(made.trace) else []),
        ("Normalisation", f"mean {_told(made.mean)}, deviation {_told(made.std)}"),
    ]  # fmt: skip
    html, json = page.write(
        folder, held.source, "What can this data set do without?", facts, findings, sections,
        command=command("lineament.audit.condense.condense_data(data, out=..., per_class=...)"),
        methods={paper.slug: {"title": paper.title, "year": paper.year, "url": paper.url}}, versions=versions(),
        notes=[*held.notes, *made.notes], extra={}, name=_NAME, kicker="Lineament condensed set",
    )  # fmt: skip
    checkpoint.finish()
    shutil.rmtree(folder / STAGES, ignore_errors=True)
    return Report(held.source, findings, sections, html, json)


@contextmanager
def _own_words(options: CondenseOptions) -> Iterator[None]:
    """What is wrong with labels is said of the data, unless their array was named."""
    try:
        yield
    except InputError as error:
        told = str(error)
        if options.targets is None and told.startswith("targets:"):
            raise type(error)("data: " + told.removeprefix("targets: ")) from error
        raise


def pictures_of(samples: Samples) -> tuple[Tensor, Tensor]:
    """Images [n, channels, height, width] and labels, from any order in which images are stored."""
    x, y = samples.inputs, samples.targets
    require(
        x.ndim in (3, 4),
        f"data: got samples of {tuple(x.shape[1:])}, expected images (height, width) or (channels, height, width)",
    )
    require(
        y.ndim == 1 and not y.is_floating_point(),
        f"data: got {checks.show(y)} as labels, expected one whole number or name a picture"
        + ("; of one-hot rows take argmax(1)" if y.ndim == 2 else "; save them as integers"),
    )
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[1] not in (1, 3) and x.shape[-1] in (1, 3, 4):
        x = x.movedim(-1, 1)
    return x, y


def _held_out(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A fifth of each class apart, the rest first."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(y), dtype=torch.bool)
    for c in y.unique():
        rows = (y == c).nonzero()[:, 0]
        test[rows[torch.randperm(len(rows), generator=generator)[: round(_HELD * len(rows))]]] = True
    require(bool(test.any()), "data: too few samples to hold out a fifth; give test data")
    return x[~test], y[~test], (x[test], y[test])


def _told(values: Tensor) -> str:
    return ", ".join(f"{v:.4g}" for v in values.tolist())


def _set(made: Condensed, images: Tensor, seconds: float) -> Section:
    total, held = len(images), made.as_bytes().numel() / 2**20
    share = len(made.labels) / total
    whole = images.numel() / 2**20
    outside = float(((made.pictures < 0) | (made.pictures > made.top)).double().mean())
    sentence = (
        f"{len(made.labels):,} pictures stand for {total:,}: {100 * share:.2g} % of them, and {held:.3g} of {whole:.3g} MiB in 8 bits, not compressed. The arrays hold them in the scale of the data, [0, {made.top:g}]; "
        f"{100 * outside:.1f} % of their values lie outside it"
        + (", and are cut off in the 8-bit pictures." if outside else ".")
    )
    tables = []
    if len(made.trace):
        thirds = [part for part in made.trace.tensor_split(3) if len(part)]
        rows = [
            [
                f"{int(p[0, 0])} to {int(p[-1, 0])}",
                float(p[:, 2].mean()),
                float(p[:, 3].mean()),
                float(p[:, 4].mean()),
            ]
            for p in thirds
        ]
        tables = [
            Table(
                "The learning",
                ["networks", "share of summed steps", "mean loss", "share of gradient rows all but zero"],
                rows,
            )
        ]
    shown = min(made.per_class, 10)
    drawn = picture(
        lambda ax: made.plot(ax, shown), alt=f"The first {shown} pictures of each class of the set, one row a class.",
        caption="The set, one row a class; values outside the scale are cut off.", kind="png",
        size=(6.4, max(2.0, min(8.0, 0.5 * len(made.names())))),
    )  # fmt: skip
    return Section(
        "set", "The set", status="note", number=f"{len(made.labels):,}", unit=f"pictures for {total:,}", sentence=sentence,
        pictures=[drawn], tables=tables, method="dcc" if len(made.trace) else "", seconds=seconds,
        numbers={"share": share, "outside": outside, "per_class": made.per_class, "settings": plain(dict(made.settings))},
    )  # fmt: skip


def _worth(found: Evaluation, protocol: Protocol, tested: int) -> Section:
    nets = list(found.accuracy["condensed"])
    first = nets[0]

    def cell(held: Any, what: str, net: str) -> str:
        values = held.get(what, {}).get(net)
        return (
            ""
            if values is None
            else f"{100 * float(values.mean()):.1f} ± {100 * float(values.std(correction=0)):.1f}"
        )

    rows = [[what, *(cell(found.accuracy, what, net) for net in nets)] for what in found.accuracy]
    rows += [
        [f"{what}, augmented", *(cell(found.augmented, what, net) for net in nets)]
        for what in found.augmented
    ]
    mine, random = found.accuracy["condensed"][first], found.accuracy["random real"][first]
    gain, count = mine - random, len(mine)
    error = float(gain.std() / count**0.5) if count > 1 else float("inf")
    full = found.accuracy.get("all pictures", {}).get(first)
    ahead = float(gain.mean()) > 2 * error
    sentence = (
        f"{first} trained on the set is right for {100 * float(mine.mean()):.1f} % of {tested:,} test pictures (population deviation over {count} networks "
        f"{100 * float(mine.std(correction=0)):.1f}), on as many random real pictures for {100 * float(random.mean()):.1f} %"
        + ("" if full is None else f", on all pictures for {100 * float(full.mean()):.1f} %")
        + f"; the difference to random pictures is {100 * float(gain.mean()):+.1f} points"
        + (
            f" (standard error over networks {100 * error:.1f})."
            if count > 1
            else " (one network: no error)."
        )
    )
    if full is not None:
        short, long = (found.seconds[what][first] for what in ("condensed", "all pictures"))
        epochs = protocol.epochs_of(False) + 1, protocol.full_epochs + 1
        sentence += f" A training of {first} took {short:.3g} s on the set ({epochs[0]} epochs) and {long:.3g} s on all pictures ({epochs[1]} epochs), the test included."
    scores = [
        f"label-robust score {found.label_robust:.1f} %" if found.label_robust is not None else "",
        f"augmentation-robust score {found.augmentation_robust:.1f} %"
        if found.augmentation_robust is not None
        else "",
    ]
    better = [
        f"{what} {100 * float(held[first].mean()):.1f} %"
        for what, held in found.accuracy.items()
        if what in ("own start", "class means") and first in held and float((held[first] - mine).mean()) > 0
    ]
    if better:
        sentence += f" What costs nothing to make does better: {', '.join(better)}."
    elif not ahead:
        sentence += " The set is no better than real pictures drawn at random, as far as this can tell."
    worth = ahead and not better
    finding = Finding(
        "good" if worth else "warning", sentence, "worth",
        advice="" if worth else "Condense for longer (outer), or take another method, and compare again.",
    )  # fmt: skip
    chart = picture(
        found.plot, alt="Test accuracy by what networks were trained on, one colour a network. " + sentence,
        caption=f"Test accuracy, mean and population deviation of {count} networks.",
    )  # fmt: skip
    return Section(
        "worth", "What is it worth?", status=finding.severity, number=f"{100 * float(mine.mean()):.1f} %", unit=f"test accuracy of {first} trained on the set",
        sentence=sentence + (" Of " + first + ": " + ", ".join(s for s in scores if s) + "." if any(scores) else ""),
        pictures=[chart], tables=[Table("Test accuracy, %, by what was trained on", ["trained on", *nets], rows)], method="dcc",
        numbers={"evaluation": found.to_dict(), "protocol": asdict(protocol)}, findings=[finding],
    )  # fmt: skip


def _anonymous(found: Evaluation) -> Section:
    near, real = float(found.nearest.median()), float(found.nearest_real.median())
    least = float(found.nearest.min())
    sentence = (
        f"The nearest training picture of a picture of the set is {near:.3f} of the scale away (root mean square, median of {len(found.nearest)}; least {least:.3f}); of a "
        f"random training picture the nearest other one is {real:.3f} away, and two random ones are {float(found.apart.median()):.3f} apart. Distance is no promise of anonymity: a set that began with real pictures holds much of them."
    )
    severity = "warning" if least < real / 2 else "note"
    return Section(
        "nearest", "Is it anonymous?", status=severity, number=f"{near:.3f}", unit="of the scale to the nearest training picture (median)", sentence=sentence,
        method="dcc", numbers={"nearest": found.nearest.tolist(), "nearest_real": found.nearest_real.tolist(), "apart": found.apart.tolist()},
        findings=[Finding(severity, sentence, "nearest", advice="Treat the set as the data themselves: who may not see those may not see it." if severity == "warning" else "")],
    )  # fmt: skip


def _memory(found: Continual) -> Section:
    last = {name: 100 * float(v[-1].mean()) for name, v in found.accuracy.items()}
    told = ", ".join(f"{name} {v:.1f} %" for name, v in last.items())
    sentence = f"After all {len(found.memory)} parts, networks trained anew on the memory of {found.memory[-1]:,} pictures have a test accuracy of: {told}."
    rows = [
        [k + 1, size, *(f"{100 * float(v[k].mean()):.1f} ± {100 * float(v[k].std(correction=0)):.1f}" for v in found.accuracy.values())]
        for k, size in enumerate(found.memory)
    ]  # fmt: skip
    chart = picture(
        found.plot,
        alt="Test accuracy on all parts met, by part. " + sentence,
        caption="Accuracy on all classes met so far.",
    )
    return Section(
        "memory", "As the memory of a learner", status="note", number=f"{next(iter(last.values())):.1f} %", unit="after the last part", sentence=sentence,
        pictures=[chart], tables=[Table("Test accuracy on all classes met, %", ["parts", "memory", *found.accuracy], rows)], method="dcc",
        numbers=found.to_dict(), findings=[Finding("note", sentence, "memory")],
    )  # fmt: skip
