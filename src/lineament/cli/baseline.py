"""The subcommand ``lineament baseline``; imports no torch before it runs."""

from __future__ import annotations

import argparse
from typing import Any

_EPILOG = """examples:
  lineament baseline digits --out beat
  lineament baseline ./photos --features pixels,hog,lbp,gabor --classifiers svm,knn,forest --splits 3 --out beat
  lineament baseline data.npz --features hog,net.py:make:layer3 --classifiers svm,gbnn,infinite --out beat

A run that was cut off goes on where it stopped when the same command is given again."""


def add_parser(subparsers: Any) -> Any:
    """Add ``baseline`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "baseline",
        help="what a network must beat: fixed descriptors and classical classifiers on your data",
        description="What must a network beat on these data? Each descriptor with each classifier, tuned on a training part, looked at once "
        "on a test part. Writes baseline.html, baseline.json, the chosen settings and the best model (scikit-learn's where skops is installed).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="as for audit; with class labels")
    add(
        "--out",
        metavar="DIR",
        default="lineament-baseline",
        help="the folder for the page (default: lineament-baseline)",
    )
    add("--overwrite", action="store_true", help="replace a finished baseline in that folder")
    add(
        "--features",
        metavar="NAMES",
        help="with commas: pixels, hog, hog-fine, lbp, lbp-whole, gabor, gabor-whole, MODEL:SITE; columns for data that are no images (default: pixels,hog,lbp,gabor or columns)",
    )
    add(
        "--classifiers",
        metavar="NAMES",
        default="svm,knn,forest",
        help="with commas: svm, knn, forest, gbdt, gbnn, infinite (default: svm,knn,forest)",
    )
    add("--splits", type=int, default=1, metavar="N", help="random splits, for the spread (default: 1)")
    add(
        "--samples",
        type=int,
        default=5000,
        metavar="N",
        help="look at no more samples than this (default: 5000)",
    )
    add("--test", type=float, default=0.2, metavar="SHARE", help="of the samples (default: 0.2)")
    add(
        "--effort",
        default="small",
        metavar="KIND",
        help="how many settings are tried: none, small (default) or full",
    )
    add("--ink", action="store_true", help="for glyphs: bright ink, cropped to it and centred, first")
    add("--inputs", metavar="ARRAY", help="the array or column with the inputs")
    add("--targets", metavar="ARRAY", help="the array or column with the class labels")
    add("--split", metavar="NAME", help="of a Hugging Face data set (default: test, validation or train)")
    add("--image-size", metavar="H,W", help="bring images to this size")
    add("--seed", type=int, default=0, metavar="N", help="of every random choice (default: 0)")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Make the table, and say where the page is."""
    from lineament.audit.baseline import BaselineOptions, baseline
    from lineament.cli.console import note
    from lineament.cli.option_values import image_size
    from lineament.report.text import printable

    words = lambda text: [word.strip() for word in text.split(",") if word.strip()]  # noqa: E731
    found = baseline(
        arguments.data,
        out=arguments.out,
        features=None if arguments.features is None else words(arguments.features),
        classifiers=words(arguments.classifiers),
        splits=arguments.splits,
        samples=arguments.samples,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
        note=note,
        options=BaselineOptions(
            inputs=arguments.inputs,
            targets=arguments.targets,
            split=arguments.split,
            image_size=image_size(arguments.image_size),
            effort=arguments.effort,
            ink=arguments.ink,
            test=arguments.test,
        ),
    )
    for finding in found.findings:
        print(f"{finding.severity:>8}  {printable(finding.sentence)}")
    print(f"Page: {found.html.resolve()}")
    return 0
