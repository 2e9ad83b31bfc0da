"""Training the models of the comparison, and measuring each: loss by budget, concentration, Theorem 1, and control selections."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.modules.sparse_attention.attend import attend, full_attention
from lineament.modules.sparse_attention.controls import last_blocks, oracle_blocks, random_blocks
from lineament.modules.sparse_attention.selection import select
from lineament.modules.sparse_attention.theory import SparsityReport, output_divergence, sparsity_report
from lineament.recipes.kit.text import read_text
from lineament.recipes.ssa.network import Attention, ByteModel
from lineament.train.callbacks import ClipGradients, Cosine
from lineament.train.loop import fit

# p_full and whether the branches are aligned.
MODELS = {
    "FullAttn": (1.0, False),
    "MoBA": (0.0, False),
    "SSA": (0.5, True),
    "SSA, coin alone": (0.5, False),
    "FullAttn, SSA's FLOPs": (1.0, False),
}


CONTROLS = {"last": last_blocks, "random": random_blocks, "oracle": oracle_blocks}


@dataclass(frozen=True)
class Trained:
    """The weights, and the mean alignment in each tenth of the training."""

    weights: dict[str, Tensor]
    alignment: list[float]


@dataclass(frozen=True)
class Measured:
    """Losses in nats a byte on the second half of held-out windows; the attention's numbers are means over layers, heads and tokens of full inference.

    ``sparse`` and the like go by the number of blocks; ``chosen``: by how the blocks were chosen; ``pairs``: (error, bound) of some tokens.
    """

    full: float
    sparse: dict[int, float]
    kept: float
    entropy: float
    first: float
    divergence: float
    violations: int
    queries: int
    deltas: list[float]
    pairs: list[tuple[float, float]]
    long_full: float
    long_sparse: float
    chosen: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sharpened:
    """FullAttn with its logits multiplied so that the chosen blocks hold as much as SSA's do: the factor, what they hold, and its losses."""

    factor: float
    kept: float
    full: float
    sparse: dict[int, float]


def text_of(config: Any) -> tuple[Tensor, Tensor]:
    """Training and held-out bytes, 90 to 10."""
    raw = read_text(config.text).encode()[: config.letters]
    ids = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def flops(config: Any, *, full: bool, sparse: bool) -> float:
    """Multiplications and additions a token, of a forward pass with these attentions."""
    kv = config.width * config.key_heads // config.heads
    linear = 2 * config.width * (2 * config.width + 2 * kv + config.heads + 3 * config.mlp)
    seen = config.length / 2 * full
    if sparse:
        seen += (
            min(config.block_size * config.blocks, config.length / 2) + config.length / config.block_size / 4
        )
    return config.layers * (linear + 4 * config.width * seen) + 2 * config.width * 256


def train(name: str, train_ids: Tensor, config: Any, seed: int) -> Trained:
    p_full, align = MODELS[name]
    steps = config.steps
    if name.endswith("FLOPs"):
        steps = round(steps * flops(config, full=True, sparse=True) / flops(config, full=True, sparse=False))
    model = ByteModel(config, p_full=p_full, alpha=config.alpha if align else 0.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(train_ids) - config.length, (steps * config.batch_size,), generator=generator)
    rows = train_ids[starts[:, None] + torch.arange(config.length + 1)]

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + model.alpha * model.alignment

    def optimizer(net: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1)

    fit(
        model, (rows[:, :-1], rows[:, 1:]), optimizer=optimizer, batch_size=config.batch_size, loss=loss, seed=seed,
        callbacks=[Cosine(warmup=config.warmup), ClipGradients(1.0)],
    )  # fmt: skip
    parts = torch.tensor(model.history).tensor_split(10)
    return Trained({n: w.detach() for n, w in model.state_dict().items()}, [float(p.mean()) for p in parts])


def windows(test: Tensor, length: int, count: int) -> Tensor:
    """Held-out windows, evenly spread, with the byte behind each."""
    starts = torch.linspace(0, len(test) - length - 1, count).long()
    return test[starts[:, None] + torch.arange(length + 1)]


@torch.no_grad()
def mean_loss(model: ByteModel, rows: Tensor, attention: Attention = full_attention) -> float:
    """Nats a byte on the second half of each window."""
    half, losses = rows.shape[1] // 2, []
    for part in rows.split(8):
        logits = model(part[:, :-1], attention)[:, half:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:][:, half:].flatten()) * len(part))
    return float(torch.stack(losses).sum() / len(rows))


def loaded(trained: Trained, config: Any) -> ByteModel:
    model = ByteModel(config, p_full=1.0, alpha=0.0, seed=0)
    model.load_state_dict(trained.weights)
    return model.eval()


def sparsely(config: Any, blocks: int, **options: Any) -> Attention:
    """Attention over the best blocks."""
    return lambda q, k, v: attend(q, k, v, block_size=config.block_size, blocks=blocks, **options).output


def chosen_by(config: Any, by: str) -> Attention:
    """Attention over the blocks of a control selection, the same number."""
    return lambda q, k, v: attend(q, k, v, CONTROLS[by](q, k, block_size=config.block_size, blocks=config.blocks)).output  # fmt: skip


def reports(model: ByteModel, rows: Tensor, config: Any, scale: float | None = None) -> list[SparsityReport]:
    """What the best blocks hold of full attention, layer by layer."""
    found = []

    def probe(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen = select(q, k, block_size=config.block_size, blocks=config.blocks, scale=scale)
        found.append(sparsity_report(q, k, v, chosen, scale=scale))
        return full_attention(q, k, v, scale=scale)

    with torch.no_grad():
        model(rows[:, :-1], probe)
    return found


def measure(trained: Trained, test: Tensor, config: Any) -> Measured:
    model, rows = loaded(trained, config), windows(test, config.length, config.windows)
    long = windows(test, 2 * config.length, max(1, config.windows // 2))
    found = reports(model, rows[:16], config)
    joined = {
        name: torch.stack([getattr(each, name) for each in found])
        for name in ("kept", "entropy", "first", "error", "bound", "delta")
    }
    error, bound = joined["error"].flatten(), joined["bound"].flatten()
    some = torch.arange(0, len(error), max(1, len(error) // 300))
    deltas = torch.histc(joined["delta"], bins=20, min=0, max=1) / joined["delta"].numel()
    sparse = sparsely(config, config.blocks)
    with torch.no_grad():
        ids, half = rows[:16, :-1], config.length // 2
        apart = output_divergence(model(ids)[:, half:], model(ids, sparse)[:, half:]).divergence
    chosen = {}
    if config.controls:
        chosen = {by: mean_loss(model, rows, chosen_by(config, by)) for by in CONTROLS}
        wide = min(config.block_size, 2 * config.blocks)
        chosen |= {how: mean_loss(model, rows, sparsely(config, wide, selection=how)) for how in ("exact", "released")}  # fmt: skip
    return Measured(
        full=mean_loss(model, rows),
        sparse={n: mean_loss(model, rows, sparsely(config, n)) for n in config.budgets},
        kept=float(joined["kept"].mean()),
        entropy=float(joined["entropy"].mean()),
        first=float(joined["first"].mean()),
        divergence=float(apart.mean()),
        violations=int((error > bound * (1 + 1e-4) + 1e-6).sum()),
        queries=len(error),
        deltas=deltas.tolist(),
        pairs=[(float(error[i]), float(bound[i])) for i in some],
        long_full=mean_loss(model, long),
        long_sparse=mean_loss(model, long, sparse),
        chosen=chosen,
    )


def sharpen(trained: Trained, goal: float, test: Tensor, config: Any) -> Sharpened:
    """The factor of the logits at which the chosen blocks hold ``goal``, by bisection of its logarithm."""
    model, rows = loaded(trained, config), windows(test, config.length, config.windows)
    base = (config.width // config.heads) ** -0.5
    low, high, kept = 0.0, 6.0, 0.0
    for _ in range(8):
        middle = (low + high) / 2
        each = reports(model, rows[:8], config, base * 2**middle)
        kept = float(torch.stack([r.kept for r in each]).mean())
        low, high = (middle, high) if kept < goal else (low, middle)
    scale = base * 2 ** ((low + high) / 2)
    sparse = {n: mean_loss(model, rows, sparsely(config, n, scale=scale)) for n in config.budgets}
    return Sharpened(scale / base, kept, mean_loss(model, rows, partial(full_attention, scale=scale)), sparse)
