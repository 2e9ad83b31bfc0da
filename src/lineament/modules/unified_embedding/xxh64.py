"""XXH64 of strings (Collet 2014), the fingerprint that many data pipelines make of words: strings of one length are hashed side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import number

_U = np.uint64
_P1, _P2, _P3, _P4, _P5 = map(
    _U, (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
)


def xxh64(texts: Sequence[str | bytes], seed: int = 0) -> Tensor:
    """XXH64 of the UTF-8 bytes of each text, as int64 of the same bits.

    >>> hex(int(xxh64(["abc"])[0]) % 2**64)
    '0x44bc2cf5ad770999'
    """
    number("seed", seed, low=0, high=(1 << 64) - 1, integer=True)
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    found = np.empty(len(raw), _U)
    lengths = np.array([len(text) for text in raw], dtype=np.int64)
    with np.errstate(over="ignore"):
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            joined = np.frombuffer(b"".join(raw[k] for k in rows), dtype=np.uint8)
            found[rows] = _hashed(joined.reshape(len(rows), int(length)), _U(seed))
    return torch.from_numpy(found.view(np.int64))


def _hashed(x: np.ndarray, seed: np.uint64) -> np.ndarray:
    """Of bytes [texts, length]."""
    length, at = x.shape[1], 0
    if length >= 32:
        v = [np.full(len(x), start, _U) for start in (seed + _P1 + _P2, seed + _P2, seed, seed - _P1)]
        while at + 32 <= length:
            v = [_round(v[k], _word(x, at + 8 * k, 8)) for k in range(4)]
            at += 32
        h = _turned(v[0], 1) + _turned(v[1], 7) + _turned(v[2], 12) + _turned(v[3], 18)
        for part in v:
            h = (h ^ _round(np.zeros_like(part), part)) * _P1 + _P4
    else:
        h = np.full(len(x), seed + _P5, _U)
    h = h + _U(length)
    while at + 8 <= length:
        h = _turned(h ^ _round(np.zeros_like(h), _word(x, at, 8)), 27) * _P1 + _P4
        at += 8
    if at + 4 <= length:
        h = _turned(h ^ (_word(x, at, 4) * _P1), 23) * _P2 + _P3
        at += 4
    for k in range(at, length):
        h = _turned(h ^ (x[:, k].astype(_U) * _P5), 11) * _P1
    h = (h ^ (h >> _U(33))) * _P2
    h = (h ^ (h >> _U(29))) * _P3
    return h ^ (h >> _U(32))


def _word(x: np.ndarray, at: int, size: int) -> np.ndarray:
    """``size`` bytes of each text as a little-endian number."""
    return np.ascontiguousarray(x[:, at : at + size]).view(f"<u{size}")[:, 0].astype(_U)


def _round(v: np.ndarray, word: np.ndarray) -> np.ndarray:
    return _turned(v + word * _P2, 31) * _P1


def _turned(x: np.ndarray, by: int) -> np.ndarray:
    return (x << _U(by)) | (x >> _U(64 - by))
