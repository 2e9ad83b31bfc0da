"""A classical approach to handcrafted features for Bangla digits: three descriptors with four classifiers, and what decides their order.

Wahid, Shahriar, Sobuj 2022, arXiv 2201.10102. ``quick`` has a part of CMATERdb (scikit-learn's digits where it is missing), ``small`` CMATERdb's 5,000 training and
1,000 test images with three seeds, BDRW and part of NumtaDB, ``paper`` the whole grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lineament.recipes.bangla_digits.claims import claims_of
from lineament.recipes.bangla_digits.figures import draw_all
from lineament.recipes.bangla_digits.study import Controls, Result, controls, sets, table
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

SLUG = "bangla-digits"
TITLE = "A Classical Approach to Handcrafted Feature Extraction Techniques for Bangla Handwritten Digit Recognition"


@dataclass(frozen=True)
class Config:
    """One run.

    ``train``, ``test``: images of each part at most; ``effort``: how many settings are searched (``"none"``, ``"small"``, ``"full"``).
    """

    data_sets: tuple[str, ...] = ("cmaterdb",)
    classifiers: tuple[str, ...] = ("svm", "knn", "forest")
    train: int = 600
    test: int = 400
    seeds: tuple[int, ...] = (0,)
    effort: str = "none"
    data_folder: str | None = None

    preset: str = presets(
        quick={},
        small={
            "data_sets": ("cmaterdb", "bdrw", "numtadb"),
            "classifiers": ("svm", "knn", "forest"),
            "train": 5000,
            "test": 1000,
            "seeds": (0, 1, 2),
        },
        paper={
            "data_sets": ("cmaterdb", "bdrw", "numtadb"),
            "classifiers": ("svm", "knn", "forest", "gbdt"),
            "train": 50_000,
            "test": 10_000,
            "seeds": (0, 1, 2),
            "effort": "full",
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    stages = Stages(out, config)
    held = sets(config)
    keys = [(name, seed) for name in held for seed in config.seeds]
    found = stages.each("table {}", keys, lambda key: table(config, held[key[0]], key[1]), list[Result])
    first = next(iter(held))
    said = stages("controls", lambda: controls(config, held, first), Controls)
    mean = _means(found, config.seeds)
    tables = [
        Table(
            f"Accuracy in %, mean of {len(config.seeds)} seeds, {name}: {held[name].source}",
            ["descriptor", *config.classifiers],
            [
                [d, *(round(100 * mean[name, d, c], 2) for c in config.classifiers)]
                for d in dict.fromkeys(r.descriptor for r in found[name, config.seeds[0]])
            ],
        )
        for name in held
    ]
    tables.append(
        Table(
            "Controls, accuracy in %",
            ["control", "accuracy"],
            [[k, None if v is None else round(100 * v, 2)] for k, v in said.accuracy.items()],
        )
    )
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(config, held, mean, said), tables, draw_all(config, held, mean, out)
    )  # fmt: skip


def _means(
    found: dict[tuple[str, int], list[Result]], seeds: Sequence[int]
) -> dict[tuple[str, str, str], float]:
    means: dict[tuple[str, str, str], float] = {}
    for (name, _), results in found.items():
        for r in results:
            key = (name, r.descriptor, r.classifier)
            means[key] = means.get(key, 0.0) + r.accuracy / len(seeds)
    return means
