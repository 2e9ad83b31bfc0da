"""The figure of the representation-bias recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineament.recipes.representation_bias.training import Measured, mean
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(found: dict[str, list[Measured]], out: Path) -> list[Figure]:
    """Write the recipe's figure into ``out``: variance explained by each feature in each condition, one dot a network."""
    names = list(found)

    def draw(ax: Any) -> None:
        for place, each in enumerate(found.values()):
            for k in range(len(each[0].features)):
                x, values = place + (0.18 if k else -0.18), [m.r2[k] for m in each]
                ax.bar(
                    x,
                    mean(values),
                    width=0.32,
                    color=f"C{k}",
                    alpha=0.5,
                    label=None if place else ("first", "second")[k],
                )
                ax.plot([x] * len(values), values, "o", color=f"C{k}", markersize=3)
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        ax.set_ylabel("variance explained")
        ax.legend(title="feature")

    told = "; ".join(
        f"{n}: " + " and ".join(f"{mean(m.r2[k] for m in each):.2f}" for k in range(len(each[0].features)))
        for n, each in found.items()
    )
    shown = picture(
        draw,
        size=(1.5 + 0.8 * len(names), 3.6),
        caption="Variance of the last hidden layer that each feature explains, by condition; a bar is the mean, a dot one network. The first feature is the easy one.",
        alt=f"Variance explained by the first and the second feature. {told}.",
    )
    return [save(shown, out, "variance")]
