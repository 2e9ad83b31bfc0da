"""The subcommand ``lineament compare``; imports no torch before it runs."""

from __future__ import annotations

import argparse
from typing import Any

_EPILOG = """examples:
  lineament compare net.py:make net.py:make data.npz --weights-a seed0.safetensors --weights-b seed1.safetensors --out compared
  lineament compare ./resnet-before ./resnet-after ./photos --groups site --out compared
  lineament compare ./gpt2-saved ./llama-saved prompts.txt --out compared

A run that was cut off goes on where it stopped when the same command is given again."""


def add_parser(subparsers: Any) -> Any:
    """Add ``compare`` to the commands of :mod:`lineament.cli`."""
    from lineament.cli.data_options import add_data_options, add_sample_options

    parser = subparsers.add_parser(
        "compare",
        help="two networks unit by unit: which features the other has too, and where their answers part",
        description="Which units of one network has the other, too, what has only one of them, and where do their answers part? "
        "Writes compare.html and compare.json.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    kinds = "package.module:factory, file.py:factory, or a Hugging Face directory or name"
    add("model_a", metavar="MODEL_A", help=kinds)
    add("model_b", metavar="MODEL_B", help="the same; another architecture may be compared, too")
    add(
        "data",
        metavar="DATA",
        help="as for audit; for two language models a .txt or .jsonl file of prompts, or ioi",
    )
    add(
        "--out",
        metavar="DIR",
        default="lineament-compare",
        help="the folder for the page (default: lineament-compare)",
    )
    add("--overwrite", action="store_true", help="replace a finished comparison in that folder")
    for which in "ab":
        add(
            f"--weights-{which}",
            metavar="FILE",
            help=f"a checkpoint for the network that MODEL_{which.upper()} makes",
        )
    add(
        "--sites",
        "--site",
        metavar="GLOB",
        action="append",
        help="places that both have, A=B for names that differ, or nearest (may be repeated; default: the blocks)",
    )
    add_data_options(parser, split="test, validation or train")
    add_sample_options(
        parser, samples=1000, tasks="classification, multi-label, regression, embedding", models="models are"
    )
    add(
        "--positions",
        type=int,
        default=64,
        metavar="N",
        help="places of a map or text looked at (default: 64)",
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Compare, and say where the page is."""
    import os

    from lineament.audit.compare import CompareOptions, compare
    from lineament.cli.console import note
    from lineament.cli.data_options import data_options
    from lineament.cli.option_values import classes
    from lineament.report.text import printable

    options = CompareOptions(
        weights_a=arguments.weights_a,
        weights_b=arguments.weights_b,
        **data_options(arguments),
        positions=arguments.positions,
    )
    found = compare(
        arguments.model_a,
        arguments.model_b,
        arguments.data,
        out=arguments.out,
        overwrite=arguments.overwrite,
        sites=_sites(arguments.sites),
        classes=classes(arguments.classes),
        groups=arguments.groups,
        samples=arguments.samples,
        device=arguments.device,
        seed=arguments.seed,
        note=note,
        options=options,
    )
    if os.environ.get("RANK", "0") != "0":  # the first of several processes says it
        return 0
    for finding in found.findings:
        print(f"{finding.severity:>8}  {printable(finding.sentence)}")
    print(f"Page: {found.html.resolve()}")
    return 0


def _sites(words: list[str] | None) -> Any:
    """Names, a mapping where each is ``A=B``, or ``"nearest"``."""
    from lineament.core.checks import require

    if not words:
        return None
    if words == ["nearest"]:
        return "nearest"
    pairs = [word.partition("=") for word in words]
    require(
        len({bool(sign) for _, sign, _ in pairs}) == 1,
        f"--sites: got {' and '.join(words[:2])}, expected names that both networks have, or A=B in every one",
    )
    return {a: b for a, _, b in pairs} if pairs[0][1] else words
