"""What batch norm does while weights move, and when that misleads.

Moving weights changes what reaches a batch norm, and its running statistics do not follow. ``"eval"`` leaves them, ``"batch"`` takes
each batch's own, ``"recalibrate"`` computes them anew at every point. With a batch's own statistics the loss does not depend on the
scale of the weights before a batch norm, so that a random plane may look flat for no reason of curvature (Gabdullin 2024, arXiv
2412.10146; Li et al. 2018, arXiv 1712.09913).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lineament.core import checks
from lineament.core.norms import batchnorms

MODES = ("eval", "batch", "recalibrate")


class LandscapeWarning(UserWarning):
    """The picture asked for can mislead, for the reason given."""


@contextmanager
def batchnorm_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Batch norm in one of :data:`MODES`; its flags as they were afterwards. Buffers are the caller's to keep."""
    checks.one_of("batchnorm", mode, MODES)
    norms = list(batchnorms(model).values())
    flags = [(m, m.training, m.track_running_stats, m.momentum) for m in norms]
    if mode == "recalibrate":
        checks.require(
            any(m.running_mean is not None for m in norms),
            "batchnorm: 'recalibrate' has nothing to compute anew, since the model has no batch norm with running statistics; use 'eval'",
        )
    try:
        for module in norms if mode == "batch" else ():
            # Without tracking, PyTorch takes the batch's statistics and writes none.
            module.train()
            module.track_running_stats = False
        yield
    finally:
        for module, training, tracks, momentum in flags:
            module.training, module.track_running_stats, module.momentum = training, tracks, momentum


def caution(model: nn.Module, axes: Sequence[Any], mode: str) -> None:
    """Warn where batch norm makes the picture along these axes mislead, and say what to do instead."""
    norms = batchnorms(model)
    if not norms:
        return
    if mode == "eval":
        for name, module in norms.items():
            if module.running_mean is None:
                _warn(
                    f"batch norm {name!r} keeps no running statistics, so that batchnorm='eval' takes each batch's all the same"
                )
                break
            if module.num_batches_tracked is not None and int(module.num_batches_tracked) == 0:
                _warn(
                    f"batch norm {name!r} has never seen a batch in train mode: its running statistics are those of its making. "
                    "Take batchnorm='recalibrate', or 'batch'"
                )
                break
    own = {
        f"{name}.{key}" if name else key
        for name, m in norms.items()
        for key, _ in m.named_parameters(recurse=False)
    }
    for axis in axes:
        if axis.kind != "random":
            continue
        if mode == "batch":
            _warn(
                "with batchnorm='batch' the loss does not feel the scale of the weights before a batch norm, so that a random "
                "plane can look flat (or spiky) for no reason of curvature; Hessian axes put no weight on such directions"
            )
            return
        moved = any(bool(part.any()) for name, part in axis.split(model).items() if name in own)
        if moved and mode == "eval":
            _warn(
                "the random axes move batch norm's own scale and shift while its running statistics stay, which changes the scale of "
                "the function itself; take one_dim='ignore', or Hessian axes"
            )
            return


def _warn(text: str) -> None:
    warnings.warn(text, LandscapeWarning, stacklevel=4)
