"""What a client does with the weights before it sends their change: epochs of minibatches, by SGD, momentum or Adam (federated averaging).

Fang et al. 2023, arXiv 2308.04699, section 1.5. The attacker repeats the same steps on a guess, so that they are written as functions that can be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, one_of, require

Weights = dict[str, Tensor]
_ORDERS = ("given", "known", "unknown")


@dataclass(frozen=True)
class Local:
    """Local training before the change of the weights is sent.

    Attributes:
        epochs: passes over the client's pictures. rate: the learning rate.
        batch_size: of a minibatch, None for one step an epoch on all pictures.
        optimizer: ``"sgd"`` or ``"adam"``, as ``torch.optim`` defines them; ``weight_decay`` is added to the gradient. momentum: of SGD.
        order: of the pictures in an epoch: ``"given"``, shuffled and ``"known"`` to the attacker, or ``"unknown"``, so that guesses are taken in one order.
        seed: of the shuffling.

    >>> Local(epochs=2, batch_size=4).steps(10)
    6
    """

    epochs: int = 1
    rate: float = 1e-4
    batch_size: int | None = None
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    order: str = "given"
    seed: int = 0

    def __post_init__(self) -> None:
        number("epochs", self.epochs, low=1, integer=True)
        number("rate", self.rate, low=0, open_low=True)
        if self.batch_size is not None:
            number("batch_size", self.batch_size, low=1, integer=True)
        one_of("optimizer", self.optimizer, ("sgd", "adam"))
        one_of("order", self.order, _ORDERS)
        number("momentum", self.momentum, low=0, high=1, open_high=True)
        number("weight_decay", self.weight_decay, low=0)
        number("seed", self.seed, low=0, integer=True)
        require(
            self.momentum == 0 or self.optimizer == "sgd",
            f"momentum: got {self.momentum} for {self.optimizer!r}, which has its own; expected 0, or optimizer = 'sgd'",
        )

    def __str__(self) -> str:
        """What the client did, for a reader of a report."""
        batches = "all pictures at once" if self.batch_size is None else f"minibatches of {self.batch_size}"
        extras = [f"{name.replace('_', ' ')} {getattr(self, name):g}" for name in ("momentum", "weight_decay") if getattr(self, name)]  # fmt: skip
        told = {"given": "", "known": ", shuffled in an order that the attacker knows", "unknown": ", shuffled in an order that the attacker does not know"}  # fmt: skip
        return f"{self.epochs} local epoch{'s' if self.epochs > 1 else ''} of {', '.join([f'{self.optimizer} at rate {self.rate:g}', *extras])} on {batches}{told[self.order]}"

    def steps(self, count: int) -> int:
        """Steps of all epochs over ``count`` pictures."""
        return self.epochs * -(-count // (self.batch_size or count))

    def guessed(self) -> Local:
        """What an attacker can repeat: an order that is unknown is replaced by that of the guess."""
        return replace(self, order="given") if self.order == "unknown" else self

    def minibatches(self, count: int) -> list[Tensor]:
        """Which pictures each step sees."""
        generator = torch.Generator().manual_seed(self.seed)
        found: list[Tensor] = []
        for _ in range(self.epochs):
            order = torch.arange(count) if self.order == "given" else torch.randperm(count, generator=generator)  # fmt: skip
            found += order.split(self.batch_size or count)
        return found

    def change(
        self, parameters: Weights, x: Tensor, y: Tensor, slope: Callable[[Weights, Tensor, Tensor], Weights]
    ) -> Weights:
        """Weights before - after; can be differentiated by ``x``. Adam's denominators count as constants in the derivative: exactly taken, the first step is a
        sign, whose derivative is 0 wherever it exists."""
        now, first, second = dict(parameters), {}, {}
        whole = self.batch_size is None or self.batch_size >= len(x)
        for t, rows in enumerate(self.minibatches(len(x)), 1):
            own = slope(now, *((x, y) if whole and self.order == "given" else (x[rows], y[rows])))
            for name, value in now.items():
                g = own[name] + self.weight_decay * value if self.weight_decay else own[name]
                if self.optimizer == "adam":
                    first[name] = 0.9 * first.get(name, 0.0) + 0.1 * g
                    second[name] = 0.999 * second.get(name, 0.0) + 0.001 * g.detach().square()
                    below = (second[name] / (1 - 0.999**t)).sqrt() + 1e-8
                    g = first[name] / (1 - 0.9**t) / below
                elif self.momentum:
                    g = first[name] = g if t == 1 else self.momentum * first[name] + g
                now[name] = value - self.rate * g
        return {name: parameters[name] - now[name] for name in parameters}

    def gradient_of(self, change: Tensor, weight: Tensor, count: int) -> Tensor:
        """A change of weights read as one gradient: that which, the same at each step, would have made it. Of Adam only the signs say something."""
        steps = self.steps(count)
        if self.optimizer == "adam":
            return change / (self.rate * steps)
        reach = sum((1 - self.momentum**t) / (1 - self.momentum) for t in range(1, steps + 1))
        return change / (self.rate * reach) - self.weight_decay * weight


def local_of(text: str) -> Local:
    """Local training by its description, NAME=VALUE with commas between them.

    >>> local_of("epochs=2,rate=0.01,batch_size=4,momentum=0.9").steps(8)
    4
    """
    kinds = {"epochs": int, "rate": float, "batch_size": int, "optimizer": str, "momentum": float, "weight_decay": float, "order": str, "seed": int}  # fmt: skip
    found = {}
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        name = name.replace("-", "_")
        one_of("local", name, tuple(kinds))
        require(bool(equals and value), f"local: got {word.strip()!r}, expected NAME=VALUE")
        try:
            found[name] = kinds[name](value)
        except ValueError:
            raise InputError(
                f"local: got {word.strip()!r}, expected {'a whole number' if kinds[name] is int else 'a number'} after the ="
            ) from None
    try:
        return Local(**found)
    except InputError as error:
        raise InputError(f"local: {error}") from None
