"""What does the network answer to all of its training data, early on? Logits and features in eval mode, without a trace on the model.

After an epoch or two batch norm's running statistics lag behind weights that change fast; :func:`recalibrated` takes them afresh.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lineament.core import checks
from lineament.core.models import device_of, dtype_of, frozen
from lineament.core.sites.activations import capture
from lineament.train.batches import moved, source
from lineament.train.loop import outputs_of as answers

# Samples at a time, of data that are not in batches.
_BATCH = 500


def outputs_of(
    model: nn.Module, data: Any, *, site: str | None = None, recalibrate: bool = False
) -> tuple[Float[Tensor, "samples classes"], Int[Tensor, "samples"], Float[Tensor, "samples dims"] | None]:
    """The model's logits on all of the data, the labels, and features where a site is named; eval mode, single precision.

    Args:
        data: un-augmented, in the order of its indices, in any form that :func:`~lineament.train.loop.fit` takes.
        site: a site whose output is returned too; spatial dimensions are averaged.
        recalibrate: take the statistics of batch norm from the data first, and put the old ones back.

    Raises:
        InputError: no data, or batches that are no pair.

    >>> net = nn.Linear(2, 3)
    >>> scores, labels, _ = outputs_of(net, [(torch.ones(4, 2), torch.zeros(4).long())])
    >>> scores.shape, labels.tolist()
    (torch.Size([4, 3]), [0, 0, 0, 0])
    """
    device = device_of(model)
    found: list[tuple[Tensor, Tensor, Tensor | None]] = []
    with torch.no_grad(), frozen(model), recalibrated(model, data) if recalibrate else nullcontext():
        for x, y in batches(data):
            with nullcontext({}) if site is None else capture(model, [site]) as seen:
                scores = answers(model, moved(x, device, dtype_of(model)))
            features = seen[next(iter(seen))] if site is not None else None
            if features is not None:
                features = (features.flatten(2).mean(2) if features.ndim > 2 else features).float().cpu()
            found.append((scores.float().cpu(), y.cpu(), features))
    checks.require(len(found) > 0, "data: it is empty; expected (inputs, labels), or batches of them")
    features = [f for _, _, f in found if f is not None]
    return (
        torch.cat([s for s, _, _ in found]),
        torch.cat([y for _, y, _ in found]),
        torch.cat(features) if features else None,
    )


@contextmanager
def recalibrated(model: nn.Module, data: Any) -> Iterator[None]:
    """Batch norm with the statistics of the whole data under the present weights; the old ones afterwards.

    After an epoch or two the running statistics lag behind weights that still change fast.

    >>> net = nn.BatchNorm1d(1).eval()
    >>> with recalibrated(net, [(torch.tensor([[1.0], [3.0]]), None)]):
    ...     inside = net.running_mean.item()
    >>> inside, net.running_mean.item()
    (2.0, 0.0)
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    held = [(m, m.momentum, m.training, {n: b.clone() for n, b in m.named_buffers()}) for m in layers]
    device = device_of(model)
    try:
        with torch.no_grad(), frozen(model):
            for m in layers:
                m.reset_running_stats()
                m.momentum = None
                m.train()
            for x, _ in batches(data) if layers else ():
                answers(model, moved(x, device, dtype_of(model)))
        yield
    finally:
        for m, momentum, training, buffers in held:
            m.momentum, m.training = momentum, training
            for name, value in buffers.items():
                m.get_buffer(name).copy_(value)


def unusable(model: nn.Module, data: Any) -> list[int]:
    """The samples whose inputs hold NaN or infinite values that come out of the network too, by their place in the data.

    Batch norm's statistics, taken afresh, would spread them over all samples.

    >>> unusable(nn.Linear(1, 2), [(torch.tensor([[1.0], [torch.nan]]), torch.zeros(2).long())])
    [1]
    """
    device, found, start = device_of(model), [], 0
    for x, y in batches(data):
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            bad = (~finite.flatten(1).all(1)).nonzero()[:, 0]
            with torch.no_grad(), frozen(model):
                scores = answers(model, moved(x[bad], device, dtype_of(model)))
            bad = bad[~torch.isfinite(scores).all(1).to(bad.device)]
            found += (start + bad).tolist()
        start += len(y)
    return found


def batches(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The data's (inputs, labels) in the order of their indices, batch by batch."""
    for batch in source(data).in_order(_BATCH):
        yield batch.inputs, batch.targets
