"""Feature transformation: do harder positives and fresh negatives help MoCo, and is it more than its rate or temperature?

Zhu, Zhao, Liu, Sun, Chen, ICCV 2021, arXiv 2108.02982. MNIST at 16 x 16 where it is there, else scikit-learn's digits, which nearly every training solves, and CIFAR-10 at 16 x 16
where it is there. Controls that the paper lacks: MoCo at the rate and the temperature that match the factor 2.6, a fixed factor, interpolated positives, the query untransformed
for negatives, keys mixed with themselves. The preset "paper" is MoCo v2 on the user's folder, see :mod:`~lineament.recipes.contrastive_ft.full_scale`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lineament.core.checks import number, one_of, require
from lineament.recipes.contrastive_ft import full_scale
from lineament.recipes.contrastive_ft.claims import Runs, claims_of, numbers
from lineament.recipes.contrastive_ft.training import VARIANTS, Trained, data_of, photographs_of, train
from lineament.recipes.kit.configuration import several_of
from lineament.recipes.kit.picture_folders import PictureFolders
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure, Outcome, Table

SLUG = "contrastive-ft"
TITLE = "Improving Contrastive Learning by Visualizing Feature Transformation"


@dataclass(frozen=True)
class Config(PictureFolders):
    """One run. The groups are the data, the variants and the training, photographs of 16 x 16, and a folder of photographs, whose ResNet is that of
    :class:`~lineament.recipes.kit.picture_folders.PictureFolders`.

    Attributes:
        data: ``"digits"``, or ``"images"``: ``train`` and ``val`` in ``data_folder``, all of them.
        norm_groups: in how many groups batch norm sees a batch of the folder's pictures. probe_epochs, probe_rate: of the linear probe.
    """

    data: Literal["digits", "images"] = "digits"
    data_folder: str | None = None
    samples: int = 2000
    test_samples: int = 1000

    variants: tuple[str, ...] = ("MoCo", "negatives", "both", "positives", "late positives")
    temperature: float = 0.2
    momentum: float = 0.99
    queue: int = 1024
    lr: float = 0.06
    batch_size: int = 256
    epochs: int = 8
    seeds: int = 2

    photo_variants: tuple[str, ...] = ()
    photo_epochs: int = 10

    norm_groups: int = 8
    probe_epochs: int = 100
    probe_rate: float = 30.0

    preset: str = presets(
        quick={},
        small={
            "samples": 6000,
            "test_samples": 2000,
            "variants": tuple(VARIANTS)[:-1],
            "photo_variants": ("MoCo", "negatives", "positives", "late positives"),
            "queue": 4096,
            "epochs": 20,
            "seeds": 5,
        },
        paper={
            "data": "images",
            "variants": ("MoCo", "both", "both, by dimension"),
            "momentum": 0.999,
            "queue": 65_536,
            "lr": 0.03,
            "epochs": 200,
            "seeds": 5,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished training, on a folder of photographs from its last finished epoch."""
    one_of("data", config.data, ("digits", "images"))
    for field in ("variants", "photo_variants"):
        several_of(field, getattr(config, field), VARIANTS)
    for name in ("samples", "test_samples", "batch_size", "epochs", "photo_epochs", "seeds"):
        number(name, getattr(config, name), low=1, integer=True)
    number("queue", config.queue, low=2, integer=True)
    require(len(config.variants) > 0, "variants: got none, expected at least one")
    if config.data == "images":
        return _on_folder(config, out)
    data, stages = data_of(config), Stages(out, config)
    photos = photographs_of(config) if config.photo_variants else None

    def small(samples: Any, **options: Any) -> Any:
        return lambda name, seed: train(name, samples, config, seed, **options)

    found = _trained(config.variants, "", stages, config, small(data, epochs=config.epochs))
    claims, tables = claims_of(found), [_table(found, config, data[0].source, "5 labels a class")]
    if photos is not None:
        how = small(photos, epochs=config.photo_epochs, labels=50)
        seen = _trained(config.photo_variants, "photographs, ", stages, config, how)
        claims += [replace(claim, name=f"CIFAR-10: {claim.name}") for claim in claims_of(seen)]
        tables.append(_table(seen, config, "CIFAR-10", "50 labels a class"))
    return Outcome(SLUG, TITLE, config.preset, asdict(config), claims, tables, [_curves(found, out)])


def _on_folder(config: Config, out: Path) -> Outcome:
    data, stages = full_scale.photographs_of(config), Stages(out, config)
    found = _trained(
        config.variants, "", stages, config, lambda name, seed: full_scale.train(name, data, config, seed, stages), jobs=None
    )  # fmt: skip
    source = f"{len(data[0]):,} photographs of {len(data[0].classes)} classes, {len(data[1]):,} held out"
    table = _table(found, config, source, "linear probe")
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(found), [table], [_curves(found, out)]
    )


def _trained(
    variants: tuple[str, ...],
    stage: str,
    stages: Stages,
    config: Config,
    made: Callable[[str, int], Trained],
    jobs: int | None = 1,
) -> Runs:
    return {
        name: list(
            stages.each(
                f"{stage}{name}, seed {{}}",
                range(config.seeds),
                lambda seed, n=name: made(n, seed),
                Trained,
                jobs=jobs,
            ).values()
        )
        for name in variants
    }


def _table(found: Runs, config: Config, source: str, read_out: str) -> Table:
    shown = ("read_out", "neighbours", "negative_mean", "negative_variance", "raw_variance", "positive_mean", "raw_positive")  # fmt: skip
    rows: list[Any] = []
    for name, runs in found.items():
        spread = statistics.stdev(numbers(runs, "read_out")) if len(runs) > 1 else None
        rows.append([name, *(statistics.mean(numbers(runs, what)) for what in shown), spread])
    columns = [
        "variant",
        read_out,
        "10 neighbours",
        "mean negative",
        "variance of negatives",
        "before transformation",
        "mean positive",
        "before transformation",
    ]
    return Table(
        f"{source}: accuracy of read-outs, and scores in the last quarter (means of {config.seeds} seeds)",
        [*columns, "sd of the first"],
        rows,
    )


def _curves(found: Runs, out: Path) -> Figure:
    names = [n for n in ("MoCo", "negatives", "both", "late positives") if n in found] or list(found)[:4]
    shown = (
        ("positive_mean", "mean positive"),
        ("negative_mean", "mean negative"),
        ("negative_variance", "variance of negatives"),
    )

    def draw(axes: Any) -> None:
        for ax, (what, title) in zip(axes[0], shown):
            for k, name in enumerate(names):
                curves = found[name][0].curves
                ax.plot(curves["step"], curves[what], color=f"C{k}", label=name)
            ax.set(title=title, xlabel="step")
        axes[0, 0].legend(fontsize=7)

    ends = "; ".join(
        f"{name}: " + ", ".join(f"{t} {found[name][0].curves[w][-1]:.3f}" for w, t in shown) for name in names
    )
    made = picture(
        draw, panels=(1, 3), size=(8.4, 2.7), caption="Scores as they enter the loss, by step, of the first seed.",
        alt=f"Curves of scores. At the end: {ends}.",
    )  # fmt: skip
    return save(made, out, "scores")
