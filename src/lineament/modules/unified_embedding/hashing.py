"""Hashes that give the same bits everywhere: mix64 and multiply-shift of integers, SipHash-2-4 and XXH64 of strings.

mix64 is the finaliser of SplitMix64; SipHash-2-4 (Aumasson, Bernstein 2012) is what TensorFlow's ``Hashing(salt=...)`` layer uses. 64-bit numbers are
int64 tensors whose bits are meant unsigned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.modules.unified_embedding.xxh64 import xxh64

_MASK = (1 << 64) - 1
# From here on the multiply-and-shift range is too uneven: the exact remainder instead.
_EXACT_FROM = 1 << 24
# Ids that are hashed at once: they and their shifts take 128 KB.
_CACHED = 1 << 13


def mix64(values: Tensor, salt: int | Tensor) -> Tensor:
    """M(u xor M(salt)) mod 2^64 for M of SplitMix64, elementwise.

    Args:
        values: int64, any, also negative. salt: 0 <= salt < 2^64; or a tensor of M(salt)s, as many as ``values`` has columns.

    >>> mix64(torch.tensor([0]), 0).tolist()
    [-6411193824288604561]
    """
    require(
        isinstance(values, Tensor) and values.dtype == torch.int64,
        f"values: got {show(values)}, expected int64 ids",
    )
    return _mixed(values ^ (salt if isinstance(salt, Tensor) else signed(mixed_salt(salt))))


def mixed_salt(salt: int) -> int:
    """M(salt), as a Python integer.

    >>> mixed_salt(1234567)
    6457827717110365317
    """
    x = (number("salt", salt, low=0, high=_MASK, integer=True) + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; ``x``, which nobody else holds, is changed."""
    x = x.add_(signed(0x9E3779B97F4A7C15))
    x = _shifted(x, 30).bitwise_xor_(x).mul_(signed(0xBF58476D1CE4E5B9))
    x = _shifted(x, 27).bitwise_xor_(x).mul_(signed(0x94D049BB133111EB))
    return _shifted(x, 31).bitwise_xor_(x)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def signed(value: int) -> int:
    """The int64 of the same bits.

    >>> signed(2**64 - 1)
    -1
    """
    return value - (1 << 64) if value >> 63 else value


def remainder(hashes: Tensor, rows: int) -> Tensor:
    """The unsigned hash modulo ``rows`` < 2^62, exactly.

    >>> remainder(torch.tensor([-1]), 10).tolist()  # 2^64 - 1
    [5]
    """
    number("rows", rows, low=1, high=(1 << 62) - 1, integer=True)
    return (_shifted(hashes, 1) % rows * 2 + (hashes & 1)) % rows


def fast_range(hashes: Tensor, rows: int) -> Tensor:
    """((h >> 32) * rows) >> 32: cheaper than a remainder, and even up to rows / 2^32; rows < 2^31.

    >>> fast_range(torch.tensor([-1]), 10).tolist()
    [9]
    """
    number("rows", rows, low=1, high=(1 << 31) - 1, integer=True)
    return _shifted(hashes, 32).mul_(rows).bitwise_right_shift_(32)


def bucket(hashes: Tensor, rows: int) -> Tensor:
    """A row for each hash: :func:`fast_range`, or from 2^24 rows on the exact :func:`remainder`."""
    return fast_range(hashes, rows) if rows < _EXACT_FROM else remainder(hashes, rows)


def multiply_shift(values: Tensor, multiplier: int, bits: int) -> Tensor:
    """The upper ``bits`` of a x mod 2^64 for an odd a: a row among 2^bits with one multiplication (Dietzfelbinger et al. 1997).

    Two values share a row with a chance of at most 2 / 2^bits over random odd multipliers.

    >>> multiply_shift(torch.tensor([1, 2]), 2**63 + 1, 2).tolist()
    [2, 0]
    """
    number("multiplier", multiplier, low=1, high=_MASK, integer=True)
    number("bits", bits, low=1, high=62, integer=True)
    require(multiplier % 2 == 1, f"multiplier: got {multiplier}, expected an odd number")
    require(
        isinstance(values, Tensor) and values.dtype == torch.int64,
        f"values: got {show(values)}, expected int64 ids",
    )
    return _shifted(values * signed(multiplier), 64 - bits)


def hashed_rows(ids: Tensor, salts: Tensor, rows: int) -> Tensor:
    """``bucket(mix64(ids, salts), rows)``, in two thirds of the time on a CPU: NumPy shifts unsigned numbers, and a part of the ids stays in the cache through all steps.

    Args:
        ids: int64 [n, columns] or [n]. salts: mixed salts as :func:`mix64` takes them, one a column, or a single one.

    >>> hashed_rows(torch.tensor([[7], [8]]), torch.tensor([5]), 100).flatten().tolist()
    [59, 76]
    """
    require(
        isinstance(ids, Tensor) and ids.dtype == torch.int64, f"values: got {show(ids)}, expected int64 ids"
    )
    if torch.compiler.is_compiling() or type(ids) is not Tensor or ids.device.type != "cpu":
        return bucket(mix64(ids, salts), rows)
    u, every, given = np.uint64, ids.numpy().view(np.uint64), salts.numpy().view(np.uint64)
    found = np.empty(every.shape, u)
    step = max(1, _CACHED // max(1, every[:1].size))
    spare = np.empty((min(step, len(every)), *every.shape[1:]), u)
    for start in range(0, len(every), step):
        x = found[start : start + step]
        shifted = spare[: len(x)]
        np.bitwise_xor(every[start : start + step], given, out=x)
        x += u(0x9E3779B97F4A7C15)
        for by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            np.right_shift(x, u(by), out=shifted)
            x ^= shifted
            x *= u(factor)
        np.right_shift(x, u(31), out=shifted)
        x ^= shifted
        if rows < _EXACT_FROM:
            x >>= u(32)
            x *= u(rows)
            x >>= u(32)
        else:
            x %= u(rows)
    return torch.from_numpy(found.view(np.int64))


def siphash(texts: Sequence[str | bytes], key: tuple[int, int]) -> Tensor:
    """SipHash-2-4 of the UTF-8 bytes of each text, under two 64-bit key words.

    >>> siphash([bytes(range(15))], (0x0706050403020100, 0x0F0E0D0C0B0A0908)).tolist() == [signed(0xA129CA6149BE45E5)]
    True
    """
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    if not raw:
        return torch.empty(0, dtype=torch.int64)
    lengths = np.array([len(r) for r in raw], dtype=np.uint64)
    blocks = lengths.astype(np.int64) // 8 + 1
    padded = np.zeros((len(raw), int(blocks.max()) * 8), dtype=np.uint8)
    for row, data in zip(padded, raw):
        row[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    words = padded.view("<u8").astype(np.uint64)
    words[np.arange(len(raw)), blocks - 1] |= (lengths & np.uint64(255)) << np.uint64(56)
    k = [np.uint64(int(word) & _MASK) for word in key]
    start = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
    v = [np.full(len(raw), np.uint64(s) ^ k[i % 2]) for i, s in enumerate(start)]
    for i in range(words.shape[1]):
        there = i < blocks
        after = _compressed([part[there] for part in v], words[there, i])
        for part, new in zip(v, after):
            part[there] = new
    v[2] ^= np.uint64(0xFF)
    for _ in range(4):
        v = _round(v)
    return torch.from_numpy((v[0] ^ v[1] ^ v[2] ^ v[3]).view(np.int64))


def _compressed(v: list[np.ndarray], word: np.ndarray) -> list[np.ndarray]:
    v[3] = v[3] ^ word
    v = _round(_round(v))
    v[0] = v[0] ^ word
    return v


def _round(v: list[np.ndarray]) -> list[np.ndarray]:
    a, b, c, d = v
    a, c = a + b, c + d
    b, d = _rolled(b, 13) ^ a, _rolled(d, 16) ^ c
    a = _rolled(a, 32)
    c, a = c + b, a + d
    b, d = _rolled(b, 17) ^ c, _rolled(d, 21) ^ a
    return [a, b, _rolled(c, 32), d]


def _rolled(x: np.ndarray, by: int) -> np.ndarray:
    return (x << np.uint64(by)) | (x >> np.uint64(64 - by))


def fingerprint(texts: Sequence[str | bytes], hash: Literal["siphash", "xxh64"] = "siphash") -> Tensor:
    """int64 ids of strings, by SipHash under key zero: hash strings once, in the loader, and embed the ids. ``"xxh64"`` where other parts of a pipeline make theirs so.

    >>> fingerprint(["a", "b", "a"]).unique().numel()
    2
    """
    if one_of("hash", hash, ("siphash", "xxh64")) == "xxh64":
        return xxh64(texts)
    return siphash(texts, (0, 0))


def as_texts(values: Sequence[object] | Tensor) -> list[str | bytes]:
    """Values as SipHash takes them: integers become decimal strings, so that 7 and "7" are one, and "07" is another."""
    found: list[str | bytes] = []
    for value in values.tolist() if isinstance(values, Tensor) else values:
        if isinstance(value, (str, bytes)):
            found.append(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(str(value))
        else:
            raise InputError(f"values: got {show(value)}, expected strings or whole numbers")
    return found
