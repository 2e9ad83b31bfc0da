"""The subcommand ``lineament condense``; imports no torch before it runs."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

_EPILOG = """examples:
  lineament condense data.npz --per-class 10 --out small
  lineament condense photos/ --per-class 1 --method dcc --evaluate --test other/ --out small
  lineament condense data.npz --per-class 10 --from small --outer 500 --out smaller

The folder holds condensed.npz (the scale of the data), pictures/CLASS/*.png and (where the package datasets is installed) dataset, each opened by train and audit, condensed.json and a page.
Methods: dsac, dcc (summed over classes), dsa, dc (class by class); random, herding, k_center, k_means (chosen, not learned).
A run that was cut off goes on where it stopped when the same command is given again."""


def add_parser(subparsers: Any) -> Any:
    """Add ``condense`` to the commands of :mod:`lineament.cli`."""
    from lineament.cli.data_options import add_data_options

    parser = subparsers.add_parser(
        "condense",
        help="a few learned pictures of each class in place of a data set",
        description="Makes a small data set whose pictures cause a network's gradients of all of them, and says what it is worth.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="labelled images, as for audit")
    add("--per-class", type=int, required=True, metavar="N", help="pictures of each class in the set")
    add("--out", metavar="DIR", required=True, help="the folder for the set and its page")
    add("--overwrite", action="store_true", help="replace a finished set in that folder")
    add("--method", default="dsac", metavar="NAME", help="how (default: dsac; see below)")
    add(
        "--from",
        dest="start",
        default="real",
        metavar="DIR",
        help="begin with a set condensed earlier, real or noise (default: real)",
    )
    add("--outer", type=int, default=1000, metavar="N", help="fresh networks to match on (default: 1000)")
    add(
        "--rate",
        default="scaled",
        metavar="RATE",
        help="of the pictures: scaled (default), paper, or a number",
    )
    add(
        "--strategy",
        metavar="WORDS",
        help="augmentations with _ between them, or none (default: the method's; for digits leave out flip)",
    )
    add("--in-range", action="store_true", help="keep pixels where 8 bits can hold them")
    add("--bfloat16", action="store_true", help="compute what is differentiated once in bfloat16")
    add(
        "--network",
        default="convnet",
        metavar="NAME",
        help="to match gradients on: convnet (default), mlp, lenet, alexnet, vgg11, resnet18",
    )
    add("--evaluate", action="store_true", help="train networks on the set and on what it must beat")
    add(
        "--continual",
        type=int,
        metavar="STEPS",
        help="use it as the memory of a learner that meets the classes in so many parts",
    )
    add(
        "--test",
        metavar="DATA",
        help="data to evaluate on (default: a fifth of DATA, which is then not condensed)",
    )
    add(
        "--networks",
        metavar="NAMES",
        default="convnet,mlp,lenet",
        help="to evaluate on, with commas between them, or all (default: convnet,mlp,lenet)",
    )
    add(
        "--nets",
        type=int,
        default=5,
        metavar="N",
        help="of each kind to evaluate on (default: 5; published: 20)",
    )
    add(
        "--epochs",
        type=int,
        default=100,
        metavar="N",
        help="of each training (default: 100; published: 300, and 1000 with augmentation)",
    )
    add(
        "--samples",
        type=int,
        default=60_000,
        metavar="N",
        help="read no more samples than this (default: 60000)",
    )
    add_data_options(parser, split="train, else the first", model=False)
    add("--device", metavar="NAME", help="cpu (default), cuda, cuda:1, mps")
    add("--seed", type=int, default=0, metavar="N", help="of every random choice (default: 0)")
    parser.names |= {
        "images": "DATA",
        "folder": "--from",
        "steps": "--continual",
        "judged": "--evaluate",
    }
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Condense, and say where the set and the page are."""
    from lineament.audit.condense import CondenseOptions, condense_data
    from lineament.cli.console import note
    from lineament.cli.option_values import classes, image_size, words
    from lineament.core.batching import progress_lines
    from lineament.core.checks import number
    from lineament.learn.condensation.networks import POOL
    from lineament.learn.condensation.options import Condensation
    from lineament.learn.condensation.trials import Protocol
    from lineament.report.text import printable

    rate: Any = arguments.rate
    if rate not in ("scaled", "paper"):
        with suppress(ValueError):  # other words are refused where they are used, which names the choices
            rate = float(rate)
    number("--nets", arguments.nets, low=1, integer=True)
    options = CondenseOptions(
        inputs=arguments.inputs,
        targets=arguments.targets,
        classes=classes(arguments.classes),
        split=arguments.split,
        image_size=image_size(arguments.image_size),
        test=arguments.test,
        network=arguments.network,
        networks=tuple(POOL) if arguments.networks == "all" else words(arguments.networks),
        learning=Condensation(
            outer=arguments.outer,
            rate=rate,
            strategy=arguments.strategy,
            in_range=arguments.in_range,
            bfloat16=arguments.bfloat16,
        ),
        protocol=Protocol(networks=arguments.nets, epochs=arguments.epochs),
    )
    with progress_lines(note):
        found = condense_data(
            arguments.data,
            out=arguments.out,
            per_class=arguments.per_class,
            method=arguments.method,
            start=arguments.start,
            judged=arguments.evaluate,
            steps=arguments.continual,
            samples=arguments.samples,
            seed=arguments.seed,
            options=options,
            overwrite=arguments.overwrite,
            device=arguments.device,
            note=note,
        )
    for finding in found.findings:
        print(f"{finding.severity:>8}  {printable(finding.sentence)}")
    print(f"Set:  {(found.html.parent / 'condensed.npz').resolve()}")
    print(f"Page: {found.html.resolve()}")
    return 0
