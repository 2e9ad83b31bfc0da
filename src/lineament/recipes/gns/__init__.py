"""Gradient-normalised smoothness: does one adaptive number make every Hessian approximation as good as its theory says?

Semenov, Jaggi, Doikov, 2025, arXiv 2506.13710. The authors' notebook (log-sum-exp, a power of linear residuals, Rosenbrock, the Chebyshev
chain) and regressions on real data. Iterations and linear solves are compared, which no machine changes; seconds are in the benchmark.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from lineament.recipes.gns import runs
from lineament.recipes.gns.claims import claims
from lineament.recipes.gns.figures import draw_all
from lineament.recipes.gns.runs import POWERS, Gammas, Runs
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

SLUG = "gns"
TITLE = "Gradient-Normalized Smoothness for Optimization with Approximate Hessians"


@dataclass(frozen=True)
class Config:
    """One run: sizes of the log-sum-exp and the Chebyshev chain, iterations at most of slow methods, directions of a measured γ."""

    lse_size: int = 200
    chebyshev_size: int = 100
    slow_iterations: int = 1000
    fisher_iterations: int = 50
    directions: int = 30
    seed: int = 3124
    preset: str = presets(
        quick={},
        small={"lse_size": 1000, "chebyshev_size": 1000, "fisher_iterations": 300, "directions": 200},
        paper={"lse_size": 10_000, "chebyshev_size": 1000, "fisher_iterations": 2000, "directions": 1000},
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    stage = Stages(out, config)
    parts = {
        f"Log-sum-exp, n = m = {config.lse_size}": stage("lse", lambda: runs.log_sum_exp(config), Runs),
        "‖Ax - b‖⁴/4, A 100 x 200": stage("power", lambda: runs.power_of_residuals(config), Runs),
        f"Chebyshev chain, p = 4, n = {config.chebyshev_size}": stage(
            "chebyshev", lambda: runs.chebyshev(config), Runs
        ),
        "Logistic regression, breast cancer": stage("logistic", lambda: runs.logistic(config), Runs),
        "Softmax regression, digits, l2 = 1e-3": stage("softmax", lambda: runs.softmax(config), Runs),
    }
    rosenbrock = stage("rosenbrock", runs.rosenbrock, dict[str, Runs])
    gamma = stage("gamma", lambda: runs.measured_gamma(config), Gammas)
    lse, power, chain, logistic, softmax = parts.values()
    tables = [
        Table(
            f"{title}: iterations to f - f* < 1e-8",
            ["method", "iterations", "linear solves", "f - f* at the end"],
            [[name, r.iterations, r.total_solves, float(f"{r.gap:.2g}")] for name, r in found.items()],
        )
        for title, found in parts.items()
    ]
    tables.append(
        Table(
            "Rosenbrock's residuals from (-2, 2): iterations to 1e-8",
            ["H", *(f"p = {p}" for p in POWERS)],
            [[kind, *(row[str(p)].iterations for p in POWERS)] for kind, row in rosenbrock.items()],
        )
    )
    judged = claims(lse, power, rosenbrock, chain, logistic, softmax, gamma)
    figures = draw_all(lse, gamma, config, out)
    return Outcome(SLUG, TITLE, config.preset, asdict(config), judged, tables, figures)
