"""The TopK step on CUDA: Triton kernels for what :mod:`.select` and :mod:`.step` do elsewhere with PyTorch's operations.

The products with the encoder and the atoms stay cuBLAS's. What is left reads each score twice: once for the maxima of groups of 64, and once, in
the k groups with the largest maxima, for the k best. Scores are computed from z and w . g as they are read, so that no tensor of scores is
written. A k-th best value is found by bisection over the bits of the number, which makes the choice exact and free of any sort. Sums by latent
run over the indices sorted by latent, one program for each latent, without atomic additions: every run gives the same bits. Adam's projection,
step and renormalisation of an atom are one pass over it.

Everything here takes contiguous tensors of one device and of :data:`DTYPES`, accumulates in float32, and runs on the CPU under ``TRITON_INTERPRET=1``.
"""

# Kernels annotate their constants with Triton's own name, which is there only where Triton is.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lineament.dictionaries.selection import Selection

triton: Any = None
tl: Any = None
try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:
    pass

GROUP = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 2**14  # values that one program holds at once
_ENTRIES, _COLUMNS = 16, 256
_SCORES = {None: 0, "sum": 1, "product": 2, "signed": 3}


def _kernel(function: Callable[..., None]) -> Any:
    return function if triton is None else triton.jit(function)


@cache
def works(device: torch.device) -> bool:
    """Whether Triton is there and its kernels run on a device, tried once; a warning says so where they do not."""
    if triton is None:
        return False
    try:
        found = best(torch.arange(256.0, device=device)[None], 1)
        return found is not None and int(found[0]) == 255
    except Exception as error:  # no compiler for its launchers, a device that it does not know
        said = " ".join(str(error).split())[:200]
        warnings.warn(
            f"Triton's kernels do not run on {device} ({type(error).__name__}: {said}); TopK steps use PyTorch's operations there",
            stacklevel=2,
        )
        return False


def _device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _padded(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


@_kernel
def _score(z, along, at, on, beta, scale, KIND: tl.constexpr):
    """Scores as :class:`lineament.dictionaries.Selection` defines them; what is not ``on`` has the least."""
    value = tl.load(z + at, mask=on, other=0.0).to(tl.float32)
    if KIND == 1:
        value = value * (tl.abs(tl.load(along + at, mask=on, other=0.0).to(tl.float32)) / scale * beta + 1.0)
    if KIND == 2:
        value = value * (tl.abs(tl.load(along + at, mask=on, other=0.0).to(tl.float32)) / scale)
    if KIND == 3:
        effect = tl.maximum(value, 0.0) * tl.load(along + at, mask=on, other=0.0).to(tl.float32) * beta
        value = tl.maximum(effect, 0.0)
    return tl.where(on, value, -float("inf"))


@_kernel
def _maxima(
    z, along, out, width, groups, beta, scale, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = _score(z, along, row * width + column, column < width, beta, scale, KIND)
    tl.store(out + row * groups + group, tl.max(values, 1), mask=group < groups)


@_kernel
def _best(
    z, along, groups, out, kept, width, k, beta, scale, KIND: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The columns of a row's k largest scores, among all columns or those of k groups, and relu(z) there."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    on = column < width
    if GROUPED:
        here = column // GROUP < k
        group = tl.load(groups + row * k + column // GROUP, mask=here, other=0)
        column = group.to(tl.int32) * GROUP + column % GROUP
        on = here & (column < width)
    score = _score(z, along, row * width + column, on, beta, scale, KIND)
    # As integers, positive numbers have the order that they have as numbers, and negative ones the opposite.
    key = score.to(tl.int32, bitcast=True)
    key = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    # The largest number that at least k keys reach, bit by bit.
    bar = tl.where(tl.sum((on & (key >= 0)).to(tl.int32), 0) >= k, 0, -2147483648)
    for bit in range(31):
        higher = bar + (1 << (30 - bit))
        bar = tl.where(tl.sum((on & (key >= higher)).to(tl.int32), 0) >= k, higher, bar)
    above = on & (key > bar)
    equal = on & (key == bar)
    left = k - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    place = row * k + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out + place, column.to(tl.int64), mask=chosen)
    value = tl.maximum(tl.load(z + row * width + column, mask=chosen, other=0.0), 0.0)
    if KIND == 3:
        value = tl.where(score > 0, value, 0.0)
    tl.store(kept + place, value, mask=chosen)


def best(
    z: Tensor, k: int, selection: Selection | None = None, along: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The places of each row's k largest scores, in no particular order, and relu(z) there (with ``score="signed"``, 0 where the score is).

    Args:
        z: (rows, width), pre-activations; along: (rows, width), w . g, where ``selection`` ranks by it.

    Returns:
        indices and values, (rows, k); ``None`` where k is too large for one program, or the scores need sums over the row.
    """
    rows, width = z.shape
    kind = None if along is None or selection is None else selection.score
    grouped = width > 2 * k * GROUP
    block = _padded(k * GROUP if grouped else width)
    groups = -(-width // GROUP)
    if kind not in _SCORES or max(block, _padded(groups) if grouped else 0) > _MOST:
        return None
    beta = scale = 1.0
    if selection is not None:
        beta, scale = float(selection.beta), float(selection.influence_scale)
        if kind == "signed":
            beta = 1.0 if selection.raising else -1.0
    z = z.contiguous()
    along = z if along is None else along.contiguous()
    indices = torch.empty(rows, k, dtype=torch.int64, device=z.device)
    values = torch.empty(rows, k, dtype=z.dtype, device=z.device)
    if not rows:
        return indices, values
    how: dict[str, Any] = {"KIND": _SCORES[kind], "GROUP": GROUP}
    among = indices
    with _device(z):
        if grouped:
            maxima = torch.empty(rows, groups, dtype=torch.float32, device=z.device)
            at_once = min(32, _padded(groups))
            _maxima[(rows, -(-groups // at_once))](
                z, along, maxima, width, groups, beta, scale, ROWS=at_once, **how
            )
            among, unused = torch.empty_like(indices), maxima.new_empty(rows, k)
            _best[(rows,)](
                maxima, maxima, among, among, unused, groups, k, 1.0, 1.0, KIND=0, GROUPED=False, GROUP=GROUP, BLOCK=_padded(groups)
            )  # fmt: skip
        _best[(rows,)](
            z, along, among, indices, values, width, k, beta, scale, GROUPED=grouped, BLOCK=block,
            num_warps=4 if block <= 4096 else 8, **how,
        )  # fmt: skip
    return indices, values


@_kernel
def _decode(indices, weights, atoms, out, active, d, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for place in range(active):
        atom = tl.load(indices + row * active + place)
        weight = tl.load(weights + row * active + place).to(tl.float32)
        total += weight * tl.load(atoms + atom * d + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(out + row * d + column, total, mask=column < d)


def decode(indices: Tensor, weights: Tensor, atoms: Tensor) -> Tensor:
    """(rows, d): the sum of each row's atoms with its weights."""
    rows, d = len(indices), atoms.shape[1]
    out = torch.empty(rows, d, dtype=atoms.dtype, device=atoms.device)
    columns = min(_COLUMNS, _padded(d))
    if out.numel():
        with _device(out):
            _decode[(rows, -(-d // columns))](
                indices.contiguous(), weights.contiguous(), atoms.contiguous(), out, indices.shape[1], d, COLUMNS=columns
            )  # fmt: skip
    return out


@_kernel
def _dots(indices, atoms, rows, out, active, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    there = place < active
    atom = tl.load(indices + row * active + place, mask=there, other=0)
    total = tl.zeros([ENTRIES], tl.float32)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        on = column < d
        value = tl.load(rows + row * d + column, mask=on, other=0.0).to(tl.float32)
        tile = tl.load(
            atoms + atom[:, None] * d + column[None, :], mask=there[:, None] & on[None, :], other=0.0
        )
        total += tl.sum(tile.to(tl.float32) * value[None, :], 1)
    tl.store(out + row * active + place, total, mask=there)


def dots(indices: Tensor, atoms: Tensor, rows: Tensor) -> Tensor:
    """(rows, active): the inner products of each row with the atoms that its indices name."""
    count, active = indices.shape
    out = torch.empty(count, active, dtype=rows.dtype, device=rows.device)
    columns = min(_COLUMNS, _padded(rows.shape[1]))
    if out.numel():
        with _device(out):
            _dots[(count, -(-active // _ENTRIES))](
                indices.contiguous(), atoms.contiguous(), rows.contiguous(), out, active, rows.shape[1], ENTRIES=_ENTRIES, COLUMNS=columns
            )  # fmt: skip
    return out


@_kernel
def _sums(order, starts, weights, rows, out, active, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    last = tl.load(starts + latent + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(tl.load(starts + latent), last, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        there = entry < last
        place = tl.load(order + entry, mask=there, other=0)
        weight = tl.load(weights + place, mask=there, other=0.0).to(tl.float32)
        tile = tl.load(
            rows + (place // active)[:, None] * d + column[None, :], mask=there[:, None] & (column < d)[None, :], other=0.0
        )  # fmt: skip
        total += tl.sum(tile.to(tl.float32) * weight[:, None], 0)
    tl.store(out + latent * d + column, total, mask=column < d)


def sums(order: Tensor, starts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """(latents, d): of each latent, the weighted sum of the rows that it is on in.

    Args:
        order: places in the flattened ``weights``, sorted by latent; starts: (latents + 1), where in it each latent begins.
        weights: (rows, active); rows: (rows, d).
    """
    latents, d = len(starts) - 1, rows.shape[1]
    out = torch.empty(latents, d, dtype=rows.dtype, device=rows.device)
    columns = min(_COLUMNS, _padded(d))
    if out.numel():
        with _device(out):
            _sums[(latents, -(-d // columns))](
                order, starts, weights.contiguous(), rows.contiguous(), out, max(weights.shape[1], 1), d, ENTRIES=_ENTRIES, COLUMNS=columns
            )  # fmt: skip
    return out


@_kernel
def _adam(
    p, g, m, v, scale, count, d, size, root, rest_one, two, rest_two, eps, UNIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * d + column
    on = (column < d) & (at < count)
    value = tl.load(p + at, mask=on, other=0.0).to(tl.float32)
    grad = tl.load(g + at, mask=on, other=0.0).to(tl.float32) * tl.load(scale)
    if UNIT:
        grad -= tl.sum(grad * value, 0) * value
    first = tl.load(m + at, mask=on, other=0.0).to(tl.float32)
    first += rest_one * (grad - first)
    second = tl.load(v + at, mask=on, other=0.0).to(tl.float32) * two + rest_two * grad * grad
    value -= size * first / (tl.sqrt(second) / root + eps)
    if UNIT:
        value = value / tl.maximum(tl.sqrt(tl.sum(value * value, 0)), 1e-12)
    tl.store(m + at, first, mask=on)
    tl.store(v + at, second, mask=on)
    tl.store(p + at, value, mask=on)


def adam_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, scale: Tensor,
    *, size: float, root: float, betas: tuple[float, float], eps: float, unit: bool,
) -> bool:  # fmt: skip
    """One step of Adam, in place, with the gradient times ``scale``; of a ``unit`` parameter each row is projected and renormalised.

    Returns:
        Whether it was done: not where a row is longer than one program holds, or a tensor is not contiguous.
    """
    d = p.shape[-1] if unit else 1024
    if _padded(d) > _MOST or not all(each.is_contiguous() for each in (p, m, v)):
        return False
    one, two = betas
    if p.numel():
        with _device(p):
            _adam[(-(-p.numel() // d),)](
                p, g.contiguous(), m, v, scale, p.numel(), d, size, root, 1 - one, two, 1 - two, eps, UNIT=unit, BLOCK=_padded(d)
            )  # fmt: skip
    return True
