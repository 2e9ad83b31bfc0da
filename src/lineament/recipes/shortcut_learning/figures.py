"""Figures of the shortcut-learning recipe."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lineament.recipes.shortcut_learning.training import Found, by_setting, mean, setting
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(found: Found, config: Any, out: Path) -> list[Figure]:
    """Write the recipe's figures into ``out``."""
    return [_heat(found, config, out), _images(found, out)]


def _heat(found: Found, config: Any, out: Path) -> Figure:
    rhos, ratios, names = list(config.shortcut), list(config.ratios), list(found.trials)
    maps = {
        name: [[mean(by_setting(trials)[setting(rho, ratio)]) for ratio in ratios] for rho in rhos]
        for name, trials in found.trials.items()
    }

    def draw(axes: Any) -> None:
        panels = axes[0] if len(names) > 1 else [axes]
        for ax, name in zip(panels, names):
            image = ax.imshow(maps[name], origin="lower", cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
            ax.set_xticks(range(len(ratios)), [f"{r:g}" for r in ratios])
            ax.set_yticks(range(len(rhos)), [f"{r:g}" for r in rhos])
            ax.set(xlabel="availability ratio", title=name)
            for y, row in enumerate(maps[name]):
                for x, value in enumerate(row):
                    ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="k")
        panels[0].set_ylabel("shortcut's predictivity")
        panels[0].figure.colorbar(image, ax=list(panels), shrink=0.8)

    strongest = {name: max(max(row) for row in values) for name, values in maps.items()}
    shown = picture(
        draw,
        panels=(1, len(names)),
        size=(1.4 + 2.0 * len(names), 2.6),
        caption=f"Mean shortcut bias over {config.seeds} seeds at the best validation epoch; the core latent's predictivity is {config.core:g}.",
        alt="Heat maps of shortcut bias by availability ratio and predictivity. Largest means: "
        + ", ".join(f"{n} {v:.2f}" for n, v in strongest.items())
        + ".",
    )
    return save(shown, out, "heat-map")


def _images(found: Found, out: Path) -> Figure:
    cells = by_setting(found.images)

    def draw(ax: Any) -> None:
        for shift, what, label in ((-0.12, "bias", "best epoch"), (0.12, "last_bias", "last epoch")):
            middle = [mean(each, what) for each in cells.values()]
            spread = [
                statistics.stdev(getattr(t, what) for t in each) if len(each) > 1 else 0.0
                for each in cells.values()
            ]
            ax.errorbar(
                [k + shift for k in range(len(cells))], middle, yerr=spread, fmt="o", label=label, capsize=3
            )
        ax.axhline(0, color="C7", linewidth=0.8)
        ax.set_xticks(range(len(cells)), [name.replace(", ", "\n") for name in cells])
        ax.set_ylabel("shortcut bias")
        ax.legend()

    shown = picture(
        draw,
        size=(1.5 + 1.3 * len(cells), 3.0),
        caption="Shortcut bias of convolutional networks by the size of the disc over the square's (mean and deviation over seeds).",
        alt="Shortcut bias: " + ", ".join(f"{name} {mean(each):.2f}" for name, each in cells.items()) + ".",
    )
    return save(shown, out, "footprint")
