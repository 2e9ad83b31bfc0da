"""A small decoder of bytes whose layers attend to their whole past, to the best blocks, or to both; and its training.

Shen et al. 2026, arXiv 2511.20102, sections 1.3, 1.5 and 7 of our reading. All models carry the same output gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.checkpoint import Checkpoint
from lineament.modules.sparse_attention import SparseSparseAttention, attend, attend_both, full_attention, nsa
from lineament.modules.sparse_attention.branch import coins
from lineament.modules.sparse_attention.selection import Selection, select
from lineament.train import Accumulate, Autocast, ClipGradients, Rows, Schedule, fit
from lineament.train.loop import Run

# A training is stored after each so many steps.
STORED = 100
Choice = Callable[[Tensor, Tensor], Selection]
Watcher = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Plan:
    """How a model is trained: the coin's probability of full attention, the alignment's weight, the scoring, whether for as many FLOPs as SSA, and whether with NSA's branches."""

    p_full: float
    alpha: float
    scoring: str = "group_softmax"
    longer: bool = False
    branches: bool = False


MODELS = {
    "FullAttn": Plan(1.0, 0.0),
    "MoBA": Plan(0.0, 0.0),
    "SSA": Plan(0.5, 10.0),
    "SSA, alpha 0": Plan(0.5, 0.0),
    "FullAttn, SSA's FLOPs": Plan(1.0, 0.0, longer=True),
    "MoBA, dot": Plan(0.0, 0.0, scoring="dot"),
    "NSA": Plan(0.0, 0.0, branches=True),
}


class Layer(nn.Module):
    """Gated attention and a SwiGLU, each after an RMS norm and added to the stream."""

    def __init__(self, config: Any):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(config.width, eps=1e-5) for _ in range(2))
        self.attention = SparseSparseAttention(
            config.width, config.heads, config.key_heads, config.head_size, theta=config.theta
        )
        self.wide = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.narrow = nn.Linear(config.hidden, config.width, bias=False)

    def gated(self, u: Tensor, heads: Tensor) -> Tensor:
        return self.attention.gate(u).sigmoid().transpose(1, 2)[..., None] * heads

    def added(self, x: Tensor, heads: Tensor) -> Tensor:
        x = x + self.attention.out(heads.transpose(1, 2).flatten(2))
        one, two = self.wide(self.norms[1](x)).chunk(2, -1)
        return x + self.narrow(F.silu(one) * two)


class Decoder(nn.Module):
    """``forward`` is inference: over the chosen blocks, or without a choice over the whole past; ``aligned`` is a training step's."""

    def __init__(self, config: Any, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(256, config.width)
            self.layers: Any = nn.ModuleList(Layer(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.width, eps=1e-5)
            for weight in self.parameters():
                if weight.ndim == 2:
                    nn.init.normal_(weight, std=0.02)

    def logits(self, x: Tensor) -> Tensor:
        """Of the next byte; the read-out is the embedding."""
        return F.linear(self.norm(x), self.embed.weight)

    def forward(
        self, ids: Tensor, choice: Choice | None = None, *, sharper: float = 1.0, watch: Watcher | None = None
    ) -> Tensor:
        """Logits. ``sharper`` multiplies the attention's logits; ``watch(layer, q, k, v)`` sees what each layer attends with."""
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            u = layer.norms[0](x)
            q, k, v = layer.attention.projected(u)
            q = q * sharper
            if watch is not None:
                watch(number, q, k, v)
            x = layer.added(x, self.attended(layer, u, q, k, v, choice))
        return self.logits(x)

    def attended(
        self, layer: Layer, u: Tensor, q: Tensor, k: Tensor, v: Tensor, choice: Choice | None
    ) -> Tensor:
        """A layer's gated heads in inference, [batch, heads, tokens, size]."""
        heads = full_attention(q, k, v) if choice is None else attend(q, k, v, choice(q, k)).output
        return layer.gated(u, heads)

    def aligned(self, ids: Tensor, full: bool, plan: Plan, config: Any) -> tuple[Tensor, Tensor]:
        """Logits with full or sparse attention going on, and the mean alignment of the layers (0 where it has no weight)."""
        x, losses = self.embed(ids), []
        budget = {"block_size": config.block_size, "blocks": config.blocks, "scoring": plan.scoring}
        for layer in self.layers:
            u = layer.norms[0](x)
            q, k, v = layer.attention.projected(u)
            if plan.alpha == 0:
                heads = full_attention(q, k, v) if full else attend(q, k, v, **budget).output
                x = layer.added(x, layer.gated(u, heads))
                continue
            both = attend_both(q, k, v, **budget)
            one, two = layer.gated(u, both.full), layer.gated(u, both.sparse)
            # One plain distance has the gradient of both directions, and half of their value.
            plain = F.smooth_l1_loss(one.float(), two.float())
            losses.append(plain + plain.detach())
            x = layer.added(x, one if full else two)
        return self.logits(x), torch.stack(losses).mean() if losses else x.new_zeros(())


class Branches(Decoder):
    """The same decoder with NSA's three branches, a gate each: means of blocks, the chosen blocks, and a window; full attention stands for those in ``full``.

    Without a choice full attention stands for all three, for which the weights were not trained.
    """

    def __init__(self, config: Any, seed: int):
        super().__init__(config, seed)
        self.window: int = config.window
        self.full: tuple[str, ...] = ()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in self.layers:
                layer.attention.gate = nn.Linear(config.width, 3 * config.heads, bias=False)
                nn.init.normal_(layer.attention.gate.weight, std=0.02)

    def attended(
        self, layer: Layer, u: Tensor, q: Tensor, k: Tensor, v: Tensor, choice: Choice | None
    ) -> Tensor:
        gates = layer.attention.gate(u).sigmoid().unflatten(-1, (-1, 3)).transpose(1, 2)
        if choice is None:
            return full_attention(q, k, v) * gates.sum(-1, keepdim=True)
        return nsa(q, k, v, gates, choice(q, k), window=self.window, full=self.full)

    def aligned(self, ids: Tensor, full: bool, plan: Plan, config: Any) -> tuple[Tensor, Tensor]:
        del full
        logits = self(ids, choices(config, config.blocks, scoring=plan.scoring))
        return logits, logits.new_zeros(())


def choices(config: Any, blocks: int, **options: Any) -> Choice:
    """The best blocks at this budget."""
    return lambda q, k: select(q, k, block_size=config.block_size, blocks=blocks, **options)


def flops_ratio(config: Any) -> float:
    """FLOPs of a token in an SSA step over those in a step of full attention, the alignment itself left out."""
    inner, keys = config.heads * config.head_size, config.key_heads * config.head_size
    weights = config.width * (2 * inner + 2 * keys + config.heads + 3 * config.hidden)
    past = (config.length + 1) / 2
    full = 4 * past * inner
    read = min(config.block_size * config.blocks, past)
    sparse = 4 * read * inner + 2 * past / config.block_size * inner
    rest = config.layers * 2 * weights + 2 * 256 * config.width
    return (rest + config.layers * (full + sparse)) / (rest + config.layers * full)


@dataclass(frozen=True)
class Course:
    """Mean cross-entropy and alignment of each step."""

    losses: list[float]
    alignments: list[float]


class Training(nn.Module):
    """Called with the places where windows start in the text it gives their loss, so that one ``forward`` holds all that is trained."""

    def __init__(self, model: Decoder, data: Tensor, plan: Plan, config: Any, seed: int):
        super().__init__()
        self.model, self.data, self.plan, self.config, self.seed = model, data, plan, config, seed
        self.part, self.parts = 0, Course([], [])

    def forward(self, starts: Tensor) -> Tensor:
        ids = windows(self.data, starts, self.config.length)
        full = coins([0], self.plan.p_full, self.seed, self.part, "step")[0]
        logits, aligned = self.model.aligned(ids[:, :-1], full, self.plan, self.config)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        self.part += 1
        self.parts.losses.append(float(loss.detach()))
        self.parts.alignments.append(float(aligned.detach()))
        return loss + self.plan.alpha * aligned


class _Steps:
    """The number of each step's first part, which decides its coin; and the means over the parts of each step."""

    def on_batch(self, run: Run, batch: Any) -> None:
        training: Any = run.model
        training.part = run.step * run.parts

    def on_epoch_end(self, run: Run) -> dict[str, list[float]]:
        training: Any = run.model
        found, training.parts = training.parts, Course([], [])
        steps = [slice(at, at + run.parts) for at in range(0, len(found.losses), run.parts)]
        return {name: [sum(values[at]) / run.parts for at in steps] for name, values in vars(found).items()}


def train(
    config: Any,
    data: Tensor,
    name: str,
    seed: int,
    device: str,
    checkpoint: Checkpoint | None = None,
) -> tuple[Decoder, Course]:
    """One model on random windows of the text. AdamW (0.9, 0.95), weight decay 0.1, clipped at 1, 1 % warm-up, cosine to 0."""
    plan = MODELS[name]
    steps = round(config.steps * flops_ratio(config)) if plan.longer else config.steps
    model = (Branches if plan.branches else Decoder)(config, seed).to(device)
    warm = max(1, round(steps / 100))

    def optimizer(training: nn.Module) -> torch.optim.Optimizer:
        decayed = [p for p in training.parameters() if p.ndim == 2]
        others = [p for p in training.parameters() if p.ndim != 2]
        return torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.95),
            weight_decay=0.1,
        )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2

    draw = torch.Generator().manual_seed(seed)
    size, parts = config.batch * config.accumulate, range(steps * config.accumulate)
    starts = torch.cat(
        [torch.randint(len(data) - config.length, (config.batch,), generator=draw) for _ in parts]
    )
    places = torch.arange(len(starts)).split(STORED * size)
    done = fit(
        Training(model, data.to(device), plan, config, seed),
        (starts, starts),
        optimizer=optimizer,
        epochs=len(places),
        batch_size=size,
        loss=lambda found, _: found,
        callbacks=[
            Rows(lambda stretch: places[stretch], shuffle=False),
            Accumulate(config.accumulate),
            *([Autocast()] if config.bf16 else []),
            Schedule(lambda made, _: torch.optim.lr_scheduler.LambdaLR(made, rate), by="step"),
            ClipGradients(1.0),
            _Steps(),
        ],
        seed=seed,
        checkpoint=checkpoint,
        name=f"{name}, seed {seed}",
    )
    course = Course(*([*chain.from_iterable(done.curve(field))] for field in ("losses", "alignments")))
    return model.eval(), course


def windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """Stretches of the text, each one byte longer than ``length``, for the last target."""
    return data[starts[:, None] + torch.arange(length + 1, device=data.device)]
