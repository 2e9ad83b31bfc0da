"""An attention layer that computes full and sparse attention from one set of weights.

Shen et al. 2026, arXiv 2511.20102, section 1.3: a gate for each query head, one of the two outputs goes on, and the other is aligned with it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require
from lineament.modules.sparse_attention.alignment import Alignment, alignment_loss
from lineament.modules.sparse_attention.attend import attend, attend_both, full_attention
from lineament.modules.sparse_attention.selection import Selection, select


class SparseSparseAttention(nn.Module):
    """Gated causal attention with rotary positions, full or over the best blocks.

    Args:
        width: of the stream. heads, key_heads, head_size: query heads, key and value heads, and their size.
        block_size, blocks: tokens of a block and blocks of a query; may be changed at any time.
        theta: base of the rotary angles.

    ``layer(x, mode="sparse"|"full")`` gives the output; :meth:`both` gives either output and their alignment.

    >>> import torch
    >>> layer = SparseSparseAttention(16, 4, 2, 8, block_size=4, blocks=2)
    >>> layer(torch.randn(1, 10, 16)).shape
    torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_heads: int,
        head_size: int,
        *,
        block_size: int = 16,
        blocks: int = 16,
        theta: float = 10_000.0,
    ):
        super().__init__()
        for name, value in {
            "width": width,
            "heads": heads,
            "key_heads": key_heads,
            "head_size": head_size,
        }.items():
            number(name, value, low=1, integer=True)
        require(
            heads % key_heads == 0, f"heads: {heads} query heads cannot share {key_heads} key heads evenly"
        )
        require(head_size % 2 == 0, f"head_size: got {head_size}, expected an even size for rotary positions")
        self.heads, self.key_heads, self.head_size = heads, key_heads, head_size
        self.block_size, self.blocks, self.theta = block_size, blocks, theta
        self.q = nn.Linear(width, heads * head_size, bias=False)
        self.k = nn.Linear(width, key_heads * head_size, bias=False)
        self.v = nn.Linear(width, key_heads * head_size, bias=False)
        self.gate = nn.Linear(width, heads, bias=False)
        self.out = nn.Linear(heads * head_size, width, bias=False)

    def forward(self, x: Tensor, mode: Literal["sparse", "full"] = "sparse") -> Tensor:
        """The output of [batch, tokens, width]."""
        one_of("mode", mode, ("sparse", "full"))
        q, k, v = self.projected(x)
        heads = full_attention(q, k, v) if mode == "full" else attend(q, k, v, self.selection(q, k)).output
        return self._joined(self._gated(x, heads))

    def both(self, x: Tensor, *, beta: float = 1.0) -> tuple[Tensor, Tensor, Alignment]:
        """The full output, the sparse output, and the alignment of the gated heads; ``beta`` as of :func:`alignment_loss`."""
        q, k, v = self.projected(x)
        found = attend_both(q, k, v, self.selection(q, k))
        full, sparse = self._gated(x, found.full), self._gated(x, found.sparse)
        return self._joined(full), self._joined(sparse), alignment_loss(full, sparse, beta=beta)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with their positions, and values, [batch, heads, tokens, size]."""
        q, k, v = (
            layer(x).unflatten(2, (-1, self.head_size)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return rotary(q, self.theta), rotary(k, self.theta), v

    def selection(self, q: Tensor, k: Tensor) -> Selection:
        """The chosen blocks."""
        return select(q, k, block_size=self.block_size, blocks=self.blocks)

    def _gated(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.gate(x).sigmoid().transpose(1, 2)[..., None] * heads

    def _joined(self, heads: Tensor) -> Tensor:
        return self.out(heads.transpose(1, 2).flatten(2))


def rotary(x: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotary positions in the half-rotation convention, angles t θ^(-2i / size), on [batch, heads, tokens, size].

    >>> rotary(torch.ones(1, 1, 1, 2)).flatten().tolist()
    [1.0, 1.0]
    """
    half = x.shape[3] // 2
    rate = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) * 2 / x.shape[3])
    angle = torch.arange(x.shape[2], dtype=torch.float64, device=x.device)[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], 3)
