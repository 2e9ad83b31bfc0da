"""Ids that a network's embeddings have no row for, named before a training instead of somewhere in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.core.models import device_of, dtype_of, frozen


class _AllSeen(Exception):
    """Every table has been asked; the rest of the forward is of no interest."""


@contextmanager
def ids_in_range(
    model: nn.Module, inputs: Tensor, columns: Sequence[str] = (), seen: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """While the block runs, an id without a row in a ``nn.Embedding`` or ``nn.EmbeddingBag`` is refused by the table's name, and the column's if its cells are the ids.

    Args:
        inputs: the stored samples, (sample, column) where there are columns. seen: called when a table is asked for ids that it has.

    Raises:
        InputError: such an id.

    >>> table = nn.Embedding(3, 2)
    >>> with ids_in_range(table, torch.tensor([[0], [2]])):
    ...     table(torch.tensor([2])).shape
    torch.Size([1, 2])
    """

    def watched(name: str, table: Any) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs.get("input")
            if not isinstance(ids, Tensor) or not ids.numel() or ids.is_floating_point():
                return
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= table.num_embeddings:
                raise InputError(_said(name, table.num_embeddings, ids, inputs, columns, low, high))
            seen()

        return table.register_forward_pre_hook(look, with_kwargs=True)

    hooks = [watched(name, table) for name, table in _tables(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require_rows(
    model: nn.Module, given: Callable[[Tensor], Any], inputs: Tensor, columns: Sequence[str], batch_size: int
) -> None:
    """Pass all samples as far as the embeddings.

    Args:
        given: how some rows go into the model.

    Raises:
        InputError: an id that an embedding has no row for.

    >>> net = nn.Sequential(nn.Embedding(3, 2), nn.Flatten())
    >>> require_rows(net, lambda rows: torch.tensor([[0], [3]])[rows], torch.tensor([[0], [3]]), ["user"], 1)
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: DATA: column 'user' holds ids from 0 to 3, and the model's table '0' has 3 rows, for ids from 0 to 2; give \
it a row for each id, or number the ids from 0 on
    """
    if not _tables(model):
        return
    asked, most = 0, -1

    def seen() -> None:
        nonlocal asked
        asked += 1
        if asked == most:
            raise _AllSeen

    for rows in torch.arange(len(inputs)).split(batch_size):
        asked = 0
        with ids_in_range(model, inputs, columns, seen), frozen(model), torch.no_grad():
            try:
                x = given(rows).to(device_of(model))
                model(x.to(dtype_of(model)) if x.is_floating_point() else x)
                # Whole once, which tells how often tables are asked.
                most = asked
            except _AllSeen:
                pass


def _tables(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}


def _said(
    name: str, size: int, ids: Tensor, inputs: Tensor, columns: Sequence[str], low: int, high: int
) -> str:
    own = f"the model's table{f' {name!r}' * bool(name)} has {size:,} rows, for ids from 0 to {size - 1}"
    advice = "give it a row for each id, or number the ids from 0 on"
    flat = ids.detach().flatten().cpu()
    for k, column in enumerate(columns):
        cells = inputs[:, k]
        # Some rows of a column, one after another.
        starts = (cells == flat[0]).nonzero()[:, 0].tolist() if inputs.ndim == 2 else []
        if any(torch.equal(cells[s : s + len(flat)].double(), flat.double()) for s in starts[:1000]):
            return f"DATA: column {column!r} holds ids from {int(cells.min())} to {int(cells.max())}, and {own}; {advice}"
    return f"DATA: ids from {low} to {high} are looked up, and {own}; {advice}"
