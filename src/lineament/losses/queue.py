"""Past keys as negatives: a ring of unit rows that wraps, and travels in the state dict."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import number, require, show
from lineament.core.shards import gathered


class Queue(nn.Module):
    """The last ``size`` keys, oldest overwritten first.

    Args:
        size, dimension: K and d. seed: of the random unit rows that it starts with.

    >>> queue = Queue(3, 2)
    >>> queue.enqueue(torch.eye(2)); queue.enqueue(-torch.eye(2))
    >>> queue.rows[1].tolist(), int(queue.pointer)
    ([0.0, 1.0], 1)
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, dimension: int, *, seed: int = 0):
        super().__init__()
        number("size", size, low=2, integer=True)
        number("dimension", dimension, low=1, integer=True)
        start = torch.randn(size, dimension, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("rows", F.normalize(start, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put unit keys [n, d] in, never transformed ones; in a process group, those of all processes, which must all call it with as many keys.

        Raises:
            InputError: another dimension, rows that are not of length 1.
        """
        require(
            keys.ndim == 2 and keys.shape[1] == self.rows.shape[1],
            f"keys: got {show(keys)}, expected rows of {self.rows.shape[1]} numbers",
        )
        norms = keys.norm(dim=1)
        room = 1e-2 if keys.dtype in (torch.float16, torch.bfloat16) else 1e-4
        require(
            bool(((norms - 1).abs() <= room).all()),
            "keys: expected rows of length 1; normalise them first, and enqueue them before any mixing",
        )
        keys = gathered(keys)
        norms = keys.norm(dim=1)
        keys = keys.to(self.rows)[-len(self.rows) :] if len(keys) > len(self.rows) else keys.to(self.rows)
        skipped = len(norms) - len(keys)
        at = (self.pointer + skipped + torch.arange(len(keys), device=self.rows.device)) % len(self.rows)
        self.rows[at] = keys
        self.pointer.copy_((self.pointer + len(norms)) % len(self.rows))
