"""Figures of the tract recipe."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lineament.recipes.tract.claims import NAMES, Digits, Pair
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(
    digits: Digits, ablations: dict[str, dict[str, Pair]], curves: dict[str, Any], config: Any, out: Path
) -> list[Figure]:
    """Write the recipe's figures into ``out``: accuracy over epochs, gains of the variants, curves on CIFAR-10."""
    figures = [_lengths(digits, config, out)]
    if ablations:
        figures.append(_gains(digits, ablations, out))
    if curves:
        figures.append(_curves(curves, NAMES[config.photographs], out))
    return figures


def _lengths(digits: Digits, config: Any, out: Path) -> Figure:
    found = digits.accuracies

    def draw(ax: Any) -> None:
        for index, (arm, by) in enumerate(found.items()):
            values = [by[str(e)] for e in config.lengths]
            centre = [statistics.fmean(v) for v in values]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            plain = arm == "ordinary"
            # Shifted a little, so that the bars do not hide each other.
            places = [e * 1.02 ** (index - len(found) / 2) for e in config.lengths]
            ax.errorbar(
                places, centre, spread, fmt="o--" if plain else "o-", color="C7" if plain else f"C{index - 1}", capsize=2,
                label="ordinary gradient" if plain else f"TrAct, λ = {arm}",
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(config.lengths), [str(e) for e in config.lengths])
        ax.minorticks_off()
        ax.set_xlabel("epochs of training")
        ax.set_ylabel("test accuracy, %")
        ax.legend(loc="lower right")

    first, last = (
        statistics.fmean(found["ordinary"][str(e)]) for e in (config.lengths[0], config.lengths[-1])
    )
    ours = [statistics.fmean(found["0.1"][str(e)]) for e in (config.lengths[0], config.lengths[-1])]
    shown = picture(
        draw,
        alt=f"Accuracy over epochs: ordinary training goes from {first:.1f} to {last:.1f} %, TrAct with lambda 0.1 from {ours[0]:.1f} to {ours[1]:.1f} %.",
        caption="Digits of varied contrast: accuracy by length of training, at the rate that is best for the ordinary gradient.",
    )
    return save(shown, out, "lengths")


def _gains(digits: Digits, ablations: dict[str, dict[str, Pair]], out: Path) -> Figure:
    lengths = list(next(iter(ablations.values())))
    rows = {"as in the figure above (SGD, varied contrast)": {
        e: Pair(digits.rates[e], digits.accuracies["ordinary"][e], digits.accuracies["0.1"][e]) for e in lengths if e in digits.rates
    }}  # fmt: skip
    rows.update(ablations)

    def draw(ax: Any) -> None:
        for index, e in enumerate(lengths):
            places = [k + 0.38 * (index - (len(lengths) - 1) / 2) for k in range(len(rows))]
            gains = [
                statistics.fmean(by[e].tract) - statistics.fmean(by[e].ordinary) if e in by else 0.0
                for by in rows.values()
            ]
            ax.barh(places, gains, height=0.36, color=f"C{index}", label=f"{e} epochs")
        ax.axvline(0, color="C7", linewidth=0.8)
        ax.set_yticks(range(len(rows)), list(rows))
        ax.invert_yaxis()
        ax.set_xlabel("accuracy with TrAct minus without, points")
        ax.legend()

    shown = picture(
        draw,
        alt="Bars of the gain in accuracy for each variant of data, normalisation and optimizer.",
        caption="Where the gain is, and where it is not: digits, λ = 0.1, at the rate that is best without.",
        size=(7.6, 0.42 * len(rows) + 1.2),
    )
    return save(shown, out, "gains")


def _curves(curves: dict[str, Any], data: str, out: Path) -> Figure:
    def draw(axes: Any) -> None:
        panels = axes.ravel() if hasattr(axes, "ravel") else [axes]
        for ax, (kind, arms) in zip(panels, curves.items()):
            for index, (arm, by) in enumerate(arms.items()):
                for e, runs in by.items():
                    centre = [statistics.fmean(values) for values in zip(*runs)]
                    plain = arm == "ordinary"
                    name = ("ordinary" if plain else f"λ = {arm}") if e == list(by)[-1] else None
                    ax.plot(
                        range(1, len(centre) + 1), centre, "--" if plain else "-", color="C7" if plain else f"C{index - 1}",
                        label=name, marker="o", markevery=[-1],
                    )  # fmt: skip
            ax.set_title(kind)
            ax.set_xlabel("epoch")
            ax.legend(loc="lower right")
        panels[0].set_ylabel("test accuracy, %")

    shown = picture(
        draw,
        alt=f"Test accuracy over epochs on {data} with and without TrAct, a curve for each length of training: "
        + "; ".join(f"{k}: {', '.join(a for a in arms)}" for k, arms in curves.items()),
        caption=f"{data}, one curve for each length (the rate falls to zero at its end, the dot).",
        size=(3.9 * len(curves), 3.2),
        panels=(1, len(curves)),
    )
    return save(shown, out, "cifar")
