"""A small decoder on bytes whose layers run full or sparse attention, or any other that is handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.modules.sparse_attention.attend import full_attention
from lineament.modules.sparse_attention.branch import coins
from lineament.modules.sparse_attention.layer import SparseSparseAttention

# Queries, keys and values to outputs, [batch, heads, tokens, size].
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Attention and a SwiGLU, each behind an RMS norm."""

    def __init__(self, config: Any):
        super().__init__()
        size = config.width // config.heads
        self.attention = SparseSparseAttention(
            config.width, config.heads, config.key_heads, size, block_size=config.block_size, blocks=config.blocks, theta=config.theta
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.RMSNorm(config.width, eps=1e-5) for _ in range(2))
        self.up = nn.Linear(config.width, 2 * config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.width, bias=False)

    def attended(self, x: Tensor, attention: Attention) -> Tensor:
        """The stream behind a given attention."""
        layer, u = self.attention, self.norms[0](x)
        return x + layer.joined(layer.gated(u, attention(*layer.projected(u))))

    def trained(self, x: Tensor, full: bool, align: bool) -> tuple[Tensor, Tensor]:
        """The stream behind full or sparse attention, and their alignment, 0 where it is not asked for."""
        u = self.norms[0](x)
        if not align:
            return x + self.attention(u, mode="full" if full else "sparse"), x.new_zeros(())
        one, two, alignment = self.attention.both(u)
        return x + (one if full else two), alignment.total

    def fed(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class ByteModel(nn.Module):
    """Logits of the next byte, [batch, tokens, 256]. In training a coin passes full attention on with probability ``p_full``.

    ``alignment`` is the mean alignment of the layers at the last training call; ``alpha`` 0 leaves it out.
    """

    def __init__(self, config: Any, *, p_full: float, alpha: float, seed: int):
        super().__init__()
        self.p_full, self.alpha, self.seed, self.step = p_full, alpha, seed, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(256, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.width, eps=1e-5)
            for weight in self.parameters():
                if weight.ndim > 1:
                    nn.init.normal_(weight, std=config.initial_std)
        self.alignment = torch.zeros(())
        self.history: list[float] = []

    def forward(self, ids: Tensor, attention: Attention = full_attention) -> Tensor:
        x, blocks = self.embedding(ids), cast(list[Block], list(self.blocks))
        if self.training:
            full = coins([0], self.p_full, self.seed, self.step, "step")[0]
            found = []
            for block in blocks:
                x, alignment = block.trained(x, full, self.alpha > 0)
                found.append(alignment)
                x = block.fed(x)
            self.step, self.alignment = self.step + 1, torch.stack(found).mean()
            self.history.append(float(self.alignment.detach()))
        else:
            for block in blocks:
                x = block.fed(block.attended(x, attention))
        return F.linear(self.norm(x), self.embedding.weight)
