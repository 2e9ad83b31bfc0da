"""ElasticFace: do margins that are drawn anew beat fixed ones, and is it the draw, the margin or the scale?

Boutros, Damer, Kirchbuchner, Kuijper, CVPR Workshops 2022, arXiv 2109.09416. Generated people with and without wrong labels, and the faces of ORL; every number
is on people who were not trained on. Controls that the paper lacks: each head at its own best scale and margin, chosen on further people; the mean of the elastic
margin without its randomness; margins matched by rank, as the released code does, and reversed.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

from lineament.core.checks import number, one_of, require
from lineament.data.identities import identities, orl_faces
from lineament.data.samples import Samples
from lineament.recipes.elasticface.claims import Found, claims_of
from lineament.recipes.elasticface.figures import draw_all
from lineament.recipes.elasticface.heads import GRID, HEADS, face_maker, maker, rank_correlation, tuned
from lineament.recipes.kit.face_folders import FaceFolders, Official, on_faces, on_folders
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.recognition import Recognised, recognise, summary
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table
from lineament.train.callbacks import Rate

SLUG = "elasticface"
TITLE = "ElasticFace: Elastic Margin Loss for Deep Face Recognition"


# The released training's: a tenth of the rate from the 8th, 14th, 20th and 25th of 26 epochs on, here at the same shares of a training.
OFFICIAL = Official(lambda: Rate(lambda done: 0.1 ** sum(done >= (m - 1) / 26 for m in (8, 14, 20, 25))), 5.0, "normal")  # fmt: skip
COMPARED = (
    ("Elastic-Arc", "ArcFace", "a few tenths of a point"),
    ("Elastic-Cos", "CosFace", "a few tenths of a point"),
    ("Elastic-Arc+, rank", "Elastic-Arc, large σ", "ElasticFace+ is the best (tables)"),
)


@dataclass(frozen=True)
class Config(FaceFolders):
    """One run. The groups are the people, the training, the grid of the tuned heads, and ORL; the user's faces are those of :class:`FaceFolders`."""

    people: int = 300
    pictures: int = 12
    strangers: int = 300
    stranger_pictures: int = 8
    wrong: float = 0.1

    heads: tuple[str, ...] = (
        *("soft-max", "ArcFace", "Elastic-Arc", "Elastic-Arc, large σ"),
        *("Elastic-Arc+, rank", "Elastic-Arc+, reversed"),
    )
    clean_heads: tuple[str, ...] = ("soft-max", "ArcFace")
    sigma: float = 0.2
    epochs: int = 8
    seeds: int = 2

    tuned_heads: tuple[str, ...] = ()
    tuning_people: int = 100

    faces: bool = False
    face_epochs: int = 40
    data_folder: str | None = None

    preset: str = presets(
        quick={},
        small={
            "heads": tuple(HEADS),
            "clean_heads": ("soft-max", "CosFace", "ArcFace", "Elastic-Arc"),
            "epochs": 25,
            "seeds": 5,
            "tuned_heads": tuple(GRID),
            "faces": True,
        },
        paper={
            "people": 3000,
            "strangers": 1000,
            "heads": tuple(HEADS),
            "clean_heads": tuple(HEADS),
            "epochs": 26,
            "seeds": 10,
            "tuned_heads": tuple(GRID),
            "tuning_people": 300,
            "faces": True,
            "depth": 100,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished training."""
    for field, known in (("heads", HEADS), ("clean_heads", HEADS), ("tuned_heads", GRID)):
        for name in getattr(config, field):
            one_of(field, name, known)
    for name in ("epochs", "seeds", "face_epochs"):
        number(name, getattr(config, name), low=1, integer=True)
    require(len(config.heads) > 0, "heads: got none, expected at least one")
    stages, seeds, found = Stages(out, config), range(config.seeds), Found()
    if on_faces(config):
        heads = {name: face_maker(name, config.sigma, config.face_scale) for name in config.heads}
        return Outcome(
            SLUG, TITLE, config.preset, asdict(config), *on_folders(config, stages, heads, OFFICIAL, COMPARED)
        )

    def trained(name: str, seed: int, wrong: float) -> Recognised:
        return recognise(
            maker(name, config.sigma), *_people(config, seed, wrong), epochs=config.epochs, seed=seed
        )

    for kind, heads, wrong in (("wrong", config.heads, config.wrong), ("clean", config.clean_heads, 0.0)):
        for name in heads:
            label = f"{kind} labels, {name}, seed {{}}"
            each = stages.each(label, seeds, lambda seed, n=name, w=wrong: trained(n, seed, w), Recognised)
            getattr(found, kind)[name] = list(each.values())
    for name in config.tuned_heads:
        cells = list(itertools.product(*GRID[name][1:]))
        label = f"tuning {name}, {{}}"
        tried = stages.each(label, cells, lambda cell, n=name: _tried(config, n, cell), float)
        best = max(tried, key=lambda cell: tried[cell])
        found.best[name] = [*best, tried[best]]
        label = f"tuned {name}, seed {{}}"
        each = stages.each(label, seeds, lambda seed, n=name, b=best: _tuned(config, n, b, seed), Recognised)
        found.tuned[name] = list(each.values())
    if config.faces:
        for name in config.clean_heads:
            for seed in seeds:
                split = orl_faces(seed=seed, data_folder=config.data_folder)
                if split is None:
                    break
                made = stages(
                    f"ORL, {name}, seed {seed}",
                    lambda n=name, s=split, k=seed: _faces(config, n, s, k),
                    Recognised,
                )
                found.faces.setdefault(name, []).append(made)
    for how in ("independent", "rank", "official", "reversed"):
        match = None if how == "independent" else how
        found.correlation[how] = rank_correlation(match, 4096, config.sigma, 0)
    tables = [
        Table(f"{title} (means of {config.seeds} seeds)", ["head", *columns], rows)
        for title, runs in (
            (f"People never seen, {config.wrong:.0%} wrong labels in training", found.wrong),
            ("People never seen, clean labels", found.clean),
            ("Each head at its own best scale and margin, wrong labels", found.tuned),
            ("ORL, 16 people never seen", found.faces),
        )
        if runs
        for columns, rows in [summary(runs)]
    ]
    if found.best:
        tables.append(
            Table("Chosen on further people (one seed)", ["head", "scale", "margin", "TAR at FAR 1e-3"], [[n, *b] for n, b in found.best.items()])
        )  # fmt: skip
    figures = draw_all(found, config, out)
    return Outcome(SLUG, TITLE, config.preset, asdict(config), claims_of(found), tables, figures)


def _people(config: Config, seed: int, wrong: float) -> tuple[Samples, Samples]:
    """People to train on and people to judge by; those for tuning come first and are left out."""
    train, unseen = identities(
        config.people, config.pictures, strangers=config.strangers + config.tuning_people,
        stranger_pictures=config.stranger_pictures, wrong=wrong, seed=seed,
    )  # fmt: skip
    return train, unseen[unseen.targets >= config.tuning_people]


def _tried(config: Config, name: str, cell: tuple[float, float]) -> float:
    """TAR at 1e-3 on the people for tuning, who are neither trained on nor judged by."""
    train, unseen = identities(
        config.people, config.pictures, strangers=config.strangers + config.tuning_people,
        stranger_pictures=config.stranger_pictures, wrong=config.wrong, seed=0,
    )  # fmt: skip
    others = unseen[unseen.targets < config.tuning_people]
    return recognise(tuned(name, *cell, config.sigma), train, others, epochs=config.epochs, seed=0).tar3


def _tuned(config: Config, name: str, cell: tuple[float, float], seed: int) -> Recognised:
    data = _people(config, seed, config.wrong)
    return recognise(tuned(name, *cell, config.sigma), *data, epochs=config.epochs, seed=seed)


def _faces(config: Config, name: str, split: tuple[Samples, Samples], seed: int) -> Recognised:
    make = maker(name, config.sigma)
    return recognise(make, *split, epochs=config.face_epochs, seed=seed, lr=0.05, batch_size=48)
