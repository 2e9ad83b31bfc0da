"""Figures of the gifd recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lineament.privacy.defences import defence_of
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(trials: dict[str, list[Any]], config: Any, out: Path) -> list[Figure]:
    """Write the recipe's figure into ``out``."""
    first = next(iter(trials.values()))
    curves = {
        str(defence_of(d)): torch.stack([t.stages[f"{defence_of(d)} | gifd"] for t in first]).mean(0).tolist()
        for d in config.defences
    }

    def draw(ax: Any) -> None:
        for name, values in curves.items():
            ax.plot(range(len(values)), values, marker="o", label=name)
        ax.set(xlabel="layer searched (0: the code)", ylabel="PSNR in dB")
        ax.set_xticks(range(max(map(len, curves.values()))))
        ax.legend(title="defence")

    told = "; ".join(f"{name}: " + ", ".join(f"{v:.1f}" for v in values) for name, values in curves.items())
    shown = picture(
        draw, alt=f"PSNR by layer for each defence. {told}.",
        caption="How near the pictures of each layer are to the true ones (means over pictures and seeds).",
    )  # fmt: skip
    return [save(shown, out, "layers")]
