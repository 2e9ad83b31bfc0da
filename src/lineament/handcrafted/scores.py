"""How good is a classifier, class by class? Accuracy, precision, recall, F1 and confusion, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from lineament.core.checks import listed, require
from lineament.core.results import Readable, axes, plain


@dataclass(frozen=True)
class ClassScores(Readable):
    """Scores of predictions; rows of ``confusion`` are true classes, ``by_class`` has (precision, recall, F1, support) of each class.

    ``macro`` (mean over classes), ``weighted`` (by support) and ``micro`` (from pooled counts) are (precision, recall, F1).
    """

    labels: tuple[Any, ...]
    accuracy: float
    macro: tuple[float, float, float]
    weighted: tuple[float, float, float]
    micro: tuple[float, float, float]
    by_class: tuple[tuple[float, ...], ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

    def plot(self, ax: Any = None) -> Any:
        """The confusion matrix, shares of each true class."""
        ax = axes(ax)
        counts = np.array(self.confusion, dtype=float)
        ax.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
        ticks = range(len(self.labels))
        ax.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="true")
        ax.set_xticklabels(self.labels)
        ax.set_yticklabels(self.labels)
        for row, column in zip(*np.nonzero(counts)):
            ax.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize="small")
        return ax


def class_scores(
    true: Any, predicted: Any, labels: Sequence[Any] | None = None, *, zero_division: float = 0.0
) -> ClassScores:
    """Scores of ``predicted`` against ``true``.

    Args:
        true, predicted: [n] labels.
        labels: all classes in their order; those that occur, sorted, by default. Averages run over all of them, also those without
            samples.
        zero_division: what a precision, recall or F1 without samples counts as.

    Raises:
        InputError: no samples, unequal lengths, a label that is not in ``labels``.

    >>> class_scores([0, 0, 1], [0, 1, 1]).accuracy
    0.6666666666666666
    """
    true, predicted = np.asarray(true), np.asarray(predicted)
    require(
        true.ndim == 1 and true.shape == predicted.shape and len(true) > 0,
        f"predicted: got shape {predicted.shape} beside true labels of shape {true.shape}, expected two equal lists of labels",
    )
    seen = np.unique(np.concatenate([true, predicted])).tolist()
    known = seen if labels is None else listed("labels", labels, "the classes in their order")
    strange = [label for label in seen if label not in known]
    require(not strange, f"labels: {strange[:5]} occur, expected only {known}")
    each: Any = precision_recall_fscore_support(true, predicted, labels=known, zero_division=zero_division)  # pyright: ignore
    macro, weighted, micro = (
        tuple(float(v) for v in precision_recall_fscore_support(
            true, predicted, labels=known, average=how, zero_division=zero_division  # pyright: ignore
        )[:3])
        for how in ("macro", "weighted", "micro")
    )  # fmt: skip
    return ClassScores(
        tuple(known),
        float((true == predicted).mean()),
        macro,  # pyright: ignore
        weighted,  # pyright: ignore
        micro,  # pyright: ignore
        tuple(tuple(float(v) for v in row) for row in zip(*each)),
        tuple(tuple(int(v) for v in row) for row in confusion_matrix(true, predicted, labels=known)),
    )
