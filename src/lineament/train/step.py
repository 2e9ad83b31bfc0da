"""One step of any optimizer on one batch, by closure, so that SAM and plain ones take it alike; where something is not finite, none is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class NotFinite(Exception):
    """A loss or gradient that is NaN or infinite; model and optimizer are as they were."""


def step(
    model: nn.Module,
    optimizer: Optimizer,
    compute: Callable[[], tuple[Tensor, Tensor]],
    *,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    judge_loss: bool = True,
) -> tuple[float, Tensor]:
    """Take one step; returns the loss and the scores before it. Where none is taken, the buffers (batch norm's statistics) are put back.

    Args:
        compute: (loss, scores) of the batch; called once for each pass that the optimizer makes.
        backward: what computes the gradients from the loss.
        judge_loss: whether the loss has to be finite too, and not only its gradient; several processes agree on the gradient alone.

    Raises:
        NotFinite: the loss or a gradient, of either pass.

    >>> net = nn.Linear(1, 1, bias=False); _ = net.weight.data.fill_(2.0)
    >>> loss, _ = step(net, torch.optim.SGD(net.parameters(), lr=0.25), lambda: (net.weight.square().sum(), net.weight))
    >>> loss, net.weight.item()
    (4.0, 1.0)
    """
    held = [b.clone() for b in model.buffers()]
    first: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, scores = compute()
        backward(loss)
        if judge_loss and not math.isfinite(float(loss.detach())):
            raise NotFinite("loss")
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [g.coalesce().values() if g.is_sparse else g for g in grads]
        if grads and not math.isfinite(float(torch.nn.utils.get_total_norm(grads))):
            raise NotFinite("gradient")
        first.extend((loss.detach(), scores.detach()))
        return loss

    try:
        optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except NotFinite:
        optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), held):
                buffer.copy_(before)
        raise
    return float(first[0]), first[1]
