"""The options that say how a user's data are read, the same for every command; imports no torch."""

from __future__ import annotations

import argparse
from typing import Any


def add_data_options(parser: argparse.ArgumentParser, *, split: str, model: bool = True) -> None:
    """``split`` says which part of data in several is taken by default, ``model`` whether a given network reads the data."""
    add = parser.add_argument
    order = "model's outputs" if model else "labels"
    add(
        "--classes",
        metavar="NAMES",
        help=f"names of the classes in the order of the {order}, with commas between them, or a text file with one a line",
    )
    add("--inputs", metavar="ARRAY", help="the array or column with the inputs")
    add("--targets", metavar="ARRAY", help="the array or column with the targets")
    add(
        "--split",
        metavar="NAME",
        help=f"of data in parts: Hugging Face, MNIST, CIFAR, arrays x_train and x_test, folders (default: {split})",
    )
    add("--image-size", metavar="H,W", help="bring images to this size")
    if model:
        add(
            "--normalize",
            metavar="MEAN,STD",
            help="two numbers, or one mean for each channel and then one deviation for each",
        )


def add_sample_options(parser: argparse.ArgumentParser, *, samples: int, tasks: str, models: str) -> None:
    """What commands that look at a network's answers to samples ask: which samples, as what task, where; ``samples`` is how many by default."""
    add = parser.add_argument
    add(
        "--groups",
        metavar="ARRAY",
        help="the array or column that names each sample's group, or a .npy or .txt file",
    )
    add("--task", default="auto", metavar="KIND", help=f"{tasks} or auto (default)")
    add(
        "--samples",
        type=int,
        default=samples,
        metavar="N",
        help=f"look at no more samples than this (default: {samples})",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="samples at a time (default: 64)")
    add("--device", metavar="NAME", help=f"cpu, cuda, cuda:1, mps (default: where the {models})")
    add("--seed", type=int, default=0, metavar="N", help="of every random choice (default: 0)")


def data_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of :class:`lineament.audit.data_options.DataOptions`, from the options that both functions above add."""
    from lineament.cli.option_values import image_size, normalize

    named = {name: getattr(arguments, name) for name in ("inputs", "targets", "split", "task", "batch_size")}
    return {
        **named,
        "image_size": image_size(arguments.image_size),
        "normalize": normalize(arguments.normalize),
    }


def add_engine(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option that says where independent jobs run."""
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help=f"run {what} side by side: loky (processes of this machine), ray or dask",
    )
