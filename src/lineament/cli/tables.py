"""The subcommand ``lineament tables``: how large a shared embedding table some columns of ids need; imports no torch before it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Any

_EPILOG = """examples:
  lineament tables clicks.csv --budget 64
  lineament tables ratings.parquet --columns user,item --chunk 8 --json

Rows are read as a stream: a table of any length fits. A list of ids in a cell (.jsonl, .parquet, or JSON in a .csv) is a bag: each of its ids counts."""

_ROWS = 1 << 16
# A value with at least this share of all rows is worth a row of its own.
_HOT = 0.01
_FRACTIONS = (0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Column:
    """One column of ids: cells seen, different ones (an estimate with a relative standard error where ``error`` is above 0), the share of the most frequent, and those worth reserving."""

    name: str
    count: int
    distinct: int
    error: float
    hottest: float
    reserve: list[str]
    empty: int


def add_parser(subparsers: Any) -> Any:
    """Add ``tables`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "tables",
        help="how large a shared embedding table the ids in your columns need",
        description="Counts the ids of a table's columns and plans one shared embedding table for all of them: rows, look-ups, and what would collide.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="a .csv, .tsv, .jsonl or .parquet file with named columns")
    add("--columns", metavar="A,B", help="the columns of ids (default: all that hold no fractions)")
    add(
        "--budget",
        type=float,
        metavar="MB",
        help="of the table, in float32, in MiB (default: a quarter of a table with a row for every value)",
    )
    add("--chunk", type=int, default=16, metavar="D", help="width of a row (default: 16)")
    add("--json", action="store_true", help="write the plan as JSON")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from lineament.cli import console
    from lineament.core.checks import number, require
    from lineament.core.results import plain
    from lineament.modules.unified_embedding.collisions import expected_collisions
    from lineament.modules.unified_embedding.probe import plan

    chunk = number("chunk", arguments.chunk, low=1, integer=True)
    if arguments.budget is not None:
        number("budget", arguments.budget, low=0, open_low=True)
        require(
            arguments.budget * 2**20 >= 4 * chunk,
            f"budget: got {arguments.budget:g} MiB, expected room for a row of {chunk} numbers, {4 * chunk} bytes, or more",
        )
    columns, left_out = columns_of(arguments.data, arguments.columns)
    values = {column.name: column.distinct for column in columns}
    whole = sum(values.values())
    budget = max(4 * chunk, whole * chunk) if arguments.budget is None else int(arguments.budget * 2**20)
    made = plan(values, budget, chunk=chunk, widest=max(64, chunk))
    smaller = {
        f"{fraction:g}": expected_collisions(list(values.values()), max(1, round(fraction * whole)))
        for fraction in _FRACTIONS
    }
    if arguments.json:
        told = {
            "columns": [vars(column) for column in columns],
            "left_out": left_out,
            "plan": plain(made),
            "collisions": {name: plain(found) for name, found in smaller.items()},
        }
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return 0
    for name in left_out:
        console.note(f"column {name!r} holds fractions and is left out; name it in --columns if they are ids")
    if arguments.budget is not None and made.rows > whole:
        console.note(
            f"--budget: {arguments.budget:g} MiB are {made.rows:,} rows, more than a row for each of {whole:,} values; {4 * chunk * whole / 2**20:.3g} MiB are enough for that"
        )
    console.show_tables(columns, made, smaller)
    return 0


def columns_of(data: str, names: str | None) -> tuple[list[Column], list[str]]:
    """The columns of ids in a table, and those that were left out because they hold fractions.

    Raises:
        InputError: no such file or column, no rows.
    """
    from lineament.cli.option_values import words
    from lineament.core.checks import require, suggest
    from lineament.load.tables import TABLES, table_of

    path = Path(data)
    require(
        path.suffix.lower() in TABLES,
        f"DATA: got {data!r}, expected a table with named columns ({', '.join(TABLES)})",
    )
    require(path.is_file(), f"DATA: file {data!r} does not exist")
    table = table_of(path)
    given = None if names is None else words(names)
    require(given != [], f"--columns: got {names!r}, expected some of {', '.join(map(repr, table.names))}")
    twice = [name for name in given or () if (given or []).count(name) > 1]
    require(not twice, f"--columns: {(twice or [''])[0]!r} is named twice")
    for name in given or ():
        require(name in table.names, f"--columns: {name!r} is not in the data{suggest(name, table.names)}")
    chosen, left_out = given or list(table.names), []
    if given is None:
        first = list(islice(table.walk(chosen, None), _ROWS))
        left_out = [
            name
            for k, name in enumerate(chosen)
            if any(_fraction(value) for row in first for value in _values(row[k]))
        ]
        chosen = [name for name in chosen if name not in left_out]
        require(
            len(chosen) > 0, f"--columns: all columns of {data!r} hold fractions; name those that hold ids"
        )
    return [_column(table, name) for name in chosen], left_out


def _column(table: Any, name: str) -> Column:
    from lineament.core.checks import InputError
    from lineament.modules.unified_embedding.hashing import fingerprint
    from lineament.modules.unified_embedding.probe import probe

    spelled: dict[int, str] = {}
    empty = 0

    def parts() -> Iterator[Any]:
        nonlocal empty
        cells = (value for row in table.walk([name], None) for value in _values(row[0]))
        while part := list(islice(cells, _ROWS)):
            filled = [cell for cell in part if cell and cell.lower() != "nan"]
            empty, part = empty + len(part) - len(filled), filled
            if part:
                hashed = fingerprint(part)
                # How a frequent value is written: the words of a part are few beside its rows, or it has none.
                if len(spelled) < 4 * _ROWS:
                    spelled.update(zip(hashed.tolist(), part))
                yield hashed

    pieces = parts()
    first = next(pieces, None)
    if first is None:
        raise InputError(f"--columns: column {name!r} has no value")
    found = probe(chain([first], pieces))
    reserve = [spelled.get(value, "") for value, count in found.hot if count >= _HOT * found.count]
    many = found.distinct > 100  # of fewer, all may have rows of their own
    return Column(
        name, found.count, found.distinct, found.distinct_error, found.hot[0][1] / found.count if found.hot else 0.0,
        [word for word in reserve if word] if many else [], empty,
    )  # fmt: skip


def _values(cell: str) -> list[str]:
    """The ids of a cell: of a JSON list each, of anything else the cell; an empty list is an empty cell."""
    cell = cell.strip()
    if not cell.startswith("["):
        return [cell]
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return [cell]
    flat = [value for each in found for value in (each if isinstance(each, list) else [each])]
    return [
        "" if value is None else value.strip() if isinstance(value, str) else json.dumps(value)
        for value in flat
    ] or [""]


def _fraction(cell: str) -> bool:
    try:
        value = float(cell)
        return isfinite(value) and not value.is_integer()
    except (ValueError, OverflowError):
        return False
