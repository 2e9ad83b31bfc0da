"""Figures of the bangla-digits recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lineament.recipes.bangla_digits.study import DESCRIPTORS, Held
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(
    config: Any, held: Mapping[str, Held], mean: Mapping[tuple[str, str, str], float], out: Path
) -> list[Figure]:
    """One heat map a data set."""
    figures = []
    for name in held:
        grid = np.array([[mean[name, d, c] for c in config.classifiers] for d in DESCRIPTORS])

        def draw(ax: Any, grid: Any = grid) -> None:
            ax.imshow(grid, cmap="viridis", vmin=grid.min(), vmax=1)
            ax.set_xticks(range(len(config.classifiers)), config.classifiers)
            ax.set_yticks(range(len(DESCRIPTORS)), DESCRIPTORS)
            for i, j in np.ndindex(*grid.shape):
                dark = grid[i, j] > (1 + grid.min()) / 2
                ax.text(
                    j,
                    i,
                    f"{100 * grid[i, j]:.1f}",
                    ha="center",
                    va="center",
                    color="black" if dark else "white",
                )

        told = "; ".join(
            f"{d}: " + ", ".join(f"{100 * v:.1f}" for v in row) for d, row in zip(DESCRIPTORS, grid)
        )
        shown = picture(
            draw, size=(4.4, 3.8), caption=f"{held[name].source}: accuracy in %, descriptors down, classifiers across.",
            alt=f"Accuracy by descriptor and classifier. {told}.",
        )  # fmt: skip
        figures.append(save(shown, out, f"table-{name}"))
    return figures
