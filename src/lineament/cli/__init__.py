"""The command `lineament`: audit, explain, train, papers, reproduce, gallery, bench.

Each command imports what it needs when it runs, so `lineament --help` is there at once. Exit status: 0 when the
work was done, 2 for input that cannot be used (one line on standard error), 130 after Ctrl-C, 1 for anything
unforeseen; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from lineament import __version__

# What these had finished when they were interrupted is used again.
_RESUMED = ("audit", "train", "reproduce")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COMMANDS = ("audit", "explain", "train", "papers", "reproduce", "gallery", "bench")


class UsageError(Exception):
    """A command line that cannot be read; the message is the one line to show."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('lineament ')}: {message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's) and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        return _dispatch([word for word in argv if word != "--debug"])
    except SystemExit as leaving:
        # argparse's way out of --help and --version.
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\nlineament: interrupted; {_again(argv)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            print(
                f"lineament: a file could not be written ({error.strerror}); {_again(argv)} once there is room",
                file=sys.stderr,
            )
            return 1
        if isinstance(error, UsageError) or _is_input_error(error):
            print(f"lineament: {_in_words_of_the_command(_one_line(error), error, argv)}", file=sys.stderr)
            return 2
        what = f"{type(error).__name__}: {_one_line(error)}".rstrip(": ")
        print(f"lineament: unexpected {what} (give --debug to see where)", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    parser, commands = build_parser()
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and first not in COMMANDS:
        raise UsageError(f"no command {first!r}{_nearest(first, COMMANDS)} (see lineament --help)")
    if first is None and not {"-h", "--help", "--version"} & set(argv):
        unknown = next((word for word in argv if word.startswith("-")), None)
        if unknown is not None:
            raise UsageError(
                f"no option {unknown!r}{_nearest(unknown, _options(parser))} (see lineament --help)"
            )
        parser.print_help()
        return 0
    fields: dict[str, str] = {}
    if first == "reproduce" and {"-h", "--help"} & set(argv) and (slug := _word_after(argv, "reproduce")):
        from lineament.cli import console
        from lineament.recipes import fields as fields_of

        found = fields_of(slug)
        commands["reproduce"].print_help()
        print()
        console.show_fields(slug, found)
        return 0
    if first == "reproduce":
        argv, fields = _split_fields(argv)
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        known = _options(commands[arguments.command])
        raise UsageError(
            f"{arguments.command}: no option or argument {extra[0]!r}{_nearest(extra[0], known)} "
            f"(see lineament {arguments.command} --help)"
        )
    if first == "reproduce":
        arguments.fields = fields
    return int(arguments.run(arguments) or 0)


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of the whole command and those of its commands; building them imports no torch."""
    parser = Parser(
        prog="lineament",
        description="Find, measure, test and change the features that neural networks learn.",
        epilog="Exit status: 0 the work was done, 2 the input cannot be used, 130 interrupted, 1 anything else.",
    )
    parser.add_argument("--version", action="version", version=f"lineament {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for place in ("lineament.cli.audit", "lineament.cli.explain", "lineament.cli.train"):
        importlib.import_module(place).add_parser(commands)

    papers = commands.add_parser("papers", help="the catalogue: 29 papers, newest first, with what runs each")
    papers.add_argument("--search", metavar="TEXT", default="", help="only papers in which every word occurs")
    papers.add_argument("--json", action="store_true", help="write the entries as JSON")
    papers.set_defaults(run=_papers)

    reproduce = commands.add_parser(
        "reproduce",
        help="run a paper's headline claims and judge them",
        usage="lineament reproduce SLUG [--preset quick|small|paper] [--out DIR] [--overwrite] [--FIELD VALUE ...]",
        epilog="Every field of the recipe's Config can be given as --FIELD VALUE, say --seed 3; `lineament reproduce SLUG "
        "--help` lists them. A killed run goes on "
        "when the same command is given again.",
    )
    reproduce.add_argument("slug", metavar="SLUG", help="the paper (see lineament papers)")
    reproduce.add_argument(
        "--preset", default="quick", help="quick (a minute), small (ten) or paper (full scale)"
    )
    reproduce.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/SLUG-PRESET)")
    reproduce.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
    reproduce.set_defaults(run=_reproduce)

    gallery = commands.add_parser("gallery", help="every outcome as a browsable static site")
    gallery.add_argument("runs", metavar="RUNS", help="a folder with runs in it (searched to any depth)")
    gallery.add_argument("--out", metavar="SITE", required=True, help="the folder for the site")
    gallery.set_defaults(run=_gallery)

    bench = commands.add_parser("bench", help="ours against the peers, side by side")
    bench.add_argument("slugs", metavar="SLUG", nargs="*", help="benchmarks to run (default: all)")
    bench.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    bench.add_argument(
        "--repeats", metavar="N", type=int, help="timings of each side (default: each file's own)"
    )
    bench.set_defaults(run=_bench)
    for command in commands.choices.values():
        # Taken out of the line before parsing; here so that --help names it.
        if "--debug" not in _options(command):
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, commands.choices


def _papers(arguments: argparse.Namespace) -> int:
    from lineament.papers import search

    found = search(arguments.search)
    if arguments.json:
        import json

        print(json.dumps([paper.to_dict() for paper in found], indent=2, ensure_ascii=False))
        return 0
    from lineament.cli import console

    console.show_papers(found, arguments.search)
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from lineament.cli import console
    from lineament.recipes.kit.run import reproduce

    run = reproduce(
        arguments.slug,
        arguments.preset,
        arguments.fields,
        out=arguments.out,
        overwrite=arguments.overwrite,
        note=console.note,
    )
    console.show_run(run)
    return 0


def _gallery(arguments: argparse.Namespace) -> int:
    from lineament.cli import console
    from lineament.papers import search
    from lineament.recipes import preset_configs
    from lineament.report.gallery import build

    site = build(
        arguments.runs,
        arguments.out,
        catalogue=[paper.to_dict() for paper in search()],
        presets=preset_configs(),
    )
    console.show_site(site)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from lineament import bench
    from lineament.cli import console
    from lineament.core.checks import number

    if arguments.repeats is not None:
        number("--repeats", arguments.repeats, low=1, integer=True)
    return console.show_bench(bench.chosen(arguments.slugs), arguments.repeats, arguments.json)


def _again(argv: Sequence[str]) -> str:
    command = next((word for word in argv if not word.startswith("-")), None)
    return f"the same command {'goes on where it stopped' if command in _RESUMED else 'begins anew'}"


def _word_after(argv: Sequence[str], command: str) -> str | None:
    following = argv[argv.index(command) + 1 :][:1]
    return next((word for word in following if not word.startswith("-")), None)


def _split_fields(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """``--FIELD VALUE`` and ``--FIELD=VALUE`` taken out of a `reproduce` line, for the recipe to judge."""
    valued, flags = {"--preset", "--out"}, {"--overwrite", "--help", "--version"}
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


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """The long options that a parser's help names."""
    return sorted(set(re.findall(r"--[a-z][a-z-]*", parser.format_help())))


def _nearest(word: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    near = difflib.get_close_matches(word.split("=")[0], choices, n=1, cutoff=0.4)
    return f"; nearest: {near[0]!r}" if near else f"; there are: {', '.join(choices)}"


def _is_input_error(error: Exception) -> bool:
    # Asked of the loaded modules: importing the checks here would import torch for nothing.
    checks = sys.modules.get("lineament.core.checks")
    return checks is not None and isinstance(error, checks.InputError)


def _in_words_of_the_command(text: str, error: Exception, argv: Sequence[str]) -> str:
    """The message with the option in place of the library's argument that it begins with."""
    argument = getattr(error, "argument", None)
    command = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser()[1].get(command or "")
    if argument is None or parser is None:
        return text
    option = f"--{argument.replace('_', '-')}"
    if option not in _options(parser) and command != "reproduce":
        if not re.search(rf"\b{argument.upper()}\b", parser.format_usage()):
            return text
        option = argument.upper()
    return option + text.removeprefix(argument)


def _one_line(error: Exception) -> str:
    """An error's text on one line, with nothing in it that could act on a terminal."""
    from lineament.report.text import printable

    return printable(" ".join(str(error).split()), limit=2000)
