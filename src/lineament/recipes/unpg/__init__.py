"""UNPG: do a batch's own negative pairs in the soft-max denominator lower false accepts, and what about them does?

Jung et al., arXiv 2203.11593. Generated people, with a tenth of the training labels wrong and without; every number is on people who were not trained on. Controls
that the paper lacks: the base head at its own best margin; pairs without gradient; random directions in place of samples; what the filter drops, against chance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from lineament.core.checks import number, one_of, require
from lineament.data.identities import identities
from lineament.recipes.kit.face_folders import FaceFolders, Official, on_faces, on_folders
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.recognition import bars, summary
from lineament.recipes.kit.stages import Stages
from lineament.recipes.unpg.claims import UNIFIED, Found, claims_of
from lineament.recipes.unpg.training import LOSSES, Trained, maker, train
from lineament.report.figures import save
from lineament.report.outcome import Outcome, Table
from lineament.train.callbacks import Cosine

SLUG = "unpg"
TITLE = "UNPG: Unified Negative Pair Generation toward Well-discriminative Feature Space for Face Recognition"


# The released training's: three of 20 epochs to warm up, then along a cosine.
OFFICIAL = Official(lambda: Cosine(warmup=3 / 20), None, "fan-out")
COMPARED = (
    (UNIFIED, "CosFace", "+0.5 to +1.9 points on web-scraped data"),
    ("ArcFace + UNPG", "ArcFace", "+0.5 to +1.9 points on web-scraped data"),
    (UNIFIED, "CosFace + contrastive", "unified beats multi-objective"),
    (UNIFIED, "CosFace + triplet", "unified beats multi-objective"),
)


@dataclass(frozen=True)
class Config(FaceFolders):
    """One run. The groups are the people and the training; the user's faces are those of :class:`FaceFolders`."""

    people: int = 300
    pictures: int = 12
    strangers: int = 300
    stranger_pictures: int = 8
    wrong: float = 0.1

    losses: tuple[str, ...] = ("CosFace", "CosFace + UNPG", "CosFace + UNPG, no filter", "pairs detached")
    clean_losses: tuple[str, ...] = ("CosFace", "CosFace + UNPG")
    scale: float = 16.0
    epochs: int = 10
    seeds: int = 2

    preset: str = presets(
        quick={},
        small={"losses": tuple(LOSSES)[:10], "epochs": 25, "seeds": 5},
        paper={
            "people": 3000,
            "strangers": 1000,
            "losses": tuple(LOSSES),
            "clean_losses": tuple(LOSSES),
            "epochs": 20,
            "seeds": 10,
            "depth": 100,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished training."""
    for field in ("losses", "clean_losses"):
        for name in getattr(config, field):
            one_of(field, name, LOSSES)
    for name in ("epochs", "seeds"):
        number(name, getattr(config, name), low=1, integer=True)
    require(len(config.losses) > 0, "losses: got none, expected at least one")
    stages, found = Stages(out, config), Found()
    if on_faces(config):
        heads = {name: maker(name, config.face_scale) for name in config.losses}
        return Outcome(
            SLUG, TITLE, config.preset, asdict(config), *on_folders(config, stages, heads, OFFICIAL, COMPARED)
        )

    def trained(name: str, seed: int, wrong: float) -> Trained:
        data = identities(
            config.people, config.pictures, strangers=config.strangers, stranger_pictures=config.stranger_pictures,
            wrong=wrong, seed=seed,
        )  # fmt: skip
        return train(name, data, epochs=config.epochs, scale=config.scale, seed=seed)

    for kind, names, wrong in (("wrong", config.losses, config.wrong), ("clean", config.clean_losses, 0.0)):
        for name in names:
            label = f"{kind} labels, {name}, seed {{}}"
            each = stages.each(
                label, range(config.seeds), lambda seed, n=name, w=wrong: trained(n, seed, w), Trained
            )
            getattr(found, kind)[name] = [t.found for t in each.values()]
            if name == UNIFIED and kind == "wrong":
                found.dropped = [t.dropped for t in each.values()]
    groups = {f"{config.wrong:.0%} wrong labels": found.wrong, "clean labels": found.clean}
    groups = {title: runs for title, runs in groups.items() if runs}
    tables = [
        Table(
            f"People never seen, {title} in training (means of {config.seeds} seeds)",
            ["loss", *columns],
            rows,
        )
        for title, runs in groups.items()
        for columns, rows in [summary(runs)]
    ]
    shown = bars(groups, "tar3", "TAR at FAR 1e-3, people never seen", config.seeds)
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        claims_of(found),
        tables,
        [save(shown, out, "recognition")],
    )
