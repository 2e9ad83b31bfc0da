"""What every method needs of a model: its logits, its device, and to find it afterwards as it was before.

Models are plain ``nn.Module``s. Hugging Face models answer with a dataclass or a dict; :func:`logits` takes the
scores out of it, so that no method has to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, show


def logits(output: Any) -> Tensor:
    """The scores in a model's output: the tensor itself, or the ``logits`` of a dataclass or dict.

    A tuple gives its only tensor. Anything else raises :class:`InputError` that names what came.

    >>> logits({"loss": None, "logits": torch.ones(2, 3)}).shape
    torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = output.get("logits")
        if isinstance(found, Tensor):
            return found
        raise InputError(
            f"the model returned a dict with keys {list(output)}, expected a tensor or a 'logits' entry; "
            "wrap the model so that it returns its logits"
        )
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and len(output) == 1 and isinstance(output[0], Tensor):
        return output[0]
    raise InputError(
        f"the model returned {show(output)} ({type(output).__name__}), expected a tensor of logits; "
        "wrap the model so that it returns its logits"
    )


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter or buffer; torch's default for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


@contextmanager
def frozen(
    model: nn.Module, *, training: bool = False, requires_grad: bool | None = False
) -> Iterator[nn.Module]:
    """The model in eval mode with its parameters not asking for gradients, and as it was afterwards.

    Every module's mode and every parameter's ``requires_grad`` is put back, also after an exception.
    ``training=True`` puts it in train mode instead; ``requires_grad=None`` leaves those flags alone.

    >>> net = nn.Dropout()
    >>> with frozen(net):
    ...     net.training
    False
    >>> net.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.train(training)
        if requires_grad is not None:
            for parameter, _ in flags:
                parameter.requires_grad_(requires_grad)
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
