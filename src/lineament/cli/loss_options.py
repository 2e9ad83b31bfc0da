"""The options of `lineament train` that choose a loss for embeddings; imports no torch."""

from __future__ import annotations

import argparse

# The losses by their names, and what kind each is.
LOSSES = {
    **dict.fromkeys(
        (
            *("norm-softmax", "sphereface", "cosface", "arcface", "combined", "elastic-arc", "elastic-cos"),
            *("magface", "curricularface", "adaface"),
        ),
        "classes",
    ),
    "supcon": "views",
    "simclr": "views",
    "moco": "keys",
}
# Which losses take an option; None: all of them.
_CLASSES = tuple(name for name, kind in LOSSES.items() if kind == "classes")
_CONTRASTIVE = tuple(name for name in LOSSES if name not in _CLASSES)
TAKES: dict[str, tuple[str, ...]] = {
    "scale": _CLASSES,
    "margin": tuple(name for name in _CLASSES if name != "norm-softmax"),
    "sigma": ("elastic-arc", "elastic-cos"),
    "match": ("elastic-arc", "elastic-cos"),
    "guard": ("arcface", "elastic-arc", "magface"),
    "unpg": tuple(name for name in _CLASSES if name != "curricularface"),
    "sample_classes": tuple(name for name in _CLASSES if name != "curricularface"),
    "temperature": _CONTRASTIVE,
    "queue": ("moco",),
    "ft": ("moco",),
    "ft_start": ("moco",),
}
NAMES = (*TAKES, "head", "head_lr", "views", "embedding", "validation_classes")


def add_loss_options(parser: argparse.ArgumentParser) -> None:
    """The loss, and what only losses for embeddings take; all but the first are ``None`` unless given."""
    add = parser.add_argument_group(
        "embeddings",
        "what a loss other than cross-entropy takes; people, products or voices are then recognised by it",
    ).add_argument
    actions = [
        add("--loss", metavar="NAME", default="cross-entropy", help="cross-entropy (default), " + ", ".join(LOSSES)),
        add("--embedding", metavar="SITE", help="where the embedding passes (default: the model's output)"),
        add("--scale", metavar="S", type=float, help="of the cosines (default: 64)"),
        add("--margin", metavar="M", help="radians or cosine; for combined m1,m2,m3, for magface the smallest and the largest (default: the paper's)"),
        add("--sigma", metavar="S", type=float, help="of elastic margins (default: 0.05)"),
        add("--match", metavar="HOW", help="give elastic margins out by rank, or as the official code does"),
        add("--guard", metavar="HOW", help="none, taylor or easy: where the margin would turn the cosine"),
        add("--unpg", metavar="R", nargs="?", const=1.5, type=float, help="unlike pairs of the batch as negatives, within R interquartile ranges (default when given alone: 1.5)"),
        add("--sample-classes", metavar="SHARE", type=float, help="of the classes that a step computes (default: 1)"),
        add("--head", metavar="KIND", help="train through a projection and throw it away: none, linear, mlp, mlp2 or fixed[:KAPPA] (default: mlp for supcon, simclr and moco, else none)"),
        add("--head-lr", metavar="RATE", type=float, help="of the projection and the class directions (default: --lr)"),
        add("--temperature", metavar="T", type=float, help="(default: 0.1 for supcon, 0.5 for simclr, 0.07 for moco)"),
        add("--queue", metavar="K", type=int, help="past keys as negatives (default: 4096)"),
        add("--ft", metavar="pos,neg", help="extrapolate positives, interpolate negatives, or both"),
        add("--ft-start", metavar="E", type=int, help="extrapolate from this epoch on, counted from 0 (default: 0)"),
        add("--views", metavar="NAMES", help="what a view does, with commas between them: flip, crop, jitter, noise, erase (default: flip,crop for simclr, moco and supcon on images, jitter,noise else)"),
        add("--validation-classes", metavar="SHARE", type=float, help="of the classes that are held out and recognised after each epoch (default: 0.2, and 2 classes or more; 0: none)"),
    ]  # fmt: skip
    for action in actions:
        parser.names[action.dest] = action.option_strings[0]  # pyright: ignore[reportAttributeAccessIssue]
    # What losses, queues and networks call them.
    own = {
        "whisker": "--unpg",
        "size": "--queue",
        "sample": "--sample-classes",
        "sites": "--embedding",
        "start": "--ft-start",
    }
    own |= dict.fromkeys(("m", "m1", "m2", "m3", "margins"), "--margin")
    parser.names.update(own)  # pyright: ignore[reportAttributeAccessIssue]
