"""The figures of the ReAGent recipe: soft comprehensiveness as published and at one sharpness, and P@2 by budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineament.recipes.reagent.claims import Budgets
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def figures(table: dict[str, dict[str, Any]], curve: Budgets | None, out: Path) -> list[Figure]:
    shown = [_bars(table, out)]
    return shown if curve is None else [*shown, _budgets(curve, out)]


def _bars(table: dict[str, dict[str, Any]], out: Path) -> Figure:
    names = [name for name in table if name != "random"]

    def draw(axes: Any) -> None:
        for ax, column, title in (
            (axes[0, 0], "log plain NC", "as published"),
            (axes[0, 1], "log entropy NC", "at ReAGent's entropy"),
        ):
            values = [table[n][column] if table[n][column] is not None else float("nan") for n in names]
            colours = ["C1" if n.startswith("reagent") else "C0" for n in names]
            ax.barh(range(len(names)), values, color=colours)
            ax.set_yticks(range(len(names)), names if ax is axes[0, 0] else [""] * len(names))
            ax.invert_yaxis()
            ax.axvline(0, color="C7", linewidth=0.8)
            ax.set(title=title, xlabel="log(Soft-NC / random)")

    def said(column: str) -> str:
        return ", ".join(f"{n} {table[n][column]:.1f}" for n in names if table[n][column] is not None)

    return save(
        picture(
            draw,
            alt=f"Bars of log Soft-NC over random, by method. As published: {said('log plain NC')}. At ReAGent's entropy: {said('log entropy NC')}.",
            caption="Soft comprehensiveness by method: scores as they are, and all brought to ReAGent's entropy prompt by prompt.",
            size=(8.6, 4.6),
            panels=(1, 2),
        ),
        out,
        "comprehensiveness",
    )


def _budgets(curve: Budgets, out: Path) -> Figure:
    def draw(ax: Any) -> None:
        ax.plot(
            [row[1] for row in curve.fixed],
            [row[2] for row in curve.fixed],
            marker="o",
            label="fixed steps, 5 probes",
        )
        for k, (name, rows, value) in enumerate(curve.early, start=1):
            ax.plot(
                [rows], [value], marker="s", linestyle="none", color=f"C{k}", label=f"{name}, early stopping"
            )
        ax.set(xscale="log", xlabel="rows asked of the model, a prompt", ylabel="P@2", ylim=(0, 1.03))
        ax.legend(loc="lower right")

    fixed = ", ".join(f"{steps} steps {value:.2f}" for steps, _, value in curve.fixed)
    early = ", ".join(f"{name} {value:.2f} at {rows:.0f} rows" for name, rows, value in curve.early)
    return save(
        picture(
            draw,
            alt=f"P@2 against the rows asked of the model. Fixed budgets: {fixed}. Early stopping: {early}.",
            caption="How often the two tokens that decide are the two best, by what was asked of the model.",
        ),
        out,
        "budgets",
    )
