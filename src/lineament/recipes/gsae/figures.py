"""Figures of the gsae recipe."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lineament.recipes.gsae.claims import Found, values
from lineament.recipes.gsae.planted import INFERENCE, OURS, RANDOM, SHUFFLED, TOPK, front
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(found: Found, config: Any, out: Path) -> list[Figure]:
    """Write the recipe's figures into ``out``."""
    return [_controls(found, out), _front(found, config, out)]


def _controls(found: Found, out: Path) -> Figure:
    rows = [
        (TOPK, "activation"),
        (INFERENCE, "gradient"),
        (RANDOM, "gradient"),
        (SHUFFLED, "gradient"),
        (OURS, "activation"),
        (OURS, "gradient"),
    ]
    rows = [row for row in rows if values(found, *row, "kl")]
    means = {f: [statistics.mean(values(found, *row, f)) for row in rows] for f in ("kl", "dead")}
    names = [f"{name} ({mode})" for name, mode in rows]

    def draw(panels: Any) -> None:
        axes = list(panels.flat)
        for ax, field, title in zip(
            axes, ("kl", "dead"), ("KL to the model's own output", "share of dead latents")
        ):
            places = range(len(rows))
            ax.barh(places, means[field], color=["C0" if name == OURS else "C7" for name, _ in rows])
            for place, row in zip(places, rows):
                every = values(found, *row, field)
                ax.plot(every, [place] * len(every), "o", color="C1", markersize=3)
            ax.set_title(title, fontsize="medium")
            ax.invert_yaxis()
        axes[0].set_yticks(range(len(rows)), names, fontsize=8)
        axes[1].set_yticks([])

    shown = picture(
        draw,
        alt="; ".join(
            f"{name}: KL {kl:.4f}, dead {dead:.3f}"
            for name, kl, dead in zip(names, means["kl"], means["dead"])
        ),
        caption="Planted features: what the gradient gives, and what its controls give. Bars are means, dots are seeds.",
        size=(9.0, 3.2),
        panels=(1, 2),
    )
    return save(shown, out, "controls")


def _front(found: Found, config: Any, out: Path) -> Figure:
    rows = [
        (0.0, TOPK, "activation"),
        (1.0, OURS, "gradient"),
        *((b, front(b), "gradient") for b in config.betas),
    ]
    points = sorted(
        (
            beta,
            statistics.mean(values(found, name, mode, "fvu")),
            statistics.mean(values(found, name, mode, "kl")),
        )
        for beta, name, mode in rows
        if values(found, name, mode, "kl")
    )

    def draw(ax: Any) -> None:
        ax.plot([p[1] for p in points], [p[2] for p in points], "o-", color="C0")
        for beta, fvu, kl in points:
            ax.annotate(f"{beta:g}", (fvu, kl), textcoords="offset points", xytext=(5, 5))
        ax.set(xlabel="variance unexplained (FVU)", ylabel="KL to the model's own output")

    shown = picture(
        draw,
        alt="; ".join(f"beta {beta:g}: FVU {fvu:.4f}, KL {kl:.4f}" for beta, fvu, kl in points),
        caption="The front over beta in gradient mode; 0 is TopK.",
    )
    return save(shown, out, "front")
