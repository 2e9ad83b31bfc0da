"""The command `lineament`: one file a command.

Each command imports what it needs when it runs, so `lineament --help` is there at once. Exit status: 0 when the
work was done, 2 for input that cannot be used (one line on standard error), 130 after Ctrl-C, 1 for anything
unforeseen; `--debug` shows the traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lineament import __version__
from lineament.cli.parser import Parser, UsageError, in_options, nearest

COMMANDS = (
    "audit",
    "compare",
    "explain",
    "train",
    "dictionary",
    "edit",
    "baseline",
    "tables",
    "condense",
    "leak",
    "colorize",
    "papers",
    "reproduce",
    "gallery",
    "bench",
)
# What these had finished when they were interrupted is used again.
_RESUMED = (
    "audit",
    "compare",
    "train",
    "edit",
    "baseline",
    "condense",
    "leak",
    "colorize",
    "reproduce",
    "bench",
)
# These share their work where several processes are started together.
_TOGETHER = ("audit", "compare", "train", "dictionary")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's) and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    parser, commands = build_parser()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    shown, warnings.formatwarning = warnings.formatwarning, warnings.formatwarning if debug else _warning
    try:
        with _terminable(processes):
            return _run(argv, parser, commands, debug, processes)
    finally:
        warnings.formatwarning = shown


def _warning(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as every other line of this command: without the place in the source."""
    return f"lineament: {message}\n"


def _run(argv: list[str], parser: Parser, commands: dict[str, Parser], debug: bool, processes: int) -> int:
    try:
        if processes > 1 and _command(argv) in COMMANDS and _command(argv) not in _TOGETHER:
            raise UsageError(
                f"{_command(argv)}: {processes} processes were started together, and it runs in one; several share the work of {', '.join(_TOGETHER)}"
            )
        return _dispatch([word for word in argv if word != "--debug"], parser, commands)
    except SystemExit as leaving:
        # argparse's way out of --help and --version.
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except _Terminated:
        if who := _ended():
            print(f"lineament: {who} of {processes} ended; {_again(argv)}", file=sys.stderr)
        return 143
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
        if not _speaks(error):
            # The launcher ends all when the first has ended: the one that says why comes before.
            time.sleep(1)
            return 2 if isinstance(error, UsageError) or _is_input_error(error) else 1
        if _is_lost(error) or (processes > 1 and _ended()):
            who = _one_line(error) if _is_lost(error) else f"{_ended()} of {processes} ended"
            print(f"lineament: {who}; {_again(argv)}", file=sys.stderr)
            return 1
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            print(
                f"lineament: a file could not be written ({error.strerror}); {_again(argv)} once there is room",
                file=sys.stderr,
            )
            return 1
        line = _one_line(error)
        if isinstance(error, UsageError) or _is_input_error(error):
            command = commands.get(_command(argv) or "")
            print(f"lineament: {line if command is None else in_options(line, command)}", file=sys.stderr)
            return 2
        what = f"{type(error).__name__}: {line}".rstrip(": ")
        print(f"lineament: unexpected {what} (give --debug to see where)", file=sys.stderr)
        return 1


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command and those of its commands; building them imports no torch."""
    parser = Parser(
        prog="lineament",
        description="Find, measure, test and change the features that neural networks learn.",
        epilog="Exit status: 0 the work was done, 2 the input cannot be used, 130 interrupted, 1 anything else.",
    )
    parser.add_argument("--version", action="version", version=f"lineament {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f"lineament.cli.{name}").add_parser(commands)
        # Taken out of the line before parsing; here so that --help names it.
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, dict(commands.choices)


def _dispatch(argv: list[str], parser: Parser, commands: dict[str, Parser]) -> int:
    first = _command(argv)
    if first is not None and first not in COMMANDS:
        raise UsageError(f"no command {first!r}{nearest(first, COMMANDS)} (see lineament --help)")
    if first is None and not {"-h", "--help", "--version"} & set(argv):
        unknown = next((word for word in argv if word.startswith("-")), None)
        if unknown is not None:
            raise UsageError(
                f"no option {unknown!r}{nearest(unknown, parser.options())} (see lineament --help)"
            )
        parser.print_help()
        return 0
    prepare = None if first is None else commands[first].prepare
    if prepare is not None:
        argv, done = prepare(argv, commands[first or ""])
        if done:
            return 0
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        raise UsageError(
            f"{first}: no option or argument {extra[0]!r}{nearest(extra[0], commands[first or ''].options())} "
            f"(see lineament {first} --help)"
        )
    return int(arguments.run(arguments) or 0)


def _command(argv: Sequence[str]) -> str | None:
    return next((word for word in argv if not word.startswith("-")), None)


def _again(argv: Sequence[str]) -> str:
    # Of the edits a pruning keeps what it has done; unlearning is short.
    resumed = _command(argv) in _RESUMED and list(argv[:2]) != ["edit", "unlearn"]
    return f"the same command {'goes on where it stopped' if resumed else 'begins anew'}"


class _Terminated(BaseException):
    """Another process asks this one to end."""


@contextmanager
def _terminable(processes: int) -> Iterator[None]:
    """Of several processes the launcher ends all when one has ended: the others say so before they go."""

    def terminated(number: int, frame: object) -> None:
        raise _Terminated

    if processes == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _speaks(error: Exception) -> bool:
    """Whether this process says it, of several that end in the same way."""
    return bool(
        getattr(error, "speaks", os.environ.get("RANK", "0") == "0" or not isinstance(error, UsageError))
    )


def _ended() -> str:
    """Which of several processes have ended, where this one is to say it."""
    shards = sys.modules.get("lineament.core.shards")
    return "" if shards is None else shards.ended()


def _is_lost(error: Exception) -> bool:
    shards = sys.modules.get("lineament.core.shards")
    return shards is not None and isinstance(error, shards.LostProcess)


def _is_input_error(error: Exception) -> bool:
    # Asked of the loaded modules: importing the checks here would import torch for nothing.
    checks = sys.modules.get("lineament.core.checks")
    return checks is not None and isinstance(error, checks.InputError)


def _one_line(error: Exception) -> str:
    """An error's text on one line, with nothing in it that could act on a terminal; lines of code, set in by four spaces, stay lines."""
    from lineament.report.text import printable

    said, *code = str(error).split("\n    ")
    lines = [printable(" ".join(said.split()), limit=2000), *(printable(line, limit=500) for line in code)]
    return "\n    ".join(lines)
