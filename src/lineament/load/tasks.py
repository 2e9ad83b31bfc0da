"""What a model is asked for, told by its outputs and the targets: classes, labels, values or an embedding; and targets of the kind that this needs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import InputError, require, show
from lineament.data.samples import Samples


def one_hot_labels(targets: Tensor, width: int = 0) -> Tensor:
    """Class labels of one-hot rows, of ``width`` classes where that is given; other targets as they are.

    >>> one_hot_labels(torch.tensor([[0, 1], [1, 0]])).tolist(), one_hot_labels(torch.tensor([[1, 1], [1, 0]])).tolist()
    ([1, 0], [[1, 1], [1, 0]])
    """
    rows = targets.ndim == 2 and targets.shape[1] > 1 and targets.shape[1] == (width or targets.shape[1])
    if rows and binary(targets) and bool((targets.sum(1) == 1).all()):
        return targets.argmax(1)
    return targets


def binary(targets: Tensor) -> bool:
    """Whether all targets are 0 or 1.

    >>> binary(torch.tensor([0.0, 1.0])), binary(torch.tensor([0, 2]))
    (True, False)
    """
    return bool(((targets == 0) | (targets == 1)).all())


def task_of(task: str, outputs: Tensor, samples: Samples) -> tuple[str, Samples, list[str]]:
    """The task, with targets of the kind it needs, and why."""
    width, targets = outputs.shape[1], samples.targets
    several, reason = f"{width} output{'s' * (width != 1)}", []
    if task != "regression":
        labels = one_hot_labels(targets, max(width, 2))
        if labels is not targets:
            reason = [f"one-hot targets of {targets.shape[1]} classes are read as class labels"]
            targets = labels
    many = targets.ndim == 2 and targets.shape[1] == width > 1 and binary(targets)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if task == "auto":
        whole = targets.ndim == 1 and bool(((targets == targets.round()) & (targets >= 0)).all())
        # Whole numbers stored as real ones are class labels where the model could not answer with a value each.
        labels = not targets.is_floating_point() or (whole and (width > 1 or binary(targets)))
        labels = labels and targets.ndim == 1 and (width > 1 or int(targets.max()) <= 1)
        task = "multi-label" if many else "classification" if labels else "regression"
        kind = (
            f"0/1 targets for {width} labels"
            if many
            else f"{'whole-number' if whole else 'real-valued'} targets"
        )
        reason.append(f"taken as {task}: {kind} and {several}")
    if task == "regression":
        per = math.prod(samples.targets.shape[1:])
        require(
            per == width,
            f"targets: {per} value{'s' * (per != 1)} a sample for a model with {several}; "
            "if the targets are classes, pass task='classification'",
        )
        return task, replace(samples, targets=samples.targets.float()), reason
    if task == "multi-label":
        require(
            many, f"targets: {show(targets)}, expected a row of 0s and 1s a sample, one for each of {several}"
        )
        return task, replace(samples, targets=targets.float()), reason
    if targets.is_floating_point() or targets.ndim != 1:
        require(
            targets.ndim == 1 and bool((targets == targets.round()).all()),
            f"targets: {show(targets)}, expected one class label a sample; pass task='multi-label' for several, task='regression' for real values",
        )
        targets = targets.long()
    if task == "embedding":
        targets = checks.labels("targets", targets)
        require(
            len(targets.unique()) > 1,
            "targets: all alike, expected two labels or more to tell embeddings apart",
        )
        return task, replace(samples, targets=targets), reason
    try:
        targets = checks.labels("targets", targets, classes=max(width, 2))
    except InputError as error:
        raise InputError(
            f"{error}; the model has {several}, counted from 0; if they are an embedding, say so (task='embedding' in an audit, a loss of embeddings in a training)"
        ) from None
    return task, replace(samples, targets=targets), reason


def check_classes(samples: Samples, width: int, fewest: int = 2) -> None:
    """Samples of ``fewest`` classes or more, and a name for each where there are names."""
    present = torch.bincount(samples.targets) > 0
    require(
        int(present.sum()) >= fewest,
        f"data: {f'all {len(samples)} samples read are' if len(samples) > 1 else 'the only sample is'} of class {int(samples.targets[0])}, expected samples of at least two classes",
    )
    names, top = len(samples.classes), len(present) - 1
    require(
        not names or top < names <= width,
        f"classes: {names} class names for labels up to {top} and a model with {width} outputs, expected a name for each class from 0 to {top}, at most {width}",
    )
