"""What do the learned features add? Fixed descriptors and every layer, read by the same simple readers on the same samples.

HOG, LBP and Gabor as in Wahid, Shahriar, Sobuj 2022 (arXiv 2201.10102); readers are a linear model, k nearest neighbours, the infinitely deep network that
matches the features' dimension (arXiv 2204.14126) and twelve boosted units (arXiv 1909.12098). All are cross-validated, so each answer is to a sample that
its reader has not seen; the network's own answers are compared sample by sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lineament.audit.phrases import mean_interval, percent, short
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.checks import InputError
from lineament.core.sites.depth import tokens_of
from lineament.core.statistics.shares import wilson
from lineament.handcrafted.table import described
from lineament.kernels.classifiers import InfiniteClassifier
from lineament.kernels.dimension import intrinsic_dimension
from lineament.learn.boosting.estimators import GBNNClassifier
from lineament.measure.collapse.profile import pooled
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain

TITLE = "What do the learned features add?"
HELP = "what fixed descriptors and each layer reach with simple readers, beside the network itself"
ORDER = 45
METHOD = "bangla-digits"
ON_REQUEST = True
_MOST, _FOLDS, _UNITS = 600, 5, 12
_READERS = ("linear", "5 neighbours", "infinite network", "12 boosted units")


@dataclass(frozen=True)
class Read:
    """What one set of features gives each reader: shares of the samples answered rightly by readers that had not seen them."""

    features: str
    learned: bool
    length: int
    dimension: float | None
    accuracy: dict[str, float]


@dataclass(frozen=True)
class Baselines:
    """The network on the same samples; ``gain`` over the best fixed features, paired, with its 95 % interval."""

    samples: int
    training: int
    network: float
    best: str
    reader: str
    best_accuracy: float
    gain: float
    gain_low: float
    gain_high: float
    first_better: str | None
    head: float | None
    read: Sequence[Read]


def applies(subject: Subject) -> str:
    if subject.task != "classification":
        return "Baselines are for one class a sample."
    counts = subject.targets.bincount()
    few = int(counts[counts > 0].min())
    if few < _FOLDS:
        return (
            f"A class has {few} samples; cross-validation in {_FOLDS} parts needs at least {_FOLDS} of each."
        )
    if int((counts > 0).sum()) < 2:
        return "All samples are of one class."
    return "" if subject.samples.lengths is None else "Baselines are for samples of one size."


def look(subject: Subject) -> Section:
    rows = subject.subset(_MOST, salt=7)
    y = subject.targets[rows].numpy()
    rare = np.isin(y, np.flatnonzero(np.bincount(y) < _FOLDS))
    rows, y = rows[torch.from_numpy(~rare)], y[~rare]
    fixed = _fixed(subject, rows)
    learned: dict[str, list[torch.Tensor]] = {site: [] for site in subject.sites}
    for _, acts in subject.activations(rows, "baselines"):
        for site, x in acts.items():
            learned[site].append(pooled(tokens_of(subject.model, site, x).float()).cpu())
    every = {
        **fixed,
        **{site: torch.cat(shards.interleaved(parts)).double().numpy() for site, parts in learned.items()},
    }
    right: dict[tuple[str, str], np.ndarray] = {}
    read = []
    for name, X in every.items():
        dimension = _dimension(X)
        for reader in _READERS:
            right[name, reader] = _answers(reader, X, y, dimension, subject.seed) == y
        shares = {reader: float(right[name, reader].mean()) for reader in _READERS}
        read.append(Read(name, name in learned, X.shape[1], dimension, shares))
    own = subject.outputs[rows].argmax(1).numpy() == y
    best = max(((name, reader) for name in fixed for reader in _READERS), key=lambda pair: right[pair].mean())
    gap = torch.from_numpy(own.astype(float) - right[best].astype(float))
    gain, low, high = mean_interval(gap)
    top = float(right[best].mean())
    better = next(
        (r.features for r in read if r.learned and max(r.accuracy.values()) > top),
        None,
    )
    last = read[-1] if read and read[-1].learned else None
    found = Baselines(
        len(rows), len(rows) * (_FOLDS - 1) // _FOLDS, float(own.mean()), *best, top, gain, low, high, better,
        None if last is None else last.accuracy["12 boosted units"], read,
    )  # fmt: skip
    finding = _finding(found)
    return Section(
        status=finding.severity,
        number=f"{100 * gain:+.1f}",
        unit="points over the best fixed features",
        sentence=_sentence(found, subject),
        pictures=[_picture(found)],
        tables=[
            Table(
                f"Right answers of each reader over {found.samples:,} samples, {_FOLDS}-fold cross-validated ({found.training:,} to learn from; errors at most "
                f"{percent((wilson(found.samples // 2, found.samples)[1] - wilson(found.samples // 2, found.samples)[0]) / 2)})",
                ("features", "numbers", "dimension", *_READERS),
                [
                    (r.features, r.length, r.dimension, *(percent(r.accuracy[reader]) for reader in _READERS))
                    for r in read
                ],
            )
        ],
        numbers=plain(found),
        findings=[finding],
    )


def _fixed(subject: Subject, rows: torch.Tensor) -> dict[str, np.ndarray]:
    """Raw inputs, and of images the descriptors."""
    x = subject.samples.inputs[rows]
    if not subject.images or min(x.shape[-2:]) < 8 or x.ndim not in (3, 4):
        return {"the inputs themselves": x.flatten(1).double().numpy()}
    found = {}
    for name in ("pixels", "hog", "lbp", "gabor"):
        try:
            shown = x if not x.is_floating_point() else (x - x.min()) / max(float(x.max() - x.min()), 1e-12)
            found[{"pixels": "pixels"}.get(name, name.upper() if name != "gabor" else "Gabor")] = described(
                name, shown
            )
        except InputError:
            continue
    return found


def _dimension(X: np.ndarray) -> float | None:
    """Of the features alone, so that no label of a held-out sample has a part in it."""
    try:
        return float(min(max(round(intrinsic_dimension(X, samples=300).both), 1), 30))
    except InputError:
        return None


def _answers(reader: str, X: np.ndarray, y: np.ndarray, dimension: float | None, seed: int) -> np.ndarray:
    made: Any
    if reader == "linear":
        made = make_pipeline(StandardScaler(), RidgeClassifier(alpha=max(1.0, 0.1 * X.shape[1])))
    elif reader == "5 neighbours":
        made = make_pipeline(StandardScaler(with_std=False), KNeighborsClassifier(5, weights="distance"))
    elif reader == "infinite network":
        made = InfiniteClassifier(dimension=dimension or 2.0)
    else:
        size = min(50, X.shape[1], len(X) // 2)
        net = GBNNClassifier(_UNITS, 4, 1.0, subsample=1.0, max_iter=60, l2=1.0, random_state=seed)
        made = make_pipeline(StandardScaler(), PCA(size, random_state=seed), net)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(cross_val_predict(made, X, y, cv=folds))


def _between(found: Baselines, sign: int = 1) -> str:
    low, high = sorted((sign * found.gain_low, sign * found.gain_high))
    return f"{100 * sign * found.gain:.1f} points ({100 * low:.1f} to {100 * high:.1f})"


def _sentence(found: Baselines, subject: Subject) -> str:
    sign = -1 if found.gain < 0 else 1
    text = (
        f"On {found.samples:,} samples of these data, {found.best} read by {_said(found.reader)} is right for {percent(found.best_accuracy)}, each time for samples that it had not seen, "
        f"after {found.training:,} of them; the network, which learned from data of its own (these may be among them), for {percent(found.network)}: {_between(found, sign)} {'more' if sign > 0 else 'less'}, sample by sample, with the 95 % interval. "
        "The best of several fixed readers was picked on these samples, so it is a little flattered. "
    )
    if found.first_better is not None:
        text += f"From {short(found.first_better, 40)} on, a layer's features let one of the same readers do better than every fixed one. "
    elif any(r.learned for r in found.read):
        text += "No layer's features let one of the same readers do better than the best fixed one. "
    if found.head is not None:
        text += f"{_UNITS} boosted units on its last layer are right for {percent(found.head)}."
    return text.strip()


def _said(reader: str) -> str:
    return {"linear": "a linear model", "infinite network": "an infinite network"}.get(reader, reader)


def _finding(found: Baselines) -> Finding:
    reached = f"{found.best} and {_said(found.reader)} reach {percent(found.best_accuracy)} on {found.samples:,} of these samples"
    if found.gain_low > 0:
        return Finding("good", f"{reached}; this network adds {_between(found)}.", key="features add")
    if found.gain_high < 0:
        return Finding(
            "warning",
            f"{reached}; this network is worse by {_between(found, -1)}.",
            advice="Use the fixed features, or train the network longer or on more data.",
            key="features add nothing",
        )
    return Finding(
        "note",
        f"{reached}; what this network adds cannot be told from nothing: {_between(found)}.",
        advice="Audit more samples, or use the fixed features if they are right often enough.",
        key="features add nothing",
    )


def _picture(found: Baselines) -> Any:
    def draw(ax: Any) -> None:
        places = np.arange(len(found.read))
        for k, reader in enumerate(_READERS):
            ax.plot([r.accuracy[reader] for r in found.read], places, "o", color=f"C{k}", label=reader)
        ax.axvline(found.network, color="C7", linestyle="--", label="the network")
        ax.set_yticks(places, [short(r.features) for r in found.read])
        ax.set_ylim(len(places) - 0.5, -0.5)
        ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        ax.set_xlabel("right on samples not seen")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        ax.grid(axis="x")

    return picture(
        draw,
        size=(6.4, 1.8 + 0.32 * len(found.read)),
        caption="Fixed features first, then the network's layers in depth order; the dashed line is the network itself.",
        alt=f"Accuracy by features and reader; best fixed {percent(found.best_accuracy)}, the network {percent(found.network)}.",
    )
