"""A cache for decoding over chosen blocks, on which a token costs its blocks and one mean key a block, and no copy of its past.

``DynamicCache`` of transformers copies all keys and values at every token. This one grows by doubling and keeps the mean key of each complete block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from lineament.modules.sparse_attention.attend import sparse_output
from lineament.modules.sparse_attention.backends import gather
from lineament.modules.sparse_attention.backends.recomputed import wide
from lineament.modules.sparse_attention.blocks import placed, row_ends
from lineament.modules.sparse_attention.options import LayerBudget
from lineament.modules.sparse_attention.selection import best_blocks

# The attribute by which the keys that a layer hands out name it.
OWNER = "_lineament_layer"
# Buffers hold a multiple of this many tokens.
ROUND = 256


class BlockLayer(DynamicLayer):
    """One layer's keys and values in buffers that double, and the mean key of each complete block, counted from each row's first real token."""

    # transformers 4.56 does not set it.
    is_initialized = False

    def __init__(self, **options: Any):
        self.length, self._keys, self._values = 0, None, None
        self._forget()
        super().__init__(**options)

    @property
    def keys(self) -> Tensor | None:
        """[batch, heads, tokens, size]."""
        return None if self._keys is None else self._keys[:, :, : self.length]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._keys = value
        self.length = 0 if value is None or value.ndim != 4 else value.shape[2]

    @property
    def values(self) -> Tensor | None:
        """[batch, heads, tokens, size]."""
        return None if self._values is None else self._values[:, :, : self.length]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._values = value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Take dtype, device and shape of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        values = key_states if value_states is None else value_states
        self._keys, self._values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, values))
        self.length = 0
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self._keys, self._values = (
            self._written(old, new, end)
            for old, new in ((self._keys, key_states), (self._values, value_states))
        )
        self.length = end
        keys = self._keys[:, :, :end]
        setattr(keys, OWNER, self)
        return keys, self._values[:, :, :end]

    def _written(self, old: Any, new: Tensor, end: int) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and (new.requires_grad or old.requires_grad)
        if needs_gradient:
            return torch.cat([old[:, :, : self.length], new], 2)
        if old.shape[2] < end:
            # Zeros: the last block is read whole, what lies behind its end with weight zero.
            # A round length: blocks of 2, 4, ... tokens are then copied as one.
            size = -(-max(end, 2 * old.shape[2]) // ROUND) * ROUND
            grown = new.new_zeros(*new.shape[:2], size, new.shape[3])
            grown[:, :, : self.length] = old[:, :, : self.length]
            old = grown
        old[:, :, self.length : end] = new
        return old

    def get_seq_length(self, *args: Any) -> int:
        """How many tokens are kept."""
        return self.length

    def reset(self) -> None:
        """Forget everything."""
        self._keys = self._values = None
        self.length, self.is_initialized = 0, False
        self._forget()

    def crop(self, tokens: int) -> None:
        """Drop the last ``-tokens`` tokens, or with transformers 4 keep the first ``tokens``."""
        self.length = max(0, self.length + tokens) if tokens < 0 else min(self.length, tokens) if tokens else self.length  # fmt: skip
        if self.means is not None:
            self.done = [min(done, self._complete(begin)) for done, begin in zip(self.done, self.begins)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        self._rows(lambda x: x[indices.to(x.device)])

    def _rows(self, change: Any) -> None:
        if self._keys is None or self._values is None:
            return
        order = change(torch.arange(len(self._keys), device=self._keys.device)).tolist()
        self._keys, self._values = change(self._keys), change(self._values)
        if self.means is not None:
            self.means = change(self.means)
            self.done, self.begins = ([x[row] for row in order] for x in (self.done, self.begins))

    def _forget(self) -> None:
        self.means: Tensor | None = None
        self.block_size, self.done, self.begins = 0, [], []

    def _complete(self, begin: int) -> int:
        return max(0, (self.length - begin) // self.block_size)

    def block_means(self, block_size: int, begins: list[int], count: int) -> Tensor:
        """The mean keys of the complete blocks of each row, which begins at its first real token, [batch, heads, count, size]; zero elsewhere."""
        assert self._keys is not None
        keys = self._keys
        if self.means is None or self.block_size != block_size or self.begins != begins:
            self._forget()
            self.block_size, self.begins, self.done = block_size, begins, [0] * len(begins)
            self.means = wide(keys.new_zeros(*keys.shape[:2], 0, keys.shape[3]))
        if self.means.shape[2] < count:
            grown = self.means.new_zeros(*keys.shape[:2], max(count, 2 * self.means.shape[2]), keys.shape[3])
            grown[:, :, : self.means.shape[2]] = self.means
            self.means = grown
        rows = [slice(row, row + 1) for row in range(len(begins))]
        if len(set(begins)) == 1 and len(set(self.done)) == 1:
            rows = [slice(None)]
        for row in rows:
            begin, done = begins[row][0], self.done[row][0]
            complete = self._complete(begin)
            if complete > done:
                tokens = keys[row, :, begin + done * block_size : begin + complete * block_size]
                self.means[row, :, done:complete] = wide(tokens).unflatten(2, (-1, block_size)).mean(3)
                self.done[row] = [complete] * len(self.done[row])
        return self.means[:, :, :count]


class BlockCache(DynamicCache):
    """A cache of transformers for sparse attention: ``model.generate(..., past_key_values=BlockCache(model.config))``.

    It serves full attention too, and any number of tokens a call. Layers with a sliding window have the library's own cache.

    >>> from transformers import LlamaConfig
    >>> cache = BlockCache(LlamaConfig(num_hidden_layers=2))
    >>> keys, values = cache.update(torch.ones(1, 4, 3, 8), torch.ones(1, 4, 3, 8), 0)
    >>> cache.get_seq_length()
    3
    """

    def __init__(self, config: Any = None, *, offloading: bool = False):
        super().__init__(config=config, offloading=offloading)
        self.layers = [BlockLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = BlockLayer


def layer_of(keys: Tensor) -> BlockLayer | None:
    """The layer that handed out these keys, where nothing is to be differentiated."""
    layer = getattr(keys, OWNER, None)
    return None if layer is None or (torch.is_grad_enabled() and keys.requires_grad) else layer


def attend_cached(
    q: Tensor, layer: BlockLayer, budget: LayerBudget, *, scale: float | None, padding: Tensor | None
) -> Tensor:
    """Sparse attention of the last tokens over a cache's blocks."""
    assert layer._keys is not None and layer._values is not None
    keys = layer.length
    ends = None if padding is None or bool(padding.all()) else row_ends(padding[:, :keys])
    begins = [0] * len(q) if ends is None else ends[0].flatten().tolist()
    exact = budget.selection == "exact"
    if exact and ends is None and q.shape[2] == 1 and layer._keys.shape[2] % budget.block_size == 0:
        means = layer.block_means(budget.block_size, begins, -(-keys // budget.block_size))
        return _one_token(q, layer, budget, means, scale)
    layout = placed(budget.block_size, keys, keys - q.shape[2], ends, q.device)
    means = layer.block_means(budget.block_size, begins * (len(q) // len(begins)), layout.count)
    selection = best_blocks(
        q, means, layout, budget.blocks, scoring=budget.scoring, scale=scale, sinks=budget.sinks, recent=budget.recent,
        selection=budget.selection,
    )  # fmt: skip
    if q.shape[2] > 32:
        k, v = layer._keys[:, :, :keys], layer._values[:, :, :keys]
        return sparse_output(q, k, v, selection, scale=scale, backend="auto", lse=False)[0]
    factor = q.shape[3] ** -0.5 if scale is None else scale
    with torch.no_grad():
        found = gather.forward(wide(q), layer._keys, layer._values, selection.indices, layout, factor)
    return found[0].to(q.dtype)


@torch.no_grad()
def _one_token(
    q: Tensor, layer: BlockLayer, budget: LayerBudget, means: Tensor, scale: float | None
) -> Tensor:
    """The same for the last token of rows without padding, in as few steps as possible: nothing is masked, for nothing lies behind it."""
    assert layer._keys is not None and layer._values is not None
    size, (batch, heads, width) = budget.block_size, (len(q), layer._keys.shape[1], q.shape[3])
    own, within = divmod(layer.length - 1, size)
    factor = width**-0.5 if scale is None else scale
    rows = wide(q).view(batch, heads, -1, width)
    best = torch.matmul(rows, means[:, :, : own + (within == size - 1)].mT)
    if budget.scoring == "dot":
        rows = rows.flatten(1, 2)[:, :, None]
        best = best.flatten(1, 2)[..., :own]
    else:
        best = best.mul_(factor).softmax(-1).sum(2)[..., :own]
    if budget.sinks:
        best[..., : budget.sinks] = torch.inf
    if budget.recent:
        best[..., max(0, own - budget.recent) :] = torch.inf
    best = best.topk(min(budget.blocks - 1, own), -1).indices
    # Its own block last, so that what lies behind the token can be cut off.
    blocks = F.pad(best, (0, 1), value=own).flatten(0, 1)
    group = len(blocks) // (batch * heads)
    first = torch.arange(batch * heads, device=q.device).repeat_interleave(group) * (
        layer._keys.shape[2] // size
    )
    flat = (blocks + first[:, None]).flatten()
    keys, values = (
        x.view(-1, size * x.shape[3]).index_select(0, flat).view(len(blocks), -1, x.shape[3])[:, : within + 1 - size or None]
        for x in (layer._keys, layer._values)
    )  # fmt: skip
    logits = torch.bmm(rows.flatten(0, 1).to(keys.dtype), keys.mT).to(rows.dtype)
    found = torch.bmm(logits.mul_(factor).softmax(-1).to(values.dtype), values)
    return found.view(*q.shape[:3], -1).to(q.dtype)
