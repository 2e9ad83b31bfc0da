"""The rows X that a layer's weight is multiplied with, their second moment XᵀX / N, and dividing a weight gradient by it.

Petersen, Borgelt, Ermon, "TrAct", NeurIPS 2024, arXiv 2410.23970, section 3. Rows are flattened tokens (linear), unfolded patches
(convolution) or one-hot vectors (embedding, whose second moment is the diagonal of token frequencies and is kept as a vector). A grouped
convolution has one moment for each group. With fewer rows than columns the same product comes from an N x N system.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core.checks import InputError


class NotFinite(InputError):
    """The layer's input or gradient holds NaN or infinite values."""


# Elements of unfolded patches held at a time.
_CHUNK = 2**23
# Columns up to which a second moment is a small matrix.
_SMALL = 256


def second_moment(
    layer: Any, x: Tensor, *, samples: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, int]:
    """The sum XᵀX over the rows of a layer's input, and the number of rows N.

    Args:
        x: the layer's input: (..., n), (batch, channels, ...) or token numbers.
        samples: take this many rows at random, with replacement, instead of all; not for embeddings, where counting is cheap.
        generator: for ``samples``.

    Returns:
        (groups, n, n) with n the columns of one group, or (tokens,) for an embedding; and N.

    >>> total, rows = second_moment(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> total.tolist(), rows
    ([[[10.0, 2.0], [2.0, 4.0]]], 2)
    """
    if isinstance(layer, nn.Embedding):
        counts = torch.bincount(x.reshape(-1), minlength=layer.num_embeddings)
        return counts.to(layer.weight.dtype if layer.weight.dtype == torch.double else torch.float), x.numel()
    windows = _windows(layer, _working(x))
    rows = row_count(layer, windows)
    if samples is not None and samples < rows:
        places = torch.randint(rows, (samples,), generator=generator).to(x.device)
        windows = windows[torch.unravel_index(places, windows.shape[: _places(layer)])]
        rows = samples
    total = None
    for columns in _chunks(layer, windows):
        total = _add_product(total, columns)
    if total is None:
        n = layer.weight[0].numel()
        total = windows.new_zeros(_groups(layer), n, n)
    return _whole(total), rows


def factorise(moment: Tensor, lam: float) -> Tensor:
    """What :func:`divide` needs of ``moment + lam I``: its Cholesky factor, or itself where the moment is a diagonal.

    Raises:
        InputError: the matrix is not finite, or not positive definite (``lam=0`` without columns of full rank).
    """
    if moment.ndim == 1:
        if lam == 0:
            # A token that does not occur has no gradient either; any divisor leaves its zero.
            return torch.where(moment > 0, moment, 1)
        return moment + lam
    matrix = moment.to(_solving(moment), copy=True)
    matrix.diagonal(dim1=-2, dim2=-1).add_(lam)
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    if not finite(moment):
        raise NotFinite("the layer's input holds NaN or infinite values")
    least, most = diagonal.square().amin(-1), diagonal.square().amax(-1)
    # Rounding can let a singular matrix pass; the data's own precision decides, not that of the solve.
    singular = least <= moment.shape[-1] * torch.finfo(moment.dtype).eps * most
    if bool(info.any()) or (lam == 0 and bool(singular.any())):
        raise InputError(
            f"lam: the second moment of the layer's input plus {lam:g} I is singular; take a larger lam (0 needs more rows than "
            "columns, of full rank)"
        )
    return factor


def finite(moment: Tensor) -> bool:
    """Whether a second moment is finite: no entry of XᵀX exceeds its diagonal's."""
    entries = moment if moment.ndim == 1 else moment.diagonal(dim1=-2, dim2=-1)
    return bool(torch.isfinite(entries).all())


def divide(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient @ (moment + lam I)⁻¹`` in the gradient's shape and dtype, from the factor of :func:`factorise`."""
    if factor.ndim == 1:
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            values = gradient.values() / factor[gradient.indices()[0]][:, None]
            return torch.sparse_coo_tensor(
                gradient.indices(), values, gradient.shape, is_coalesced=True, check_invariants=False
            )
        return (gradient / factor[:, None]).to(gradient.dtype)
    rows = gradient.reshape(len(factor), -1, factor.shape[-1]).to(factor.dtype)
    return torch.cholesky_solve(rows.mT, factor).mT.reshape(gradient.shape).to(gradient.dtype)


def wide(layer: Any, x: Tensor) -> bool:
    """Whether the layer's input has fewer rows than columns, so that the N x N form is the cheaper one."""
    if isinstance(layer, nn.Embedding) or x.numel() == 0:
        return False
    return row_count(layer, _windows(layer, x)) < layer.weight[0].numel()


def mean_square(layer: Any, x: Tensor) -> float:
    """The mean entry of the rows, squared: the mean of the second moment's diagonal, where no moment is made.

    >>> mean_square(nn.Linear(2, 1), torch.tensor([[1.0, 3.0]]))
    5.0
    """
    return float(_windows(layer, _working(x)).square().mean())


def divide_wide(gradient: Tensor, layer: Any, x: Tensor, lam: float) -> Tensor:
    """``gradient @ (XᵀX / N + lam I)⁻¹`` from an N x N system.

    With Xᵀ = Q R the gradient's rows lie in the span of Q, where the moment is R Rᵀ / N. This takes the rounding noise outside that
    span out of the gradient, which a solve in n dimensions, or a difference divided by lam, would multiply by 1 / lam.
    """
    columns = torch.cat(list(_chunks(layer, _windows(layer, _working(x)))), -1)
    basis, triangle = torch.linalg.qr(columns)
    triangle = triangle.to(_solving(triangle))
    factor = factorise(triangle @ triangle.mT / columns.shape[-1], lam)
    rows = gradient.reshape(len(columns), -1, columns.shape[-2]).to(basis.dtype) @ basis
    inner = torch.cholesky_solve(rows.mT.to(factor.dtype), factor).mT
    return (inner.to(basis.dtype) @ basis.mT).reshape(gradient.shape).to(gradient.dtype)


def row_count(layer: Any, windows: Tensor) -> int:
    """N: tokens of a linear layer, patches of a convolution, over the whole batch."""
    return windows.shape[: _places(layer)].numel()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 inside: a second moment in ten bits of mantissa is not positive definite."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float, torch.double) else x.float()


def _solving(x: Tensor) -> torch.dtype:
    """Small systems are solved in double precision, which costs nothing; large ones in that of the moments, whose rounding decides then."""
    return torch.double if x.shape[-1] <= _SMALL and x.device.type != "mps" else x.dtype


def _add_product(total: Tensor | None, columns: Tensor) -> Tensor:
    """The sum so far plus Xᵀ X, of which only blocks on and below the diagonal are made where there are several."""
    width = columns.shape[-2]
    if width <= _SMALL:
        product = columns @ columns.mT
        return product if total is None else total.add_(product)
    if total is None:
        total = columns.new_zeros(len(columns), width, width)
    step = -(-width // 6)
    for start in range(0, width, step):
        block = slice(start, start + step)
        total[:, block, : block.stop] += columns[:, block] @ columns[:, : block.stop].mT
    return total


def _whole(total: Tensor) -> Tensor:
    """A symmetric matrix from its blocks on and below the diagonal."""
    return total if total.shape[-1] <= _SMALL else total.tril() + total.tril(-1).mT


def _groups(layer: Any) -> int:
    return 1 if isinstance(layer, nn.Linear) else int(layer.groups)


def _places(layer: Any) -> int:
    """How many leading dimensions of the windows say where a row is: (rows,) or (batch, *places)."""
    return 1 if isinstance(layer, nn.Linear) else layer.weight.ndim - 1


def _windows(layer: Any, x: Tensor) -> Tensor:
    """A view of the input with a row at each place: (rows, n), or (batch, *places, channels, *kernel) behind the padding."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    dims = layer.weight.ndim - 2
    x = x if x.ndim == dims + 2 else x[None]
    sides = _padding(layer)
    if any(sides):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, sides, mode=mode)
    for d in range(dims):
        step = layer.dilation[d]
        x = x.unfold(2 + d, step * (layer.kernel_size[d] - 1) + 1, layer.stride[d])[..., ::step]
    # (batch, channels, *places, *kernel) -> the channels go behind the places
    return x.movedim(1, 1 + dims)


def _padding(layer: Any) -> list[int]:
    """Pixels before and after, the last dimension first, as ``F.pad`` takes them."""
    sides: list[int] = []
    for d in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[d] * (layer.kernel_size[d] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0 if layer.padding == "valid" else layer.padding[d]] * 2
    return sides


def _chunks(layer: Any, windows: Tensor) -> Iterator[Float[Tensor, "groups columns rows"]]:
    """The transposed rows, some leading places at a time, so that unfolded patches never need more than a bounded memory."""
    if isinstance(layer, nn.Linear):
        if len(windows):
            yield windows.mT[None]
        return
    # A random choice of patches has one leading dimension, a whole batch has batch and places.
    inner = windows.ndim - layer.weight.ndim + 1
    size = max(1, _CHUNK // max(1, windows[:1].numel()))
    shape = (_groups(layer), layer.weight[0].numel())
    for part in windows.split(size) if windows.numel() else ():
        places, window = range(inner), range(inner, part.ndim)
        if layer.stride[-1] == 1:
            # Neighbouring places are neighbours in memory, neighbouring columns of a patch only a few.
            yield part.permute(*window, *places).reshape(*shape, -1)
        else:
            yield part.reshape(-1, *shape).permute(1, 2, 0)
