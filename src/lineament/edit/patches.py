"""What do the weights of a layer multiply? Linear layers, convolutions over one or two axes, and GPT-2's transposed kind, as matrices."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.models import weight_of


def reads(module: nn.Module) -> bool:
    """Whether a layer's output is a sum of what its inputs contribute, in a form that is followed here."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear) or is_transposed(module)


def matrix(module: nn.Module) -> Tensor:
    """A layer's weight as [outputs, inputs, taps]."""
    weight = weight_of(module).detach()
    weight = weight.T if is_transposed(module) else weight
    return weight.reshape(weight.shape[0], weight.shape[1], -1)


def unmatrixed(module: nn.Module, weight: Tensor) -> Tensor:
    """[outputs, inputs, taps], or with the last two as one, in the shape of a layer's own weight."""
    own = weight_of(module)
    return weight.flatten(1).T if is_transposed(module) else weight.reshape(own.shape)


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What the weights multiply, [rows, inputs * taps]."""
    if isinstance(module, nn.Conv1d):
        x, module = x[:, :, None], widened(module)
    if isinstance(module, nn.Conv2d):
        x, padding = (padded(module, x), 0) if isinstance(module.padding, str) else (x, module.padding)
        found = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # pyright: ignore[reportArgumentType]
        return found.mT.reshape(-1, found.shape[1])
    return x.reshape(-1, x.shape[-1])


def padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    rows, columns = padding_of(module)
    return F.pad(x, (*columns, *rows)) if any(rows + columns) else x


def padding_of(module: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Zeros above and below, left and right."""
    if isinstance(module.padding, str):
        same = module.padding == "same"
        sides = [d * (k - 1) * same for d, k in zip(module.dilation, module.kernel_size)]
        rows, columns = ((s // 2, s - s // 2) for s in sides)
        return rows, columns
    high, wide = module.padding
    return (high, high), (wide, wide)


def widened(module: nn.Conv1d) -> nn.Conv2d:
    """The geometry of a convolution over one axis, as one over two."""
    padding = module.padding if isinstance(module.padding, str) else (0, module.padding[0])
    return nn.Conv2d(
        1,
        1,
        (1, module.kernel_size[0]),
        (1, module.stride[0]),
        padding,
        (1, module.dilation[0]),
        device="meta",
    )


def batched(module: nn.Module, x: Tensor) -> Tensor:
    dims = {nn.Conv1d: 3, nn.Conv2d: 4}.get(type(module), 0)
    return x[None] if x.ndim < (dims or 2) else x


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's convolution of size one holds its weight as [inputs, outputs]."""
    return (
        hasattr(module, "nf")
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim == 2
    )  # pyright: ignore
