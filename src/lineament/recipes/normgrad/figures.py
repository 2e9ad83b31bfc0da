"""The figures of the normgrad recipe: accuracy by layer, class correlation by layer, and the maps of one scene."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lineament.data.samples import Samples
from lineament.explain.saliency.aggregation import normalised
from lineament.explain.saliency.maps import saliency
from lineament.recipes.normgrad.claims import AfterStep, Correlations, number
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def pointing_figure(layers: dict[str, Any], sites: list[str], labels: list[str], out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for k, (method, row) in enumerate(layers.items()):
            ax.plot(labels, [100 * row[s] for s in sites], marker="o", color=f"C{k}", label=method)
        ax.set(ylabel="pointing accuracy, %", xlabel="layer", ylim=(0, 103))
        # Above the axes: inside, some method's line runs through it.
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)

    early = ", ".join(f"{m} {100 * row[sites[0]]:.0f} %" for m, row in layers.items())
    shown = picture(
        draw,
        alt=f"Pointing accuracy against the layer, one line a method. At the first layer: {early}.",
        caption="How often the map's largest value lies on the digit that was asked for, by layer.",
    )
    return save(shown, out, "pointing")


def correlation_figure(alike: Correlations, meta: AfterStep, sites: dict[str, str], out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for k, method in enumerate(alike.mean):
            means = [alike.mean[method][s] for s in sites.values()]
            values = [float("nan") if m is None else m for m in means]
            ax.plot([f"ReLU {n}" for n in sites], values, marker="o", color=f"C{k}", label=method)
            if method in meta.correlation:
                late = [meta.correlation[method][sites[n]] for n in ("6", "7")]
                ax.plot(
                    ["ReLU 6", "ReLU 7"],
                    late,
                    marker="x",
                    linestyle="--",
                    color=f"C{k}",
                    label=f"{method}, meta step",
                )
        ax.set(ylabel="rank correlation of two classes' maps", xlabel="layer", ylim=(-1.05, 1.05))
        ax.legend(ncols=2, fontsize=7)

    changes = []
    for m in meta.correlation:
        before, after = alike.mean[m][sites["7"]], meta.correlation[m][sites["7"]]
        changes.append(f"{m} {number(before)}, with the step {number(after)}")
    late = f"At the last layer: {'; '.join(changes)}."
    shown = picture(
        draw,
        alt=f"Rank correlation of two classes' maps against the layer, one line a method, dashed with the meta step. {late}",
        caption="Maps of the most and the least probable class: 1 ignores the class. Dashed: after one step on the image.",
    )
    return save(shown, out, "class-correlation")


def picture_grid(model: nn.Module, scenes: Samples, sites: dict[str, str], out: Path) -> Figure:
    methods = ["grad_cam", "norm_grad", "norm_grad_selective"]
    image, asked = scenes.inputs[:1], int(scenes.extras["digits"][0, 0])
    maps: Any = saliency(model, image, asked, site=list(sites.values()), method=methods)

    def draw(axes: Any) -> None:
        for row, method in enumerate(methods):
            panels = [("the scene", image[0, 0], "gray")]
            panels += [
                (f"ReLU {k}", normalised(maps[method][s])[0][0, 0], "viridis") for k, s in sites.items()
            ]
            for column, (title, values, colours) in enumerate(panels):
                ax = axes[row, column]
                ax.imshow(values.numpy(), cmap=colours)
                ax.set(xticks=[], yticks=[], title=title if row == 0 else "")
                if column == 0:
                    ax.set_ylabel(method, fontsize=7)

    shown = picture(
        draw,
        alt=f"Maps of three methods at five layers for a scene with two digits, asked for the digit {asked}.",
        caption=f"Where the network looks for the {asked}, by method (rows) and layer (columns).",
        size=(7.2, 3.9),
        kind="png",
        panels=(3, 6),
    )
    return save(shown, out, "maps")
