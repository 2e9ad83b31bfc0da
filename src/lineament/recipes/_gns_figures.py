"""Figures of the recipe of gradient-normalised smoothness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def draw_all(found: dict[str, Any], config: Any, out: Path) -> list[Figure]:
    """Write the three figures into ``out``."""
    return [_gaps(found["lse"], config, out), _rules(found["lse"], out), _measured(found["gamma"], out)]


def _gaps(lse: dict[str, Any], config: Any, out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for name, (colour, line) in _STYLES.items():
            values = [max(gap, 1e-9) for gap in lse[name]["gaps"]]
            ax.loglog(range(1, len(values) + 1), values, line, color=colour, label=name)
        ax.axhline(1e-8, color="C7", linewidth=0.8)
        ax.text(1000, 1.3e-8, "the goal, 1e-8", color="C7", ha="right", va="bottom", fontsize=8)
        ax.set(xlabel="iteration, from 1", ylabel="f − f*")
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.17), fontsize=8)

    steps = {name: lse[name]["iterations"] for name in _STYLES}
    shown = picture(
        draw,
        alt="Curves of f minus f* over iterations: "
        + ", ".join(f"{n} ends after {s}" for n, s in steps.items())
        + ".",
        caption=f"Log-sum-exp, n = m = {config.lse_size}: the distance to the minimum by iteration.",
    )
    return save(shown, out, "log-sum-exp")


def _rules(lse: dict[str, Any], out: Path) -> Figure:
    names = ["exact", "weighted Gauss-Newton", *(name for name in lse if name.startswith("super"))]

    def draw(ax: Any) -> None:
        for index, name in enumerate(names):
            gammas = lse[name]["gammas"]
            label = {"exact": "this rule, exact H"}.get(name, name)
            line = "-" if index < 2 else "--"
            ax.semilogy(range(len(gammas)), gammas, line, color=f"C{index}", label=label)
        ax.set(xlabel="iteration", ylabel="γ, the norm of the gradient over λ")
        ax.legend()

    shown = picture(
        draw,
        alt="γ by iteration for the rule with the Hessian and with weighted Gauss-Newton and for super-universal Newton with three α.",
        caption="The adapted γ on the log-sum-exp: one number for every Hessian approximation, beside the rules with a fixed power α.",
    )
    return save(shown, out, "gamma-rules")


def _measured(gamma: dict[str, Any], out: Path) -> Figure:
    def draw(ax: Any) -> None:
        ks = range(len(gamma["sampled"]))
        ax.semilogy(ks, gamma["sampled"], "o-", label="γ(x), measured by sampling")
        ax.semilogy(ks, gamma["accepted"], "s--", label="γ accepted by the search")
        ax.axhline(gamma["bound"], color="C7", label="bound of the theory")
        ax.set(xlabel="iteration", ylabel="γ")
        ax.legend()

    shown = picture(
        draw,
        alt=f"Measured γ between {min(gamma['sampled']):.2g} and {max(gamma['sampled']):.2g}, above the bound {gamma['bound']:.2g}; "
        "the accepted γ doubles from 1.",
        caption="Log-sum-exp, 40 x 10: the definition's γ(x) along a run, what the search used, and the bound.",
    )
    return save(shown, out, "gamma-measured")
