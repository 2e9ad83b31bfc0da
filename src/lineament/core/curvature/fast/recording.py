"""Call an autograd function, and record it only where somebody would read the record.

The backward pass of a function that is differentiated twice calls other such functions. In the last pass, which is every product
of a curvature, their records are thrown away at once, and making them costs as much as a small operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.utils import unwrap_dead_wrappers


class Recorded(torch.autograd.Function):
    """An autograd function that takes its arguments by position.

    PyTorch's looks the signature of ``forward`` up at every call, for defaults: a quarter of the time in which a small graph is built.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return custom_function_call(cls, *args)  # pyright: ignore[reportCallIssue]
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # pyright: ignore[reportAttributeAccessIssue]


def recorded() -> bool:
    """Whether what is computed now is recorded, or transformed (``torch.func``)."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def transformed() -> bool:
    """Whether what is computed now is transformed (``torch.func``), or carries tangents (``torch.autograd.forward_ad``)."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def call(function: Any, *args: Any) -> Any:
    """``function.apply(*args)``, or its bare ``forward`` where nothing is recorded.

    >>> class Twice(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(x): return 2 * x
    ...     @staticmethod
    ...     def setup_context(ctx, inputs, output): pass
    ...     @staticmethod
    ...     def backward(ctx, g): return 2 * g
    >>> x = torch.ones(1, requires_grad=True)
    >>> with torch.no_grad():
    ...     bare = call(Twice, x)
    >>> bare.requires_grad, call(Twice, x).requires_grad
    (False, True)
    """
    return function.apply(*args) if recorded() else function.forward(*args)
