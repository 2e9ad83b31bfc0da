"""Figures of the colormnet recipe."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lineament.recipes.colormnet.experiments import VARIANTS
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(found: list[Any], out: Path) -> list[Figure]:
    """Write the recipe's figures into ``out``."""
    return [_frames(found, out), _memory(found, out)]


def _frames(found: list[Any], out: Path) -> Figure:
    kinds = {"own": "each surface its grey", "shared": "two shapes of one grey"}
    curves = {
        kind: {
            name: [statistics.mean(v) for v in zip(*(film for f in found for film in getattr(f, kind)[name]))]
            for name in getattr(found[0], kind)
        }
        for kind in kinds
    }

    def draw(axes: Any) -> None:
        for ax, (kind, title) in zip(axes[0], kinds.items()):
            for name, curve in curves[kind].items():
                ax.plot(range(1, len(curve) + 1), curve, "-" if name in VARIANTS else "--", label=name)
            ax.set(title=title, xlabel="frame", ylabel="PSNR of ab in dB" if kind == "own" else "")
        axes[0][1].legend(fontsize=6)

    told = "; ".join(
        f"{kinds[kind]}, {name}: {c[0]:.1f} to {c[-1]:.1f}"
        for kind, each in curves.items()
        for name, c in each.items()
    )
    shown = picture(
        draw, panels=(1, 2), size=(7.4, 3.2), alt=f"PSNR of the chroma by frame. {told}.",
        caption="How near the chroma of unseen films is to the truth, frame by frame; dashed lines need no network of their own.",
    )  # fmt: skip
    return save(shown, out, "frames")


def _memory(found: list[Any], out: Path) -> Figure:
    sizes = found[0].elements

    def draw(ax: Any) -> None:
        ax.plot(range(len(sizes)), sizes)
        ax.set(xlabel="frame", ylabel="elements in memory", ylim=(0, None))

    shown = picture(
        draw, alt=f"Elements in memory over {len(sizes)} frames: at most {max(sizes)}, at the end {sizes[-1]}.",
        caption="Memory over a long film.",
    )  # fmt: skip
    return save(shown, out, "memory")
