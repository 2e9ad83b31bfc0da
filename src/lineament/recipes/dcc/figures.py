"""Figures of the dcc recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lineament.recipes.dcc.experiments import told_of
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(trials: dict[str, list[Any]], out: Path) -> list[Figure]:
    """Write the recipe's figure into ``out``."""
    names = list(trials["shared"][0].accuracy)
    held = {
        setting: [torch.stack([100 * t.accuracy[name].mean() for t in each]) for name in names]
        for setting, each in trials.items()
    }

    def draw(ax: Any) -> None:
        for place, (setting, values) in enumerate(held.items()):
            at = [k + 0.15 * (place - (len(held) - 1) / 2) for k in range(len(names))]
            errors = [float(v.std() / len(v) ** 0.5) if len(v) > 1 else 0.0 for v in values]
            ax.errorbar(at, [float(v.mean()) for v in values], errors, fmt="o", label=told_of(setting))
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        ax.set(ylabel="test accuracy, %")
        ax.legend(fontsize=6)

    told = "; ".join(
        f"{told_of(setting)}: " + ", ".join(f"{name} {float(v.mean()):.0f}" for name, v in zip(names, values))
        for setting, values in held.items()
    )
    shown = picture(
        draw, alt=f"Test accuracy in % by what networks were trained on. {told}.",
        caption="Test accuracy by what networks were trained on: means over seeds and their standard errors.",
    )  # fmt: skip
    return [save(shown, out, "accuracy")]
