"""What an explanation explains: the logit of a class, for every image, and the state in which the model is asked for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import answered, device_of, dtype_of, frozen, ordinary


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, its parameters asking for nothing, gradients on whatever the caller's mode is."""
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        yield


def prepared(model: nn.Module, images: Any) -> Tensor:
    """The checked images on the model's device, in its dtype, out of any graph.

    >>> prepared(nn.Linear(2, 2).double(), torch.zeros(1, 3, 2, 2)).dtype
    torch.float64
    """
    checks.require(
        isinstance(model, nn.Module), f"model: got {checks.show(model)}, expected a torch.nn.Module"
    )
    checks.tensor("images", images, shape=("batch", "channels", "height", "width"), floating=True)
    with torch.inference_mode(False):
        # A tensor made in inference mode cannot be saved for a backward; its clone can.
        return (images.clone() if images.is_inference() else images.detach()).to(
            device_of(model), dtype_of(model) if any(True for _ in model.parameters()) else images.dtype
        )


def scores_of(model: nn.Module, images: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """The logits and the class to explain for each image.

    Args:
        images: a batch, as the model takes it.
        targets: one class for each image, an int for all, or ``None`` for the class with the largest logit.

    Returns:
        (batch, classes) logits, or (batch, classes, h, w) of a fully convolutional network; int64 classes (batch,).

    Raises:
        InputError: logits of another shape, or not finite; targets out of range or of another number.

    >>> scores_of(nn.Flatten(), torch.tensor([[[[1.0, 3.0]]]]), None)[1].tolist()
    [1]
    """
    given = labels_of(targets, len(images))
    output = answered(model, images)
    checks.require(
        output.ndim in (2, 4) and len(output) == len(images),
        f"model: its logits are {checks.show(output)} for {len(images)} images, expected shape (batch, classes)",
    )
    if not bool(torch.isfinite(output.detach()).all()):
        raise checks.InputError(
            "model: its logits hold NaN or infinities for these images; are its weights finite?"
        )
    if given is None:
        return output, class_scores(output.detach()).argmax(1)
    checked = checks.labels("targets", given, count=len(images), classes=output.shape[1])
    return output, checked.to(output.device)


def labels_of(targets: Any, count: int) -> Tensor | None:
    """Given targets as one label for each image; ``None`` where the model has to say (``None``, ``"all"``).

    >>> labels_of(3, 2)
    tensor([3, 3])
    """
    check_targets(targets, count)
    if targets is None or isinstance(targets, str):
        return None
    return ordinary(torch.as_tensor(targets)).long().expand(count)


def check_targets(targets: Any, count: int, *, every: bool = True) -> None:
    """Refuse targets that cannot be classes of ``count`` images, before any forward."""
    if targets is None:
        return
    if isinstance(targets, str):
        checks.one_of("targets", targets, ["all"] if every else [])
        return
    known = isinstance(targets, (Tensor, list, tuple, int)) or hasattr(targets, "__array__")
    known = known and not isinstance(targets, bool)
    checks.require(
        known, f"targets: got {checks.show(targets)}, expected class labels, one for each image, or None"
    )
    labels = torch.as_tensor(targets)
    labels = labels if labels.ndim else labels.expand(count)
    checks.tensor("targets", labels, shape=(count,), floating=False)
    least = int(labels.min())
    checks.require(least >= 0, f"targets: got label {least}, expected labels from 0")


def class_scores(output: Tensor) -> Tensor:
    """(batch, classes) from logits: themselves, or of score maps the mean that :func:`cotangent` differentiates.

    >>> class_scores(torch.tensor([[[[2.0, 2.0]]]])).tolist()
    [[2.0]]
    """
    if output.ndim == 2:
        return output
    flat = output.flatten(2)
    return (flat.softmax(2) * flat).sum(2)


def cotangent(scores: Tensor, target: Tensor) -> Tensor:
    """The signal that starts backwards at the logits: one at the target's.

    On the score maps of a fully convolutional network it is the softmax over positions of the target's scores, as the
    pointing game of Zhang et al. 2016 has it.

    >>> cotangent(torch.zeros(1, 3), torch.tensor([2])).tolist()
    [[0.0, 0.0, 1.0]]
    """
    start = torch.zeros_like(scores)
    rows = torch.arange(len(scores), device=scores.device)
    if scores.ndim == 2:
        start[rows, target] = 1.0
    else:
        chosen = scores.detach()[rows, target]
        start[rows, target] = chosen.flatten(1).softmax(1).reshape(chosen.shape)
    return start
