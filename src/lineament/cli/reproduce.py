"""The command ``lineament reproduce``: run a paper's claims and judge them; every field of the recipe's ``Config`` is an option."""

from __future__ import annotations

import argparse
from typing import Any

from lineament.cli.data_options import add_engine
from lineament.cli.parser import Parser, UsageError


def add_parser(subparsers: Any) -> Parser:
    """Add ``reproduce`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "reproduce",
        help="run a paper's headline claims and judge them",
        usage="lineament reproduce SLUG [--preset quick|small|paper] [--out DIR] [--overwrite] [--FIELD VALUE ...]",
        epilog="Every field of the recipe's Config can be given as --FIELD VALUE, say --seed 3; `lineament reproduce SLUG "
        "--help` lists them; several values of one are separated by commas, or by semicolons where a value has a comma. A killed run goes on when the same command is given again.",
    )
    parser.add_argument("slug", metavar="SLUG", help="the paper (see lineament papers)")
    parser.add_argument(
        "--preset", default="quick", help="quick (a minute), small (ten) or paper (full scale)"
    )
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/SLUG-PRESET)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
    add_engine(parser, "seeds and settings")
    parser.set_defaults(run=run, fields={})
    parser.prepare = prepare
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Reproduce, and show what was found."""
    from lineament.cli import console
    from lineament.core.engines import engine
    from lineament.recipes.kit.run import reproduce

    with engine(arguments.engine):
        found = reproduce(
            arguments.slug,
            arguments.preset,
            arguments.fields,
            out=arguments.out,
            overwrite=arguments.overwrite,
            note=console.note,
        )
    console.show_run(found)
    return 0


def prepare(argv: list[str], parser: Parser) -> tuple[list[str], bool]:
    """Take the fields out of the line; with a paper, ``--help`` lists them, and nothing is left to do."""
    following = argv[argv.index("reproduce") + 1 :][:1]
    slug = next((word for word in following if not word.startswith("-")), None)
    if {"-h", "--help"} & set(argv):
        if slug is None:
            return argv, False
        from lineament.cli import console
        from lineament.recipes.kit.configuration import fields

        found = fields(slug)
        parser.print_help()
        print()
        console.show_fields(slug, found)
        return argv, True
    rest, given = split_fields(argv)
    parser.set_defaults(fields=given)
    # A recipe's messages name its fields.
    parser.names |= {name.replace("-", "_"): f"--{name}" for name in given}
    return rest, False


def split_fields(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """``--FIELD VALUE`` and ``--FIELD=VALUE`` taken out of a line, for the recipe to judge."""
    valued, flags = {"--preset", "--out", "--engine"}, {"--overwrite", "--help", "--version"}
    rest: list[str] = []
    fields: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in valued and not equals:
            rest += [word, *([following] if (following := next(words, None)) is not None else [])]
        elif not word.startswith("--") or name in valued | flags:
            rest.append(word)
        else:
            if not equals:
                following = next(words, None)
                if following is None or following.startswith("--"):
                    raise UsageError(f"reproduce: {word} stands without a value, expected {word} VALUE")
                value = following
            if name[2:] in fields:
                raise UsageError(f"reproduce: {name} is given twice")
            fields[name[2:]] = value
    return rest, fields
