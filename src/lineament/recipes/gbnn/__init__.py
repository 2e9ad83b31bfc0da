"""Sequential training of neural networks with gradient boosting: small networks that need little tuning and can be cut short.

Emami, Martínez-Muñoz 2019-2023, arXiv 1909.12098. Five tables of scikit-learn by the reference's protocol, units switched off on digits, widths, and a head
grown on a small CNN's features. ``quick`` has one or two seeds and fewer units, ``small`` the eight seeds of the reference, ``paper`` the nested validation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from lineament.recipes.gbnn.claims import claims_of
from lineament.recipes.gbnn.figures import draw_all
from lineament.recipes.gbnn.study import REFERENCE, Cut, Head, Score, Solvers, cut, head, scored, solvers
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

SLUG = "gbnn"
TITLE = "Sequential Training of Neural Networks with Gradient Boosting"


@dataclass(frozen=True)
class Config:
    """One run.

    ``sets``: tables; ``iterations``: of each small network by L-BFGS; ``units``: of the network that is cut short; ``images``: of each half for the boosted head.
    """

    sets: tuple[str, ...] = ("diabetes", "wine", "friedman1")
    seeds: tuple[int, ...] = (0, 1)
    iterations: int = 50
    units: int = 80
    images: int = 600
    epochs: int = 6
    data_folder: str | None = None

    preset: str = presets(
        quick={},
        small={
            "sets": ("diabetes", "breast_cancer", "wine", "friedman1", "digits"),
            "seeds": (0, 1, 2, 3, 4, 5, 6, 7),
            "iterations": 200,
            "units": 200,
            "images": 2000,
            "epochs": 8,
        },
        paper={
            "sets": ("diabetes", "breast_cancer", "wine", "friedman1", "digits"),
            "seeds": tuple(range(20)),
            "iterations": 200,
            "units": 200,
            "images": 3000,
            "epochs": 8,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    stages = Stages(out, config)
    keys = [(name, seed) for name in config.sets for seed in config.seeds]
    scores = stages.each("score {}", keys, lambda key: scored(*key, config.iterations), Score)
    cuts = stages.each(
        "cut {}", config.seeds[:3], lambda seed: cut(seed, config.units, config.iterations), Cut
    )
    heads = stages.each("head {}", config.seeds[:3], lambda seed: head(seed, config), Head)
    both = stages("solvers", lambda: solvers(config), list[Solvers])
    names = list(next(iter(scores.values())).by)
    tables = [
        Table(
            f"Test error or accuracy, mean of {len(config.seeds)} seeds (RMSE for diabetes and friedman1)",
            ["data", "reference", *names],
            [
                [name, REFERENCE[name].mean, *(sum(scores[name, s].by[k] for s in config.seeds) / len(config.seeds) for k in names)]
                for name in config.sets
            ],
        ),
        Table(
            "Accuracy on digits with the first units only",
            ["units", *next(iter(cuts.values())).kept],
            [
                [m, *(sum(c.kept[k][i] for c in cuts.values()) / len(cuts) for k in next(iter(cuts.values())).kept)]
                for i, m in enumerate(next(iter(cuts.values())).units)
            ],
        ),
        Table(
            "Solvers, one seed: seconds of processor time and error",
            ["data", "lbfgs, s", "varpro, s", "lbfgs", "varpro"],
            [[s.data, s.lbfgs_seconds, s.varpro_seconds, s.lbfgs, s.varpro] for s in both],
        ),
        Table(
            "A head grown on a CNN's features (accuracy)",
            ["seed", "the CNN", "boosted head"],
            [[seed, h.network, h.boosted] for seed, h in heads.items()],
        ),
    ]  # fmt: skip
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(config, scores, cuts, heads, both), tables,
        draw_all(cuts, out),
    )  # fmt: skip
