"""Optimizers of large tables: a step moves the rows that have a gradient, and reads no others.

A sparse gradient (``nn.Embedding(sparse=True)``, a class head with ``sparse=True``) names the rows. Momentum, moments and weight decay of the other rows stand still, so that a row's state is
that of its own steps: with a gradient for every row, :class:`RowSGD` and :class:`RowAdam` are PyTorch's SGD and Adam. Dense gradients are taken, too: then every row has one.
Parameters and states may lie with several processes (DTensors of a mesh of one dimension): each moves its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lineament.core.checks import InputError, number, require
from lineament.core.gradients import summed_rows
from lineament.core.shards import told
from lineament.core.whole_files import dimension, divided, local

# Numbers of a gradient's rows that are worked on at once.
_NUMBERS = 1 << 17


class _Rows(Optimizer):
    """What the three share: which rows a step is of, checked options, lazy weight decay."""

    def __init__(self, params: Any, **options: Any):
        for name in ("lr", "weight_decay", "eps"):
            if name in options:
                number(name, options[name], low=0)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; with a closure, on the gradients that it leaves."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        require(parameter.ndim > 0, "params: a parameter without dimensions has no rows")
        if not self.state[parameter]:
            self.state[parameter].update(self._fresh(parameter, group))
        # Of what lies with several processes each moves its part.
        state = {name: local(value) for name, value in self.state[parameter].items()}
        own = local(parameter)
        for rows, gradient in _parts_of(parameter):
            if group["weight_decay"]:
                gradient = gradient.add(_part(own, rows), alpha=group["weight_decay"])
            change = self._change(state, parameter, rows, gradient, group)
            if rows is None:
                own.add_(change, alpha=-group["lr"])
            else:
                own.index_copy_(0, rows, _part(own, rows).add_(change, alpha=-group["lr"]))

    def _fresh(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state before the first step."""
        raise NotImplementedError

    def _change(
        self,
        state: dict[str, Tensor],
        parameter: Tensor,
        rows: Tensor | None,
        gradient: Tensor,
        group: dict[str, Any],
    ) -> Tensor:
        """What the rows move by, over the rate."""
        raise NotImplementedError


class RowSGD(_Rows):
    """SGD with momentum that stands still in rows without a gradient.

    >>> w = torch.nn.Parameter(torch.ones(3, 2)); optimizer = RowSGD([w], lr=0.5, momentum=0.9)
    >>> torch.nn.functional.embedding(torch.tensor([1]), w, sparse=True).sum().backward(); optimizer.step()
    >>> w[:, 0].tolist()
    [1.0, 0.5, 1.0]
    """

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.0, weight_decay: float = 0.0):
        number("momentum", momentum, low=0, high=1, open_high=True)
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def _fresh(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(parameter)} if group["momentum"] else {}

    def _change(
        self,
        state: dict[str, Tensor],
        parameter: Tensor,
        rows: Tensor | None,
        gradient: Tensor,
        group: dict[str, Any],
    ) -> Tensor:
        if not group["momentum"]:
            return gradient
        held = _part(state["momentum"], rows)
        return _put(state["momentum"], rows, held.mul(group["momentum"]).add_(gradient))


class RowAdagrad(_Rows):
    """Adagrad with one number a row: the sum of its gradients' mean squares. The usual choice for embedding tables.

    >>> w = torch.nn.Parameter(torch.ones(3, 2)); optimizer = RowAdagrad([w], lr=0.5)
    >>> torch.nn.functional.embedding(torch.tensor([1]), w, sparse=True).sum().backward(); optimizer.step()
    >>> w[:, 0].tolist(), optimizer.state[w]["squares"].shape
    ([1.0, 0.5, 1.0], torch.Size([3]))
    """

    def __init__(self, params: Any, lr: float = 0.01, weight_decay: float = 0.0, eps: float = 1e-10):
        super().__init__(params, lr=lr, weight_decay=weight_decay, eps=eps)

    def _fresh(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"squares": _number_a_row(parameter)}

    def _change(
        self,
        state: dict[str, Tensor],
        parameter: Tensor,
        rows: Tensor | None,
        gradient: Tensor,
        group: dict[str, Any],
    ) -> Tensor:
        squares = _over_columns(gradient.flatten(1).square().sum(1), parameter)
        squares = squares * len(parameter) / max(1, parameter.numel())
        found = _put(state["squares"], rows, _part(state["squares"], rows) + squares)
        scale = found.sqrt().add_(group["eps"]).reciprocal_()
        return gradient * scale.view(-1, *(1,) * (gradient.ndim - 1))


class RowAdam(_Rows):
    """Adam with a count of steps for each row: its moments and their correction are of the row's own steps.

    >>> w = torch.nn.Parameter(torch.ones(3, 2)); optimizer = RowAdam([w], lr=0.5)
    >>> torch.nn.functional.embedding(torch.tensor([1]), w, sparse=True).sum().backward(); optimizer.step()
    >>> [round(v, 4) for v in w[:, 0].tolist()]
    [1.0, 0.5, 1.0]
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ):  # fmt: skip
        for beta in betas:
            number("betas", beta, low=0, high=1, open_high=True)
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)

    def _fresh(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "first": torch.zeros_like(parameter),
            "second": torch.zeros_like(parameter),
            "steps": _number_a_row(parameter),
        }

    def _change(
        self,
        state: dict[str, Tensor],
        parameter: Tensor,
        rows: Tensor | None,
        gradient: Tensor,
        group: dict[str, Any],
    ) -> Tensor:
        one, two = group["betas"]
        first = _put(state["first"], rows, _part(state["first"], rows).lerp(gradient, 1 - one))
        second = _put(state["second"], rows, _part(state["second"], rows).lerp(gradient.square(), 1 - two))
        steps = _put(state["steps"], rows, _part(state["steps"], rows) + 1)
        shape = (-1, *(1,) * (gradient.ndim - 1))
        corrected = (second / (1 - two**steps).view(shape)).sqrt_().add_(group["eps"])
        return first / (1 - one**steps).view(shape) / corrected


def _parts_of(parameter: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
    """The rows of a sparse gradient and their values, as many at a time as stay in the cache; ``None`` and all of a dense one."""
    assert parameter.grad is not None
    gradient = local(parameter.grad)
    if not gradient.is_sparse:
        yield None, gradient
        return
    if gradient.sparse_dim() != 1:
        raise InputError(
            f"params: a sparse gradient of {gradient.sparse_dim()} sparse dimensions, expected whole rows"
        )
    rows, values = summed_rows(gradient)
    size = max(1, _NUMBERS * len(parameter) // max(1, parameter.numel()))
    yield from zip(rows.split(size), values.split(size))


def _number_a_row(parameter: Any) -> Tensor:
    """A zero for each row, where the row lies."""
    if not divided(parameter):
        return parameter.new_zeros(len(parameter))
    from torch.distributed.tensor import Replicate, Shard, zeros

    place = Shard(0) if dimension(parameter) == 0 else Replicate()
    return zeros(len(parameter), dtype=parameter.dtype, device_mesh=parameter.device_mesh, placements=[place])


def _over_columns(sums: Tensor, parameter: Any) -> Tensor:
    """The sum over the processes of a parameter whose columns lie with several."""
    if dimension(parameter) not in (None, 0):
        import torch.distributed as dist

        told(lambda: dist.all_reduce(sums, group=parameter.device_mesh.get_group()))
    return sums


def _part(state: Tensor, rows: Tensor | None) -> Tensor:
    return state if rows is None else state.index_select(0, rows)


def _put(state: Tensor, rows: Tensor | None, value: Tensor) -> Tensor:
    """Store the rows' new state; gives it back."""
    state.copy_(value) if rows is None else state.index_copy_(0, rows, value)
    return value
