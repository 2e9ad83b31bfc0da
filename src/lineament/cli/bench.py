"""The command ``lineament bench``: ours against the peers, each row as soon as it is measured."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any

from lineament.cli.data_options import add_engine
from lineament.cli.parser import Parser

_EPILOG = """examples:
  lineament bench --quick
  lineament bench diffgrad normgrad --json rows.json
  lineament bench audit --quick

Each row is printed, and written to the file, as soon as it is measured; a killed run with --json goes on when
the same command is given again."""


def add_parser(subparsers: Any) -> Parser:
    """Add ``bench`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "bench",
        help="ours against the peers, side by side, and the audit against networks of known truth",
        description="How fast is this library beside its peers, row by row? And how often is the audit right? The latter is `bench audit`: networks "
        "whose shortcuts, confidence, groups, units and minima are known are made and audited, and what was found is counted.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("slugs", metavar="SLUG", nargs="*", help="benchmarks to run (default: all)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--quick", action="store_true", help="small sizes, once each: all in five minutes")
    parser.add_argument(
        "--repeats", metavar="N", type=int, help="timings of each side (default: each file's own)"
    )
    add_engine(parser, "the networks of the battery (bench audit)")
    parser.prepare = _with_slugs
    parser.set_defaults(run=run)
    return parser


def _with_slugs(argv: list[str], parser: Parser) -> tuple[list[str], bool]:
    """The help with the benchmarks that there are, which are looked up only where it is asked for."""
    if {"-h", "--help"} & set(argv):
        from lineament import bench
        from lineament.core.checks import InputError

        try:
            slugs = ", ".join(bench.files())
        except InputError:
            slugs = "none, since no benchmark files are beside this installation"
        there = textwrap.fill(f"SLUG: {slugs}", 96, subsequent_indent="  ", break_on_hyphens=False)
        parser.epilog = f"{_EPILOG}\n\n{there}"
    return argv, False


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmarks one after the other; 1 where one of them ended early."""
    from lineament import bench
    from lineament.cli import console
    from lineament.core.checks import number
    from lineament.report.text import printable

    if arguments.repeats is not None:
        number("repeats", arguments.repeats, low=1, integer=True)
    rows: list[bench.AnyRow] = []
    failed = False
    for item in bench.measure(
        bench.chosen(arguments.slugs),
        repeats=arguments.repeats,
        quick=arguments.quick,
        json=arguments.json,
        engine=arguments.engine,
    ):
        if isinstance(item, bench.Ended):
            failed = True
            print(f"lineament: bench {item.slug} ended early: {printable(item.reason)}", file=sys.stderr)
        else:
            rows.append(item)
            console.show_row(item)
    console.show_total(rows)
    return int(failed)
