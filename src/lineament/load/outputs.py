"""What a network's outputs are, told by their values: logits, probabilities or their logarithms; all are read as logits.

For classes log p is a row of logits, because softmax(log p) = p / Σp; for a label of its own it is log p - log(1 - p).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import require, show, suggest
from lineament.core.models import logits

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """How outputs are read: what makes logits of them (``None``: they are logits), and what is said of it."""

    change: Change | None = None
    said: str = ""


def reading(outputs: Tensor, task: str, dtype: torch.dtype = torch.float32) -> Reading:
    """What the outputs of all samples, (sample, output), are.

    Args:
        task: ``"classification"``, ``"multi-label"``, ``"regression"`` or ``"embedding"``.
        dtype: the precision in which they were computed.

    >>> reading(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), "classification").said
    'its outputs are probabilities (none below 0, rows sum to 1); their logarithm is read as the logits'
    >>> reading(torch.tensor([[9.0, 1.0], [2.0, 8.0]]), "classification").said
    ''
    """
    if task in ("regression", "embedding"):
        return Reading()
    width, tolerance = outputs.shape[1], 1e-3 if dtype in (torch.float32, torch.float64) else 2e-2
    z = outputs.double()
    # A network whose answers leave one half of [0, 1] empty says nothing that logits could not say.
    unit = bool((z >= -1e-6).all() and (z <= 1 + 1e-6).all()) and float(z.min()) < 0.5 < float(z.max())
    if task == "multi-label":
        said = "its outputs lie in [0, 1] and are read as the probability of each label; their log-odds are the logits"
        return Reading(_log_odds, said) if unit else Reading()
    if width == 1:
        if unit:
            said = "one output p in [0, 1] for two classes is read as the probabilities (1 - p, p); their logarithm as the logits"
            return Reading(lambda p: torch.stack([_log(1 - p, p), _log(p)], 1).flatten(1), said)
        said = "one output z for two classes is read as the logits (0, z)"
        return Reading(lambda z: torch.stack([torch.zeros_like(z), z], 1).flatten(1), said)
    if bool((z >= -1e-6).all() and ((z.sum(1) - 1).abs() < tolerance).all()):
        said = "its outputs are probabilities (none below 0, rows sum to 1); their logarithm is read as the logits"
        return Reading(_log, said)
    if bool((z <= 1e-6).all() and (z.logsumexp(1).abs() < tolerance).all()):
        return Reading(None, "its outputs are log-probabilities (their exponentials sum to 1)")
    if unit:
        said = "its outputs lie in [0, 1] without summing to 1 and are read as a probability of each class on its own; their logarithm is read as the logits"
        return Reading(_log, said)
    return Reading()


@contextmanager
def one_output(model: nn.Module, which: str | int | None) -> Iterator[None]:
    """Let the model answer with one of its outputs while the block runs, by name or number.

    Raises:
        InputError: when it answers, it has no such output.

    >>> class Two(nn.Module):
    ...     def forward(self, x): return {"aux": x, "classes": 2 * x}
    >>> net = Two()
    >>> with one_output(net, "classes"):
    ...     net(torch.ones(1)).item()
    2.0
    """
    if which is None:
        yield
        return

    def answer(_: nn.Module, _args: object, output: Any) -> Any:
        there: dict[str, Any]
        if isinstance(output, Mapping):
            there = {str(name): value for name, value in output.items()}
        elif isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
            there = {str(number): value for number, value in enumerate(output)}
        elif isinstance(output, Tensor):
            there = {}
        else:
            names = getattr(output, "_fields", None) or vars(output)
            there = {name: getattr(output, name) for name in names if not name.startswith("_")}
        require(
            str(which) in there,
            f"output: the model has none called {which!r}; it answers with {show(output)}"
            f"{suggest(str(which), there) if there else ', which is the only one'}",
        )
        return there[str(which)]

    handle = model.register_forward_hook(answer)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def read_as_logits(model: nn.Module, change: Change | None) -> Iterator[None]:
    """Let the model answer with logits while the block runs."""
    if change is None:
        yield
        return

    def answer(_: nn.Module, _args: object, output: object) -> Tensor:
        return change(logits(output))

    handle = model.register_forward_hook(answer)
    try:
        yield
    finally:
        handle.remove()


def _log(p: Tensor, near: Tensor | None = None) -> Tensor:
    """log p in float32 at least, bounded by the smallest number, or by the rounding of 1 - ``near``."""
    wide = p if p.dtype == torch.float64 else p.float()
    info = torch.finfo(wide.dtype)
    low = info.tiny if near is None else info.eps / 2
    return wide.clamp_min(low).log().to(p.dtype)


def _log_odds(p: Tensor) -> Tensor:
    return _log(p) - _log(1 - p, p)
