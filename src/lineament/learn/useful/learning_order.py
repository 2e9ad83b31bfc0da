"""When is each example learned, and how often forgotten? Three counts on the record of what was right after each epoch.

Toneva et al., ICLR 2019, arXiv 1812.05159 (forgetting); the first and the lasting epoch of being right as USEFUL (arXiv 2404.17768) uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable


@dataclass(frozen=True)
class LearningOrder(Readable):
    """Per example; epochs count from 1, and ``epochs + 1`` stands for never."""

    forgetting: Int[Tensor, "samples"]
    first_learned: Int[Tensor, "samples"]
    learned: Int[Tensor, "samples"]
    epochs: int

    def to_dict(self) -> dict[str, Any]:
        names = ("forgetting", "first_learned", "learned")
        return {"epochs": self.epochs, **{name: getattr(self, name).tolist() for name in names}}

    def plot(self, ax: Any = None) -> Any:
        """How many examples are learned for good by each epoch."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        done = [float((self.learned <= e).double().mean()) for e in range(1, self.epochs + 1)]
        ax.plot(range(1, self.epochs + 1), done)
        ax.set(xlabel="epoch", ylabel="share learned for good", ylim=(0, 1))
        return ax


def learning_order(right: Bool[Tensor, "epochs samples"]) -> LearningOrder:
    """From the matrix of what was classified correctly after each epoch.

    Forgetting counts the changes from right to wrong; ``first_learned`` is the first epoch that is right, ``learned`` the first
    after which it stays so.

    Raises:
        InputError: not a boolean matrix.

    >>> order = learning_order(torch.tensor([[1, 0], [0, 0], [1, 0]]).bool())
    >>> order.forgetting.tolist(), order.first_learned.tolist(), order.learned.tolist()
    ([1, 0], [1, 4], [3, 4])
    """
    checks.tensor("right", right, shape=("epochs", "samples"))
    checks.require(right.dtype == torch.bool, f"right: got {checks.show(right)}, expected a boolean tensor")
    epochs = len(right)
    forgetting = (right[:-1] & ~right[1:]).sum(0)
    first = torch.where(right.any(0), right.int().argmax(0) + 1, epochs + 1)
    # The last wrong epoch, plus one.
    last_wrong = torch.where((~right).any(0), epochs - (~right).flip(0).int().argmax(0), 0)
    return LearningOrder(forgetting, first, last_wrong + 1, epochs)
