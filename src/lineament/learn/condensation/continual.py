"""A condensed set as the memory of a learner that meets its classes, or its domains, one part after the other.

Arrival by arrival the new pictures are condensed into the memory, and a network is trained anew on the joint memory (Zhao, Bilen 2021; arXiv 2202.02916, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import require
from lineament.core.results import Readable, axes, plain
from lineament.learn.condensation.condensed import Condensed
from lineament.learn.condensation.condensing import Network, _maker, condense
from lineament.learn.condensation.options import Condensation
from lineament.learn.condensation.trials import Protocol, TestData, accuracies

_PLAIN, _FEW = Condensation(), Protocol(networks=3)
Task = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Continual(Readable):
    """Accuracy on all that was met so far, in [0, 1], [steps, networks], of each kind of memory by name; the memory's size after each step."""

    accuracy: dict[str, Tensor]
    memory: list[int]

    def to_dict(self) -> dict[str, Any]:
        return plain(vars(self))

    def plot(self, ax: Any = None) -> Any:
        """Accuracy by step, with the population deviation over networks."""
        ax = axes(ax)
        for name, values in self.accuracy.items():
            v = 100 * values
            ax.errorbar(range(1, len(v) + 1), v.mean(1), v.std(1, correction=0), marker="o", label=name)
        ax.set_xticks(range(1, len(self.memory) + 1))
        ax.set(xlabel="parts met", ylabel="test accuracy on all parts met, %")
        ax.legend()
        return ax


def class_tasks(
    images: Tensor, targets: Tensor, test_images: Tensor, test_targets: Tensor, steps: int, *, seed: int = 0
) -> list[Task]:
    """The classes in a random order, in so many parts of equal size (up to one class).

    >>> y = torch.arange(8) % 4
    >>> [t[1].unique().numel() for t in class_tasks(torch.zeros(8, 1, 4, 4), y, torch.zeros(8, 1, 4, 4), y, 2)]
    [2, 2]
    """
    classes = int(targets.max()) + 1
    checks.number("steps", steps, low=2, high=classes // 2, integer=True)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    found = []
    for part in order.tensor_split(steps):
        rows, held = (torch.isin(y, part.to(y.device)) for y in (targets, test_targets))
        found.append((images[rows], targets[rows], test_images[held], test_targets[held]))
    return found


def continual(
    tasks: Sequence[Task],
    *,
    per_class: int,
    methods: Sequence[str] = ("dsac", "random"),
    network: Network = "convnet",
    options: Condensation = _PLAIN,
    protocol: Protocol = _FEW,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Continual:
    """Retrain at every step on the joint memory of everything met so far.

    Args:
        tasks: training pictures and labels, test pictures and labels, of each arrival: new classes (:func:`class_tasks`), or the same classes in another domain. Labels are
            those of the whole.
        methods: how memories are made, see :func:`condense`.
        checkpoint: keeps what was condensed and which networks were tested, so that a run that was killed goes on.
        note: is told of each part before it is learned.

    >>> x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 4
    >>> found = continual(class_tasks(x, y, x, y, 2), per_class=1, methods=["random"], network="mlp", protocol=Protocol(networks=1, epochs=2))
    >>> found.memory, tuple(found.accuracy["random"].shape)
    ([2, 4], (2, 1))
    """
    require(len(tasks) > 0, "tasks: got none, expected at least one")
    classes = 1 + max(int(task[1].max()) for task in tasks)
    make = _maker(network, tuple(tasks[0][0].shape[1:]), classes)
    found: dict[str, list[Tensor]] = {}
    memory: list[int] = []
    for method in methods:
        sets: list[Condensed] = []
        memory = []
        for k, (x, y, _, _) in enumerate(tasks):
            there, own = y.unique(return_inverse=True)
            part = None if checkpoint is None else checkpoint.within(f"{method} {k}")
            note(f"{method}: part {k + 1} of {len(tasks)}, {len(there)} classes, {len(y):,} pictures")
            # The classes of one arrival are condensed among themselves, by the plain networks of the pool.
            made = condense(
                x, own, per_class=per_class, method=method, network=network if isinstance(network, str) else "convnet", options=options, checkpoint=part,
                seed=seed + k,
            )  # fmt: skip
            sets.append(replace(made, labels=there[made.labels]))
            joint = replace(
                sets[0],
                pictures=torch.cat([s.pictures for s in sets]),
                labels=torch.cat([s.labels for s in sets]),
            )
            memory.append(len(joint.labels))
            seen = TestData(
                joint, torch.cat([t[2] for t in tasks[: k + 1]]), torch.cat([t[3] for t in tasks[: k + 1]])
            )
            found.setdefault(method, []).append(
                accuracies(
                    joint, joint.pictures, joint.labels, seen, make, protocol, checkpoint=part, seed=seed
                )
            )
    return Continual({name: torch.stack(values) for name, values in found.items()}, memory)
