"""A whole training in one call, on one process or several: any optimizer here, SAM around it, USEFUL before it, TrAct below it.

The function behind `lineament train`, over Hugging Face Accelerate; its epochs are in `fit_loop.py`. The model, the global random state and the first
layer's class are put back in order also after an exception; the weights are then those of the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import require
from lineament.learn.tract.layer import tract
from lineament.train.fitting_loop import Inputs, Loop
from lineament.train.options import Options
from lineament.train.processes import Processes, randomness
from lineament.train.result import Fitted


def fit(
    model: nn.Module,
    inputs: Tensor | Inputs,
    targets: Int[Tensor, "samples"],
    options: Options | None = None,
    *,
    processes: Processes | None = None,
    checkpoint: Checkpoint | None = None,
    record: Callable[[list[dict[str, Any]]], None] = lambda history: None,
    note: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Train a classifier with cross-entropy; the model is then at its last epoch's weights, in eval mode.

    Args:
        model: any network that answers with logits; trained in place, on the device of ``processes``.
        inputs: (samples, ...), or a function that gives the rows asked for as the model takes them.
        targets: the class of each sample; every class from 0 to the greatest must be there.
        processes: where to train; by default what Accelerate finds.
        checkpoint: stores each epoch (and the early stage of USEFUL, as a whole) and goes on from there; given to the first process.
        record: called by the first process after each epoch with the history so far.
        note: called with a line for each step, for who waits.

    Returns:
        :class:`~lineament.train.result.Fitted`.

    Raises:
        InputError: labels that leave a class empty, nothing to train or to validate on, a loss or gradient that is NaN or infinite (after
            what step, unless they are skipped), no layer for TrAct.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)); y = (x[:, 0] > 0).long()
    >>> net = nn.Linear(4, 2); _ = [nn.init.zeros_(p) for p in net.parameters()]
    >>> done = fit(net, x, y, Options(epochs=5, batch_size=8, validation=0.2), processes=Processes("cpu"))
    >>> len(done.history), done.last >= 0.9
    (5, True)
    """
    options = options or Options()
    targets = _targets(targets)
    if isinstance(inputs, Tensor):
        held = checks.tensor("inputs", inputs, finite=False)
        require(
            len(held) == len(targets),
            f"inputs: got {len(held)}, and {len(targets)} targets, expected as many of one as of the other",
        )
        inputs = lambda rows: held[rows]  # noqa: E731
    processes = processes or Processes()
    require(
        options.batch_size % processes.count == 0,
        f"batch_size: got {options.batch_size}, expected a multiple of the {processes.count} processes",
    )
    train, validation = split(targets, options.validation, options.seed)
    model.to(processes.device)
    with randomness(options.seed), _tract(model, options.tract, processes) as tract:
        loop = Loop(model, inputs, targets, options, processes, checkpoint, note)
        try:
            early = loop.early(train) if options.useful is not None else None
            rows = train if early is None else train[early.pop("rows")]
            history = loop.run(rows, validation, record)
        finally:
            processes.unwrapped(loop.wrapped)
            model.zero_grad(set_to_none=True)
            model.eval()
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    require(
        not bad, f"training: the last step left NaN or infinite weights in {bad[:1]}; lower the learning rate"
    )
    return Fitted(
        options=options,
        history=tuple(history),
        samples=len(train),
        validation_samples=len(validation),
        early=early,
        tract_layer=getattr(tract, "layer", None),
        processes=processes.count,
        device=str(processes.device),
    )


def split(targets: Int[Tensor, "samples"], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and to validate on: of each class the same share at random, at least one to train on.

    >>> train, held = split(torch.tensor([0, 1]).repeat(10), 0.2, seed=0)
    >>> len(train), len(held), torch.tensor([0, 1]).repeat(10)[held].tolist()
    (16, 4, [0, 1, 0, 1])
    """
    if share == 0:
        return torch.arange(len(targets)), torch.arange(0)
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(int(targets.max()) + 1):
        own = (targets == label).nonzero()[:, 0]
        count = min(round(share * len(own)), len(own) - 1)
        held[own[torch.randperm(len(own), generator=generator)[: max(count, 0)]]] = True
    require(
        bool(held.any()),
        f"validation: a share of {share} of {len(targets)} samples in {int(targets.max()) + 1} classes holds none out; give a greater share, or 0",
    )
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def _targets(targets: Any) -> Tensor:
    targets = checks.labels("targets", targets).cpu()
    counts = torch.bincount(targets)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    require(
        not empty,
        f"targets: class {empty[0] if empty else ''} has no example (labels run from 0 to {len(counts) - 1}); number the classes without gaps",
    )
    require(len(counts) > 1, "targets: all of class 0, expected at least two classes")
    return targets


def _tract(model: nn.Module, lam: float | None, processes: Processes) -> Any:
    if lam is None:
        return nullcontext()
    # What is not finite is judged by the loop, which knows the step.
    group = "world" if processes.count > 1 else None
    return tract(model, lam=lam, nonfinite="pass", process_group=group)
