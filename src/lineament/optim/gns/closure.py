"""What GNS asks of a closure: the loss with its gradient, and products with its Hessian through the gradient's graph.

For Semenov, Jaggi, Doikov (2025, arXiv 2506.13710). Nothing is added to any ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.gradients import flatten, unflatten


def differentiated(
    closure: Callable[[], Any], params: list[Tensor], second: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss that a closure returns, and its gradients; with their graph for ``second`` derivatives.

    Raises:
        InputError: no tensor, more than one element, no graph, a graph that was freed, sparse gradients.
    """
    with torch.enable_grad():
        loss = closure()
        checks.require(
            isinstance(loss, Tensor) and loss.numel() == 1,
            f"closure: returned {checks.show(loss)} ({type(loss).__name__}), expected the loss, a tensor of one element",
        )
        checks.require(
            loss.requires_grad,
            "closure: its loss has no graph; expected one computed from the parameters, with gradients",
        )
        try:
            grads = torch.autograd.grad(
                loss.reshape(()), params, create_graph=second, allow_unused=True, materialize_grads=True
            )
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise checks.InputError(
                "closure: its graph was freed, by backward(); expected a closure that only computes and returns the loss"
            ) from error
    checks.require(
        not any(grad.is_sparse for grad in grads),
        "closure: a gradient of its loss is sparse, but the step needs every coordinate; use dense gradients "
        "(nn.Embedding(sparse=False))",
    )
    return loss, list(grads)


class ClosureHessian:
    """Products with the Hessian through the graph of the gradient."""

    def __init__(self, params: list[Tensor], grads: list[Tensor], like: Tensor):
        self.params = params
        self.curved = [k for k, grad in enumerate(grads) if grad.requires_grad]
        self.grads = [grads[k] for k in self.curved]
        self.shape, self.dtype, self.device = (len(like),) * 2, like.dtype, like.device

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.ndim == 2:
            return torch.stack([self @ column for column in v.T], 1)
        if not self.curved:
            return torch.zeros_like(v)
        parts = unflatten(v, self.params)
        found = torch.autograd.grad(
            self.grads,
            self.params,
            [parts[k].to(grad.dtype) for k, grad in zip(self.curved, self.grads)],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return flatten(found).to(v)
