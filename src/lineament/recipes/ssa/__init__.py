"""SSA: does training with full and sparse attention, aligned, give one model for any budget, and is it the alignment that does it?

Shen et al., ICML 2026, arXiv 2511.20102. Small decoders on the bytes of Shakespeare. Controls that the paper lacks: the coin alone, FullAttn for as many FLOPs,
FullAttn sharpened by a temperature, other choices of as many blocks, the released kernel's choice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from lineament.core.checks import number, one_of, require
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.ssa.claims import Found, claims_of
from lineament.recipes.ssa.figures import draw_all
from lineament.recipes.ssa.training import (
    MODELS,
    Measured,
    Sharpened,
    Trained,
    measure,
    sharpen,
    text_of,
    train,
)
from lineament.report.outcome import Outcome, Table

SLUG = "ssa"
TITLE = "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in Feature Space"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the text, the network, its attention, the training, and the evaluation."""

    text: str | None = None
    letters: int = 2_000_000

    layers: int = 2
    width: int = 128
    heads: int = 4
    key_heads: int = 2
    mlp: int = 512
    theta: float = 1e4
    initial_std: float = 0.02

    block_size: int = 8
    blocks: int = 4
    alpha: float = 10.0

    models: tuple[str, ...] = ("FullAttn", "SSA")
    length: int = 256
    batch_size: int = 8
    steps: int = 100
    lr: float = 3e-3
    warmup: float = 0.05
    seeds: tuple[int, ...] = (0,)

    windows: int = 32
    budgets: tuple[int, ...] = (2, 4, 8, 16)
    controls: bool = False

    preset: str = presets(
        quick={},
        small={"models": tuple(MODELS), "steps": 300, "controls": True},
        paper={
            "models": tuple(MODELS),
            "letters": 10**12,
            "layers": 16,
            "width": 2048,
            "heads": 32,
            "key_heads": 2,
            "mlp": 8192,
            "theta": 5e5,
            "block_size": 16,
            "blocks": 16,
            "length": 8192,
            "batch_size": 384,
            "steps": 31_789,
            "lr": 1e-3,
            "warmup": 0.01,
            "seeds": (0, 1, 2),
            "windows": 1000,
            "budgets": (16, 32, 64, 128, 256),
            "controls": True,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished training."""
    for name in config.models:
        one_of("models", name, MODELS)
    for name in ("models", "seeds", "budgets"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    require(not config.controls or config.blocks in config.budgets, f"budgets: got {config.budgets}, expected blocks={config.blocks} among them")  # fmt: skip
    for name in ("steps", "batch_size", "windows"):
        number(name, getattr(config, name), low=1, integer=True)
    stages, found = Stages(out, config), Found()
    text, test = text_of(config)
    require(len(test) > 2 * config.length + 1, f"letters: {len(test)} held-out bytes are too few for windows of {2 * config.length}")  # fmt: skip
    for name in config.models:
        each = stages.each(f"train {name}, seed {{}}", config.seeds, lambda s, n=name: train(n, text, config, s), Trained)  # fmt: skip
        found.trained[name] = list(each.values())
        seen = stages.each(f"measure {name}, seed {{}}", config.seeds, lambda s, e=each: measure(e[s], test, config), Measured)  # fmt: skip
        found.measured[name] = list(seen.values())
    if config.controls and {"FullAttn", "SSA"} <= found.measured.keys():
        goals = dict(zip(config.seeds, zip(found.trained["FullAttn"], found.measured["SSA"])))
        done = stages.each("sharpen, seed {}", config.seeds, lambda s: sharpen(goals[s][0], goals[s][1].kept, test, config), Sharpened)  # fmt: skip
        found.sharpened = list(done.values())
    claims = claims_of(found, config)
    return Outcome(SLUG, TITLE, config.preset, asdict(config), claims, _tables(found, config), draw_all(found, config, out))  # fmt: skip


def _tables(found: Found, config: Config) -> list[Table]:
    budgets = sorted(config.budgets)
    rows = []
    for name in found.measured:
        losses = [found.mean(name, lambda m, b=b: m.sparse[b]) for b in budgets]
        numbers = [
            found.mean(name, lambda m, f=f: getattr(m, f))
            for f in ("kept", "entropy", "first", "divergence", "long_full", "long_sparse")
        ]
        rows.append([name, *(round(x, 4) for x in (found.mean(name, lambda m: m.full), *losses, *numbers))])
    columns = ["trained as", "full", *(f"{b} blocks" for b in budgets), "held weight", "entropy, nats", "on token 0",
               "KL full | sparse", f"{2 * config.length} tokens, full", f"{2 * config.length} tokens, {config.blocks} blocks"]  # fmt: skip
    tables = [Table(f"Loss in nats a byte and attention under full inference (means of {len(config.seeds)} seeds)", columns, rows)]  # fmt: skip
    if config.controls:
        names = list(next(iter(found.measured.values()))[0].chosen)
        tables.append(
            Table(
                f"Loss by how as many blocks are chosen (exact and released: {min(config.block_size, 2 * config.blocks)} blocks)",
                ["trained as", f"chosen, {config.blocks} blocks", *names],
                [
                    [m, *(round(x, 4) for x in (found.mean(m, lambda e: e.sparse[config.blocks]), *(found.mean(m, lambda e, n=n: e.chosen[n]) for n in names)))]
                    for m in found.measured
                ],
            )
        )  # fmt: skip
    if found.sharpened:
        tables.append(
            Table(
                "FullAttn, sharpened until the blocks hold what they hold of SSA",
                ["logits times", "held weight", "full", *(f"{b} blocks" for b in budgets)],
                [[round(x, 4) for x in (s.factor, s.kept, s.full, *(s.sparse[b] for b in budgets))] for s in found.sharpened],
            )
        )  # fmt: skip
    return tables
