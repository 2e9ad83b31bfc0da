"""What a training is told: the optimizer and its numbers, the schedule, SAM, USEFUL and TrAct, checked before any work.

The rate follows from how much of the training is done and from nothing else, so that a resumed run needs no scheduler's state.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from lineament.cli.embedding_options import EmbeddingOptions
from lineament.core import checks
from lineament.learn.useful.separating import window_of
from lineament.optim import ASAM, SAM, DiffGrad

# The usual rate of each, and the decay that it has by default.
OPTIMIZERS: dict[str, tuple[float, float]] = {
    "sgd": (0.05, 0.0),
    "adam": (1e-3, 0.0),
    "adamw": (1e-3, 0.01),
    "diffgrad": (1e-3, 0.0),
}
SCHEDULES = ("cosine", "step", "none")


@dataclass(frozen=True)
class Options:
    """The options of :func:`lineament.cli.train_fit.fit`.

    Args:
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"`` or ``"diffgrad"``.
        lr: the rate at the start; by default .05 for SGD and .001 for the others.
        momentum: SGD's (default .9); the others have none.
        weight_decay: by default .01 for AdamW, whose decay is decoupled, and 0 for the others.
        epochs, batch_size: as usual; the batch is that of all processes together.
        schedule: ``"cosine"`` to zero, step by step; ``"step"``: a tenth from half of the training on and a hundredth from three quarters;
            ``"none"``.
        seed: of the split, the orders, dropout and everything else that is random.
        sam, asam: the radius of sharpness-aware minimisation around the optimizer; one of the two.
        useful: show the examples that are learned late twice: the epoch after which they are separated, or ``"auto"``.
        tract: λ of TrAct, which trains the first layer's outputs.
        validation: the share of each class that is held out, rounded; 0 for none.
        multiplex: the share of the numbers in the network's embedding tables that one shared table in their place has.
        on_nan: what a loss or gradient that is NaN or infinite does: ``"raise"``, or ``"skip"`` the step (weights, optimizer and batch-norm
            statistics stay as they were).
        embedding: train an embedding by another loss than cross-entropy, which holds out classes instead of samples.

    Raises:
        InputError: a number out of its range or not finite, an unknown name, options that exclude each other.

    >>> Options(schedule="step").factor(0.5)
    0.1
    >>> Options("adam", lr=float("nan"))
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: lr: got nan, expected a number in (0, inf)
    """

    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    epochs: int = 20
    batch_size: int = 64
    schedule: str = "cosine"
    seed: int = 0
    sam: float | None = None
    asam: float | None = None
    useful: int | str | None = None
    tract: float | None = None
    validation: float = 0.1
    on_nan: str = "raise"
    multiplex: float | None = None
    embedding: EmbeddingOptions | None = None

    def __post_init__(self) -> None:
        checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
        checks.one_of("schedule", self.schedule, SCHEDULES)
        checks.one_of("on_nan", self.on_nan, ("raise", "skip"))
        lr, decay = OPTIMIZERS[self.optimizer]
        checks.require(
            self.momentum is None or self.optimizer == "sgd",
            f"momentum: {self.optimizer} takes none; leave it out, or choose sgd",
        )
        usual = {"lr": lr, "weight_decay": decay, "momentum": 0.9 if self.optimizer == "sgd" else None}
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        checks.number("lr", self.lr, low=0, open_low=True)
        checks.number("weight_decay", self.weight_decay, low=0)
        if self.momentum is not None:
            checks.number("momentum", self.momentum, low=0, high=1, open_high=True)
        for name in ("epochs", "batch_size"):
            checks.number(name, getattr(self, name), low=1, integer=True)
        checks.seed("seed", self.seed)
        checks.number("validation", self.validation, low=0, high=1, open_high=True)
        for name in ("sam", "asam"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), low=0, open_low=True)
        checks.require(
            self.sam is None or self.asam is None, "sam, asam: got both, expected at most one of them"
        )
        if self.tract is not None:
            checks.number("tract", self.tract, low=0)
        if self.multiplex is not None:
            checks.number("multiplex", self.multiplex, low=0, high=1, open_low=True)
        self._check_useful()
        if self.embedding is not None:
            name = self.embedding.loss
            checks.require(
                self.useful is None,
                f"useful: it looks for samples that a classifier learns late, and {name} trains none",
            )
            checks.require(
                name != "moco" or (self.sam is None and self.asam is None),
                "sam, asam: they pass each batch twice, and moco's queue takes it once; leave them out",
            )
            start = self.embedding.ft_start
            checks.require(
                start is None or start < self.epochs,
                f"ft_start: got {start}, and the last of {self.epochs} epochs, counted from 0, is {self.epochs - 1}: nothing would be extrapolated; "
                "give an earlier one, or more epochs",
            )
            checks.require(
                name not in ("supcon", "simclr") or self.batch_size > 1,
                f"batch_size: got 1, expected at least 2: {name} pushes the samples of a batch apart",
            )

    def factor(self, done: float) -> float:
        """What the learning rate is multiplied by when the share ``done`` of the training, in [0, 1], lies behind."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "step":
            return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
        return 1.0

    def make(self, model: nn.Module, *, plain: bool = False) -> torch.optim.Optimizer:
        """The optimizer of the model's trainable parameters; ``plain``: without SAM around it."""
        parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        checks.require(
            len(parameters) > 0,
            "model: it has no parameter that asks for gradients; there is nothing to train",
        )
        sparse = self._sparse(model)
        rate = None if self.embedding is None else self.embedding.head_lr
        if rate is not None:
            own = {id(p) for p in model.get_submodule("encoder").parameters()}
            others = [p for p in parameters if id(p) not in own]
            parameters = [{"params": [p for p in parameters if id(p) in own]}, {"params": others, "lr": rate}]
            parameters = [group for group in parameters if group["params"]]
        given: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            base: torch.optim.Optimizer = torch.optim.SGD(parameters, momentum=self.momentum or 0.0, **given)
            for weight in sparse if self.momentum else ():
                # SGD would begin with a sparse one, which no checkpoint holds.
                base.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        elif self.optimizer == "diffgrad":
            base = DiffGrad(parameters, **given)
        else:
            base = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer](parameters, **given)
        if plain or (self.sam is None and self.asam is None):
            return base
        return (
            SAM(base, rho=self.sam, model=model)
            if self.sam is not None
            else ASAM(base, rho=self.asam or 0.0, model=model)
        )

    def to_dict(self) -> dict[str, Any]:
        """All options in one level; those of a loss for embeddings only where there is one."""
        own = {name: value for name, value in asdict(self).items() if name != "embedding"}
        if self.embedding is None:
            return own
        # What it holds out takes the place of the share of samples.
        return {**own, "validation": 0.0, **self.embedding.to_dict()}

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Options:
        """The options that :meth:`to_dict` gave; what is not known is left out."""
        known = {f.name for f in fields(cls)} - {"embedding"}
        inner = {f.name for f in fields(EmbeddingOptions)}
        return cls(
            **{k: v for k, v in raw.items() if k in known},
            embedding=EmbeddingOptions(**{k: v for k, v in raw.items() if k in inner})
            if "loss" in raw
            else None,
        )

    def _sparse(self, model: nn.Module) -> list[torch.Tensor]:
        """The weights whose gradients are sparse, if this optimizer takes such ones."""
        kinds = (nn.Embedding, nn.EmbeddingBag)
        found = {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m.sparse}
        takes = self.optimizer == "sgd" and not self.weight_decay and self.sam is None and self.asam is None
        checks.require(
            takes or not found,
            f"model: the gradient of {next(iter(found), '')!r} is sparse, which only sgd without weight decay and SAM can take; make it with "
            "sparse=False",
        )
        return [m.weight for m in found.values()]

    def _check_useful(self) -> None:
        if self.useful is None:
            return
        if isinstance(self.useful, str):
            checks.require(
                self.useful == "auto",
                f"useful: got {checks.show(self.useful)}, expected an epoch or 'auto' (on a command line, MODEL and DATA come before it)",
            )
            checks.require(
                window_of(self.epochs)[1] + 1 <= self.epochs,
                f"useful: {self.epochs} epochs are too few to see where the training error's fall slows down; give the epoch, or "
                "at least 3 epochs",
            )
        else:
            checks.number("useful", self.useful, low=1, high=self.epochs, integer=True)
