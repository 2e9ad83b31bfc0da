"""What must a network beat on these data? Every descriptor with every classifier, tuned on a training part and looked at once on a test part.

The table of Wahid, Shahriar, Sobuj 2022 (arXiv 2201.10102) for a user's own data, with networks grown by boosting (arXiv 1909.12098), infinitely wide and
deep ones (arXiv 2204.14126), and any network's sites as further descriptors. Each pair is a stage of a checkpoint, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from lineament.audit.phrases import percent
from lineament.audit.stages import STAGES, Report, command, fresh, opened
from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, one_of, require, show, suggest
from lineament.core.files import write_json
from lineament.core.statistics.shares import wilson
from lineament.data.samples import Samples
from lineament.handcrafted.table import (
    CLASSIFIERS,
    DESCRIPTORS,
    EFFORTS,
    Entry,
    classifier,
    described,
    evaluated,
)
from lineament.kernels.classifiers import InfiniteClassifier
from lineament.learn.boosting.estimators import GBNNClassifier
from lineament.learn.boosting.network import SiteFeatures
from lineament.load.data import Data, load_data
from lineament.load.models import load_model
from lineament.papers import search
from lineament.report import page
from lineament.report.figures import picture
from lineament.report.outcome import Table, versions
from lineament.report.section import Finding, Section
from lineament.report.text import plain

EVERY = (*CLASSIFIERS, "gbnn", "infinite")
_NAME = "baseline"
_CALL = "lineament.audit.baseline.baseline(data, out=...)"
_SLUG = "bangla-digits"


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


@dataclass(frozen=True)
class Pair:
    """One descriptor with one classifier on one split, as it is stored."""

    descriptor: str
    classifier: str
    split: int
    features: int
    settings: dict[str, Any]
    validation: float | None
    accuracy: float
    macro_f1: float
    predicted: np.ndarray
    margin: np.ndarray | None
    seconds: float
    seconds_predicting: float


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
    held = load_data(
        data, samples=samples, seed=seed, inputs=options.inputs, targets=options.targets, split=options.split,
        image_size=options.image_size,
    )  # fmt: skip
    y = _labels(held)
    images = _is_images(held)
    names = tuple(features or (("pixels", "hog", "lbp", "gabor") if images else ("columns",)))
    for name in names:
        _check_feature(name, images)
    opened(folder, _NAME)
    key = {
        "data": hashlib.sha256(held.inputs.contiguous().numpy().tobytes() + y.tobytes()).hexdigest(),
        "asked": [list(names), list(classifiers), splits, seed, str(options)],
        "versions": versions(),
    }
    checkpoint = Checkpoint(folder / STAGES / "pairs", key)
    if checkpoint.resumed:
        note("an earlier run of the same baseline was cut off; going on where it stopped")
    made: dict[str, np.ndarray] = {}

    def rows(name: str) -> np.ndarray:
        if name not in made:
            made[name] = _features(name, held, options)
        return made[name]

    parts = [_split(y, options.test, seed + k) for k in range(splits)]
    pairs: list[Pair] = []
    for k, (train, test) in enumerate(parts):
        for name in names:
            for kind in classifiers:
                note(f"split {k + 1}/{splits}: {name} with {kind}")
                found = checkpoint.stage(
                    f"{k} {name} {kind}",
                    lambda name=name, kind=kind, train=train, test=test, k=k: _pair(
                        name, kind, rows(name), y, train, test, k, options.effort, seed
                    ),
                    Pair,
                )
                pairs.append(found)
    best = max(((n, c) for n in names for c in classifiers), key=lambda pair: _mean(pairs, *pair))
    top = next(p for p in pairs if (p.descriptor, p.classifier, p.split) == (*best, 0))
    sizes = checkpoint.stage(
        "sizes",
        lambda: _by_size(top, rows(best[0]), y, *parts[0], options.effort, seed),
        list[tuple[int, float]],
    )
    train, test = parts[0]
    sections = [
        _table(pairs, names, classifiers, len(train), len(test), splits),
        _best(top, y[test], test, held, images),
        _learning(top, sizes),
    ]
    accuracy = _mean(pairs, *best)
    finding = Finding(
        "note",
        _to_beat(best, accuracy, top.accuracy, len(test), len(train), splits),
        key="baseline",
        section="table",
    )
    _write_settings(folder, pairs, names, classifiers)
    unwritten = _write_models(folder, best, pairs, rows, y, train, options.effort, seed)
    for line in unwritten:
        note(line)
    paper = next(paper for paper in search() if paper.slug == _SLUG)
    title = f"What must a network beat on {held.source or 'these data'}?"
    html, json_file = page.write(
        folder, title, "Fixed descriptors and classical classifiers, tuned on the training part only.",
        [
            ("Data", held.source), ("Samples", f"{len(held):,}" + (f" of {held.total:,}" if held.total > len(held) else "")),
            ("Training / test", f"{len(train):,} / {len(test):,}"), ("Classes", len(np.unique(y))), ("Splits", splits),
        ],
        [finding], sections, command=command(_CALL),
        methods={paper.slug: {"title": paper.title, "year": paper.year, "url": paper.url}}, versions=versions(),
        notes=[*held.notes, *unwritten], name=_NAME, kicker="Lineament baseline",
    )  # fmt: skip
    checkpoint.finish()
    shutil.rmtree(folder / STAGES, ignore_errors=True)
    return Report(title, [finding], sections, html, json_file)


def _to_beat(best: tuple[str, str], accuracy: float, first: float, test: int, train: int, splits: int) -> str:
    """What a network must beat, or that these samples cannot tell a better one; ``first``: the accuracy on the split of the interval."""
    low, high = wilson(round(first * test), test)
    if accuracy >= 1:
        on = (
            f"these {test:,} test samples"
            if splits == 1
            else f"the {test:,} test samples of any of {splits} splits"
        )
        return (
            f"No network can be seen to beat this here: {best[0]} read by {best[1]} was never wrong on {on} after {train:,} training samples "
            f"(95 % interval {percent(low)} to {percent(high)})."
        )
    return (
        f"A network must beat {percent(accuracy)}: {best[0]} read by {best[1]} is right for so many of {test:,} test samples after {train:,} training samples "
        f"(95 % interval {percent(low)} to {percent(high)}{f', mean of {splits} splits' if splits > 1 else ''})."
    )


def estimator_of(
    kind: str, *, effort: str = "none", samples: int = 0, seed: int = 0
) -> tuple[Any, dict[str, list[Any]]]:
    """A pipeline and its grid for any of the six classifiers.

    >>> list(estimator_of("infinite")[0].named_steps), estimator_of("gbnn")[1]
    (['scale', 'model'], {})
    """
    if kind == "gbnn":
        model: Any = GBNNClassifier(100, solver="varpro", max_iter=20, random_state=seed)
        grid = {"model__learning_rate": [0.1, 0.3]} if effort != "none" else {}
        return Pipeline([("scale", StandardScaler()), ("model", model)]), grid
    if kind == "infinite":
        return Pipeline([("scale", StandardScaler(with_std=False)), ("model", InfiniteClassifier())]), {}
    return classifier(kind, effort=effort, samples=samples, seed=seed)  # pyright: ignore


def _pair(
    name: str,
    kind: str,
    X: np.ndarray,
    y: np.ndarray,
    train: Any,
    test: Any,
    split: int,
    effort: str,
    seed: int,
) -> Pair:
    made, grid = estimator_of(kind, effort=effort, samples=len(train), seed=seed)
    if kind == "gbnn" and X.shape[1] > 200:
        # Its Gauss-Newton steps grow with the square of the hidden weights.
        made.set_params(model__solver="lbfgs", model__max_iter=30, model__units_per_step=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Entry = evaluated(
            name,
            kind,
            made,
            grid,
            (X[train], y[train]),
            (X[test], y[test]),
            labels=np.unique(y).tolist(),
            seed=seed,
        )[0]
    settings = {k: (v.item() if isinstance(v, np.generic) else v) for k, v in found.settings.items()}
    return Pair(
        name, kind, split, found.features, settings, found.validation, found.scores.accuracy, found.scores.macro[2],
        np.asarray(found.predicted), found.margin, found.seconds, found.seconds_predicting,
    )  # fmt: skip


def _labels(held: Samples) -> np.ndarray:
    targets = held.targets
    require(
        targets.ndim == 1 and not targets.is_floating_point(),
        f"targets: got {show(targets)}, expected one class label a sample; a baseline is for classification",
    )
    y = targets.numpy()
    known, counts = np.unique(y, return_counts=True)
    require(len(known) > 1, f"targets: one class only ({known.tolist()}), expected two or more")
    rare = known[counts < 2]
    require(
        not len(rare),
        f"targets: class {rare[:1].tolist()} has a single sample among those read, expected at least 2 (one to train, one to test)",
    )
    return y


def _is_images(held: Samples) -> bool:
    shape = held.inputs.shape[1:]
    return len(shape) in (2, 3) and min(shape[-2:]) >= 8


def _check_feature(name: str, images: bool) -> None:
    if ":" in name:
        return
    known = DESCRIPTORS if images else ("columns",)
    if name not in known:
        what = ""
        if images and name == "columns":
            what = " is for data that are no images, and these are images (their plain values are 'pixels'),"
        elif name in DESCRIPTORS:
            what = " is for images of 8 pixels a side or more, which these data are not,"
        raise InputError(
            f"features: got {name!r}, which{what or ' is not a choice'}{suggest(name, known)}; MODEL:SITE is a network's site"
        )


def _features(name: str, held: Samples, options: BaselineOptions) -> np.ndarray:
    if name == "columns":
        return held.inputs.flatten(1).double().numpy()
    if ":" not in name:
        return described(name, held.inputs, prepare=options.ink)
    model, site = _model_and_site(name)
    loaded = load_model(model)
    inputs = held.inputs
    if not inputs.is_floating_point() and inputs.ndim == 4:
        inputs = inputs.float() / 255
    if loaded.mean:
        shape = (1, -1, 1, 1)
        inputs = (inputs - torch.tensor(loaded.mean).view(shape)) / torch.tensor(loaded.std).view(shape)
    return SiteFeatures(loaded.model, site).fit(inputs).transform(inputs)


def _model_and_site(name: str) -> tuple[str, str]:
    """``net.py:make:layer4`` is the model ``net.py:make`` and the site ``layer4``; sites may end in ``:in``."""
    words = name.split(":")
    tail = 2 if words[-1] in ("in", "out") else 1
    model, site = ":".join(words[:-tail]), ":".join(words[-tail:])
    require(
        bool(model) and bool(site), f"features: got {name!r}, expected MODEL:SITE, such as net.py:make:layer4"
    )
    return model, site


def _split(y: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    classes = len(np.unique(y))
    size = max(classes, round(share * len(y)))
    train, test = train_test_split(np.arange(len(y)), test_size=size, random_state=seed, stratify=y)
    return np.sort(train), np.sort(test)


def _mean(pairs: Sequence[Pair], name: str, kind: str) -> float:
    return float(np.mean([p.accuracy for p in pairs if (p.descriptor, p.classifier) == (name, kind)]))


def _by_size(
    top: Pair, X: np.ndarray, y: np.ndarray, train: Any, test: Any, effort: str, seed: int
) -> list[tuple[int, float]]:
    """Accuracy of the best pair with its chosen settings after fewer training samples, classes kept in proportion."""
    found = []
    classes = len(np.unique(y))
    made, _ = estimator_of(top.classifier, samples=len(train), seed=seed)
    made.set_params(**{f"model__{k}": v for k, v in top.settings.items()})
    for size in sorted(
        {max(2 * classes, round(len(train) * share)) for share in (0.05, 0.1, 0.25, 0.5, 1.0)}
    ):
        some = train
        if size < len(train) - classes:
            some = train_test_split(train, train_size=size, random_state=seed, stratify=y[train])[0]
        if len(np.unique(y[some])) < classes:
            continue
        anew: Any = clone(made)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append((len(some), float((anew.fit(X[some], y[some]).predict(X[test]) == y[test]).mean())))
    return found


def _table(
    pairs: Sequence[Pair], names: Sequence[str], kinds: Sequence[str], train: int, test: int, splits: int
) -> Section:
    accuracy = np.array([[_mean(pairs, n, c) for c in kinds] for n in names])
    row, column = divmod(int(accuracy.argmax()), len(kinds))
    rows = []
    for n in names:
        for c in kinds:
            mine = [p for p in pairs if (p.descriptor, p.classifier) == (n, c)]
            values = [p.accuracy for p in mine]
            low, high = wilson(round(mine[0].accuracy * test), test)
            spread = (
                percent(float(np.std(values, ddof=1))) if splits > 1 else f"{percent(low)} to {percent(high)}"
            )
            rows.append(
                (
                    n, c, mine[0].features, percent(float(np.mean(values))), spread, float(np.mean([p.macro_f1 for p in mine])),
                    json.dumps(mine[0].settings), float(np.mean([p.seconds for p in mine])),
                )
            )  # fmt: skip

    def draw(ax: Any) -> None:
        shown = ax.imshow(accuracy, cmap="viridis", vmin=max(0.0, accuracy.min() - 0.05), vmax=1)
        ax.set_xticks(range(len(kinds)), kinds)
        ax.set_yticks(range(len(names)), [n[-24:] for n in names])
        middle = (shown.norm.vmin + 1) / 2
        for i, j in np.ndindex(*accuracy.shape):
            ax.text(
                j,
                i,
                f"{100 * accuracy[i, j]:.1f}",
                ha="center",
                va="center",
                color="black" if accuracy[i, j] > middle else "white",
            )

    spread_title = "deviation over splits" if splits > 1 else "95 % interval"
    return Section(
        "table", "What does each descriptor reach with each classifier?", "note", percent(float(accuracy.max())),
        f"of test samples right: {names[row]} with {kinds[column]}",
        f"Each classifier was tuned on {train:,} training samples only and looked at {test:,} test samples once{f', on {splits} splits' if splits > 1 else ''}; the best, {names[row]} with {kinds[column]}, "
        f"is right for {percent(float(accuracy.max()))}. It was picked as the best of {accuracy.size} on these test samples, so it is a little flattered.",
        [
            picture(
                draw, size=(2.2 + 0.9 * len(kinds), 1.4 + 0.5 * len(names)), caption="Accuracy on the test part in %, descriptors down, classifiers across.",
                alt=f"Accuracy by descriptor and classifier, from {percent(float(accuracy.min()))} to {percent(float(accuracy.max()))}.",
            )
        ],
        [Table("Every pair", ("descriptor", "classifier", "features", "accuracy", spread_title, "macro F1", "settings", "seconds to tune and fit"), rows)],
        _SLUG,
        {"pairs": [{k: v for k, v in plain(p).items() if k not in ("predicted", "margin")} for p in map(_lists, pairs)], "training": train, "test": test},
    )  # fmt: skip


def _lists(pair: Pair) -> dict[str, Any]:
    return {k: (v.tolist() if isinstance(v, np.ndarray) else v) for k, v in pair.__dict__.items()}


def _best(top: Pair, truth: np.ndarray, test: np.ndarray, held: Samples, images: bool) -> Section:
    classes = np.unique(held.targets.numpy())
    names = [held.classes[c] if c < len(held.classes) else str(c) for c in classes.tolist()]
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (np.searchsorted(classes, truth), np.searchsorted(classes, top.predicted)), 1)
    wrong = np.flatnonzero(top.predicted != truth)
    order = wrong if top.margin is None else wrong[np.argsort(-top.margin[wrong])]

    def draw(ax: Any) -> None:
        ax.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(names)), [n[:12] for n in names], rotation=90)
        ax.set_yticks(range(len(names)), [n[:12] for n in names])
        ax.set(xlabel="predicted", ylabel="true")

    pictures = [
        picture(
            draw, size=(4.6, 4.2), caption="Confusion of the best pair: shares of each true class.",
            alt=f"Confusion matrix of {len(names)} classes; {int(np.trace(counts))} of {int(counts.sum())} on its diagonal.",
        )
    ]  # fmt: skip
    shown = order[:8]
    if images and len(shown):
        x = held.inputs[torch.from_numpy(test[shown])].double()

        def mistakes(axes: Any) -> None:
            for place, ax in enumerate(np.asarray(axes).ravel()):
                ax.set_axis_off()
                if place < len(shown):
                    one = x[place] if x[place].ndim == 2 else x[place].movedim(0, -1).squeeze(-1)
                    one = (one - one.min()) / max(float(one.max() - one.min()), 1e-12)
                    ax.imshow(one, cmap="gray")
                    said = names[int(np.searchsorted(classes, top.predicted[shown[place]]))]
                    ax.set_title(
                        f"{names[int(np.searchsorted(classes, truth[shown[place]]))][:9]}, said {said[:9]}",
                        fontsize=7,
                    )

        pictures.append(
            picture(
                mistakes, size=(6.4, 3.4), panels=(2, 4), kind="png", caption="Its surest mistakes first: the true class, and what it said.",
                alt=f"{len(shown)} samples that the best pair calls by a wrong class.",
            )
        )  # fmt: skip
    worst = counts - np.diag(np.diag(counts))
    i, j = divmod(int(worst.argmax()), len(names))
    told = (
        f"most often {names[i]} is called {names[j]} ({int(worst[i, j])} of {int(counts[i].sum())})"
        if worst.any()
        else "it makes no mistake"
    )
    return Section(
        "mistakes", "Where does the best of them err?", "note", f"{len(wrong):,}", f"of {len(truth):,} test samples wrong",
        f"With {top.descriptor} and {top.classifier}, {told}.", pictures, [], _SLUG,
        {"confusion": counts.astype(int).tolist(), "classes": names, "surest_mistakes": [int(held.index[test[w]]) for w in order[:50]]},
    )  # fmt: skip


def _learning(top: Pair, sizes: Sequence[tuple[int, float]]) -> Section:
    def draw(ax: Any) -> None:
        ax.plot([n for n, _ in sizes], [a for _, a in sizes], "o-", color="C0")
        ax.set_xscale("log")
        ax.set(xlabel="training samples", ylabel="accuracy on the test part")
        ax.grid(True)

    gain = sizes[-1][1] - sizes[-2][1] if len(sizes) > 1 else 0.0
    return Section(
        "size", "Would more data help?", "note", percent(sizes[-1][1]), f"after {sizes[-1][0]:,} training samples",
        f"With the settings chosen for all of them, {top.descriptor} and {top.classifier} reach "
        + ", ".join(f"{percent(a)} after {n:,}" for n, a in sizes)
        + (f"; the last doubling brought {100 * gain:.1f} points." if len(sizes) > 1 else "."),
        [picture(draw, size=(5.2, 3.0), caption="Accuracy against training size.", alt="Accuracy against training size: " + ", ".join(f"{percent(a)} at {n}" for n, a in sizes) + ".")],
        [], _SLUG, {"sizes": [list(pair) for pair in sizes]},
    )  # fmt: skip


def _write_settings(folder: Path, pairs: Sequence[Pair], names: Sequence[str], kinds: Sequence[str]) -> None:
    chosen = {
        n: {c: next(p.settings for p in pairs if (p.descriptor, p.classifier) == (n, c)) for c in kinds}
        for n in names
    }
    write_json(folder / "baseline-settings.json", chosen)


def _write_models(
    folder: Path,
    best: tuple[str, str],
    pairs: Sequence[Pair],
    rows: Any,
    y: np.ndarray,
    train: Any,
    effort: str,
    seed: int,
) -> list[str]:
    """The best pair's estimator, fitted to the training part: safetensors for ours, skops for scikit-learn's; what could not be written, and why."""
    name, kind = best
    top = next(p for p in pairs if (p.descriptor, p.classifier) == best)
    target = folder / f"baseline-best.{'safetensors' if kind in ('gbnn', 'infinite') else 'skops'}"
    if target.suffix == ".skops":
        try:
            import skops.io  # pyright: ignore
        except ImportError:
            return [
                f"The best model, {name} with {kind}, is not written: that needs skops (pip install skops); its settings are in baseline-settings.json."
            ]
    made, _ = estimator_of(kind, samples=len(train), seed=seed)
    made.set_params(**{f"model__{k}": v for k, v in top.settings.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(rows(name)[train], y[train])
    if target.suffix == ".skops":
        skops.io.dump(made, target)  # pyright: ignore
        return []
    made.named_steps["model"].save(target)
    scale = made.named_steps["scale"]
    write_json(
        folder / "baseline-best.json",
        {
            "features": name,
            "mean": scale.mean_.tolist(),
            "scale": None if scale.scale_ is None else scale.scale_.tolist(),
        },
    )
    return []
