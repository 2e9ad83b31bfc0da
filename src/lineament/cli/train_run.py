"""One run of `lineament train`: its folder, the user's network and data brought together as the audit does it, and what is written.

The folder of an unfinished run holds `unfinished.json`, which says what was asked for: the same command goes on, another one is told what
differs. `train.json` comes last and makes a run a finished one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lineament.audit.stages import threads
from lineament.cli import console
from lineament.cli.option_values import classes, image_size, normalize
from lineament.cli.train_fit import fit
from lineament.cli.train_options import Options
from lineament.cli.train_output import BOARD, FILES, Log, say, write
from lineament.cli.train_result import Fitted
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require, show
from lineament.core.files import output_folder, possible_folder, write_json
from lineament.data.samples import Samples
from lineament.load.data import load_data, training_part
from lineament.load.loaded import Loaded
from lineament.load.model_and_data import ModelAndData, bring_together
from lineament.load.models import load_model
from lineament.load.tasks import one_hot_labels
from lineament.load.weights import digest, require_savable
from lineament.modules.unified_embedding.views import multiplex
from lineament.report.outcome import versions
from lineament.train.processes import Processes, randomness

_STAGES, _UNFINISHED = ".stages", "unfinished.json"
_HELD = 256


def train(a: argparse.Namespace, options: Options) -> int:
    """Train as the command line ``a`` says; everything is checked before anything is written."""
    folder = _folder(a.out, a.overwrite)
    processes = Processes(a.device)

    def note(line: str) -> None:
        if processes.first:
            console.note(line)

    note("reading the model and the data")
    with randomness(options.seed):
        loaded = load_model(a.model, weights=a.weights)
    require(
        loaded.kind == "factory",
        f"MODEL: {a.model!r} is no factory, and the audit could not open its new weights; expected file.py:factory, where factory() "
        "makes the network (and may load what it starts from)",
    )
    if options.multiplex is not None:
        shared = multiplex(loaded.model, fraction=options.multiplex, seed=options.seed)
        note(
            f"one table of {shared.rows:,} rows for {', '.join(shared.replaced)}: {shared.after:,} numbers instead of {shared.before:,}"
            + ("; the values that they were trained to are gone" if a.weights else "")
        )
    if processes.first:
        require_savable(loaded.model)
    samples = _samples(a)
    if a.classes:
        loaded = replace(loaded, classes=())  # those given come before the model's own
    with _brought_together(loaded, samples, a, options) as subject:
        for line in samples.notes:
            note(line)
        asked = _asked(a, options, subject, samples)
        new = not folder.exists()
        checkpoint = opened(folder, asked, a.overwrite) if processes.first else None
        record = Log(folder, note) if processes.first else None
        with threads(3 * subject.flops * options.batch_size), _nothing_left(folder, record if new else None):
            fitted = fit(
                loaded.model,
                lambda rows: subject.layout.apply(samples.inputs[rows]),
                samples.targets,
                options,
                processes=processes,
                checkpoint=checkpoint,
                record=record or (lambda history: None),
                note=note,
            )
    if checkpoint is not None and record is not None:
        record.close()
        write(folder, fitted, loaded, asked)
        checkpoint.finish()
        shutil.rmtree(folder / _STAGES, ignore_errors=True)
        (folder / _UNFINISHED).unlink(missing_ok=True)
        say(a, folder, fitted, record)
    return 0


@contextmanager
def _nothing_left(folder: Path, record: Log | None) -> Iterator[None]:
    """A new folder goes when the training is refused before an epoch was stored: there is nothing in it to go on with."""
    try:
        yield
    except InputError:
        if record is not None and not any((folder / _STAGES).rglob("*.safetensors")):
            record.close()
            shutil.rmtree(folder)
        raise


def runs_in(places: Sequence[str], note: Callable[[str], None]) -> dict[str, Fitted]:
    """The finished trainings in some folders, at any depth; what is unfinished or unreadable is said."""
    found: dict[str, Fitted] = {}
    for place in places:
        path = Path(place)
        require(
            path.is_dir(),
            f"--compare: {place!r} is no folder; expected runs of lineament train, or a folder of them",
        )
        for file in sorted({*path.rglob("train.json")}):
            try:
                found[str(file.parent)] = Fitted.read(file)
            except InputError as error:
                note(str(error))
        for file in sorted(path.rglob(_UNFINISHED)):
            old = (file.parent / "train.json").exists()
            note(
                f"{str(file.parent)!r} {'shows an earlier run, which an unfinished one is to replace' if old else 'is not finished; left out'}"
            )
    require(
        len(found) > 0, f"--compare: no finished run of lineament train in {', '.join(map(repr, places))}"
    )
    return found


def _folder(out: str, overwrite: bool) -> Path:
    """The run's folder: new, empty, or of an unfinished run; a finished one only with ``overwrite``."""
    folder = possible_folder(out)
    if folder.is_dir():
        present = {p.name for p in folder.iterdir()}
        require(
            overwrite or "train.json" not in present,
            f"--out: {out!r} already holds a finished run; give --overwrite to replace it, or choose another folder",
        )
        own = {*FILES, _UNFINISHED, _STAGES, BOARD}
        foreign = sorted(name for name in present - own if not _half_written(name))
        require(
            not foreign,
            f"--out: {out!r} holds files that are no training's ({show(foreign[0]) if foreign else ''} ...); choose an empty or new folder",
        )
    return folder


def _half_written(name: str) -> bool:
    return name.startswith(tuple(f".{Path(file).stem}-" for file in (*FILES, _UNFINISHED)))


def _samples(a: argparse.Namespace) -> Samples:
    # Of a data set in parts the audit looks at the test part; training must not.
    samples = load_data(
        a.data,
        samples=2**62,
        inputs=a.inputs,
        targets=a.targets,
        classes=classes(a.classes),
        split=a.split or training_part(a.data, inputs=a.inputs),
        image_size=image_size(a.image_size),
    )
    require(
        samples.lengths is None,
        "DATA: samples differ in length, expected all alike; train.fit in Python takes a DataLoader with its collate_fn",
    )
    samples = replace(samples, targets=one_hot_labels(samples.targets))
    whole = not samples.targets.is_floating_point() or bool(
        (samples.targets == samples.targets.round()).all()
    )
    require(
        whole and samples.targets.ndim == 1,
        f"DATA: targets are {show(samples.targets)}, expected one class label a sample; train makes classifiers only, and embeddings of classes",
    )
    return replace(samples, targets=samples.targets.long())


@contextmanager
def _brought_together(
    loaded: Loaded, samples: Samples, a: argparse.Namespace, options: Options
) -> Iterator[ModelAndData]:
    """Network and data as the audit would see them, judged on a few samples of every class; then the labels of all."""
    labels = samples.targets
    low = int(labels.min())
    require(low >= 0, f"DATA: targets: got label {low}, expected labels from 0 on")
    firsts = [int((labels == c).nonzero()[0]) for c in labels.unique().tolist()]
    rows = torch.tensor([*firsts, *range(min(_HELD, len(samples)))]).unique()
    together = bring_together(
        loaded,
        samples[rows],
        task="classification" if options.embedding is None else "embedding",
        normalize=normalize(a.normalize),
        batch_size=options.batch_size,
        seed=options.seed,
    )
    with together as subject:
        if options.embedding is not None:
            yield subject
            return
        width = subject.outputs.shape[1]
        empty = (torch.bincount(labels, minlength=width) == 0).nonzero()[:, 0].tolist()
        names = ", ".join(subject.class_name(c) for c in empty[:4]) + (", ..." if len(empty) > 4 else "")
        require(
            not empty,
            f"DATA: {len(empty)} of the model's {width} classes have no example: {names}; every output needs examples to learn from",
        )
        yield subject


def _asked(
    a: argparse.Namespace, options: Options, subject: ModelAndData, samples: Samples
) -> dict[str, Any]:
    """Everything that decides the result, flat, so that what differs can be named."""
    data = hashlib.sha256()
    for value in (samples.inputs, samples.targets):
        data.update(f"{value.dtype}{tuple(value.shape)}".encode())
        data.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    here = versions()
    return {
        "model": a.model,
        "data": a.data,
        **options.to_dict(),
        "layout": str(subject.layout),
        "classes": list(subject.classes),
        "network at the start (sha256)": digest(subject.model),
        "samples (sha256)": data.hexdigest(),
        **{name: here[name] for name in ("lineament", "torch")},
    }


def opened(folder: Path, asked: dict[str, Any], overwrite: bool) -> Checkpoint:
    """Make the folder and open its checkpoint, unless it holds the beginning of another run."""
    file = folder / _UNFINISHED
    before: Any = None
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
    same = before == json.loads(json.dumps(asked))
    if isinstance(before, dict) and not same and not overwrite:
        differ = [
            f"{key} was {show(before.get(key), 40)} and is {show(asked.get(key), 40)}"
            for key in dict.fromkeys((*before, *asked))
            if before.get(key) != json.loads(json.dumps(asked.get(key)))
        ]
        raise InputError(
            f"--out: {str(folder)!r} holds an unfinished run that was asked for otherwise ({'; '.join(differ[:3])}); give its command to go "
            "on, choose another folder, or give --overwrite"
        )
    output_folder(folder)
    for leftover in folder.iterdir():
        if _half_written(leftover.name):
            leftover.unlink()
    if not same:
        # Another run begins: nothing of the last one may be taken for its own.
        for stale in (folder / _STAGES, folder / BOARD):
            shutil.rmtree(stale, ignore_errors=True)
        write_json(file, asked)
    return Checkpoint(folder / _STAGES, asked)
