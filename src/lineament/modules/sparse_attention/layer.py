"""An attention layer that computes full and sparse attention from one set of weights.

Shen et al. 2026, arXiv 2511.20102, section 1.3: a gate for each query head, one of the two outputs goes on, and the other is aligned with it.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lineament.core.checks import number, one_of, require
from lineament.modules.sparse_attention.attention import Alignment, alignment_loss, attention, rotary
from lineament.modules.sparse_attention.selection import select_blocks


class SparseSparseAttention(nn.Module):
    """Gated causal attention with rotary positions, full or over the best blocks.

    Args:
        width: of the stream. heads, key_heads, head_size: query heads, key and value heads, and their size.
        block_size, top_k: tokens of a block and blocks of a query; may be changed at any time.
        theta: base of the rotary angles.

    ``layer(x, mode="sparse"|"full")`` gives the output; :meth:`both` gives either output and their alignment.

    >>> import torch
    >>> layer = SparseSparseAttention(16, 4, 2, 8, block_size=4, top_k=2)
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
        top_k: int = 16,
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
        self.block_size, self.top_k, self.theta = block_size, top_k, theta
        self.q = nn.Linear(width, heads * head_size, bias=False)
        self.k = nn.Linear(width, key_heads * head_size, bias=False)
        self.v = nn.Linear(width, key_heads * head_size, bias=False)
        self.gate = nn.Linear(width, heads, bias=False)
        self.out = nn.Linear(heads * head_size, width, bias=False)

    def forward(self, x: Tensor, mode: Literal["sparse", "full"] = "sparse") -> Tensor:
        """The output of [batch, tokens, width]."""
        one_of("mode", mode, ("sparse", "full"))
        q, k, v = self.projected(x)
        blocks = self.blocks(q, k) if mode == "sparse" else None
        return self._joined(self._gated(x, attention(q, k, v, blocks, block_size=self.block_size)))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor, Alignment]:
        """The full output, the sparse output, and the alignment of the gated heads."""
        q, k, v = self.projected(x)
        full = self._gated(x, attention(q, k, v))
        sparse = self._gated(x, attention(q, k, v, self.blocks(q, k), block_size=self.block_size))
        return self._joined(full), self._joined(sparse), alignment_loss(full, sparse)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with their positions, and values, [batch, tokens, heads, size]."""
        q, k, v = (layer(x).unflatten(2, (-1, self.head_size)) for layer in (self.q, self.k, self.v))
        return rotary(q, self.theta), rotary(k, self.theta), v

    def blocks(self, q: Tensor, k: Tensor) -> Tensor:
        """The chosen blocks."""
        return select_blocks(q, k, block_size=self.block_size, top_k=self.top_k)

    def _gated(self, x: Tensor, heads: Tensor) -> Tensor:
        return self.gate(x).sigmoid()[..., None] * heads

    def _joined(self, heads: Tensor) -> Tensor:
        return self.out(heads.flatten(2))
