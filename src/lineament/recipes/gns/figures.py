"""Figures of the recipe of gradient-normalised smoothness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineament.recipes.gns.runs import Gammas, Runs
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure

_STYLES = {
    "exact": ("C0", "-"),
    "weighted Gauss-Newton": ("C1", "-"),
    "cubic Newton": ("C3", "--"),
    "gradient method, metric B": ("C2", "-"),
    "fast gradient method, metric B": ("C4", "-"),
    "gradient method": ("C7", "-"),
}


def draw_all(lse: Runs, gamma: Gammas, config: Any, out: Path) -> list[Figure]:
    """Write the three figures into ``out``."""
    return [_gaps(lse, config, out), _rules(lse, out), _measured(gamma, out)]


def _gaps(lse: Runs, config: Any, out: Path) -> Figure:
    measures = {"iterations": "iteration, from 1", "solves": "linear solves", "seconds": "seconds"}

    def draw(axes: Any) -> None:
        for ax, (measure, words) in zip(axes[0], measures.items()):
            for name, (colour, line) in _STYLES.items():
                values = [max(gap, 1e-9) for gap in lse[name].gaps]
                at = range(1, len(values) + 1) if measure == "iterations" else getattr(lse[name], measure)
                # The fast gradient method solves nothing; before the first solve there is no place on the axis.
                pairs = [(x, y) for x, y in zip(at, values) if x > 0]
                if pairs:
                    ax.loglog(*zip(*pairs), line, color=colour, label=name)
            ax.axhline(1e-8, color="C7", linewidth=0.8)
            ax.set(xlabel=words, ylim=(5e-10, None))
        for ax in axes[0, 1:]:
            ax.sharey(axes[0, 0])
            ax.tick_params(labelleft=False)
        axes[0, 0].set_ylabel("f − f*")
        axes[0, 0].text(1, 1.3e-8, "the goal, 1e-8", color="C7", va="bottom", fontsize=8)
        handles, names = axes[0, 0].get_legend_handles_labels()
        # Above the panels: each of them is full of curves.
        axes[0, 0].figure.legend(handles, names, loc="outside upper center", ncols=3, fontsize=8)

    steps = {name: lse[name].iterations for name in _STYLES}
    shown = picture(
        draw,
        alt="Curves of f minus f* over iterations, linear solves and seconds: "
        + ", ".join(f"{n} ends after {s} iterations" for n, s in steps.items())
        + ".",
        caption=f"Log-sum-exp, n = m = {config.lse_size}: the distance to the minimum by iteration, by linear solve and by time on this machine.",
        size=(9.6, 3.8),
        panels=(1, 3),
    )
    return save(shown, out, "log-sum-exp")


def _rules(lse: Runs, out: Path) -> Figure:
    names = ["exact", "weighted Gauss-Newton", *(name for name in lse if name.startswith("super"))]

    def draw(ax: Any) -> None:
        for index, name in enumerate(names):
            gammas = lse[name].gammas
            label = {"exact": "this rule, exact H"}.get(name, name)
            line = "-" if index < 2 else "--"
            ax.semilogy(range(len(gammas)), gammas, line, color=f"C{index}", label=label)
        ax.set(xlabel="iteration", ylabel="γ, the norm of the gradient over λ")
        # Above the axes: the curves end in every corner.
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, fontsize=8)

    shown = picture(
        draw,
        alt="γ by iteration for the rule with the Hessian and with weighted Gauss-Newton and for super-universal Newton with three α.",
        caption="The adapted γ on the log-sum-exp: one number for every Hessian approximation, beside the rules with a fixed power α.",
    )
    return save(shown, out, "gamma-rules")


def _measured(gamma: Gammas, out: Path) -> Figure:
    def draw(ax: Any) -> None:
        ks = range(len(gamma.sampled))
        ax.semilogy(ks, gamma.sampled, "o-", label="γ(x), measured by sampling")
        ax.semilogy(ks, gamma.accepted, "s--", label="γ accepted by the search")
        ax.axhline(gamma.bound, color="C7", label="bound of the theory")
        ax.set(xlabel="iteration", ylabel="γ")
        ax.legend()

    shown = picture(
        draw,
        alt=f"Measured γ between {min(gamma.sampled):.2g} and {max(gamma.sampled):.2g}, above the bound {gamma.bound:.2g}; "
        "the accepted γ doubles from 1.",
        caption="Log-sum-exp, 40 x 10: the definition's γ(x) along a run, what the search used, and the bound.",
    )
    return save(shown, out, "gamma-measured")
