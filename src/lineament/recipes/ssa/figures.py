"""Figures of the ssa recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineament.recipes.ssa.claims import Found
from lineament.recipes.ssa.measures import BUDGETS, FULL
from lineament.recipes.ssa.network import MODELS
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(found: Found, out: Path) -> list[Figure]:
    """Write the recipe's figures into ``out``."""
    return [_budgets(found, out), _left(found, out)]


def _budgets(found: Found, out: Path) -> Figure:
    keys = [*map(str, BUDGETS), FULL]
    # Full attention is not NSA's own, and far off.
    shown = {name: keys[:-1] if MODELS[name].branches else keys for name in found}
    lines = {n: [found.mean(n, lambda m, k=k: m.losses[k]) for k in ks] for n, ks in shown.items()}

    def draw(ax: Any) -> None:
        for name, values in lines.items():
            ax.plot(range(len(values)), values, "o-", label=name)
        ax.set_xticks(range(len(keys)), keys)
        ax.set(xlabel="blocks that a query reads", ylabel="cross-entropy, nats a byte")
        # Above the lines, which lie flat over the whole width.
        ax.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    said = "; ".join(f"{n}: " + ", ".join(f"{k} {v:.3f}" for k, v in zip(keys, e)) for n, e in lines.items())
    figure = picture(
        draw,
        caption="One set of weights at each budget: what sparse attention costs models that were trained in different ways.",
        alt=f"Lines of cross-entropy by blocks. {said}.",
    )
    return save(figure, out, "budgets")


def _left(found: Found, out: Path) -> Figure:
    lines = {
        name: [found.mean(name, lambda m, d=d: m.attention.delta[d]) for d in range(11)] for name in found
    }

    def draw(ax: Any) -> None:
        for name, values in lines.items():
            ax.plot(values, [d / 10 for d in range(11)], label=name)
        ax.set(xlabel="full attention's weight outside the selection", ylabel="share of queries and heads")
        ax.legend(fontsize=7)

    said = "; ".join(
        f"{name}: median {values[5]:.3f}, 90 % {values[9]:.3f}" for name, values in lines.items()
    )
    shown = picture(
        draw,
        caption="How much of full attention's weight the selection leaves out, by query and head.",
        alt=f"Distribution of the weight outside the selection. {said}.",
    )
    return save(shown, out, "left-out")
