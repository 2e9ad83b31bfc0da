"""What a trained model costs at each budget, how concentrated its attention is, and the controls at equal budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.checkpoint import Checkpoint
from lineament.modules.sparse_attention import last_blocks, oracle_blocks, random_blocks, sparsity_report
from lineament.recipes.ssa.network import MODELS, Branches, Choice, Course, Decoder, choices, train, windows

BUDGETS = (2, 4, 8, 16)
FULL = "full"
# Which of NSA's branches full attention replaces, as in the paper's table; none is NSA itself.
REPLACED = ("", "selected", "compressed, selected", "selected, window", "compressed, selected, window")


@dataclass(frozen=True)
class Attention:
    """Of full inference, means over layers, heads and the windows' second halves.

    ``kept``: AttnSparsity at the training's budget; ``entropy`` in nats; ``sink``: weight on token 0; ``delta``: deciles of what is left out;
    ``violations``: queries (all of them) whose error exceeds Theorem 1's bound, of ``queries``; ``tight``: mean error over mean bound.
    """

    kept: float
    entropy: float
    sink: float
    delta: list[float]
    violations: int
    queries: int
    tight: float


@dataclass(frozen=True)
class Sharpened:
    """FullAttn with its attention's logits multiplied by ``factor``, so that it keeps as much as SSA."""

    factor: float
    kept: float
    losses: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """One trained model. ``losses`` in nats a byte by budget; ``longer``: the same on windows twice as long; ``controls``: by other selections; ``replaced``: NSA's by the
    branches that full attention stands for."""

    losses: dict[str, float]
    longer: dict[str, float]
    attention: Attention
    course: Course
    controls: dict[str, float] = field(default_factory=dict)
    sharpened: Sharpened | None = None
    replaced: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def loss_of(model: Decoder, rows: Tensor, choice: Choice | None, *, sharper: float = 1.0) -> float:
    """Cross-entropy of the second half of each window, a few windows at a time."""
    half, total = rows.shape[1] // 2, 0.0
    for part in rows.split(8):
        logits = model(part[:, :-1], choice, sharper=sharper)[:, half:]
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, half + 1 :].flatten(), reduction="sum"))
    return total / (len(rows) * (rows.shape[1] - 1 - half))


@torch.no_grad()
def attention_of(model: Decoder, rows: Tensor, config: Any, *, sharper: float = 1.0) -> Attention:
    """Selections are those of the training's budget; inference is full, but along NSA's own branches for NSA."""
    choice, found, half = choices(config, config.blocks), [], rows.shape[1] // 2

    def watch(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        # In float64: where nothing is left out the bound is zero, and rounding is not to be taken for an error.
        found.append(sparsity_report(q.double(), k.double(), v.double(), choice(q, k)))

    own = choice if isinstance(model, Branches) else None
    for part in rows.split(8):
        model(part[:, :-1], own, sharper=sharper, watch=watch)

    def late(name: str) -> Tensor:
        return torch.cat([getattr(each, name)[..., half:].flatten() for each in found])

    error, bound = (torch.cat([getattr(e, name).flatten() for e in found]) for name in ("error", "bound"))
    over = error > bound * (1 + 1e-4) + 1e-5
    kept = late("kept")
    deciles = torch.quantile((1 - kept).double().cpu()[:: max(1, len(kept) // 100_000)], torch.linspace(0, 1, 11).double())  # fmt: skip
    return Attention(
        float(kept.mean()), float(late("entropy").mean()), float(late("first").mean()), deciles.tolist(),
        int(over.sum()), over.numel(), float(error.mean() / bound.mean().clamp(min=1e-12)),
    )  # fmt: skip


def measured(
    config: Any,
    train_data: Tensor,
    test_data: Tensor,
    name: str,
    seed: int,
    kept: float | None,
    checkpoint: Checkpoint | None = None,
) -> Measured:
    """Train a model and measure it; FullAttn is sharpened until it keeps as much as ``kept``."""
    device = device_of(config)
    model, course = train(config, train_data, name, seed, device, checkpoint)
    rows, longer = (
        rows_of(test_data, config.windows, length).to(device) for length in (config.length, 2 * config.length)
    )
    scoring = MODELS[name].scoring
    losses = {FULL: loss_of(model, rows, None)}
    losses |= {
        str(k): loss_of(model, rows, choices(config, k, scoring=scoring))
        for k in sorted({*BUDGETS, config.blocks})
    }
    twice = {FULL: loss_of(model, longer, None)}
    twice[str(config.blocks)] = loss_of(model, longer, choices(config, config.blocks, scoring=scoring))
    controls = {}
    if config.controls and name in ("FullAttn", "SSA"):
        controls = {key: loss_of(model, rows, choice) for key, choice in selections(config, seed).items()}
    sharper = None
    if config.controls and name == "FullAttn" and kept is not None:
        sharper = sharpened(model, rows, config, kept)
    replaced = {}
    if config.controls and isinstance(model, Branches):
        replaced = {key: replaced_loss(model, rows, choices(config, config.blocks), key) for key in REPLACED}
    attention = attention_of(model, rows[: config.watched], config)
    return Measured(losses, twice, attention, course, controls, sharper, replaced)


def replaced_loss(model: Branches, rows: Tensor, choice: Choice, key: str) -> float:
    """NSA's loss with full attention in place of the branches named in ``key``."""
    model.full = tuple(name for name in key.split(", ") if name)
    try:
        return loss_of(model, rows, choice)
    finally:
        model.full = ()


def selections(config: Any, seed: int) -> dict[str, Choice]:
    """Other choices of as many blocks as in training; the released kernel's and the exact one at its published budget, as many blocks as a block has tokens."""
    budget = {"block_size": config.block_size, "blocks": config.blocks}
    size = config.block_size
    return {
        "exact": choices(config, config.blocks),
        "last": lambda q, k: last_blocks(q, k, **budget),
        "random": lambda q, k: random_blocks(q, k, **budget, seed=seed),
        "oracle": lambda q, k: oracle_blocks(q, k, **budget),
        "exact, k = s": choices(config, size),
        "released, k = s": choices(config, size, selection="released"),
    }


def device_of(config: Any) -> str:
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def rows_of(data: Tensor, count: int, length: int) -> Tensor:
    """Windows spread evenly over the text."""
    return windows(data, torch.linspace(0, len(data) - length - 1, count).long(), length)


def sharpened(model: Decoder, rows: Tensor, config: Any, kept: float, steps: int = 7) -> Sharpened:
    """The factor on a logarithmic scale between 1 and 8 whose AttnSparsity comes nearest to ``kept``."""
    low, high = 0.0, math.log(8)
    for _ in range(steps):
        middle = (low + high) / 2
        if attention_of(model, rows[: config.watched], config, sharper=math.exp(middle)).kept < kept:
            low = middle
        else:
            high = middle
    factor = math.exp((low + high) / 2)
    losses = {FULL: loss_of(model, rows, None, sharper=factor)}
    losses |= {str(k): loss_of(model, rows, choices(config, k), sharper=factor) for k in BUDGETS}
    return Sharpened(factor, attention_of(model, rows[: config.watched], config, sharper=factor).kept, losses)
