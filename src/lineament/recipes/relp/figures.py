"""The figures of the relp recipe: maps side by side, scatter of approximation against patching, correlation by rule set, circuits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lineament.recipes.relp.circuits import Circuits
from lineament.recipes.relp.claims import COUNTS, KINDS, Comparison, mean_of
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def scatter(run: Comparison, methods: Sequence[str], out: Path) -> Figure:
    def draw(axes: Any) -> None:
        for k, kind in enumerate(KINDS):
            ax = axes[0, k]
            exact = run.truth[kind].flatten().numpy()
            low, high = min(0.0, float(exact.min())), max(1.0, float(exact.max()))
            ax.plot([low, high], [low, high], color="C7", linewidth=0.8)
            for c, name in enumerate(methods):
                found = run.maps[name][kind].flatten().numpy()
                ax.plot(exact, found, "o" if c else "x", color=f"C{c}", label=name, markersize=4)
            ax.set(title=kind, xlabel="activation patching", ylabel="approximation" if k == 0 else "")
        axes[0, 0].legend()

    shown = picture(
        draw,
        alt=f"Approximated against measured effects of every layer and position, one panel for each of {', '.join(KINDS)}.",
        caption="Every layer and position: the approximation against the measured effect. The line is equality.",
        size=(8.4, 3.2),
        panels=(1, len(KINDS)),
    )
    return save(shown, out, "scatter")


def heat(run: Comparison, methods: Sequence[str], out: Path) -> Figure:
    """The residual stream's maps beside each other on one scale."""
    maps = {"activation patching": run.truth["resid_pre"], **{m: run.maps[m]["resid_pre"] for m in methods}}
    top = max(float(values.abs().max()) for values in maps.values())

    def draw(axes: Any) -> None:
        for k, (name, values) in enumerate(maps.items()):
            ax = axes[0, k]
            image = ax.imshow(values.numpy(), cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
            ax.set(title=name, xlabel="position", ylabel="layer" if k == 0 else "", yticks=range(len(values)))
        axes[0, 0].figure.colorbar(image, ax=list(axes[0]), label="share of the metric")

    shown = picture(
        draw,
        alt=f"Heat maps of the residual stream's scores by layer and position: {', '.join(maps)}.",
        caption="Residual stream before each block, denoising: 1 restores the clean logit difference.",
        size=(8.4, 2.8),
        panels=(1, len(maps)),
    )
    return save(shown, out, "maps")


def rule_sets(runs: Sequence[Comparison], out: Path) -> Figure:
    means = {method: {kind: mean_of(runs, method, kind) for kind in KINDS} for method in runs[0].maps}

    def draw(ax: Any) -> None:
        # Points, not bars: what counts lies near 1, and the length of a bar would want the axis to begin at 0.
        width = 0.5 / len(KINDS)
        for c, (kind, marker) in enumerate(zip(KINDS, "os^Dv*")):
            at = [k + (c - (len(KINDS) - 1) / 2) * width for k in range(len(means))]
            ax.plot(at, [row[kind] for row in means.values()], marker, color=f"C{c}", label=kind)
        ax.grid(axis="y", color="C7", alpha=0.3)
        ax.set_xticks(range(len(means)), [name.replace(", ", ",\n") for name in means], fontsize=8)
        ax.set(ylabel="Pearson with activation patching", ylim=(None, 1.02))
        ax.legend(ncols=len(KINDS), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)

    listed = "; ".join(f"{name} {row[KINDS[0]]:.3f}" for name, row in means.items())
    shown = picture(
        draw,
        alt=f"Correlation with activation patching by rule set and kind of site. {KINDS[0]}: {listed}.",
        caption="Correlation with activation patching, mean over the seeds, by rule set.",
        size=(8.0, 3.6),
    )
    return save(shown, out, "rules")


def curves(runs: Sequence[Circuits], out: Path) -> Figure:
    """Faithfulness (left) and completeness (right) against the number of nodes, mean over the seeds."""

    def draw(axes: Any) -> None:
        for k, which in enumerate(("faithfulness", "completeness")):
            ax = axes[0, k]
            for c, method in enumerate(("attrib", "relp", "ig", "random")):
                rows = [getattr(run.curves[method], which) for run in runs]
                mean = [sum(values) / len(values) for values in zip(*rows)]
                ax.plot(COUNTS, mean, marker="o", color="C7" if method == "random" else f"C{c}", label=method)
            ax.set(xscale="log", xlabel="nodes", ylabel=which)
        axes[0, 0].legend()

    shown = picture(
        draw,
        alt="Faithfulness and completeness of circuits of dictionary features against the number of nodes, for gradients, relevance, integrated gradients and random nodes.",
        caption="Circuits of dictionary features: faithfulness (high is good) and completeness (low is good) on prompts that were not used to find them.",
        size=(8.0, 3.2),
        panels=(1, 2),
    )
    return save(shown, out, "circuits")
