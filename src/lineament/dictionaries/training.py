"""Train dictionaries on what passes at a site of an unmodified model; several of them share one harvest.

One step (Olmo et al. 2024, arXiv 2411.10397; Gao et al. 2024, arXiv 2406.04093): a batch of shuffled rows (x, g); codes by the kind's rule, of TopK kinds
ranked with g; the loss |x - x'|^2 over the data's variance, plus the kind's penalty, plus the dead latents' part; Adam, with each atom's gradient
projected and each atom brought back to norm 1.

Activations are scaled to a mean variance of 1 a dimension while training, so that rates and penalties mean the same at every site (g then is divided by
that scale); the dictionary that comes back is in the units of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament import __version__
from lineament.core import checks, shards
from lineament.core.batching import progress
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import number, require
from lineament.core.models import device_of, unwrapped
from lineament.dictionaries.autoencoders import Autoencoder
from lineament.dictionaries.harvest import Harvest, Rows, joined
from lineament.dictionaries.saving import weights_hash
from lineament.dictionaries.sequences import Gradient, checked_gradient
from lineament.dictionaries.trainer import Trainer, TrainingOptions
from lineament.train.processes import OneProcess, Processes


def train_dictionary(
    model: nn.Module,
    data: Any,
    *,
    site: str,
    dictionary: Any,
    tokens: int,
    batch_size: int = 4096,
    learning_rate: float | str = "auto",
    gradient: Gradient | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    options: TrainingOptions | Sequence[TrainingOptions] | None = None,
) -> Any:
    """Train a dictionary, or several at once on the same rows.

    Args:
        data: as for :func:`lineament.dictionaries.harvest`; walked again as often as ``tokens`` asks for.
        site: where, see :func:`lineament.sites`.
        dictionary: an autoencoder of :mod:`lineament.dictionaries`, or a list; it stays as it is, and a copy is trained. One whose atoms are all zero is initialised:
            b_dec at the geometric median, random atoms of norm 1, the encoder their transpose, scaled.
        tokens: how many rows to see.
        learning_rate: ``"auto"`` is 2e-4 sqrt(2^14 / width).
        gradient: whose gradient ranks the latents of TopK kinds (with ``Selection(beta=0)`` none): ``"labels"``, ``"sampled"``, ``"max_logit"`` or a
            function; ``None``: plain training.
        checkpoint: a folder from which a killed training goes on, with the same bits on one process. It is emptied at the end.
        options: :class:`TrainingOptions`, or a list as long as ``dictionary``.

    Returns:
        A :class:`Trained`, or a list where ``dictionary`` is one.

    Raises:
        InputError: what cannot be trained: another d than the site's, a site where nothing varies, atoms that are not of norm 1, a gradient that is missing,
            zero everywhere or not finite.

    >>> from lineament.dictionaries import TopK
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = train_dictionary(net, (torch.randn(64, 4), torch.zeros(64).long()), site="1", dictionary=TopK(8, 16, k=2), tokens=640, batch_size=64)
    >>> found.tokens, found.dictionary.site, len(found.history) > 0
    (640, '1', True)
    """
    several = isinstance(dictionary, (list, tuple))
    dictionaries: list[Any] = list(dictionary) if several else [dictionary]
    require(len(dictionaries) > 0, "dictionary: got none, expected at least one")
    for each in dictionaries:
        require(
            isinstance(each, Autoencoder),
            f"dictionary: got {type(each).__name__}, which is not trained by steps; expected TopK, BatchTopK, ReLU, JumpReLU or Gated",
        )
    one = options if isinstance(options, TrainingOptions) else TrainingOptions()
    every = list(options) if isinstance(options, Sequence) else [one] * len(dictionaries)
    require(
        len(every) == len(dictionaries),
        f"options: got {len(every)} for {len(dictionaries)} dictionaries, expected one for each or one for all",
    )
    number("tokens", tokens, low=1, integer=True)
    number("batch_size", batch_size, low=1, integer=True)
    if learning_rate != "auto":
        number("learning_rate", learning_rate, low=0, open_low=True)
    checks.seed("seed", seed)
    checked_gradient(gradient)
    processes = _processes(device_of(model))
    harvested = Harvest(
        model,
        data,
        site=site,
        gradient=gradient,
        exclude=every[0].exclude,
        buffer=every[0].buffer,
        seed=seed,
        share=(processes.rank, processes.count),
    )
    d = harvested.width
    for each in dictionaries:
        require(
            each.d == d, f"dictionary: made for {each.d} dimensions, and {site!r} has {d}; make it with d={d}"
        )
    require(
        checkpoint is None or processes.count == 1,
        f"checkpoint: a training on {processes.count} processes cannot be resumed with the same bits; leave it out",
    )
    wants, steps = gradient is not None, math.ceil(tokens / batch_size)
    first = _of_all(next(harvested.batches(max(1024, min(batch_size, 8192)))), processes)
    place = harvested.sites[0].name
    about = described(
        model, place, processes, tokens=tokens, batch_size=batch_size, learning_rate=learning_rate, seed=seed,
        gradient=gradient if isinstance(gradient, str | None) else getattr(gradient, "__qualname__", "function"),
    )  # fmt: skip
    trainers = [
        Trainer(each, first, chosen, about, number_, processes)
        for number_, (each, chosen) in enumerate(zip(dictionaries, every))
    ]
    position = {"after": [0, 0], "rows": 0, "zero_rows": 0}
    loop: Any = range(steps)
    run = None
    if checkpoint is not None:
        run = Checkpoint(checkpoint, {**about, "dictionaries": [trainer.told for trainer in trainers]})
        held = {f"dictionary {i}": trainer for i, trainer in enumerate(trainers)}
        loop = run.loop("train", steps, {**held, "position": position})
    rows: Any = None
    for number_ in progress(loop, "training", total=steps, before=int):
        if rows is None:
            rows = harvested.batches(
                max(1, batch_size // processes.count),
                after=(position["after"][0], position["after"][1]),
                passes=None,
            )
        part = next(rows)
        for trainer in trainers:
            trainer.step(part, number_, steps)
        position["after"] = list(part.after)
        position["rows"] += len(part)
        position["zero_rows"] += int((part.gradient.abs().amax(1) == 0).sum()) if wants else 0
    found = [trainer.finished(position["rows"], position["zero_rows"]) for trainer in trainers]
    if run is not None:
        run.finish()
    return found if several else found[0]


def described(model: nn.Module, place: str, processes: OneProcess, **said: Any) -> dict[str, Any]:
    """What repeats a training, beside the dictionary's own settings."""
    return {
        "model": type(unwrapped(model)).__name__, "model_sha256": weights_hash(model), "site": place, **said,
        "processes": processes.count, "lineament": __version__, "torch": torch.__version__,
    }  # fmt: skip


def _of_all(rows: Rows, processes: OneProcess) -> Rows:
    """The rows of every process, from which each measures the same scales and starts with the same weights."""
    if processes.count == 1:
        return rows
    held: list[Any] = [None] * processes.count
    torch.distributed.all_gather_object(held, rows)
    return joined(held)


def _processes(device: torch.device) -> OneProcess:
    return Processes() if shards.started() > 1 else OneProcess(device)
