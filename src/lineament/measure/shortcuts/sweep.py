"""Shortcut bias over many settings and seeds: all networks of one architecture are trained as one program, and probed on one batch of grids.

The heat maps of Hermann, Mobahi, Fel, Mozer (ICLR 2024, arXiv 2310.16228). Under-training looks like bias and so does the choice of the epoch, so that every
trial gives the best validation epoch and the last one, its training loss, and the accuracy that the best rule would have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.models import frozen
from lineament.core.results import Readable
from lineament.data.two_latents import TwoLatents
from lineament.measure.shortcuts.reliance import reliance
from lineament.train.loop import Run, fit
from lineament.train.stacked import Stack, StackedBatches, Training

# Validation samples are drawn by seeds of their own.
_HELD = 2**32


@dataclass(frozen=True)
class Trial(Readable):
    """One network of a sweep: its bias at the best validation epoch and at the last, with both terms of its reliance.

    ``optimal`` is the best rule's reliance and ``optimal_accuracy`` its accuracy; ``loss`` is the mean training loss of the last epoch.
    """

    setting: str
    seed: int
    bias: float
    with_shortcut: float
    with_core: float
    accuracy: float
    last_bias: float
    last_with_shortcut: float
    last_with_core: float
    last_accuracy: float
    loss: float
    optimal: float
    optimal_accuracy: float


def shortcut_sweep(
    factory: Callable[[], nn.Module],
    worlds: Mapping[str, Callable[[int], TwoLatents]],
    *,
    seeds: Sequence[int] = tuple(range(10)),
    samples: int = 3200,
    validation: int = 1000,
    epochs: int = 40,
    lr: float = 3e-3,
    batch_size: int = 64,
    points: int = 30,
    at_once: int = 64,
) -> list[Trial]:
    """Train a network for every setting and seed, and measure its shortcut bias.

    Squared error on ±1, Adam. A seed draws the latents, the network and the order of the samples, the same for all settings.

    Args:
        factory: makes the network of one score without arguments; its initialisation is drawn under the seed.
        worlds: of each setting's name a function that makes its latents of a seed.
        samples, validation: of each world, to train on and to choose the epoch by.
        epochs, lr, batch_size: of the training.
        points: of the grid, in each direction.
        at_once: networks that are trained as one program.

    Returns:
        Trials, setting by setting.

    >>> from lineament.data import two_latents
    >>> worlds = {"8": lambda seed: two_latents(dims=4, amplification=(0.8, 0.1), seed=seed)}
    >>> trials = shortcut_sweep(lambda: nn.Linear(4, 1), worlds, seeds=[0, 1], samples=64, validation=32, epochs=2)
    >>> [(t.setting, t.seed) for t in trials]
    [('8', 0), ('8', 1)]
    """
    checks.require(
        bool(worlds) and bool(len(seeds)), "worlds and seeds: got none, expected at least one of each"
    )
    checks.number("at_once", at_once, low=1, integer=True)
    jobs = [(name, checks.seed("seeds", seed)) for name in worlds for seed in seeds]
    found: list[Trial] = []
    parts = [jobs[at : at + at_once] for at in range(0, len(jobs), at_once)]
    for part in progress(parts, "shortcut sweep"):
        made = [worlds[name](seed) for name, seed in part]
        models = [Training(factory).fresh(seed) for _, seed in part]
        found += _together(part, made, models, samples, validation, epochs, lr, batch_size, points)
    return found


def _together(
    jobs: Sequence[tuple[str, int]],
    worlds: Sequence[TwoLatents],
    models: Sequence[nn.Module],
    samples: int,
    validation: int,
    epochs: int,
    lr: float,
    batch_size: int,
    points: int,
) -> list[Trial]:
    seeds = [seed for _, seed in jobs]
    train = [world.draw(samples, seed=seed) for world, seed in zip(worlds, seeds)]
    held = [world.draw(validation, seed=seed + _HELD) for world, seed in zip(worlds, seeds)]
    # Classes come in turn, so that all networks share the targets.
    goals, held_goals = (2.0 * part[0].targets - 1 for part in (train, held))
    stack = Stack(models)
    rows = torch.arange(samples).expand(len(jobs), -1)
    inputs = torch.stack([part.inputs for part in train])
    batches = StackedBatches(inputs, goals, rows, seeds, batch_size)
    best = _Best(torch.stack([part.inputs for part in held]), held_goals)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        # The sum over networks of each one's mean: every slice gets its own network's gradient.
        return (z[..., 0] - y).square().mean(1).sum()

    fit(
        stack, batches, optimizer=lambda net: torch.optim.Adam(net.parameters(), lr=lr, fused=True), epochs=epochs,
        loss=loss, callbacks=[best], name=f"training {len(jobs)} networks at once",
    )  # fmt: skip
    grids = [world.grid(points) for world in worlds]
    cells = torch.stack([world.embed(z.float()) for world, z in zip(worlds, grids)])
    last = _scores(stack, cells)
    losses = (_scores(stack, inputs) - goals).square().mean(1).tolist()
    stack.load_state_dict(best.kept)
    chosen = _scores(stack, cells)
    trials = []
    for k, ((name, seed), world, z) in enumerate(zip(jobs, worlds, grids)):
        ours, end, optimal = (reliance(s, z) for s in (chosen[k], last[k], z @ world.optimal_weights))
        trials.append(
            Trial(
                name, seed,
                ours.value - optimal.value, ours.with_shortcut, ours.with_core, float(best.accuracy[k]),
                end.value - optimal.value, end.with_shortcut, end.with_core, float(best.last[k]),
                losses[k], optimal.value, world.optimal_accuracy,
            )
        )  # fmt: skip
    return trials


def _scores(stack: Stack, inputs: Tensor) -> Tensor:
    with frozen(stack), torch.no_grad():
        return torch.cat([stack(part)[..., 0] for part in inputs.split(512, dim=1)], 1)


class _Best:
    """Of every network in a stack the epoch with the best validation accuracy."""

    def __init__(self, inputs: Tensor, goals: Tensor):
        self.inputs, self.goals = inputs, goals
        self.accuracy, self.last = torch.full((len(inputs),), -1.0), torch.empty(0)
        self.kept: dict[str, Tensor] = {}

    def on_start(self, run: Run) -> None:
        self.kept = {name: value.clone() for name, value in run.model.state_dict().items()}

    def on_epoch_end(self, run: Run) -> None:
        assert isinstance(run.model, Stack)
        scores = _scores(run.model, self.inputs)
        self.last = ((scores >= 0) == (self.goals > 0)).float().mean(1)
        better = self.last > self.accuracy
        self.accuracy = torch.where(better, self.last, self.accuracy)
        for name, value in run.model.state_dict().items():
            self.kept[name][better] = value[better]
