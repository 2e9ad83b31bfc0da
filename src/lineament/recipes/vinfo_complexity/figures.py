"""The pictures of the complexity recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lineament.recipes.vinfo_complexity.claims import Study
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(runs: Sequence[Study], out: Path) -> list[Figure]:
    return [_curves(runs[0], out), _scatter(runs, out), _flow(runs[0], out), _training(runs, out)]


def _curves(run: Study, out: Path) -> Figure:
    order = run.complexity.argsort().tolist()

    def draw(ax: Any) -> None:
        from matplotlib import colormaps

        for rank, feature in enumerate(order):
            colour = colormaps["viridis"](rank / max(len(order) - 1, 1))
            ax.plot(run.curves[:, feature], color=colour, alpha=0.8, linewidth=1)
        ax.set_xticks(range(len(run.sites)), run.sites, rotation=40, ha="right")
        ax.set_ylabel("variance explained, held out")
        ax.set_ylim(min(-0.05, float(run.curves.min())), 1.05)

    shown = picture(
        draw,
        alt=f"One line a feature over {len(run.sites)} sites: variance that a linear read-out explains rises with depth to about 1.",
        caption="Where each feature becomes readable, from the simplest (dark) to the most complex (light).",
        size=(6.6, 3.4),
    )
    return save(shown, out, "curves")


def _scatter(runs: Sequence[Study], out: Path) -> Figure:
    def draw(axes: Any) -> None:
        for ax, name, label in zip(axes[0], ("temporal", "importance"), ("temporal score Λ", "importance")):
            for index, run in enumerate(runs):
                ax.errorbar(run.complexity, getattr(run, name), xerr=run.errors, fmt="o", markersize=4, linewidth=0.8, color=f"C{index}", label=f"network {index + 1}")  # fmt: skip
            ax.set(xlabel="complexity K", ylabel=label)
        if len(runs) > 1:
            axes[0][0].legend()

    shown = picture(
        draw,
        alt="Two scatter plots over features: complexity against temporal score, and against importance.",
        caption="Complexity (with its standard error over held-out samples) against when a feature becomes readable in training (K and Λ share the last read-out) and against its importance.",
        size=(7.0, 3.2),
        panels=(1, 2),
    )
    return save(shown, out, "scatter")


def _flow(run: Study, out: Path) -> Figure:
    def draw(axes: Any) -> None:
        for ax, first, title in zip(axes[0], (0, 2), ("simplest features", "most complex features")):
            places = list(range(run.flow.shape[1]))
            ax.bar([p - 0.2 for p in places], run.flow[first], 0.4, label="residual branch")
            ax.bar([p + 0.2 for p in places], run.flow[first + 1], 0.4, label="main branch")
            ax.set_xticks(places, [str(p + 1) for p in places])
            ax.set(title=title, xlabel="block", ylim=(0, 1.1 * float(run.flow.max())))
        axes[0][0].set_ylabel("CKA with the features")
        axes[0][0].legend()

    shown = picture(
        draw,
        alt="Bars of CKA with the simplest and with the most complex features in both branches of each block.",
        caption="Where features flow: mean CKA of each block's branches with the fifth of the features that is simplest, and that is most complex.",
        size=(7.0, 3.0),
        panels=(1, 2),
    )
    return save(shown, out, "flow")


def _training(runs: Sequence[Study], out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for index, run in enumerate(runs):
            ax.plot(run.means, "o-", color=f"C{index}", label="all features" if index == 0 else None)
            ax.plot(run.tops, "s--", color=f"C{index}", label="the most important" if index == 0 else None)
        ax.set(xlabel="checkpoint (evenly spread over training)", ylabel="mean complexity")
        ax.set_xticks(range(len(runs[0].means)))
        ax.legend()

    shown = picture(
        draw,
        alt="Mean complexity of all features and of the most important ones at four checkpoints.",
        caption="Features extracted anew at each checkpoint: mean complexity of all, and of the most important.",
    )
    return save(shown, out, "training")
