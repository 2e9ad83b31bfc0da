"""Figures of the elasticface recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lineament.losses.margins import Elastic
from lineament.recipes.elasticface.claims import Found
from lineament.recipes.kit.recognition import bars
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(found: Found, config: Any, out: Path) -> list[Figure]:
    """Write the recipe's figures into ``out``."""
    groups = {"wrong labels": found.wrong, "clean labels": found.clean, "tuned, wrong labels": found.tuned}
    shown = bars(
        {kind: runs for kind, runs in groups.items() if runs},
        "tar3",
        "TAR at FAR 1e-3, people never seen",
        config.seeds,
    )
    return [save(shown, out, "recognition"), _matching(found, config, out)]


def _matching(found: Found, config: Any, out: Path) -> Figure:
    def draw(axes: Any) -> None:
        for ax, (name, match) in zip(
            axes[0], (("independent", None), ("rank", "rank"), ("official", "official"))
        ):
            generator = torch.Generator().manual_seed(0)
            cosines = torch.rand(256, generator=generator)
            drawn = Elastic("arc", sigma=config.sigma, match=match).draw(cosines, generator)  # pyright: ignore
            ax.plot(cosines, drawn, ".", markersize=3)
            ax.set(title=f"{name}: ρ = {found.correlation[name]:+.2f}", xlabel="target cosine")
        axes[0, 0].set_ylabel("margin")

    said = ", ".join(f"{name} {value:+.2f}" for name, value in found.correlation.items())
    shown = picture(
        draw,
        panels=(1, 3),
        size=(7.5, 2.6),
        caption="Margins of a batch against its target cosines: independent draws, matched by rank, and as the released code matches them.",
        alt=f"Scatter of margins against target cosines. Spearman correlations: {said}.",
    )
    return save(shown, out, "matching")
