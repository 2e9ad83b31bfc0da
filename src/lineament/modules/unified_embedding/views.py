"""A model's own embeddings as views of one shared table: the same calls, fewer rows.

Coleman et al., "Unified Embedding", NeurIPS 2023, arXiv 2305.12102. Each ``nn.Embedding`` and ``nn.EmbeddingBag`` becomes a feature of one table, by its name in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, number, require, show
from lineament.core.results import Readable
from lineament.modules.unified_embedding.inputs import rising
from lineament.modules.unified_embedding.table import UnifiedEmbedding


@dataclass(frozen=True)
class Multiplexed(Readable):
    """What :func:`multiplex` did: the replaced modules, the rows of the shared table, and parameters before and after."""

    replaced: tuple[str, ...]
    rows: int
    before: int
    after: int

    @property
    def saved(self) -> float:
        """The share of the embeddings' parameters that is gone."""
        return 1 - self.after / self.before


class EmbeddingView(nn.Module):
    """One feature of a shared table, called as the ``nn.Embedding`` or ``nn.EmbeddingBag`` whose place it takes."""

    def __init__(self, table: UnifiedEmbedding, name: str, like: nn.Embedding | nn.EmbeddingBag):
        super().__init__()
        # The first view of the model owns the table, the others refer to it; state dicts hold it once a view, as one tensor.
        self.table, self.name = table, name
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx = like.padding_idx
        self.mode = like.mode if isinstance(like, nn.EmbeddingBag) else None
        self.include_last_offset = getattr(like, "include_last_offset", False)

    def extra_repr(self) -> str:
        return f"{self.name!r}, {self.embedding_dim} wide, of a table of {self.table.rows} rows"

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """As the module that it replaces."""
        if self.mode is None:
            require(
                offsets is None and per_sample_weights is None, "offsets: an nn.Embedding takes ids alone"
            )
            found = self._rows(input.reshape(-1)).view(*input.shape, self.embedding_dim)
            return found if self.padding_idx is None else found * (input != self.padding_idx)[..., None]
        if input.ndim == 2:
            require(offsets is None, "offsets: not with ids [batch, values]")
            offsets = torch.arange(0, input.numel(), input.shape[1], device=input.device)
            input = input.reshape(-1)
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        if offsets is None:
            raise InputError(f"offsets: got none beside {show(input)}, expected where each bag starts")
        rising(offsets, self.name, len(input))
        starts = offsets[:-1] if self.include_last_offset else offsets
        bag = torch.bucketize(torch.arange(len(input), device=input.device), starts, right=True) - 1
        return self._pooled(self._rows(input), input, bag, len(starts), per_sample_weights)

    def _rows(self, ids: Tensor) -> Tensor:
        table = self.table
        source, (at,) = table.rows_at([table.places_of(self.name, ids)])
        found = F.embedding(at, source, sparse=table.sparse and not table.sharded)
        return found.flatten(1)[:, : self.embedding_dim]

    def _pooled(self, rows: Tensor, ids: Tensor, bag: Tensor, count: int, weights: Tensor | None) -> Tensor:
        there = (
            torch.ones_like(ids, dtype=torch.bool) if self.padding_idx is None else ids != self.padding_idx
        )
        if self.mode == "max":
            low = rows.masked_fill(~there[:, None], -torch.inf)
            at = bag[:, None].expand_as(low)
            found = rows.new_full((count, rows.shape[1]), -torch.inf).scatter_reduce(0, at, low, "amax")
            return found.masked_fill(found == -torch.inf, 0)
        share = there.to(rows.dtype) if weights is None else there * weights
        found = rows.new_zeros(count, rows.shape[1]).index_add(0, bag, rows * share[:, None])
        if self.mode == "mean":
            found = (
                found / found.new_zeros(count).index_add(0, bag, there.to(rows.dtype)).clamp(min=1)[:, None]
            )
        return found


def multiplex(
    model: nn.Module,
    *,
    rows: int | None = None,
    fraction: float = 0.25,
    lookups: int = 2,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    seed: int = 0,
) -> Multiplexed:
    """Replace a model's embeddings by views of one shared table, in place; their trained values are gone.

    Args:
        rows: of the table, as wide as the narrowest embedding over ``lookups``; by default ``fraction`` of what the embeddings' parameters make.
        lookups: rows of each value of the narrowest embedding; wider ones get as many as they need.
        only, skip: names of modules; by default every embedding.
        seed: of hashes and weights.

    Raises:
        InputError: no embedding, a model that is one itself, tied weights, ``max_norm``, ``scale_grad_by_freq``; the model is then as it was.

    >>> net = nn.ModuleDict({"user": nn.Embedding(1000, 16), "item": nn.EmbeddingBag(3000, 16)})
    >>> found = multiplex(net, fraction=0.25)
    >>> found.replaced, round(found.saved, 2), net["user"](torch.tensor([[1, 2]])).shape
    (('user', 'item'), 0.75, torch.Size([1, 2, 16]))
    """
    number("lookups", lookups, low=1, integer=True)
    number("fraction", fraction, low=0, high=1, open_low=True)
    every = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    for field, names in (("only", only), ("skip", skip)):
        for name in names:
            require(
                name in every,
                f"{field}: got {name!r}, expected one of {', '.join(map(repr, every)) or 'no embeddings'}",
            )
    chosen = {n: m for n, m in every.items() if (not only or n in only) and n not in skip}
    require(len(chosen) > 0, "model: it has no nn.Embedding or nn.EmbeddingBag to replace")
    require(
        "" not in chosen,
        f"model: it is itself {type(model).__name__}, which cannot be replaced in place; pass the network that holds it",
    )
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in every.items():
        own = [n for n in owners[id(module.weight)] if n != f"{name}.weight"]
        if name in chosen:
            require(
                not own,
                f"model: {name}.weight is tied to {own[0] if own else ''}, so that it cannot be shared; name it in skip",
            )
            require(
                module.max_norm is None,
                f"model: {name} has max_norm, which a shared row cannot keep; name it in skip",
            )
            require(not module.scale_grad_by_freq, f"model: {name} has scale_grad_by_freq; name it in skip")
    width = max(1, min(m.embedding_dim for m in chosen.values()) // lookups)
    before = sum(m.weight.numel() for m in chosen.values())
    count = (
        max(1, round(fraction * before / width))
        if rows is None
        else number("rows", rows, low=1, integer=True)
    )
    like: Any = next(iter(chosen.values())).weight
    table = UnifiedEmbedding(count, width, seed=seed).to(like)
    for name, module in chosen.items():
        table.add(name, -(-module.embedding_dim // width))
    for name, module in chosen.items():
        parent, _, own = name.rpartition(".")
        view = EmbeddingView(table, name, module).train(module.training)
        setattr(model.get_submodule(parent), own, view)
    return Multiplexed(tuple(chosen), count, before, table.weight.numel())
