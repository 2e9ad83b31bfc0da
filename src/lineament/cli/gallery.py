"""The command ``lineament gallery``: every outcome as a static site."""

from __future__ import annotations

import argparse
from typing import Any

from lineament.cli.parser import Parser


def add_parser(subparsers: Any) -> Parser:
    """Add ``gallery`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser("gallery", help="every outcome as a browsable static site")
    parser.add_argument("runs", metavar="RUNS", help="a folder with runs in it (searched to any depth)")
    parser.add_argument("--out", metavar="SITE", required=True, help="the folder for the site")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Build the site, and say where it is."""
    from lineament.cli import console
    from lineament.papers import search
    from lineament.recipes.kit.configuration import preset_configs
    from lineament.report.gallery import build

    catalogue = [paper.to_dict() for paper in search()]
    console.show_site(build(arguments.runs, arguments.out, catalogue=catalogue, presets=preset_configs()))
    return 0
