"""The papers on faces at their own scale, on the user's folders: an iResNet trained on a folder a person, judged by lists of pairs, templates and distractors.

What LFW, CFP, AgeDB and K-FACE ask is a list of pairs, IJB a list of templates and one of their pairs, MegaFace people sought among distractors.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require
from lineament.core.models import device_of
from lineament.measure.embeddings.retrieval import identification
from lineament.measure.embeddings.verification import (
    best_threshold_accuracy,
    fold_accuracy,
    nearest_tar_at_far,
    tar_at_far,
    template_features,
    with_flips,
)  # fmt: skip
from lineament.recipes.kit.claims import higher
from lineament.recipes.kit.face_pictures import Listed, Lists, Pictures, people_of, strangers_of
from lineament.recipes.kit.iresnet import iresnet
from lineament.recipes.kit.stages import Stages
from lineament.recipes.kit.threads import usable_device
from lineament.report.outcome import Claim, Table
from lineament.train.callbacks import Augment, Autocast, Rate
from lineament.train.loop import Run, fit


@dataclass(frozen=True)
class FaceFolders:
    """Fields of a recipe that can be run on the user's faces.

    Attributes:
        people_folder: a folder a person, to train on; the recipe then runs on faces alone. Its heads, epochs and seeds are the recipe's.
        pair_lists: files of lines ``picture picture 0|1``. picture_folder: where the lists' pictures lie; beside each list by default.
        template_list, template_pairs: files of lines ``picture template medium`` and ``template template 0|1``.
        probe_folder, distractor_folder: a folder a person to be sought, and pictures of others.
        protocol: ``"insightface"``: flips added, ten folds, false-accept rates never exceeded. ``"unpg"``: flips concatenated (none in templates), the best threshold, the nearest rate.
        depth, channels, dropout, image_size: of the iResNet. face_batch: samples a step; the rate is 0.1 at 512, in proportion. face_scale: of the heads.
    """

    people_folder: str | None = None
    pair_lists: tuple[str, ...] = ()
    picture_folder: str | None = None
    template_list: str | None = None
    template_pairs: str | None = None
    probe_folder: str | None = None
    distractor_folder: str | None = None
    fars: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6)
    protocol: Literal["insightface", "unpg"] = "insightface"

    depth: int = 50
    channels: int = 64
    dropout: float = 0.0
    image_size: int = 112
    face_batch: int = 512
    face_scale: float = 64.0
    device: str = "auto"
    bfloat16: bool = False


def on_faces(config: FaceFolders) -> bool:
    """Whether the recipe is to be run on the user's faces.

    Raises:
        InputError: something to judge by is given, and nothing to train on.
    """
    names = ("pair_lists", "template_list", "template_pairs", "probe_folder", "distractor_folder")
    given = [name for name in names if getattr(config, name)]
    require(config.people_folder is not None or not given, f"people_folder: got none beside {', '.join(given)}, expected a folder to train on")  # fmt: skip
    return config.people_folder is not None


@dataclass(frozen=True)
class Official:
    """What the papers' own trainings differ in: the rate's course, the norm at which the network's gradients are clipped, and how convolutions are drawn."""

    rate: Callable[[], Rate]
    clip: float | None
    init: Literal["normal", "fan-out"]


class FaceNet(nn.Module):
    """An embedding and the loss that it is trained with."""

    def __init__(self, embed: nn.Module, loss: nn.Module):
        super().__init__()
        self.embed, self.loss = embed, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x)


class _ClipEmbedding:
    """Clips the gradients of the embedding, not of the head."""

    def __init__(self, norm: float):
        self.norm = norm

    def on_gradients(self, run: Run) -> None:
        nn.utils.clip_grad_norm_(run.model.get_submodule("embed").parameters(), self.norm)


@dataclass(frozen=True)
class Comparisons:
    """What the trained embeddings are judged by."""

    pictures: Pictures
    pairs: Mapping[str, Listed]
    templates: tuple[Tensor, Tensor, Tensor, Listed] | None
    among: tuple[Pictures, Pictures] | None


def comparisons_of(config: FaceFolders) -> Comparisons:
    """Every list and folder of the configuration, looked up; nothing is opened yet but the lists.

    Raises:
        InputError: none is given, one of two that belong together, or what the lists name is not there.
    """
    for first, second in (("template_list", "template_pairs"), ("probe_folder", "distractor_folder")):
        for given, other in ((first, second), (second, first)):
            require(
                getattr(config, given) is None or getattr(config, other) is not None,
                f"{other}: got none beside {given}, expected both",
            )
    given = (config.pair_lists, config.template_list, config.probe_folder)
    require(
        any(given),
        "pair_lists: got none, and neither template_list nor probe_folder; expected one of them to judge by",
    )
    for far in config.fars:
        number("fars", far, low=0, high=1, open_low=True)
    lists = Lists(config.picture_folder)
    pairs = {file: lists.pairs("pair_lists", file) for file in config.pair_lists}
    templates = among = None
    if config.template_list is not None and config.template_pairs is not None:
        templates = lists.templates("template_list", config.template_list, config.template_pairs)
    if config.probe_folder is not None and config.distractor_folder is not None:
        probes = people_of("probe_folder", config.probe_folder, config.image_size)
        require(
            int(torch.bincount(probes.labels).max()) > 1,
            f"probe_folder: {config.probe_folder!r} holds no person with two pictures",
        )
        among = probes, strangers_of("distractor_folder", config.distractor_folder, config.image_size)
    return Comparisons(
        Pictures(list(lists.files), [0] * len(lists.files), config.image_size), pairs, templates, among
    )


def on_folders(
    config: Any,
    stages: Stages,
    heads: Mapping[str, Callable[[int, int, int], nn.Module]],
    official: Official,
    compared: Sequence[tuple[str, str, str]],
) -> tuple[list[Claim], list[Table]]:
    """Train each head's network for each seed and judge it; a claim for each comparison (ours, theirs, the paper's word) and number, paired over seeds.

    Args:
        config: :class:`FaceFolders` with ``epochs`` and ``seeds``.
    """
    one_of("protocol", config.protocol, ("insightface", "unpg"))
    number("face_batch", config.face_batch, low=2, integer=True)
    usable_device(config.device)
    given, people = (
        comparisons_of(config),
        people_of("people_folder", config.people_folder, config.image_size, 2),
    )
    found: dict[str, list[dict[str, float]]] = {}
    for name, head in heads.items():
        for seed in range(config.seeds):
            label = f"faces, {name}, seed {seed}"
            made = stages(
                label, lambda h=head, k=seed, n=label: _trained(config, h, official, people, given, k, stages, n), dict[str, float]
            )  # fmt: skip
            found.setdefault(name, []).append(made)
    names = list(next(iter(found.values()))[0])
    claims = [
        higher(f"{ours} beats {theirs}: {name}", paper, *([run[name] for run in found[head]] for head in (ours, theirs)))
        for ours, theirs, paper in compared
        if ours in found and theirs in found
        for name in names
    ]  # fmt: skip
    rows = [
        [head, name, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
        for head, runs in found.items()
        for name in names
        for values in [[run[name] for run in runs]]
    ]
    title = f"iResNet-{config.depth}, {len(people)} pictures in training (means of {config.seeds} seeds)"
    return claims, [Table(title, ["head", "number", "mean", "sd"], rows)]


def _trained(
    config: Any, head: Callable[[int, int, int], nn.Module], official: Official, people: Pictures, given: Comparisons, seed: int,
    stages: Stages, label: str,
) -> dict[str, float]:  # fmt: skip
    size = 512
    loss = head(int(people.labels.max()) + 1, size, seed)
    embed = iresnet(
        config.depth, config.image_size, seed=seed, channels=config.channels, size=size, dropout=config.dropout, init=official.init
    )  # fmt: skip
    device = usable_device(config.device)
    net, rate = FaceNet(embed, loss).to(device), 0.1 * config.face_batch / 512
    callbacks = [official.rate(), Augment(flipped), *([Autocast()] if config.bfloat16 else [])]
    callbacks += [] if official.clip is None else [_ClipEmbedding(official.clip)]
    fit(
        net, people, optimizer=lambda net: torch.optim.SGD((p for p in net.parameters() if p.requires_grad), rate, momentum=0.9, weight_decay=5e-4),
        epochs=config.epochs, batch_size=config.face_batch, loss=loss, seed=seed, callbacks=callbacks, checkpoint=stages.checkpoint,
        name=f"{label}, training",
    )  # fmt: skip
    return judged_by(net.eval(), given, config)


def flipped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of a batch's pictures mirrored."""
    chosen = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)


@torch.no_grad()
def judged_by(net: nn.Module, given: Comparisons, config: FaceFolders) -> dict[str, float]:
    """Accuracies and true-accept rates of an embedding, by names; rates for which no impostor pair may be accepted are left out."""
    found: dict[str, float] = {}
    added = config.protocol == "insightface"
    plain, mirrored = (
        _embedded(net, given.pictures, config.face_batch) if len(given.pictures) else (None, None)
    )
    how = "added" if added else "concatenated"
    if plain is not None and mirrored is not None:
        for file, listed in given.pairs.items():
            scores = _scores(with_flips(plain, mirrored, how), listed.pairs)
            # Ten folds take two rows a pair: two points as far apart as the pair's.
            rows = (2 - 2 * scores).clamp(min=0).sqrt()[:, None] * torch.tensor([0.0, 1.0])
            accuracy = (
                fold_accuracy(rows.reshape(-1, 1), listed.same).mean
                if added
                else best_threshold_accuracy(scores, listed.same)
            )
            found |= {f"{file}: accuracy": accuracy, **_rates(file, scores, listed.same, config)}
        if given.templates is not None:
            rows, templates, media, listed = given.templates
            x, _ = template_features((plain + mirrored if added else plain)[rows], templates, media)
            found |= _rates("templates", _scores(x, listed.pairs), listed.same, config)
    if given.among is not None:
        probes, strangers = (
            with_flips(*_embedded(net, part, config.face_batch), how) for part in given.among
        )
        fars = [far for far in config.fars if far * len(probes) * len(strangers) >= 1]
        made = identification(probes, given.among[0].labels, strangers, fars)
        found["among distractors: rank 1"] = made.rank1
        found |= {f"among distractors: TAR at {far:g}": tar for far, tar in zip(fars, made.tar)}
    return found


def _embedded(net: nn.Module, pictures: Pictures, batch_size: int) -> tuple[Tensor, Tensor]:
    """Rows of pictures and of their mirror images."""
    parts: list[list[Tensor]] = [[], []]
    for batch in pictures.batches(batch_size):
        for part, x in zip(parts, (batch, batch.flip(-1))):
            part.append(net(x.to(device_of(net))).float().cpu())
    return torch.cat(parts[0]), torch.cat(parts[1])


def _scores(unit: Tensor, pairs: Tensor) -> Tensor:
    """The cosine of each pair of rows, a part of the pairs at a time."""
    return torch.cat([(unit[part[:, 0]] * unit[part[:, 1]]).sum(1) for part in pairs.split(2**16)])


def _rates(what: str, scores: Tensor, same: Tensor, config: FaceFolders) -> dict[str, float]:
    fars = [far for far in config.fars if far * int((~same).sum()) >= 1]
    tar = (
        tar_at_far(scores, same, fars)
        if config.protocol == "insightface"
        else nearest_tar_at_far(scores, same, fars)[0]
    )
    return {f"{what}: TAR at {far:g}": value for far, value in zip(fars, tar.tolist())}
