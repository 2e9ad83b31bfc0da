"""Figures of the diffgrad recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineament.recipes.diffgrad.functions import FUNCTIONS
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure

_COLOURS = {"diffGrad": "C0", "Adam": "C1", "Adam (half the rate)": "C2"}
_SCALES = {"diffGrad (loss / 1000)": "C7", "diffGrad": "C0", "diffGrad (loss x 1000)": "C3"}


def draw_all(walks: dict[str, Any], found: dict[Any, Any], timing: Any, out: Path) -> list[Figure]:
    """Write the recipe's figures into ``out``; training is shown for the first activation and batch size."""
    first = next(iter(found))[:2]
    curves = {name: each for (activation, batch, name), each in found.items() if (activation, batch) == first}
    figures = [_walks(walks, out)]
    if set(_COLOURS) & set(curves):
        figures.append(_losses(curves, out))
    if set(_SCALES) & set(curves):
        figures.append(_friction(curves, out))
    return [*figures, _timing(timing, out)]


def _walks(walks: dict[str, Any], out: Path) -> Figure:
    def draw(axes: Any) -> None:
        for column, (name, each) in enumerate(walks.items()):
            top, ax = axes[0, column], axes[1, column]
            xs = [k / 200 - 1.1 for k in range(321)]
            top.plot(xs, [min(FUNCTIONS[name].value(x), 1.2) for x in xs], color="C7", linewidth=1.2)
            top.set_title(name if len(name) < 4 else f"{name[:2]}, derivative as released")
            for who, walk in each.items():
                ax.plot(walk.x, color=_COLOURS[who], label=who, linewidth=1.3)
                top.plot(walk.x[-1], FUNCTIONS[name].value(walk.x[-1]), "o", color=_COLOURS[who])
            ax.axhline(FUNCTIONS[name].minimum, color="C7", linewidth=0.8, linestyle="--")
            ax.set_xlabel("step")
        axes[0, 0].set_ylabel("F(x)")
        axes[1, 0].set_ylabel("x")
        axes[1, 0].legend(fontsize=8)

    ends = "; ".join(
        f"{name}: " + ", ".join(f"{who} {walk.x[-1]:.3f}" for who, walk in each.items())
        for name, each in walks.items()
    )
    shown = picture(
        draw,
        alt=f"Four functions and the positions of three optimizers over the steps. Ends: {ends}.",
        caption="Above: the functions, with dots where each optimizer ends. Below: positions from x = -1; dashed, the global minimum.",
        size=(10.5, 4.6),
        panels=(2, len(walks)),
    )
    return save(shown, out, "functions")


def _losses(curves: dict[str, Any], out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for name, colour in _COLOURS.items():
            for index, each in enumerate(curves.get(name, [])):
                dashed = "--" if name == "diffGrad" else "-"
                ax.semilogy(
                    range(1, len(each.losses) + 1),
                    each.losses,
                    dashed,
                    color=colour,
                    alpha=0.8,
                    zorder=3 if name == "diffGrad" else 2,
                    label=name if index == 0 else None,
                )
        ax.set_xlabel("epoch")
        ax.set_ylabel("training loss")
        ax.legend()

    ends = ", ".join(
        f"{name} {sum(r.losses[-1] for r in curves[name]) / len(curves[name]):.4f}"
        for name in _COLOURS
        if name in curves
    )
    shown = picture(
        draw,
        alt=f"Training loss over epochs, one line a seed. Mean losses of the last epoch: {ends}.",
        caption="Training loss, one line a seed: diffGrad (dashed) beside Adam at the same rate and at half of it.",
    )
    return save(shown, out, "loss")


def _friction(curves: dict[str, Any], out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for name, colour in _SCALES.items():
            if name in curves:
                friction = curves[name][0].friction
                ax.plot(friction.step, friction.mean, color=colour, label=name)
                ax.fill_between(friction.step, friction.low, friction.high, color=colour, alpha=0.25)
        for level in (0.5, 1.0):
            ax.axhline(level, color="C7", linewidth=0.8)
        ax.set_ylim(0.48, 1.02)
        ax.set_xlabel("step")
        ax.set_ylabel("friction")
        # Above the axes: the band of the scaled loss fills them.
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(_SCALES), fontsize=8)

    means = ", ".join(
        f"{name} {sum(curves[name][0].friction.mean) / len(curves[name][0].friction.mean):.4f}"
        for name in _SCALES
        if name in curves
    )
    shown = picture(
        draw,
        alt=f"The friction over the steps of a training for three scales of the loss. Means: {means}.",
        caption="The friction during training: the mean over coordinates, and the band from the 5 % to the 95 % quantile. 1 is Adam, 1/2 Adam at half the rate.",
    )
    return save(shown, out, "friction")


def _timing(timing: Any, out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for index, (name, seconds) in enumerate(timing.seconds.items()):
            ax.loglog(
                timing.sizes,
                [1e3 * s for s in seconds],
                "o--" if name.startswith("Adam") else "o-",
                color=f"C{index}",
                label=name,
            )
        ax.set_xlabel("parameters in one tensor")
        ax.set_ylabel("milliseconds a step")
        ax.legend(fontsize=8)

    largest = ", ".join(
        f"{name} {seconds[-1] / timing.seconds['Adam, fused'][-1]:.1f}"
        for name, seconds in timing.seconds.items()
    )
    shown = picture(
        draw,
        alt=f"Time of a step against the number of parameters. At the largest, in units of fused Adam: {largest}.",
        caption="Time of a step on one tensor, this machine.",
    )
    return save(shown, out, "step-time")
