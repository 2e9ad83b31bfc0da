"""Wide and deep neural networks achieve optimality for classification: does the activation that matches the data's dimension win?

Radhakrishnan, Belkin, Uhler 2022, arXiv 2204.14126. Four pairs of Dirichlet densities on spheres, whose Bayes rule is known; digits, whose dimension is estimated.
``quick`` has 1,000 training points and two seeds, ``small`` the 8,000 points and four seeds of the table, ``paper`` 50,000 points.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.wide_deep_kernels.claims import claims_of
from lineament.recipes.wide_deep_kernels.figures import draw_all
from lineament.recipes.wide_deep_kernels.study import Digits, Limits, Pair, digits, limits, pair
from lineament.report.outcome import Outcome, Table

SLUG = "wide-deep-kernels"
TITLE = "Wide and Deep Neural Networks Achieve Optimality for Classification"


@dataclass(frozen=True)
class Config:
    """One run.

    ``samples``: training points by size, the last is the one that claims are about; ``tests``: test points; ``digits``: of each set of digits; ``principal``: numbers of
    principal components.
    """

    samples: tuple[int, ...] = (100, 1000)
    tests: int = 1000
    seeds: tuple[int, ...] = (0, 1)
    digits: int = 1200
    principal: tuple[int, ...] = (3, 6)
    data_folder: str | None = None

    preset: str = presets(
        quick={},
        small={
            "samples": (100, 1000, 8000),
            "tests": 2000,
            "seeds": (0, 1, 2, 3),
            "digits": 4000,
            "principal": (3, 5, 8, 10),
        },
        paper={
            "samples": (100, 1000, 8000, 50_000),
            "tests": 10_000,
            "seeds": (0, 1, 2, 3),
            "digits": 20_000,
            "principal": (3, 5, 8, 10),
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    stages = Stages(out, config)
    keys = [(d, n, s) for d in (1, 2, 4, 8) for n in config.samples for s in config.seeds]
    pairs = stages.each("pair {}", keys, lambda key: pair(*key, config.tests), Pair)
    known = stages("limits", lambda: limits(config.seeds[0]), Limits)
    seen = stages("digits", lambda: digits(config), list[Digits])
    rules = list(next(iter(pairs.values())).accuracy)
    mean = lambda d, n, rule: sum(pairs[d, n, s].accuracy[rule] for s in config.seeds) / len(config.seeds)  # noqa: E731
    tables = [
        Table(
            f"Accuracy, mean of {len(config.seeds)} seeds, {config.tests:,} test points",
            ["d", "n", *rules],
            [
                [d, n, *(round(mean(d, n, rule), 4) for rule in rules)]
                for d in (1, 2, 4, 8)
                for n in config.samples
            ],
        ),
        Table(
            "Digits: the estimated dimension and the leave-one-out choice",
            ["data", "components", "TwoNN", "maximum likelihood", "chosen", "test accuracy", "1-NN"],
            [[r.data, r.components, r.two_nn, r.likelihood, r.chosen, r.accuracy, r.nearest] for r in seen],
        ),
    ]
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(config, pairs, known, seen), tables, draw_all(config, pairs, known, out)
    )  # fmt: skip
