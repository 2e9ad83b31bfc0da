"""Figures of the convergent-learning recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lineament.recipes.convergent_learning.claims import Layer
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(layers: Sequence[Layer], out: Path) -> list[Figure]:
    """Write the recipe's figures into ``out``."""
    return [_curves(layers, out), _ladder(layers, out)]


def _curves(layers: Sequence[Layer], out: Path) -> Figure:
    lines = {
        "semi": "best unit",
        "match": "one to one",
        "shuffled": "shuffled images",
        "untrained": "untrained pair",
    }

    def draw(axes: Any) -> None:
        panels = list(axes[0]) if len(layers) > 1 else [axes]
        for panel, layer in zip(panels, layers):
            for number, (name, label) in enumerate(lines.items()):
                values = getattr(layer, f"curve_{name}")
                style = "-" if number < 2 else "--"
                panel.plot(
                    range(len(values)), values, style, color=("C0", "C1", "C7", "C3")[number], label=label
                )
            panel.set(title=layer.site, xlabel="units, best first", ylim=(-0.05, 1.05))
        panels[0].set_ylabel("correlation")
        panels[0].legend(fontsize=7)

    shown = picture(
        draw,
        panels=(1, len(layers)),
        size=(2.8 * len(layers) + 0.6, 3.2),
        caption="Correlations of units between two trainings, sorted; dashed, what shuffled images and untrained networks give.",
        alt="Mean one-to-one correlation by layer: "
        + ", ".join(
            f"{layer.match:.2f} (shuffled {layer.shuffled:.2f}, untrained {layer.untrained:.2f}) at {layer.site}"
            for layer in layers
        )
        + ".",
    )
    return save(shown, out, "correlations")


def _ladder(layers: Sequence[Layer], out: Path) -> Figure:
    names = {"single": "best single unit", "few": "a few units", "dense": "dense map"}

    def draw(ax: Any) -> None:
        for number, (name, label) in enumerate(names.items()):
            ax.plot(
                [layer.site for layer in layers],
                [getattr(layer, name) for layer in layers],
                "o-",
                color=f"C{number}",
                label=label,
            )
        ax.axhline(0.5, color="C7", ls="--")
        ax.set(ylabel="half-MSE on held-out images", ylim=(0, 0.55))
        ax.legend()

    shown = picture(
        draw,
        caption="How much of a unit is left unsaid by the other network's units; 0.5 (dashed) is nothing predicted.",
        alt="Half-MSE of the best single unit, of a few units and of a dense map: "
        + "; ".join(
            f"{layer.site} {layer.single:.3f}, {layer.few:.3f}, {layer.dense:.3f}" for layer in layers
        )
        + ".",
    )
    return save(shown, out, "ladder")
