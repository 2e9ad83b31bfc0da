"""Figures of the wide-deep-kernels recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lineament.kernels.regimes import optimal_dual
from lineament.kernels.table import LogTable
from lineament.recipes.wide_deep_kernels.study import PAIRS, Limits, Pair
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(
    config: Any, pairs: Mapping[tuple[int, int, int], Pair], known: Limits, out: Path
) -> list[Figure]:
    """Write the figures into ``out``."""
    mean = lambda d, n, rule: sum(pairs[d, n, s].accuracy[rule] for s in config.seeds) / len(config.seeds)  # noqa: E731
    n = config.samples[-1]
    grid = np.array([[mean(d, n, f"psi {e}") for e in PAIRS] for d in PAIRS])

    def heat(ax: Any) -> None:
        ax.imshow(grid - grid.max(1, keepdims=True), cmap="viridis")
        ax.set_xticks(range(4), [f"ψ {e}" for e in PAIRS])
        ax.set_yticks(range(4), [f"d = {d}" for d in PAIRS])
        for i, j in np.ndindex(4, 4):
            ax.text(
                j,
                i,
                f"{100 * grid[i, j]:.1f}",
                ha="center",
                va="center",
                color="white" if grid[i, j] < grid[i].max() - 0.02 else "black",
            )

    def sizes(axes: Any) -> None:
        for ax, d in zip(axes[0], PAIRS):
            for rule, colour in (
                (f"psi {d}", "C0"),
                ("1-NN", "C1"),
                ("k-NN, k tuned", "C2"),
                ("Bayes", "C7"),
            ):
                ax.plot(
                    config.samples,
                    [mean(d, m, rule) for m in config.samples],
                    "o-",
                    color=colour,
                    label=rule.replace(f" {d}", ", matching"),
                )
            ax.set(xscale="log", title=f"d = {d}", xlabel="points")
        axes[0, 0].set_ylabel("accuracy")
        axes[0, 0].legend(fontsize=7)

    def slopes(ax: Any) -> None:
        r = np.geomspace(1e-6, 0.5, 80)
        for k, d in enumerate((1, 2, 4, 8)):
            ax.loglog(r, np.exp(LogTable(optimal_dual(d))(r**2 / 2)), color=f"C{k}", label=f"d = {d}")
        ax.set(xlabel="distance", ylabel="ψ")
        ax.legend()

    told = "; ".join(f"d = {d}: " + ", ".join(f"{100 * v:.1f}" for v in row) for d, row in zip(PAIRS, grid))
    return [
        save(picture(heat, size=(4.2, 3.6), caption=f"Accuracy in % at n = {n:,}: the data's dimension down, the activation's across. The best is on the diagonal where theory holds.", alt=f"Accuracy by dimension and activation. {told}."), out, "dimensions"),
        save(picture(sizes, size=(9.0, 2.8), panels=(1, 4), caption="Accuracy against the number of points.", alt="Accuracy of four rules against the number of points, one panel a dimension."), out, "sizes"),
        save(picture(slopes, size=(4.6, 3.2), caption="The singular kernels of the optimal activations: straight lines of slope -d.", alt="Four falling lines; slopes " + ", ".join(f"{v:.2f}" for v in known.slopes.values()) + "."), out, "slopes"),
    ]  # fmt: skip
