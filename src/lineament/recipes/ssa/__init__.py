"""SSA: does aligning full and sparse attention make one model that runs at any budget, and is it the alignment that does it?

Shen et al., ICML 2026, arXiv 2511.20102. A decoder of bytes is trained with full attention, with sparse attention (MoBA), with NSA's three branches, and with SSA. Controls that the
paper lacks: full attention for as many FLOPs, full attention sharpened by a temperature to the same concentration, and other choices of as many blocks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lineament.core.checks import number, one_of, require
from lineament.modules.sparse_attention.nsa import BRANCHES
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.kit.text import read_text
from lineament.recipes.ssa.claims import Found, claims_of
from lineament.recipes.ssa.figures import draw_all
from lineament.recipes.ssa.measures import BUDGETS, FULL, Measured, measured
from lineament.recipes.ssa.network import MODELS, flops_ratio
from lineament.report.outcome import Outcome, Table

SLUG = "ssa"
TITLE = "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in Feature Space"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the text, the network, its attention, the training, and the evaluation."""

    text: str | None = None
    device: str = "auto"

    width: int = 128
    hidden: int = 512
    layers: int = 2
    heads: int = 4
    key_heads: int = 2
    head_size: int = 32
    theta: float = 1e4

    block_size: int = 8
    blocks: int = 4
    window: int = 16
    length: int = 256

    models: tuple[str, ...] = ("FullAttn", "SSA")
    seeds: tuple[int, ...] = (0,)
    steps: int = 100
    batch: int = 4
    accumulate: int = 1
    lr: float = 3e-3
    bf16: bool = False

    windows: int = 16
    watched: int = 4
    controls: bool = False

    preset: str = presets(
        quick={},
        small={
            "models": tuple(MODELS),
            "steps": 200,
            "batch": 8,
            "windows": 64,
            "watched": 16,
            "controls": True,
        },
        paper={
            "width": 2048,
            "hidden": 8192,
            "layers": 16,
            "heads": 32,
            "head_size": 64,
            "theta": 5e5,
            "block_size": 16,
            "blocks": 16,
            "window": 128,
            "length": 8192,
            "models": tuple(MODELS),
            "seeds": (0, 1, 2),
            "steps": 31_800,
            "batch": 8,
            "accumulate": 48,
            "lr": 1e-3,
            "bf16": True,
            "windows": 128,
            "watched": 16,
            "controls": True,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on where it stopped, to a hundred steps of a model."""
    for name in config.models:
        one_of("models", name, MODELS)
    for name in ("models", "seeds"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    for name in (
        "steps",
        "batch",
        "accumulate",
        "windows",
        "watched",
        "block_size",
        "blocks",
        "window",
        "layers",
    ):
        number(name, getattr(config, name), low=1, integer=True)
    train, test = _bytes(config)
    stages, found = Stages(out, config), Found()
    # SSA first: its concentration is the mark to which full attention is sharpened.
    for name in sorted(config.models, key=lambda n: n != "SSA"):

        def one(seed: int, name: str = name) -> Measured:
            kept = found["SSA"][config.seeds.index(seed)].attention.kept if "SSA" in found else None
            return measured(config, train, test, name, seed, kept, stages.checkpoint)

        found[name] = list(stages.each(name + ", seed {}", config.seeds, one, Measured).values())
    found = Found({name: found[name] for name in config.models})
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(found, config), _tables(found, config), draw_all(found, out)
    )  # fmt: skip


def _bytes(config: Config) -> tuple[Tensor, Tensor]:
    """The first 90 % of the text to train on, and the rest."""
    data = torch.tensor(list(read_text(config.text).encode()))
    cut = len(data) * 9 // 10
    require(
        len(data) - cut > 2 * config.length + 1,
        f"text: its last tenth has {len(data) - cut} bytes, expected more than two windows of length={config.length}",
    )
    return data[:cut], data[cut:]


def _tables(found: Found, config: Config) -> list[Table]:
    mean = found.mean
    tested = config.windows * (config.length - config.length // 2)
    tables = [
        Table(
            f"Cross-entropy, nats a byte, on {tested:,} bytes of the held-out tenth (means of {len(config.seeds)} seeds)",
            [
                *("trained as", "full"),
                *(f"k = {k}" for k in BUDGETS),
                *("twice as long, full", f"twice as long, k = {config.blocks}"),
            ],
            [
                [
                    name,
                    mean(name, lambda m: m.losses[FULL]),
                    *(mean(name, lambda m, k=k: m.losses[str(k)]) for k in BUDGETS),
                    mean(name, lambda m: m.longer[FULL]),
                    mean(name, lambda m: m.longer[str(config.blocks)]),
                ]
                for name in found
            ],
        ),
        Table(
            f"Full attention's weights, with selections of k = {config.blocks} (NSA's: along its own inference)",
            ["trained as", "AttnSparsity", "entropy, nats", "sink mass", "error / bound of Theorem 1"],
            [
                [
                    name,
                    mean(name, lambda m: m.attention.kept),
                    mean(name, lambda m: m.attention.entropy),
                    mean(name, lambda m: m.attention.sink),
                    mean(name, lambda m: m.attention.tight),
                ]
                for name in found
            ],
        ),
    ]
    controlled = [name for name in found if found[name][0].controls]
    if controlled:
        kinds = list(found[controlled[0]][0].controls)
        tables.append(
            Table(
                f"Other choices of as many blocks: cross-entropy at k = {config.blocks}, and at k = s = {config.block_size}",
                ["trained as", *kinds],
                [[n, *(mean(n, lambda m, c=c: m.controls[c]) for c in kinds)] for n in controlled],
            )
        )
    replaced = {name: found[name][0].replaced for name in found if found[name][0].replaced}
    tables += [
        Table(
            f"{name} with full attention in place of its branches: cross-entropy at k = {config.blocks}",
            ["compressed", "selected", "window", "cross-entropy"],
            [
                [*("full" if b in key.split(", ") else "its own" for b in BRANCHES), mean(name, lambda m, key=key: m.replaced[key])]
                for key in kinds
            ],
        )
        for name, kinds in replaced.items()
    ]  # fmt: skip
    sharp = [m.sharpened for m in found.get("FullAttn", []) if m.sharpened is not None]
    if sharp:
        tables.append(
            Table(
                f"FullAttn sharpened to SSA's AttnSparsity, by seed (an SSA step takes {flops_ratio(config):.3f} of a full step's FLOPs)",
                ["factor of the logits", "AttnSparsity", "full", *(f"k = {k}" for k in BUDGETS)],
                [[s.factor, s.kept, s.losses[FULL], *(s.losses[str(k)] for k in BUDGETS)] for s in sharp],
            )
        )
    return tables
