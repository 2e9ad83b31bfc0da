"""The rows X that a layer's weight is multiplied with, their second moment XᵀX / N, and dividing a weight gradient by it.

Petersen, Borgelt, Ermon, "TrAct", NeurIPS 2024, arXiv 2410.23970, section 3. Rows are flattened tokens (linear), unfolded patches
(convolution) or one-hot vectors (embedding, whose second moment is the diagonal of token frequencies and is kept as a vector). A grouped
convolution has one moment for each group. With fewer rows than columns the same product comes from an N x N system.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lineament.core.checks import InputError, NotFiniteError

# Elements of unfolded patches held at a time.
_CHUNK = 2**23
# Columns up to which a second moment is a small matrix.
_SMALL = 256


class Use(NamedTuple):
    """How a weight is multiplied with its input: by ``F.linear`` or ``F.embedding`` (the shape only), or by a convolution.

    ``sides`` are the padded entries before and after each dimension, the last dimension first, as ``F.pad`` takes them.
    """

    shape: Sequence[int]  # of the weight
    stride: Sequence[int] = ()
    sides: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 1

    @property
    def columns(self) -> int:
        return torch.Size(self.shape[1:]).numel()

    @property
    def places(self) -> int:
        """How many leading dimensions of the windows say where a row is: (rows,) or (batch, *places)."""
        return max(1, len(self.shape) - 1)


def second_moment(
    use: Use, x: Tensor, *, samples: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, int]:
    """The sum XᵀX over the rows of an input, and the number of rows N.

    Args:
        x: the input: (..., n), (batch, channels, ...) or token numbers.
        samples: take this many rows at random, with replacement, instead of all; not for embeddings, where counting is cheap.
        generator: for ``samples``.

    Returns:
        (groups, n, n) with n the columns of one group, or (tokens,) for an embedding; and N.

    >>> total, rows = second_moment(Use((1, 2)), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> total.tolist(), rows
    ([[[10.0, 2.0], [2.0, 4.0]]], 2)
    """
    if not x.is_floating_point():
        counts = torch.bincount(x.reshape(-1), minlength=use.shape[0])
        return counts.to(torch.float if x.device.type == "mps" else torch.double), x.numel()
    windows = _windows(use, _working(x))
    rows = windows.shape[: use.places].numel()
    if samples is not None and samples < rows:
        at = torch.randint(rows, (samples,), generator=generator).to(x.device)
        windows = windows[torch.unravel_index(at, windows.shape[: use.places])]
        rows = samples
    total = windows.new_zeros(use.groups, use.columns, use.columns)
    for columns in _chunks(use, windows):
        _add_product(total, columns)
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
        raise NotFiniteError("the layer's input holds NaN or infinite values")
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
            values = (gradient.values() / factor[gradient.indices()[0]][:, None]).to(gradient.dtype)
            return torch.sparse_coo_tensor(
                gradient.indices(), values, gradient.shape, is_coalesced=True, check_invariants=False
            )
        return (gradient / factor[:, None]).to(gradient.dtype)
    rows = gradient.reshape(len(factor), -1, factor.shape[-1]).to(factor.dtype)
    return torch.cholesky_solve(rows.mT, factor).mT.reshape(gradient.shape).to(gradient.dtype)


def wide(use: Use, x: Tensor) -> bool:
    """Whether the input has fewer rows than columns, so that the N x N form is the cheaper one."""
    if not x.is_floating_point() or x.numel() == 0:
        return False
    return _windows(use, x).shape[: use.places].numel() < use.columns


def mean_square(use: Use, x: Tensor) -> float:
    """The mean entry of the rows, squared: the mean of the second moment's diagonal, where no moment is made.

    >>> mean_square(Use((1, 2)), torch.tensor([[1.0, 3.0]]))
    5.0
    """
    return float(_windows(use, _working(x)).square().mean())


def divide_wide(gradient: Tensor, use: Use, x: Tensor, lam: float) -> Tensor:
    """``gradient @ (XᵀX / N + lam I)⁻¹`` from an N x N system.

    With Xᵀ = Q R the gradient's rows lie in the span of Q, where the moment is R Rᵀ / N. This takes the rounding noise outside that
    span out of the gradient, which a solve in n dimensions, or a difference divided by lam, would multiply by 1 / lam.
    """
    columns = torch.cat(list(_chunks(use, _windows(use, _working(x)))), -1)
    basis, triangle = torch.linalg.qr(columns)
    triangle = triangle.to(_solving(triangle))
    factor = factorise(triangle @ triangle.mT / columns.shape[-1], lam)
    rows = gradient.reshape(use.groups, -1, use.columns).to(basis.dtype) @ basis
    inner = torch.cholesky_solve(rows.mT.to(factor.dtype), factor).mT
    return (inner.to(basis.dtype) @ basis.mT).reshape(gradient.shape).to(gradient.dtype)


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


def _add_product(total: Tensor, columns: Tensor) -> None:
    """Add XᵀX; of a large matrix only blocks on and below the diagonal."""
    width = columns.shape[-2]
    step = width if width <= _SMALL else -(-width // 6)
    for start in range(0, width, step):
        block = slice(start, start + step)
        total[:, block, : block.stop] += columns[:, block] @ columns[:, : block.stop].mT


def _whole(total: Tensor) -> Tensor:
    """A symmetric matrix from its blocks on and below the diagonal."""
    return total if total.shape[-1] <= _SMALL else total.tril() + total.tril(-1).mT


def _windows(use: Use, x: Tensor) -> Tensor:
    """A view of the input with a row at each place: (rows, n), or (batch, *places, channels, *kernel) behind the padding."""
    dims = len(use.shape) - 2
    if not dims:
        return x.reshape(-1, use.shape[1])
    x = x if x.ndim == dims + 2 else x[None]
    if any(use.sides):
        x = F.pad(x, list(use.sides))
    for d, (size, stride, step) in enumerate(zip(use.shape[2:], use.stride, use.dilation)):
        x = x.unfold(2 + d, step * (size - 1) + 1, stride)[..., ::step]
    # (batch, channels, *places, *kernel) -> the channels go behind the places
    return x.movedim(1, 1 + dims)


def _chunks(use: Use, windows: Tensor) -> Iterator[Float[Tensor, "groups columns rows"]]:
    """The transposed rows, some leading places at a time, so that unfolded patches never need more than a bounded memory."""
    if windows.numel() == 0:
        return
    if len(use.shape) == 2:
        yield windows.mT[None]
        return
    # A random choice of patches has one leading dimension, a whole batch has batch and places.
    inner = windows.ndim - len(use.shape) + 1
    for part in windows.split(max(1, _CHUNK // windows[:1].numel())):
        if use.stride[-1] == 1:
            # Neighbouring places are neighbours in memory, neighbouring columns of a patch only a few.
            yield part.permute(*range(inner, part.ndim), *range(inner)).reshape(use.groups, use.columns, -1)
        else:
            yield part.reshape(-1, use.groups, use.columns).permute(1, 2, 0)
