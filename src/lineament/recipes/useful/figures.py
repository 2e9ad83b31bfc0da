"""Figures of the useful recipe."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lineament.recipes.useful.theory import WAYS, Theory
from lineament.recipes.useful.training import Early, Final
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(
    config: Any,
    theory: Theory,
    early: list[Early],
    found: dict[str, list[Final]],
    out: Path,
) -> list[Figure]:
    figures = [_theory(config, theory, out), _errors(found, out)]
    if early:
        figures.append(_early(early, out))
    return figures


def _theory(config: Any, theory: Theory, out: Path) -> Figure:
    def draw(axes: Any) -> None:
        for column, slow in enumerate(config.theory_slow):
            ax = axes[0][column] if len(config.theory_slow) > 1 else axes
            for index, name in enumerate(WAYS):
                mean = theory.mean(slow, name)
                steps = range(1, len(mean) + 1)
                ax.plot(steps, mean[:, 0].tolist(), "--", color=f"C{index}", linewidth=1.1)
                ax.plot(steps, mean[:, 1].tolist(), color=f"C{index}", label=name)
            ax.set_title(f"slow feature of strength {slow:g}")
            ax.set_xlabel("step")
            if column == 0:
                ax.set_ylabel("largest alignment of a filter")
                ax.legend()

    shown = picture(
        draw,
        alt="Alignments over steps: the fast feature (dashed) rises first in every run; the slow one (solid) rises sooner with upsampling.",
        caption="Two-layer network: alignment with the fast (dashed) and the slow feature (solid).",
        size=(3.2 * len(config.theory_slow) + 0.6, 3.2),
        panels=(1, len(config.theory_slow)),
    )
    return save(shown, out, "theory")


def _errors(found: dict[str, list[Final]], out: Path) -> Figure:
    names = list(found)[::-1]

    def draw(ax: Any) -> None:
        for row, name in enumerate(names):
            errors = [r.test for r in found[name]]
            colour = "C0" if "useful" in name else "C7"
            ax.plot(errors, [row] * len(errors), "o", color=colour, alpha=0.45, markersize=4)
            ax.plot([statistics.fmean(errors)], [row], "|", color=colour, markersize=16, markeredgewidth=2.5)
        ax.set_yticks(range(len(names)))
        ax.set_yticklabels(names)
        ax.set_xlabel("test error, % (dots: seeds; bar: their mean)")

    shown = picture(
        draw,
        alt="Test errors by method: "
        + ", ".join(f"{n} {statistics.fmean(r.test for r in found[n]):.2f}" for n in found)
        + ".",
        caption="Test error of the last epoch; methods with USEFUL are coloured.",
        size=(6.6, 0.9 + 0.3 * len(names)),
    )
    return save(shown, out, "errors")


def _early(early: list[Early], out: Path) -> Figure:
    def draw(axes: Any) -> None:
        left, right = axes[0]
        for index, e in enumerate(early):
            colour = f"C{index % 7}"
            left.plot(range(1, len(e.errors) + 1), [100 * v for v in e.errors], "o-", color=colour)
            right.plot(range(len(e.class_shares)), [100 * v for v in e.class_shares], "o", color=colour)
        left.set_xlabel("epoch of the early training")
        left.set_ylabel("training error, %")
        right.set_xlabel("class")
        right.set_ylabel("selected, %")
        right.set_ylim(0, 100)

    share = statistics.fmean(float(e.masks["clusters"].double().mean()) for e in early)
    shown = picture(
        draw,
        alt=f"Training error over the first epochs, and the share of each class that is selected; {share:.0%} on the whole.",
        caption="Early training until the examples are separated, and the share of each class that is shown twice; one colour a seed.",
        size=(7.2, 3.0),
        panels=(1, 2),
    )
    return save(shown, out, "early")
