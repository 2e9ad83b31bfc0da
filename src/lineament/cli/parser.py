"""argparse for this command: one-line errors, no abbreviations, and the library's argument names said as options."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class UsageError(Exception):
    """A command line that cannot be read; the message is the one line to show."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes no abbreviated options.

    ``names`` says how a library argument is called on this command line: ``{"image_size": "--image-size"}``. A command whose line must be
    changed before it is parsed sets ``prepare(argv, parser) -> (argv, done)``.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.names: dict[str, str] = {}
        self.prepare: Callable[[list[str], Parser], tuple[list[str], bool]] | None = None
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.names[action.dest] = next(iter(action.option_strings), None) or str(
            action.metavar or action.dest
        )
        return action

    def options(self) -> list[str]:
        """The long options."""
        return sorted({name for name in self.names.values() if name.startswith("--")})

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("lineament ")
        raise UsageError(f"{command}: {_in_our_words(message, self.prog)} (see {self.prog} --help)")


_KINDS = {"int": "an integer", "float": "a number", "_count": "an integer"}


def _in_our_words(message: str, prog: str) -> str:
    """What argparse says as every other error here: what was passed, what was expected.

    >>> _in_our_words("argument --epochs: invalid int value: 'zero'", "toy")
    "--epochs: got 'zero', expected an integer"
    >>> _in_our_words("the following arguments are required: MODEL, --out", "toy")
    'MODEL, --out: got none, and toy needs all of them'
    """
    found = re.fullmatch(r"argument (\S+): invalid (\w+) value: ('.*')", message, re.S)
    if found:
        return f"{found[1]}: got {found[3]}, expected {_KINDS.get(found[2], found[2])}"
    found = re.fullmatch(r"argument (\S+): invalid choice: ('.*') \(choose from (.*)\)", message, re.S)
    if found:
        choices = [choice.strip().strip("'") for choice in found[3].split(",")]
        return f"{found[1]}: got {found[2]}, which is not a choice{nearest(found[2].strip(chr(39)), choices)}"
    found = re.fullmatch(r"argument (\S+): expected (.* arguments?)", message)
    if found:
        return f"{found[1]}: got too few values, expected {found[2]}"
    found = re.fullmatch(r"the following arguments are required: (.*)", message)
    if not found:
        return message
    return f"{found[1]}: got none, and {prog} needs {'all of them' if ',' in found[1] else 'it'}"


def in_options(message: str, parser: Parser) -> str:
    """A message of the library in the words of a command line: ``image_size: ...`` becomes ``--image-size: ...``.

    Arguments are named at the beginning, before a colon, and with a value (``overwrite=True``) or in backticks elsewhere.

    >>> parser = Parser(prog="toy")
    >>> for option in ("--out", "--overwrite", "--on-nan"):
    ...     _ = parser.add_argument(option)
    >>> in_options("out: 'x' is there; pass overwrite=True, on_nan='skip' or another `out`", parser)
    "--out: 'x' is there; pass --overwrite, --on-nan skip or another --out"
    """
    names = parser.names
    known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    head = re.match(rf"(?:{known})(?:, (?:{known}))*(?=:)", message)
    start = ""
    if head:
        start = ", ".join(names[name] for name in head[0].split(", "))
        message = message[head.end() :]

    def option(found: re.Match[str]) -> str:
        value = found["text"] if found["text"] is not None else found["plain"]
        return names[found["name"]] if value in ("True", None) else f"{names[found['name']]} {value}"

    values = rf"(?<![\w.'\"-])(?P<name>{known})=(?:'(?P<text>[^']*)'|(?P<plain>[\w.+-]*\w))"
    message = re.sub(values, option, message)
    return start + re.sub(rf"`({known})`", lambda found: names[found[1]], message)


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice that is most like ``word``, or all of them where they are few, as the end of a message."""
    choices = list(choices)
    near = difflib.get_close_matches(word.split("=")[0], choices, n=1, cutoff=0.6)
    if near:
        return f"; nearest: {near[0]!r}"
    return f"; there are: {', '.join(choices)}" if len(choices) <= 12 else ""
