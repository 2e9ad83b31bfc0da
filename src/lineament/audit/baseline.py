"""What must a network beat on these data? Every descriptor with every classifier, tuned on a training part and looked at once on a test part.

The table of Wahid, Shahriar, Sobuj 2022 (arXiv 2201.10102) for a user's own data, with networks grown by boosting (arXiv 1909.12098), infinitely wide and
deep ones (arXiv 2204.14126), and any network's sites as further descriptors. Each pair is a stage of a checkpoint, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lineament.audit.baseline_data import (
    SiteRows,
    channels_first,
    check_feature,
    class_labels,
    feature_rows,
    is_images,
    stratified_split,
)
from lineament.audit.baseline_pairs import (
    EVERY,
    Pair,
    accuracy_by_size,
    evaluated_pair,
    mean_accuracy,
    write_best_model,
    write_settings,
)
from lineament.audit.baseline_sections import SLUG, mistakes_section, size_section, table_section, to_beat
from lineament.audit.stages import STAGES, Report, command, fresh, opened
from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import one_of
from lineament.handcrafted.table import EFFORTS, grey_range
from lineament.load.data import Data, load_data
from lineament.papers import search
from lineament.report import page
from lineament.report.outcome import versions
from lineament.report.section import Finding

_NAME = "baseline"
_CALL = "lineament.audit.baseline.baseline(data, out=...)"


@dataclass(frozen=True)
class BaselineOptions:
    """What a baseline rarely needs to be told.

    Attributes:
        inputs, targets, split, image_size: as for :func:`lineament.load.data.load_data`.
        effort: ``"none"``, ``"small"`` or ``"full"``, how many settings are tried.
        ink: make images bright ink, cropped and centred, first: for glyphs.
        test: the share of the samples in the test part.

    >>> BaselineOptions().effort
    'small'
    """

    inputs: str | None = None
    targets: str | None = None
    split: str | None = None
    image_size: int | tuple[int, int] | None = None
    effort: str = "small"
    ink: bool = False
    test: float = 0.2


def baseline(
    data: Data,
    *,
    out: str | Path,
    features: Sequence[str] | None = None,
    classifiers: Sequence[str] = ("svm", "knn", "forest"),
    splits: int = 1,
    samples: int = 5000,
    seed: int = 0,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda line: None,
    options: BaselineOptions = BaselineOptions(),
) -> Report:
    """The table of descriptors and classifiers for labelled data, as `baseline.html` and `baseline.json` in ``out``.

    Args:
        data: what :func:`lineament.load.data.load_data` takes, with class labels.
        features: of images ``"pixels"``, ``"hog"``, ``"lbp"``, ``"gabor"`` (default: these four) and their variants; of other data ``"columns"`` (default);
            ``"MODEL:SITE"`` is a network's site.
        classifiers: ``"svm"``, ``"knn"``, ``"forest"``, ``"gbdt"``, ``"gbnn"``, ``"infinite"``.
        splits: how many random stratified splits, whose spread is told.
        samples, seed, overwrite, note: as for :func:`lineament.audit.run.audit`.

    Raises:
        InputError: data without class labels, a class with fewer than two samples, an unknown feature or classifier.

    >>> import tempfile
    >>> found = baseline("digits", out=tempfile.mkdtemp(), features=["pixels"], classifiers=["knn"], samples=200, options=BaselineOptions(effort="none"))
    >>> found["table"].number.endswith("%")
    True
    """
    checks.number("splits", splits, low=1, integer=True)
    checks.number("test", options.test, low=0, high=1, open_low=True, open_high=True)
    checks.seed("seed", seed)
    one_of("effort", options.effort, EFFORTS)
    for name in checks.listed("classifiers", classifiers, f"{', '.join(EVERY)}"):
        one_of("classifiers", name, EVERY)
    folder = fresh(out, overwrite, _NAME)
    note("reading the data")
    held = channels_first(
        load_data(
            data, samples=samples, seed=seed, inputs=options.inputs, targets=options.targets, split=options.split,
            image_size=options.image_size,
        )
    )  # fmt: skip
    for line in held.notes:
        note(line)
    y = class_labels(held)
    images = is_images(held)
    names = tuple(features or (("pixels", "hog", "lbp", "gabor") if images else ("columns",)))
    for name in names:
        check_feature(name, held)
    parts = [stratified_split(y, options.test, seed + k) for k in range(splits)]
    networks = {name: SiteRows(name, held) for name in names if ":" in name}
    opened(folder, _NAME)
    key = {
        "data": hashlib.sha256(held.inputs.contiguous().numpy().tobytes() + y.tobytes()).hexdigest(),
        "asked": [list(names), list(classifiers), splits, seed, str(options)],
        "networks": [network.digest for network in networks.values()],
        "versions": versions(),
    }
    checkpoint = Checkpoint(folder / STAGES / "pairs", key)
    if checkpoint.resumed:
        note("an earlier run of the same baseline was cut off; going on where it stopped")
    made: dict[str, np.ndarray] = {}

    def rows(name: str) -> np.ndarray:
        if name not in made:
            made[name] = feature_rows(name, held, options, networks)
        return made[name]

    pairs: list[Pair] = []
    for k, (train, test) in enumerate(parts):
        for name in names:
            for kind in classifiers:
                stage = f"{k} {name} {kind}"
                if not checkpoint.finished(stage, Pair):
                    note(f"split {k + 1}/{splits}: {name} with {kind}")
                found = checkpoint.stage(
                    stage,
                    lambda name=name, kind=kind, train=train, test=test, k=k: evaluated_pair(
                        name, kind, rows(name), y, train, test, k, options.effort, seed
                    ),
                    Pair,
                )
                pairs.append(found)
    best = max(((n, c) for n in names for c in classifiers), key=lambda pair: mean_accuracy(pairs, *pair))
    top = next(p for p in pairs if (p.descriptor, p.classifier, p.split) == (*best, 0))
    sizes = checkpoint.stage(
        "sizes",
        lambda: accuracy_by_size(top, rows(best[0]), y, *parts[0], seed),
        list[tuple[int, float]],
    )
    train, test = parts[0]
    sections = [
        table_section(pairs, names, classifiers, len(train), len(test), splits),
        mistakes_section(top, y[test], test, held, images, splits),
        size_section(top, sizes, splits),
    ]
    accuracy = mean_accuracy(pairs, *best)
    finding = Finding(
        "note",
        to_beat(best, accuracy, top.accuracy, len(test), len(train), splits),
        key="baseline",
        section="table",
    )
    write_settings(folder, pairs, names, classifiers)
    told = {"ink": options.ink, "levels": list(grey_range(held.inputs)) if images else None}
    unwritten = write_best_model(folder, top, rows(best[0]), y, train, seed, told=told)
    for line in unwritten:
        note(line)
    paper = next(paper for paper in search() if paper.slug == SLUG)
    title = f"What must a network beat on {held.source or 'these data'}?"
    html, json_file = page.write(
        folder, title, "Fixed descriptors and classical classifiers, tuned on the training part only.",
        [
            ("Data", held.source), ("Samples", f"{len(held):,}" + (f" of {held.total:,}" if held.total > len(held) else "")),
            ("Training / test", f"{len(train):,} / {len(test):,}"), ("Classes", len(np.unique(y))), ("Splits", splits),
        ],
        [finding], sections, command=command(_CALL),
        methods={paper.slug: {"title": paper.title, "year": paper.year, "url": paper.url}}, versions=versions(),
        notes=[*held.notes, *(network.note for network in networks.values()), *unwritten], name=_NAME, kicker="Lineament baseline",
    )  # fmt: skip
    checkpoint.finish()
    shutil.rmtree(folder / STAGES, ignore_errors=True)
    return Report(title, [finding], sections, html, json_file)
