"""Which indices of which parameters must move together: a union of sets over every index of every axis, and labels on tensors.

Each index of each axis of a parameter is an atom. A tensor that a network computes carries factors: arrays of atoms, broadcastable to its shape,
that say from which atoms each of its elements comes. An operator joins the atoms of elements that it combines. What is joined along an axis keeps
its order there: atoms joined over the columns of a head can only move as that head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

NONE = -1  # the label of a constant, such as padding: it may stay while others move


class Atoms:
    """Disjoint sets of integers, joined and looked up by whole arrays.

    >>> atoms = Atoms()
    >>> a, b = atoms.new(3), atoms.new(3)
    >>> atoms.join(a, b)
    >>> atoms.find(b).tolist()
    [0, 1, 2]
    """

    def __init__(self) -> None:
        self.parent = np.zeros(0, dtype=np.int64)

    def new(self, count: int) -> Tensor:
        start = len(self.parent)
        self.parent = np.concatenate([self.parent, np.arange(start, start + count)])
        return torch.arange(start, start + count)

    def roots(self, atoms: np.ndarray) -> np.ndarray:
        root = self.parent[atoms]
        while not np.array_equal(up := self.parent[root], root):
            root = up
        self.parent[atoms] = root
        return root

    def find(self, labels: Tensor) -> Tensor:
        """The smallest atom of each label's set; :data:`NONE` stays."""
        flat = labels.reshape(-1).numpy()
        known = flat >= 0
        found = flat.copy()
        found[known] = self.roots(flat[known])
        return torch.from_numpy(found).view(labels.shape)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Make one set of each pair of labels, after broadcasting."""
        a, b = torch.broadcast_tensors(a, b)
        first, second = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        while True:
            known = (first >= 0) & (second >= 0)
            first, second = self.roots(first[known]), self.roots(second[known])
            apart = first != second
            if not apart.any():
                return
            first, second = first[apart], second[apart]
            np.minimum.at(self.parent, np.maximum(first, second), np.minimum(first, second))

    def join_along(self, labels: Tensor, axes: Sequence[int]) -> None:
        """Make one set of what differs only along these axes."""
        for axis in axes:
            self.join(labels, labels.amax(axis, keepdim=True))  # the largest is a label where there is one

    def squeezed(self, labels: Tensor) -> Tensor:
        """The labels of the sets, of size one along each axis where they do not vary."""
        labels = self.find(labels)
        for axis, size in enumerate(labels.shape):
            if size > 1:
                first = labels.narrow(axis, 0, 1)
                if bool((labels == first).all()):
                    labels = first
        return labels


def varying(labels: Tensor) -> set[int]:
    """The axes along which labels differ, once :meth:`Atoms.squeezed`."""
    return {axis for axis, size in enumerate(labels.shape) if size > 1}


@dataclass
class Operand:
    """A tensor of the network: its shape, where its elements come from, and whether it depends on the inputs."""

    shape: tuple[int, ...]
    factors: list[Tensor] = field(default_factory=list)
    data: bool = False
    differs: Callable[[int], bool] = lambda axis: True  # whether its values differ along an axis

    def aligned(self, dims: int) -> Operand:
        """With axes of size one in front."""
        more = dims - len(self.shape)
        front = (1,) * more
        factors = [f.reshape(front + tuple(f.shape)) for f in self.factors]
        return Operand(front + self.shape, factors, self.data, lambda axis: self.differs(axis - more))

    def reshaped(self, shape: Sequence[int], axes: Sequence[int]) -> Operand:
        """In a space of other axes: axis ``i`` of this becomes ``axes[i]``; the others have size one."""
        factors = []
        for f in self.factors:
            sizes = [1] * len(shape)
            for old, new in enumerate(axes):
                sizes[new] = f.shape[old]
            order = sorted(range(len(axes)), key=lambda i: axes[i])
            factors.append(f.permute(order).reshape(sizes))
        sizes = [1] * len(shape)
        for old, new in enumerate(axes):
            sizes[new] = self.shape[old]
        back = {new: old for old, new in enumerate(axes)}
        return Operand(tuple(sizes), factors, self.data, lambda axis: self.differs(back[axis]))
