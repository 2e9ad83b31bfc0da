"""Pictures of the recipe ssa: loss by budget, what the blocks hold, what is left out, and Theorem 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineament.recipes.ssa.claims import Found
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(found: Found, config: Any, out: Path) -> list[Figure]:
    budgets = sorted(config.budgets)
    loss = {n: [found.mean(n, lambda m, b=b: m.sparse[b]) for b in budgets] for n in found.measured}
    full = {n: found.mean(n, lambda m: m.full) for n in found.measured}
    kept = {n: found.mean(n, lambda m: m.kept) for n in found.measured}
    deltas = {n: found.measured[n][0].deltas for n in found.measured}
    pairs = found.measured["SSA" if "SSA" in found.measured else next(iter(found.measured))][0].pairs

    def budget(ax: Any) -> None:
        for place, (name, line) in enumerate(loss.items()):
            ax.plot([*budgets, 2 * budgets[-1]], [*line, full[name]], "o-", color=f"C{place}", label=name)
        ax.set(xscale="log", xlabel="blocks a query reads (last: all)", ylabel="loss, nats a byte")
        ax.set_xticks([*budgets, 2 * budgets[-1]], [*map(str, budgets), "all"])
        ax.legend(fontsize=7)

    def held(ax: Any) -> None:
        ax.barh(list(kept), list(kept.values()), color="C0", height=0.6)
        ax.set(xlim=(0, 1), xlabel=f"full attention weight on the best {config.blocks} blocks")

    def left(ax: Any) -> None:
        for place, (name, shares) in enumerate(deltas.items()):
            ax.stairs(shares, [i / 20 for i in range(21)], color=f"C{place}", label=name)
        ax.set(xlabel="weight that is left out", ylabel="share of tokens and heads")
        ax.legend(fontsize=7)

    def bounds(ax: Any) -> None:
        ax.plot([b for _, b in pairs], [e for e, _ in pairs], ".", color="C0")
        ax.axline((0, 0), slope=1, color="C7", linewidth=1)
        ax.set(xlabel="Theorem 1's bound", ylabel="|full - sparse|")

    shown = {
        "budget": (budget, "Loss by the blocks that a query reads.", "; ".join(f"{n}: " + ", ".join(f"{v:.3f}" for v in line) for n, line in loss.items())),
        "held": (held, "What the best blocks hold of full attention.", ", ".join(f"{n} {v:.3f}" for n, v in kept.items())),
        "left-out": (left, "Weight left out, by token and head.", "Histograms of the weight left out, by model"),
        "theorem": (bounds, "The difference of full and sparse attention beside its bound.", "Points below the diagonal: error against bound"),
    }  # fmt: skip
    return [
        save(picture(draw, caption=caption, alt=f"{caption} {alt}."), out, name)
        for name, (draw, caption, alt) in shown.items()
    ]
