"""Figures of the ifm recipe."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(
    found: dict[Any, Any], trials: list[Any], deep: list[Any], config: Any, out: Path
) -> list[Figure]:
    """Write the recipe's figures into ``out``."""
    return [_curves(found, config, out), _rivals(trials, out), _depth(deep, config, out)]


def _curves(found: dict[Any, Any], config: Any, out: Path) -> Figure:
    curves = {
        key: [statistics.mean(n.curve[k] for n in each) for k in range(len(config.betas))]
        for key, each in found.items()
    }

    def draw(ax: Any) -> None:
        for number, ((width, decay), curve) in enumerate(curves.items()):
            style = "-" if decay == max(config.decays) else "--"
            ax.plot(
                sorted(config.betas),
                curve,
                style,
                marker="o",
                color=f"C{number % 7}",
                label=f"width {width}, decay {decay:g}",
            )
        ax.set(xlabel="beta", ylabel="channels left / channels", ylim=(0, 1.05))
        ax.legend(fontsize=8)

    ends = "; ".join(f"width {w}, decay {d:g}: {c[0]:.2f} to {c[-1]:.2f}" for (w, d), c in curves.items())
    shown = picture(
        draw, alt=f"The share of channels that is left falls as beta rises. {ends}.",
        caption="How many channels of each network differ, by how different they have to be (means over layers and seeds).",
    )  # fmt: skip
    return save(shown, out, "complexity")


def _rivals(trials: list[Any], out: Path) -> Figure:
    means = {how: statistics.mean(t.accuracy[how] for t in trials) for how in trials[0].accuracy}
    repaired = {how: statistics.mean(t.repaired[how] for t in trials) for how in trials[0].repaired}

    def draw(ax: Any) -> None:
        names = list(means)
        ax.barh(
            range(len(names)),
            list(means.values()),
            color=["C0" if n.startswith("merging") else "C7" for n in names],
            height=0.7,
        )
        ax.plot(
            [repaired[n] for n in names if n in repaired],
            [k for k, n in enumerate(names) if n in repaired],
            "|",
            color="C1",
            markersize=14,
            label="with repair",
        )
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set(xlabel="test accuracy", xlim=(0, 1))
        ax.legend(loc="lower right")

    told = "; ".join(f"{how} {value:.3f}" for how, value in means.items())
    shown = picture(
        draw, alt=f"Bars of test accuracy at one size of every layer: {told}.",
        caption="Every way to the same sizes of all layers; a mark shows the accuracy after the same repair.",
    )  # fmt: skip
    return save(shown, out, "rivals")


def _depth(deep: list[Any], config: Any, out: Path) -> Figure:
    layers = range(1, len(deep[0].shares) + 1)

    def draw(ax: Any) -> None:
        for d in deep:
            ax.plot(layers, d.shares, color="C7", linewidth=0.8)
        ax.plot(
            layers,
            [statistics.mean(d.shares[k - 1] for d in deep) for k in layers],
            "o-",
            color="C0",
            label="mean",
        )
        ax.set(xlabel="layer", ylabel="channels left / channels", ylim=(0, 1.05))
        ax.legend()

    shown = picture(
        draw, alt="The share of channels that is left, from layer to layer, a line a seed and their mean.",
        caption=f"Complexity by depth at beta {config.beta:g}.",
    )  # fmt: skip
    return save(shown, out, "depth")
