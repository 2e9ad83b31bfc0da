"""Tables with named columns, `.csv`, `.tsv`, `.jsonl` and `.parquet`: rows of numbers, or texts, with a target each; read as streams.

A row with an empty cell in a column that is read is left out, counted and named. A table of any length is walked twice and never held: once to
count it and to number the names of its classes, once for the chosen rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import InputError, require, show, suggest
from lineament.data.samples import Samples
from lineament.load.columns import Choose, as_targets, find_column, with_groups
from lineament.load.texts import NONE, TEXTS, TextReader, text_samples

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
TARGETS = ("label", "labels", "target", "targets", "y", "class", "outcome")
_EMPTY = {"", "na", "n/a", "nan", "null", "none", "?"}
_WORDS = {"true": 1.0, "false": 0.0}
# More names than this are no classes.
_MOST = 100_000


def read_table(
    path: Path,
    choose: Choose,
    *,
    inputs: str | None,
    targets: str | None,
    groups: str | None,
    reader: TextReader | None = None,
) -> Samples:
    """Samples from the columns of a table: inputs (sample, column), or with a reader of texts those of one column.

    Args:
        inputs, targets: one column, or several with commas between them; by default the inputs are all other columns that hold numbers, or that
            with a usual name for texts.

    Raises:
        InputError: an unreadable file, no such column, cells that are no numbers, no rows.
    """
    table = table_of(path)
    second = _several("targets", targets, table.names) or [find_column("targets", None, TARGETS, table.names)]
    first = _several("inputs", inputs, table.names)
    if reader is not None:
        first = [find_column("inputs", inputs, TEXTS, table.names)]
    group = None if groups is None else find_column("groups", groups, (), table.names)
    wanted = first or [name for name in table.names if name not in (*second, group)]
    total, classes = surveyed(table, second)
    rows = choose(total)
    columns = [*wanted, *second, *([group] if group else [])]
    cells: dict[str, list[str]] = {name: [] for name in columns}
    for row in table.walk(list(cells), set(rows.tolist())):
        for name, cell in zip(cells, row):
            cells[name].append(cell)
    notes = []
    if not first:
        bad = {name: k for name in wanted if (k := _no_number(cells[name])) is not None}
        wanted = [n for n in wanted if n not in bad and not all(map(_empty, cells[n]))]
        mixed = {name: said for name, k in bad.items() if (said := _mixed(name, cells[name], k, rows))}
        words = [name for name in bad if name not in mixed]
        if words:
            notes.append(f"columns that hold no numbers are left out: {_listed(words)}")
        notes += mixed.values()
        require(
            bool(wanted),
            f"data: {str(path)!r} has no column of numbers beside {_listed(second)} (its columns: {_listed(table.names)}); "
            f"{NONE}",
        )
    for name in wanted if reader is None else ():
        k = _no_number(cells[name])
        require(
            k is None,
            f"inputs: column {name!r} holds {show(cells[name][k or 0])}, expected numbers (row {rows[k or 0] + 1})",
        )
    # A text may say "none"; only an empty one is none.
    missing = {
        n: [_empty(c) if reader is None or n in second else not c for c in cells[n]]
        for n in (*wanted, *second)
    }
    whole = [not any(column[k] for column in missing.values()) for k in range(len(rows))]
    rows, notes = rows[np.array(whole)], [*notes, *_left_out(missing, rows, whole)]
    require(len(rows) > 0, f"data: every row read of {str(path)!r} has an empty cell")
    kept = {name: [cell for cell, good in zip(column, whole) if good] for name, column in cells.items()}
    labels, names = targets_of([kept[name] for name in second], classes)
    rest: dict[str, Any] = {
        "targets": labels,
        "classes": names,
        "index": torch.from_numpy(rows),
        "total": total,
        "source": path.name,
    }
    said = f"targets {_listed(second)}"
    if reader is not None:
        notes.append(f"texts are column {first[0]!r}, {said}")
        found = text_samples(kept[first[0]], reader.tokenizer, notes=tuple(notes), **rest)
    else:
        values = [[_number(cell) for cell in kept[name]] for name in wanted]
        notes.append(f"inputs are {len(wanted)} columns ({_listed(wanted)}), {said}")
        x = torch.tensor(values, dtype=torch.float32).T.contiguous()
        found = Samples(inputs=x, columns=tuple(wanted), notes=tuple(notes), **rest)
    return found if group is None else with_groups(found, np.array(kept[group]))


class CsvTable:
    """A file with one row a line, cells between commas, semicolons or tabs, quoted or not."""

    def __init__(self, path: Path):
        self.path = path
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline(1 << 20)
        counts = {mark: line.count(mark) for mark in (",", ";", "\t")}
        self.mark = "\t" if path.suffix.lower() == ".tsv" else max(counts, key=lambda mark: counts[mark])
        self.names = [name.strip() for name in next(self._rows(), [])]
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        require(twice is None, f"data: {str(path)!r} has two columns called {twice!r}")
        require(len(self.names) > 0, f"data: {str(path)!r} is empty, expected a row of column names first")
        require(
            not all(_is_number(name) for name in self.names),
            f"data: {str(path)!r} begins with numbers ({', '.join(self.names[:4])} ...), expected a row of column names first",
        )

    def walk(self, names: Sequence[str], rows: set[int] | None) -> Iterator[list[str]]:
        """The cells of these columns in some rows, counted from 0 without the names; in all by default."""
        places = [self.names.index(name) for name in names]
        found = self._rows()
        next(found)
        for number, row in enumerate(found):
            require(
                len(row) == len(self.names),
                f"data: row {number + 1} of {str(self.path)!r} has {len(row)} cells, expected {len(self.names)} as in the row of names",
            )
            if rows is None or number in rows:
                yield [row[place].strip() for place in places]

    def _rows(self) -> Iterator[list[str]]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                yield from (row for row in csv.reader(file, delimiter=self.mark, strict=True) if row)
        except (csv.Error, UnicodeDecodeError, OSError) as error:
            raise InputError(f"data: {str(self.path)!r} cannot be read as a table ({error})") from error


class JsonLines:
    """A file with one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path
        self.names = list(next(self._rows(), {}))
        require(bool(self.names), f"data: {str(path)!r} is empty, expected one JSON object a line")

    def walk(self, names: Sequence[str], rows: set[int] | None) -> Iterator[list[str]]:
        for number, row in enumerate(self._rows()):
            if rows is None or number in rows:
                yield [_cell(row.get(name)) for name in names]

    def _rows(self) -> Iterator[dict[str, Any]]:
        number = 0
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    require(
                        isinstance(row, dict),
                        f"data: line {number} of {str(self.path)!r} holds {show(row)}, expected a JSON object",
                    )
                    yield row
        except InputError:
            raise
        except (UnicodeDecodeError, OSError) as error:
            raise InputError(f"data: {str(self.path)!r} cannot be read ({error})") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"data: line {number} of {str(self.path)!r} is no JSON ({error})") from error


class ParquetTable:
    """A parquet file, through pyarrow where that is installed."""

    def __init__(self, path: Path):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise InputError(
                "data: parquet files need the package 'pyarrow'; install lineament[hub], or save the table as .csv"
            ) from error
        self.path = path
        try:
            self.file: Any = pyarrow.parquet.ParquetFile(path)
            self.names = list(self.file.schema_arrow.names)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f"data: {str(path)!r} is no readable parquet file ({error})") from error

    def walk(self, names: Sequence[str], rows: set[int] | None) -> Iterator[list[str]]:
        import pyarrow

        chosen = None if rows is None else np.array(sorted(rows), dtype=np.int64)
        start = 0
        try:
            for batch in self.file.iter_batches(columns=list(names)):
                end = start + batch.num_rows
                if chosen is not None:
                    batch = batch.take(pyarrow.array(chosen[(chosen >= start) & (chosen < end)] - start))
                start = end
                columns = [batch.column(name).to_pylist() for name in names]
                yield from (list(map(_cell, row)) for row in zip(*columns))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f"data: {str(self.path)!r} is no readable parquet file ({error})") from error


def table_of(path: Path) -> CsvTable | JsonLines | ParquetTable:
    """The table in a file, by its ending."""
    kinds = {".parquet": ParquetTable, ".jsonl": JsonLines, ".ndjson": JsonLines}
    try:
        return kinds.get(path.suffix.lower(), CsvTable)(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data: {str(path)!r} cannot be read as a table ({error})") from error


def _several(argument: str, given: str | None, there: Sequence[str]) -> list[str]:
    """The columns that were asked for: one name, which may hold commas, or several with commas between them."""
    if given is None:
        return []
    names = [given] if given in there else [name.strip() for name in given.split(",")]
    for name in names:
        require(name in there, f"{argument}: {name!r} is not in the data{suggest(name, there)}")
    return names


def surveyed(table: Any, targets: Sequence[str]) -> tuple[int, list[str]]:
    """How many rows there are, and the names among the targets, sorted, where some are no numbers."""
    total, found, named = 0, set(), False
    for row in table.walk(targets, None):
        total += 1
        if len(row) == 1 and not _empty(row[0]) and len(found) < _MOST:
            named = named or not _is_number(row[0])
            found.add(row[0])
    require(total > 0, f"data: {str(table.path)!r} has no rows, expected at least one sample")
    return total, sorted(found) if named else []


def targets_of(columns: Sequence[Sequence[str]], classes: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Class names (of ``classes``), class numbers or real values from one or several columns of cells."""
    if classes:
        return as_targets("the column", np.array(columns[0]), tuple(classes))
    values = np.array([[_number(cell) for cell in column] for column in columns]).T
    whole = bool((values == values.round()).all()) and not any("." in c for column in columns for c in column)
    values = values.astype(np.int64) if whole else values
    return as_targets("the column", values[:, 0] if values.shape[1] == 1 else values)


def _left_out(missing: dict[str, list[bool]], rows: np.ndarray, whole: Sequence[bool]) -> list[str]:
    bad = [k for k, good in enumerate(whole) if not good]
    if not bad:
        return []
    places = [f"row {rows[k] + 1} ({next(n for n in missing if missing[n][k])!r})" for k in bad[:4]]
    return [
        f"{len(bad)} of {len(whole)} rows read are left out for an empty cell: {', '.join(places)}{' ...' if len(bad) > 4 else ''}"
    ]


def _no_number(column: Sequence[str]) -> int | None:
    """The place of the first cell that is neither a number nor empty."""
    return next((k for k, cell in enumerate(column) if not _empty(cell) and not _is_number(cell)), None)


def _mixed(name: str, column: Sequence[str], bad: int, rows: np.ndarray) -> str:
    """What is said of a column that is left out although most of its cells are numbers, or nothing of another."""
    filled = [cell for cell in column if not _empty(cell)]
    numbers = sum(map(_is_number, filled))
    if 2 * numbers <= len(filled):
        return ""
    return (
        f"column {name!r} is left out: {show(column[bad])} in row {rows[bad] + 1} is no number, and {numbers:,} of its {len(filled):,} cells "
        "are; to read it, correct or empty the others"
    )


def _cell(value: Any) -> str:
    """A value as a .csv file would hold it; a list as JSON."""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value).strip()


def _empty(cell: str) -> bool:
    return cell.strip().lower() in _EMPTY


def _number(cell: str) -> float:
    return _WORDS.get(cell.lower(), 0.0) if cell.lower() in _WORDS else float(cell)


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
