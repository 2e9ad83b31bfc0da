"""The figures of the diffroar recipe: DiffROAR by kept share, gradients beside their images, and the theorem beside trained networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lineament.data.samples import Samples
from lineament.explain.faithfulness.feature_leakage import predicted_gradients
from lineament.explain.faithfulness.input_gradients import input_gradient
from lineament.explain.faithfulness.retraining import DiffROAR
from lineament.recipes.diffroar.claims import Simplified
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure

_COLOURS = {"standard": "C0", "robust": "C1", "random": "C7"}


def curves(found: Mapping[str, DiffROAR], out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for name, each in found.items():
            order = sorted(range(len(each.fractions)), key=lambda k: each.fractions[k])
            ax.errorbar(
                [100 * each.fractions[k] for k in order],
                [100 * float(each.mean[k]) for k in order],
                [100 * float(each.std[k]) for k in order],
                marker="o",
                capsize=2,
                color=_COLOURS.get(name, "C2"),
                label={"random": "random order"}.get(name, f"{name} model"),
            )
        ax.axhline(0, color="C7", linewidth=0.8)
        ax.set(xlabel="coordinates kept, %", ylabel="DiffROAR, points of accuracy", xscale="log")
        ax.legend()

    low = {name: (min(each.fractions), each.at(min(each.fractions))) for name, each in found.items()}
    told = ", ".join(
        f"{name} {100 * value:.0f} points at {100 * k:g} % kept" for name, (k, value) in low.items()
    )
    shown = picture(
        draw,
        alt=f"DiffROAR against the share of coordinates kept, one line a model: {told}.",
        caption="Accuracy after retraining on what the gradient calls important, less that on what it calls unimportant. Bars: one "
        "standard deviation over pairs of runs.",
    )
    return save(shown, out, "diffroar")


def heat_maps(
    models: Mapping[tuple[str, str], nn.Module], data: Mapping[str, tuple[Samples, Samples]], out: Path
) -> Figure:
    names, placements = (list(dict.fromkeys(part)) for part in zip(*models))

    def draw(axes: Any) -> None:
        for line, placement in enumerate(placements):
            test = data[placement][1]
            # The first image, and the first of another class.
            other = int((test.targets != test.targets[0]).nonzero()[0])
            for part, k in enumerate((0, other)):
                image = test.inputs[k : k + 1]
                panels: list[tuple[str, Any, str]] = [(f"signal {placement}", image[0, 0], "gray")]
                panels += [
                    (n, input_gradient(models[n, placement], image)[0, 0].abs(), "inferno") for n in names
                ]
                for column, (title, values, colours) in enumerate(panels):
                    ax = axes[line, (1 + len(names)) * part + column]
                    ax.imshow(values.numpy(), cmap=colours)
                    ax.set(xticks=[], yticks=[], title=title)

    shown = picture(
        draw,
        alt="Images of two blocks beside the gradient's size for the standard and the robust model; the standard model's "
        "gradient lies on both blocks where the digit may be in either.",
        caption="Images and the size of the gradient of the predicted class. A digit that can be in either block draws the standard "
        "model's gradient into the empty one; a digit that is always on top does not.",
        size=(7.6, 2.6 * len(placements)),
        kind="png",
        panels=(len(placements), 2 * (1 + len(names))),
    )
    return save(shown, out, "gradients")


def theorem(found: Mapping[str, Simplified], blocks: int, out: Path) -> Figure:
    signals = blocks // 2
    lines = {"theorem": predicted_gradients(signals, blocks).tolist()}
    lines |= {name: found[name].sizes for name in ("wide", "robust")}

    def draw(axes: Any) -> None:
        left, right = axes[0]
        for k, (name, sizes) in enumerate(lines.items()):
            at = [b + 0.27 * (k - 1) for b in range(1, blocks + 1)]
            left.bar(at, sizes, width=0.25, color=f"C{k}", label=name)
        left.set(xlabel="block", ylabel="share of the gradient", xticks=range(1, blocks + 1))
        left.legend(fontsize=8)
        names = [n for n in ("linear", "wide", "robust") if n in found]
        base = [0.0] * len(names)
        for k, part in enumerate(("own", "other", "noise")):
            values = [getattr(found[n].leakage, part) for n in names]
            right.bar(names, values, bottom=base, color=f"C{k}", label=part)
            base = [a + b for a, b in zip(base, values)]
        right.set(ylabel="share of the gradient", ylim=(0, 1.02))
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    wide, robust = found["wide"].leakage, found["robust"].leakage
    shown = picture(
        draw,
        panels=(1, 2),
        size=(7.4, 3.2),
        alt=f"Gradient by block: the theorem gives 1/{signals} to each of the first {signals} blocks; the wide network puts {wide.own:.2f} on the "
        f"instance's own block and {wide.other:.2f} on the other signal blocks, the robust one {robust.own:.2f} and {robust.other:.2f}.",
        caption="Simplified data. Left: the mean size of the gradient on each block. Right: the instance's own block, blocks that carry the "
        "signal in other instances, and blocks that never do.",
    )
    return save(shown, out, "theorem")
