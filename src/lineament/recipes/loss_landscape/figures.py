"""Figures of the loss-landscape recipe: planes and surfaces, densities before and after training, criteria against accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineament.recipes.loss_landscape.claims import Measured
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure
from lineament.report.surface_plot import SurfacePlot


def draw_all(runs: dict[str, Measured], out: Path) -> list[Figure]:
    """Write the recipe's figures into ``out``."""
    return [_planes(runs, out), _densities(runs, out), _scatter(runs, out)]


def _planes(runs: dict[str, Measured], out: Path) -> Figure:
    name, run = next((n, r) for n, r in runs.items() if "batch norm" in n)
    titles = {
        "random, eval": "random, running statistics",
        "random, batch": "random, batch statistics",
        "hessian, eval": "Hessian, running statistics",
    }
    shown = [(title, run.planes[key]) for key, title in titles.items()]

    def draw(axes: Any) -> None:
        for column, (title, found) in enumerate(shown):
            found.plot(axes[0, column])
            axes[0, column].set_title(title)
            found.surface(axes[1, column])

    return save(
        picture(
            draw,
            alt="Contours and surfaces of the loss around one network, along two random directions under running and under batch statistics, and along two eigenvectors.",
            caption=f"The loss around one network ({name}): filter-normalised random directions with batch norm's running statistics and with each batch's, and the two eigenvectors of largest curvature.",
            size=(12.6, 7.0),
            panels=(2, 3),
            kind="png",
            surfaces=[SurfacePlot.of(found, title=title) for title, found in shown],
        ),
        out,
        "planes",
    )


def _densities(runs: dict[str, Measured], out: Path) -> Figure:
    name, run = next(iter(runs.items()))

    def draw(axes: Any) -> None:
        for ax, when in zip(axes[0], ("init", "trained")):
            grid, height = run.curves[when]
            ax.semilogy(grid.tolist(), height.clamp_min(1e-7).tolist())
            ax.set_ylim(bottom=1e-5 * float(height.max()))
            ax.axvline(0, color="C7", linewidth=0.8)
            numbers = run.init if when == "init" else run.trained
            ax.set_title(f"{when}: r_e {numbers.re:.3g}, K {numbers.k:.3g}")
            ax.set(xlabel="eigenvalue", ylabel="density")

    return save(
        picture(
            draw,
            alt="Spectral density before training, nearly symmetric about zero, and after it, almost all on the positive side.",
            caption=f"Spectral density of the Hessian on the training data before and after training ({name}).",
            size=(8.8, 3.3),
            panels=(1, 2),
        ),
        out,
        "densities",
    )


def _scatter(runs: dict[str, Measured], out: Path) -> Figure:
    def draw(axes: Any) -> None:
        for ax, key, label in zip(axes[0], ("re", "k"), ("r_e", "K_H0.5")):
            for number, (name, run) in enumerate(runs.items()):
                points = [p.spectrum for p in run.shifts]
                x, y = [p.accuracy for p in points], [getattr(p, key) for p in points]
                ax.plot(x, y, "o", color=f"C{number % 7}", label=name)
            ax.set_yscale("log")
            ax.set(xlabel="accuracy on the shifted test set", ylabel=label)
        axes[0, 0].legend()

    return save(
        picture(
            draw,
            alt="r_e and K_H0.5 against accuracy on thirteen shifted test sets for each network.",
            caption="The criteria on thirteen shifted test sets against accuracy there.",
            size=(8.8, 3.6),
            panels=(1, 2),
        ),
        out,
        "shifts",
    )
