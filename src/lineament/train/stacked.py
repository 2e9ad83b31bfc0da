"""A training as a value: the same small recipe for one network, for a robust one, and for dozens of the same architecture at once.

What DiffROAR retrains with (Shah, Jain, Netrapalli 2021, arXiv 2102.12781). Networks that differ in seed and data only are stacked
(``torch.func``): one batched matrix product a layer serves all of them, and each gets the weights that it would get alone, up to
rounding, since a sum of their losses has each network's own gradient in its own slice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.models import answered, frozen, holding, logits
from lineament.train.attacks import PGD

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}

_SMALL, _STACK = 2**14, 64


@dataclass(frozen=True)
class Training:
    """Train a fresh network: ``training(inputs, targets, seed) -> model``, in eval mode.

    Args:
        factory: makes the network without arguments; its initialisation is drawn under the seed.
        epochs, batch_size, lr: as usual; ``batch_size`` rows of a fresh permutation at each step.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"``; ``momentum`` is SGD's.
        decay: multiply the rate by this every ``decay_every`` epochs, down to ``lr_floor``.
        attack: train against this attack (adversarial training): min over weights of E max over δ of the cross-entropy.
        select: ``"validation"`` keeps the epoch with the best accuracy on a tenth of the data that is not trained on, ``"last"`` the last.
            Never the test data: the official trainer does that.
        at_once: networks that :meth:`together` stacks in one program. ``None`` decides: 64 on an accelerator or for networks of at most
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
    optimizer: str = "adam"
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: float = 1.0
    decay_every: int = 1
    lr_floor: float = 0.0
    attack: PGD | None = None
    select: str = "validation"
    validation: float = 0.1
    at_once: int | None = None

    def __post_init__(self) -> None:
        checks.require(
            callable(self.factory),
            f"factory: got {checks.show(self.factory)}, expected a function that makes the network",
        )
        checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
        checks.one_of("select", self.select, ("validation", "last"))
        for name in (
            "epochs",
            "batch_size",
            "decay_every",
            *(("at_once",) if self.at_once is not None else ()),
        ):
            checks.number(name, getattr(self, name), low=1, integer=True)
        checks.number("lr", self.lr, low=0, open_low=True)
        checks.number("validation", self.validation, low=0, high=1, open_low=True, open_high=True)

    def __call__(self, inputs: Tensor, targets: Tensor, seed: int = 0) -> nn.Module:
        targets = checks.labels("targets", targets, count=len(inputs))
        model = self.fresh(seed).to(inputs.device)
        rows, held = self._rows(len(targets), seed)
        optimizer = self._optimizer(list(model.parameters()))
        generator = torch.Generator().manual_seed(seed)
        best: tuple[float, dict[str, Tensor]] = (-1.0, {})
        for epoch in progress(range(self.epochs), "training"):
            self._rate(optimizer, epoch)
            model.train()
            for number, batch in enumerate(
                rows[torch.randperm(len(rows), generator=generator)].split(self.batch_size)
            ):
                x, y = inputs[batch], targets[batch]
                if self.attack is not None:
                    own = (seed * 1_000_003 + epoch * 10_007 + number) % 2**63
                    x = x + self.attack(model, x, y, seed=own).delta
                z = answered(model, x, "inputs")
                if epoch == number == 0:
                    checks.labels("targets", targets, classes=z.shape[-1])
                loss = F.cross_entropy(z, y)
                _step(optimizer, list(model.parameters()), loss)
            if self.select == "validation":
                with frozen(model), torch.no_grad():
                    found = float((logits(model(inputs[held])).argmax(1) == targets[held]).double().mean())
                if found > best[0]:
                    best = found, {k: v.clone() for k, v in model.state_dict().items()}
        if best[1]:
            model.load_state_dict(best[1])
        model.zero_grad(set_to_none=True)
        return model.eval()

    def together(self, views: Sequence[Any], targets: Tensor, seeds: Sequence[int]) -> list[nn.Module]:
        """All trainings of one architecture as one program: the i-th from ``seeds[i]`` on the inputs ``views[i]``, whose rows are asked for.

        Networks trained against an attack are trained one after the other.

        >>> views = [torch.eye(2), torch.eye(2).flip(0)]
        >>> train = Training(lambda: nn.Linear(2, 2), epochs=50, lr=0.1, select="last")
        >>> [model(torch.eye(2)).argmax(1).tolist() for model in train.together(views, torch.tensor([0, 1]), [0, 0])]
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
        device = views[0][torch.tensor([0])].device
        models = [self.fresh(seed).to(device).train() for seed in seeds]
        parameters, buffers = stack_module_state(models)
        bare = copy.deepcopy(models[0]).to("meta")
        optimizer = self._optimizer(list(parameters.values()))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        split = [self._rows(len(targets), seed) for seed in seeds]
        best = torch.full((len(models),), -1.0, dtype=torch.float64, device=device)
        kept = {k: v.detach().clone() for k, v in {**parameters, **buffers}.items()}

        def scores(p: Any, b: Any, x: Tensor) -> Tensor:
            with holding(bare, {**p, **b}):
                return logits(bare(x))

        run = vmap(scores, randomness="different")
        for epoch in progress(range(self.epochs), f"training {len(models)} networks at once"):
            self._rate(optimizer, epoch)
            bare.train()
            orders = [rows[torch.randperm(len(rows), generator=g)] for (rows, _), g in zip(split, generators)]
            for batch in torch.stack(orders).split(self.batch_size, dim=1):
                x = torch.stack([view[rows] for view, rows in zip(views, batch)])
                z = run(parameters, buffers, x)
                if epoch == 0:
                    checks.labels("targets", targets, classes=z.shape[-1])
                # The sum over networks of each one's mean loss: every network's slice gets its own gradient.
                loss = (
                    F.cross_entropy(z.flatten(0, 1), targets[batch].flatten(), reduction="sum")
                    / batch.shape[1]
                )
                _step(optimizer, list(parameters.values()), loss)
            if self.select == "validation":
                bare.eval()
                held = torch.stack([rows for _, rows in split])
                with torch.no_grad():
                    z = run(parameters, buffers, torch.stack([v[r] for v, r in zip(views, held)]))
                found = (z.argmax(2) == targets[held]).double().mean(1)
                better = found > best
                best = torch.where(better, found, best)
                for name, value in {**parameters, **buffers}.items():
                    kept[name][better] = value.detach()[better]
        final = kept if self.select == "validation" else {**parameters, **buffers}
        for number, model in enumerate(models):
            model.load_state_dict(
                {name: value[number].detach() for name, value in final.items()}, strict=False
            )
            model.eval()
        return models

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
        held = max(1, round(self.validation * count))
        checks.require(count > held, f"inputs: got {count}, too few to hold {held} out for validation")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 2**20))
        return order[held:], order[:held]

    def _optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        options = {"momentum": self.momentum} if self.optimizer == "sgd" else {}
        return OPTIMIZERS[self.optimizer](
            parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True, **options
        )

    def _rate(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = max(
                self.lr * self.decay ** (epoch // self.decay_every), min(self.lr_floor, self.lr)
            )


def _step(optimizer: torch.optim.Optimizer, parameters: list[Any], loss: Tensor) -> None:
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        # A fused step on the CPU reads the gradient in the parameter's order of memory, whatever its own (stacks have it transposed).
        if gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
    optimizer.step()


def refreshed(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a network with every weight drawn anew by its module's own ``reset_parameters``.

    Raises:
        InputError: a parameter of a module that has no ``reset_parameters``, which would keep what it learned.

    >>> net = nn.Linear(2, 2); _ = net.weight.data.zero_()
    >>> bool((refreshed(net).weight != 0).all())
    True
    """
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in fresh.named_modules():
            own = list(module.named_parameters(recurse=False))
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif own:
                raise checks.InputError(
                    f"model: parameter {name + '.' if name else ''}{own[0][0]} cannot be drawn anew, since its module "
                    f"{type(module).__name__} has no reset_parameters; pass a factory that makes the network"
                )
    return fresh
