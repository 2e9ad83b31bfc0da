"""The command ``lineament papers``: the catalogue."""

from __future__ import annotations

import argparse
from typing import Any

from lineament.cli.parser import Parser


def add_parser(subparsers: Any) -> Parser:
    """Add ``papers`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "papers", help="the catalogue: 29 papers, newest first, with what runs each"
    )
    parser.add_argument("--search", metavar="TEXT", default="", help="only papers in which every word occurs")
    parser.add_argument("--json", action="store_true", help="write the entries as JSON")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the catalogue."""
    from lineament.papers import search

    found = search(arguments.search)
    if arguments.json:
        import json

        print(json.dumps([paper.to_dict() for paper in found], indent=2, ensure_ascii=False))
        return 0
    from lineament.cli import console

    console.show_papers(found, arguments.search)
    return 0
