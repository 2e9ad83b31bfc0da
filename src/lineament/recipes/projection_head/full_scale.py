"""A ResNet-50 with a head on the user's folder of photographs: what stands before the head and after it, of classes, of their sub-folders, and for the worst group.

The numbers are the released code's for Waterbirds and CelebA. Sub-folders of a class, ``train/CLASS/PART/*.jpg``, are its sub-classes, which the training is
not told, and the groups of the worst one.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, number, require, suggest
from lineament.data.augmentation import flip
from lineament.learn.projection.heads import WithHead, projection_head
from lineament.learn.projection.layers import layers_worth
from lineament.learn.projection.photograph_views import photograph_view, resized_crop
from lineament.learn.projection.robust import DFRMLP
from lineament.losses.contrastive import NTXent, SupCon
from lineament.recipes.kit.configuration import several_of
from lineament.recipes.kit.picture_folders import Photographs, ResNet, WholeBatches, features, folders_of
from lineament.recipes.kit.stages import Stages
from lineament.recipes.projection_head.claims import on_folder, values
from lineament.recipes.projection_head.training import Classified, Groups, Pair, Probed, probed
from lineament.report.outcome import Outcome, Table
from lineament.train.batches import Batch
from lineament.train.loop import Run, fit

HEADS = {
    "no head": "none", "linear head": "linear", "MLP head": "mlp", "MLP head of three layers": "mlp2", "identity head": "identity",
    "diagonal head": "diagonal", "fixed head": "fixed",
}  # fmt: skip
TRAININGS = {f"{how}, {name}": (how, head) for how in ("SL", "SCL", "SimCLR") for name, head in HEADS.items()}


@dataclass(frozen=True)
class Worth:
    """Read-outs before and after the head, and those for the worst group where there are groups."""

    read: Probed
    groups: Groups | None


@dataclass(frozen=True)
class Part:
    """Pictures, and the number of each one's sub-folder."""

    pictures: Photographs
    parts: Tensor


def at_full_scale(config: Any, out: Path, slug: str, title: str) -> Outcome:
    """Every training for every seed; a killed run goes on from its last epoch."""
    several_of("kinds", config.kinds, TRAININGS)
    for name in ("epochs", "seeds", "batch_size", "probe_samples", "mlp_hidden"):
        number(name, getattr(config, name), low=1 if name != "batch_size" else 2, integer=True)
    for name in ("rate", "temperature"):
        number(name, getattr(config, name), low=0, open_low=True)
    number("decay", config.decay, low=0)
    require(len(config.kinds) > 0, "kinds: got none, expected at least one")
    low, high = (number("crop", share, low=0, high=1, open_low=True) for share in config.crop)
    require(low <= high, f"crop: got {low:g} to {high:g}, expected the smaller first")
    config.checked()
    pictures, divided = _read(config)
    stages, found = Stages(out, config), {}
    for name in config.kinds:
        each = stages.each(
            f"{name}, seed {{}}", range(config.seeds), lambda seed, n=name: worth(n, *pictures, divided, config, seed, stages), Worth, jobs=None
        )  # fmt: skip
        found[name] = list(each.values())
    claims = on_folder(found, divided)
    return Outcome(
        slug, title, config.preset, asdict(config), claims, _tables(found, pictures, divided, config)
    )


def _read(config: Any) -> tuple[tuple[Part, Part], bool]:
    """Both parts, and whether classes are divided into sub-folders."""
    read = folders_of(config.data_folder, config.image_size)
    names = sorted(set(read[0].parts))
    for name in sorted(set(read[1].parts)):
        if name not in names:
            raise InputError(f"data_folder: the held-out pictures have the sub-folder {name!r}, which those to train on have not{suggest(name, names, most=1)}")  # fmt: skip
    made = [Part(each, torch.tensor([names.index(p) for p in each.parts])) for each in read]
    divided = any("/" in name for name in names)
    require(
        config.probe_samples >= 2 * len(names),
        f"probe_samples: got {config.probe_samples}, expected at least two of each of {len(names)} classes or sub-folders",
    )
    counts = torch.bincount(made[1].parts, minlength=len(names))
    few = [name for name, count in zip(names, counts.tolist()) if count < 2]
    require(
        not divided or not few,
        f"data_folder: fewer than two held-out pictures in {', '.join(map(repr, few[:3]))}; each sub-folder's are halved, to read out from and to judge by",
    )
    return (made[0], made[1]), divided


def worth(name: str, train: Part, test: Part, divided: bool, config: Any, seed: int, stages: Stages) -> Worth:
    """Train it with a head; then read out of its features before the head and after it."""
    (how, kind), label = TRAININGS[name], f"{name}, seed {seed}"
    encoder = ResNet(config, seed, config.weights)

    def head(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return projection_head(kind, encoder.width, kappa=config.kappa)  # pyright: ignore[reportArgumentType]

    net = WithHead(encoder, head(seed + 1000))
    whole = Classified(net, len(train.pictures.classes), seed, width=encoder.width) if how == "SL" else net
    loss: dict[str, Any] = {"SCL": {"loss": SupCon(config.temperature, on_missing="skip")}}
    contrast = NTXent(config.temperature)
    loss["SimCLR"] = {"loss": lambda z, _: contrast(z)}
    fit(
        whole.to(config.checked()), train.pictures, epochs=config.epochs, batch_size=config.batch_size, seed=seed, **loss.get(how, {}),
        optimizer=lambda net: torch.optim.SGD(net.parameters(), config.rate, momentum=0.9, weight_decay=config.decay),
        callbacks=[WholeBatches(), Seen(how, config), *config.callbacks()], checkpoint=stages.checkpoint, name=f"{label}, training",
    )  # fmt: skip
    net.eval().requires_grad_(False)
    x, y = (_some(encoder, part, config, seed) for part in (train, test))
    net.to("cpu")
    read = probed(net.head, head(seed + 500), x, y)
    groups = _worst(net.head, *y, config, seed) if divided else None
    return Worth(read, groups)


class Seen:
    """One crop of each picture, perhaps mirrored; for SimCLR two views, and each label twice."""

    def __init__(self, how: str, config: Any):
        self.twice, self.size, self.crop = how == "SimCLR", config.image_size, config.crop

    def on_batch(self, run: Run, batch: Batch) -> None:
        x = batch.inputs
        if self.twice:
            batch.inputs = torch.cat([photograph_view(x, self.size) for _ in range(2)])
            batch.targets = batch.targets.repeat(2)
        else:
            batch.inputs = flip(resized_crop(x, self.size, area=self.crop))


def _some(encoder: nn.Module, part: Part, config: Any, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, sub-folders and classes of pictures drawn by ``seed``, so many in all and as many of each sub-folder at most."""
    order = torch.randperm(len(part.parts), generator=torch.Generator().manual_seed(seed))
    names = part.parts.unique()
    most = config.probe_samples // len(names)
    rows = torch.cat([order[part.parts[order] == name][:most] for name in names])
    chosen = part.pictures.some(rows)
    return (
        features(encoder, chosen, config, max(32, config.batch_size)),
        part.parts[rows],
        part.pictures.labels[rows],
    )


def _worst(head: nn.Module, y: Tensor, parts: Tensor, classes: Tensor, config: Any, seed: int) -> Groups:
    """One half of each group's held-out pictures to read out from, the other to judge by."""
    generator = torch.Generator().manual_seed(seed)
    halves: list[list[Tensor]] = [[], []]
    for group in parts.unique():
        rows = (parts == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for half, some in zip(halves, rows.tensor_split(2)):
            half.append(some)
    tune, judge = (torch.cat(half) for half in halves)
    found = layers_worth(
        WithHead(nn.Identity(), head), (y[tune], classes[tune]), (y[judge], classes[judge]), sites=["encoder", "head"],
        groups=(parts[tune], parts[judge]), mlp=DFRMLP(config.mlp_hidden, seed=seed),
    )  # fmt: skip

    def pair(name: str) -> Pair:
        before, after = (getattr(found[site], name).worst for site in ("encoder", "head"))
        return Pair(before, after)

    return Groups(pair("dfr"), pair("dfr_standardised"), pair("dfr_mlp"))


def _tables(
    found: dict[str, list[Worth]], pictures: tuple[Part, Part], divided: bool, config: Any
) -> list[Table]:
    train, test = pictures
    shown = {"class, standardised": "fine_standardised", "class, as it is": "fine"}
    if divided:
        shown = {name.replace("class", "sub-folder"): what for name, what in shown.items()} | {
            "class, as it is": "coarse"
        }
    rows: list[Any] = []
    for name, each in found.items():
        for side in ("before", "after", "untrained", "components"):
            read = [one.read for one in each]
            numbers = [values(read, side, what) for what in shown.values()]
            spread = statistics.stdev(numbers[0]) if len(each) > 1 else None
            rows.append([name, side, *map(statistics.mean, numbers), spread])
    source = f"{len(train.pictures):,} photographs of {len(train.pictures.classes)} classes, {len(test.pictures):,} held out"
    if config.probe_samples < max(len(train.pictures), len(test.pictures)):
        source += f" (read out from at most {config.probe_samples:,} of each)"
    tables = [
        Table(
            f"{source}: accuracy of a logistic read-out (means of {config.seeds} seeds)",
            ["training", "features", *shown, "sd of the first"],
            rows,
        )
    ]  # fmt: skip
    worst: list[Any] = []
    for name, each in found.items():
        for how, title in (("dfr", "DFR"), ("standardised", "DFR, standardised"), ("mlp", "DFR-MLP")):
            pairs = [getattr(one.groups, how) for one in each if one.groups is not None]
            if pairs:
                worst.append([name, title, *(statistics.mean(getattr(p, s) for p in pairs) for s in ("before", "after"))])  # fmt: skip
    if worst:
        tables.append(Table("The worst group", ["training", "read-out", "before the head", "after the head"], worst))  # fmt: skip
    return tables
