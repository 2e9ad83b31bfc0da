"""A training as a value: the same recipe for one network, for a robust one, and for dozens of the same architecture as one program.

What DiffROAR retrains with (Shah, Jain, Netrapalli 2021, arXiv 2102.12781). Networks that differ in seed and data only are stacked
(``torch.func``): one batched matrix product a layer serves all of them, and each gets the weights that it would get alone, up to
rounding, since a sum of their losses has each network's own gradient in its own slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.models import frozen, holding, logits
from lineament.core.redrawing import copied, redraw, reset_of, weighted
from lineament.core.results import Readable
from lineament.train.attacks import PGD, Adversarial
from lineament.train.callbacks import KeepBest, Rate, Rows, Validation
from lineament.train.loop import Run, fit

_SMALL, _STACK = 2**14, 64
# The share of the data that the epoch is chosen by.
_HELD = 0.1


@dataclass(frozen=True)
class Training(Readable):
    """Train a fresh network: ``training(inputs, targets, seed) -> model``, in eval mode.

    Args:
        factory: makes the network without arguments; its initialisation is drawn under the seed.
        epochs, batch_size: as for :func:`~lineament.train.loop.fit`.
        lr: of Adam, where no ``optimizer`` is given.
        optimizer: makes an optimizer from the network (or from a stack of them).
        schedule: the factor of the learning rate when a share of the training is done, as for :class:`~lineament.train.callbacks.Rate`.
        attack: train against this attack (adversarial training): min over weights of E max over δ of the cross-entropy.
        select: ``"validation"`` keeps the epoch with the best accuracy on a tenth of the data that is not trained on, ``"last"`` the last.
            Never the test data: the official trainer does that.
        at_once: networks that :meth:`stacked` trains in one program. ``None`` decides: 64 on an accelerator or for networks of at most
            16,384 weights; on a CPU larger ones are trained one after the other, since a stack's optimizer state leaves the caches
            and costs more than the calls it saves.

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)); y = (x[:, 0] > 0).long()
    >>> train = Training(lambda: nn.Linear(4, 2), epochs=20, lr=0.05, select="last")
    >>> round((train(x, y, 0)(x).argmax(1) == y).double().mean().item(), 1)
    1.0
    """

    factory: Callable[[], nn.Module]
    epochs: int = 10
    batch_size: int = 100
    lr: float = 1e-3
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    schedule: Callable[[float], float] | None = None
    attack: PGD | None = None
    select: str = "validation"
    at_once: int | None = None

    def __post_init__(self) -> None:
        checks.require(
            callable(self.factory),
            f"factory: got {checks.show(self.factory)}, expected a function that makes the network",
        )
        checks.one_of("select", self.select, ("validation", "last"))
        for name in ("epochs", "batch_size", *(("at_once",) if self.at_once is not None else ())):
            checks.number(name, getattr(self, name), low=1, integer=True)
        checks.number("lr", self.lr, low=0, open_low=True)

    @torch.inference_mode(False)
    def __call__(self, inputs: Tensor, targets: Tensor, seed: int = 0) -> nn.Module:
        targets = checks.labels("targets", targets, count=len(inputs))
        model = self.fresh(seed).to(inputs.device)
        rows, held = self._rows(len(targets), seed)
        callbacks: list[Any] = [Rows(rows)]
        if self.attack is not None:
            callbacks.append(Adversarial(self.attack))
        if len(held):
            callbacks += [Validation((inputs[held], targets[held])), KeepBest()]
        return self._fit(model, (inputs, targets), callbacks, seed=seed, name="training")

    @torch.inference_mode(False)
    def stacked(self, views: Sequence[Any], targets: Tensor, seeds: Sequence[int]) -> list[nn.Module]:
        """All trainings of one architecture as one program: the i-th from ``seeds[i]`` on the inputs ``views[i]``, whose rows are asked for.

        Networks trained against an attack are trained one after the other.

        >>> views = [torch.eye(2), torch.eye(2).flip(0)]
        >>> train = Training(lambda: nn.Linear(2, 2), epochs=50, lr=0.1, select="last")
        >>> [model(torch.eye(2)).argmax(1).tolist() for model in train.stacked(views, torch.tensor([0, 1]), [0, 0])]
        [[0, 1], [1, 0]]
        """
        checks.require(
            len(views) == len(seeds), f"seeds: got {len(seeds)} for {len(views)} trainings, expected as many"
        )
        size = self._stack(targets.device)
        if size == 1:
            rows = torch.arange(len(targets))
            return [
                self(view[rows], targets, seed)
                for view, seed in progress(zip(views, seeds), "training", len(seeds))
            ]
        done: list[nn.Module] = []
        for at in range(0, len(views), size):
            done += self._stacked(views[at : at + size], targets, seeds[at : at + size])
        return done

    def fresh(self, seed: int) -> nn.Module:
        """The network before training, drawn under the seed; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(checks.seed("seed", seed))
            model = self.factory()
        checks.require(
            isinstance(model, nn.Module), f"factory: it made {checks.show(model)}, expected a torch.nn.Module"
        )
        return model.requires_grad_(True)

    def against(self, attack: PGD | None) -> Training:
        """The same training against an attack."""
        return replace(self, attack=attack)

    def _stacked(self, views: Sequence[Any], targets: Tensor, seeds: Sequence[int]) -> list[nn.Module]:
        models = [self.fresh(seed).to(views[0][torch.tensor([0])].device) for seed in seeds]
        stack = Stack(models)
        splits = [self._rows(len(targets), seed) for seed in seeds]
        rows, held = (torch.stack(part) for part in zip(*splits))
        batches = StackedBatches(views, targets, rows, seeds, self.batch_size)
        keep = [_KeepBestOfEach(batches, held)] if held.numel() else []

        seen: list[Tensor] = []

        def loss(z: Tensor, y: Tensor) -> Tensor:
            if not seen:
                seen.append(checks.labels("targets", targets, classes=z.shape[-1]))
            # The sum over networks of each one's mean loss: every network's slice gets its own gradient.
            return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") / z.shape[1]

        name = f"training {len(models)} networks at once"
        self._fit(stack, batches, keep, loss=loss, name=name)
        stack.unstack(models)
        return [model.eval() for model in models]

    def _fit(self, model: nn.Module, data: Any, callbacks: list[Any], **options: Any) -> nn.Module:
        adam = lambda net: torch.optim.Adam(net.parameters(), lr=self.lr, fused=True)  # noqa: E731
        rate = [] if self.schedule is None else [Rate(self.schedule)]
        fit(
            model, data, optimizer=self.optimizer or adam, epochs=self.epochs, batch_size=self.batch_size,
            callbacks=[*callbacks, *rate], **options,
        )  # fmt: skip
        return model.eval()

    def _stack(self, device: torch.device) -> int:
        if self.attack is not None:
            return 1
        if self.at_once is not None:
            return self.at_once
        small = device.type != "cpu" or sum(p.numel() for p in self.fresh(0).parameters()) <= _SMALL
        return _STACK if small else 1

    def _rows(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """The rows to train on, and those to choose the epoch by."""
        if self.select == "last":
            return torch.arange(count), torch.arange(0)
        held = max(1, round(_HELD * count))
        checks.require(count > held, f"inputs: got {count}, too few to hold {held} out for validation")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 2**20))
        return order[held:], order[:held]


class Stack(nn.Module):
    """Networks of one architecture as one: inputs (networks, batch, ...) give logits (networks, batch, classes).

    >>> nets = [nn.Linear(2, 3) for _ in range(4)]
    >>> Stack(nets)(torch.ones(4, 5, 2)).shape
    torch.Size([4, 5, 3])
    """

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        parameters, buffers = stack_module_state(list(models))
        self.names = [*parameters], [*buffers]
        self.weights = nn.ParameterList(parameters.values())
        for number, value in enumerate(buffers.values()):
            self.register_buffer(f"buffer{number}", value)
        # Not a part of this module: its weights hold nothing.
        self.bare = (copied(models[0]).to("meta"),)

    def forward(self, x: Tensor) -> Tensor:
        def answer(parameters: Sequence[Tensor], buffers: Sequence[Tensor], x: Tensor) -> Tensor:
            held = dict(zip([*self.names[0], *self.names[1]], [*parameters, *buffers]))
            with holding(self.bare[0], held):
                return logits(self.bare[0](x))

        return vmap(answer, randomness="different")([*self.weights], [*self.buffers()], x)

    def train(self, mode: bool = True) -> Stack:
        self.bare[0].train(mode)
        return super().train(mode)

    def unstack(self, models: Sequence[nn.Module]) -> None:
        """Give each network its slice."""
        values = dict(zip([*self.names[0], *self.names[1]], [*self.weights, *self.buffers()]))
        for number, model in enumerate(models):
            model.load_state_dict({k: v[number].detach() for k, v in values.items()}, strict=False)


class StackedBatches:
    """Batches of every network's own inputs in its own order, a fresh one each epoch; ``views`` may be one tensor (network, sample, ...)."""

    def __init__(self, views: Any, targets: Tensor, rows: Tensor, seeds: Sequence[int], batch_size: int):
        self.views, self.targets, self.rows, self.batch_size = views, targets, rows, batch_size
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __len__(self) -> int:
        return math.ceil(self.rows.shape[1] / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        orders = [rows[torch.randperm(len(rows), generator=g)] for rows, g in zip(self.rows, self.generators)]
        return map(self.take, torch.stack(orders).split(self.batch_size, dim=1))

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.views, Tensor):
            # One gather for all networks.
            first = torch.arange(len(rows))[:, None] * self.views.shape[1]
            found = self.views.flatten(0, 1).index_select(0, (rows + first).flatten())
            return found.view(*rows.shape, *found.shape[1:]), self.targets[rows]
        return torch.stack([view[own] for view, own in zip(self.views, rows)]), self.targets[rows]


class _KeepBestOfEach:
    """Of every network in a stack the epoch with the best accuracy on the rows held out for it."""

    def __init__(self, batches: StackedBatches, held: Tensor):
        self.batches, self.held = batches, held

    def on_start(self, run: Run) -> None:
        self.best = torch.full((len(self.held),), -1.0, dtype=torch.float64, device=run.device)
        self.kept = {name: value.clone() for name, value in run.model.state_dict().items()}

    def on_epoch_end(self, run: Run) -> None:
        x, y = self.batches.take(self.held)
        with frozen(run.model, requires_grad=None), torch.no_grad():
            found = (run.model(x).argmax(2) == y).double().mean(1)
        better = found > self.best
        self.best = torch.where(better, found, self.best)
        for name, value in run.model.state_dict().items():
            self.kept[name][better] = value[better]

    def on_end(self, run: Run) -> None:
        run.model.load_state_dict(self.kept)


def refreshed(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a network with every weight drawn anew by its module's own ``reset_parameters``.

    Raises:
        InputError: a parameter of a module that has no ``reset_parameters``, which would keep what it learned.

    >>> net = nn.Linear(2, 2); _ = net.weight.data.zero_()
    >>> bool((refreshed(net).weight != 0).all())
    True
    """
    fresh = copied(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own_weights = set(weighted(fresh))
        for name, module in fresh.named_modules():
            if reset_of(module) is not None:
                redraw(module)
            elif name in own_weights:
                own = [*module.named_parameters(recurse=False), ("weight", None)]
                raise checks.InputError(
                    f"model: parameter {name + '.' if name else ''}{own[0][0]} cannot be drawn anew, since its module "
                    f"{type(module).__name__} has no reset_parameters; pass a factory that makes the network"
                )
    return fresh
