"""Logs of clicks as their publishers give them: Criteo's display advertising challenge and Avazu's, read in chunks of lines."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lineament.core import checks
from lineament.core.checks import InputError, require
from lineament.data.formats import folder_of
from lineament.data.samples import Samples

CHUNK = 20_000
AVAZU = (
    "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category", "device_id", "device_ip",
    "device_model", "device_type", "device_conn_type", *(f"C{k}" for k in range(14, 22)),
)  # fmt: skip


class Numbered(defaultdict[str, int]):
    """Numbers values from 0 in the order in which they are first looked up."""

    def __init__(self):
        super().__init__()
        self.default_factory = self.__len__

    def of(self, values: Sequence[str]) -> np.ndarray:
        return np.fromiter(map(self.__getitem__, values), np.int32, len(values))


def criteo(data_folder: str | Path | None = None, *, at_least: int = 10) -> Samples:
    """Criteo's `train.txt` (Kaggle, 45.8 million lines): inputs int32 (line, 26), ``others["dense"]`` float32 (line, 13), targets 1 for a click.

    The 13 counts are log(x + 4) for the second and log(x + 1) for the others; a missing one counts 0, and below 1 no logarithm is taken of less than 1.
    Values of a categorical column are numbered from 1, with missing as a value like others; those in fewer than ``at_least`` lines share number 0.
    About 156 bytes a line stay in memory. Lines are in the order of time, over seven days.

    Args:
        data_folder: holds ``train.txt`` or ``train.txt.gz``, or a folder ``criteo`` with it; default: the environment's ``LINEAMENT_DATA``.
        at_least: lines that a value is in to be told from other rare ones. (The threshold that was used for the paper is not published.)

    Raises:
        InputError: no such file, or a line that has not 40 fields.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> line = "\\t".join(["1", *"1234567890123", *(f"{k:08x}" for k in range(26))])
    >>> _ = (folder / "train.txt").write_text(line + "\\n" + line.replace("1", "0", 1) + "\\n")
    >>> found = criteo(folder, at_least=1)
    >>> tuple(found.inputs.shape), tuple(found.others["dense"].shape), found.targets.tolist()
    ((2, 26), (2, 13), [1, 0])
    """
    path = file_of(data_folder, "criteo", ("train.txt", "train.txt.gz"))
    coded = [f"C{k}" for k in range(1, 27)]
    columns = ["label", *(f"I{k}" for k in range(1, 14)), *coded]
    return _read(path, "\t", columns, "label", coded, columns[1:14], {}, at_least, "Criteo")


def avazu(data_folder: str | Path | None = None, *, at_least: int = 10) -> Samples:
    """Avazu's `train.csv` (Kaggle, 40.4 million lines): inputs int32 (line, 22), targets 1 for a click.

    The number of the line is left out, and of the time only the hour of the day is kept. Values are numbered as :func:`criteo` does.

    Args:
        data_folder: holds ``train.csv``, ``train`` or ``train.gz``, or a folder ``avazu`` with it; default: the environment's ``LINEAMENT_DATA``.
        at_least: lines that a value is in to be told from other rare ones.

    Raises:
        InputError: no such file, a missing column, or a line of another number of fields.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> lines = [",".join(["id", "click", *AVAZU]), ",".join(["7", "1", "14102123", *"abcdefghijklmnopqrstu"])]
    >>> _ = (folder / "train.csv").write_text("\\n".join(lines))
    >>> avazu(folder, at_least=1).inputs.shape
    torch.Size([1, 22])
    """
    path = file_of(data_folder, "avazu", ("train.csv", "train.gz", "train"))
    return _read(path, ",", None, "click", AVAZU, (), {"hour": lambda text: text[-2:]}, at_least, "Avazu")


def file_of(data_folder: str | Path | None, name: str, files: Sequence[str]) -> Path:
    """The first of ``files`` that is in the data folder, or in its folder ``name``."""
    place = folder_of(data_folder)
    places = [] if place is None else [place / name, place]
    found = next((p / file for p in places for file in files if (p / file).is_file()), None)
    if found is None:
        where = "none was given" if place is None else f"it is not in {place} or {place / name}"
        raise InputError(f"data_folder: expected {name}'s {' or '.join(files)}, and {where}")
    return found


def _read(
    path: Path, delimiter: str, columns: Sequence[str] | None, label: str, coded: Sequence[str], dense: Sequence[str],
    change: dict[str, Callable[[str], str]], at_least: int, source: str,
) -> Samples:  # fmt: skip
    """Lines to samples; the columns' names are in the first line where ``columns`` is ``None``."""
    checks.number("at_least", at_least, low=1, integer=True)
    numbered, ids, counts, clicks, line = [Numbered() for _ in coded], [], [], [], 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            names = next(rows, []) if columns is None else list(columns)
            missing = [name for name in (label, *coded, *dense) if name not in names]
            require(
                not missing,
                f"{path}: has no column {', '.join(map(repr, missing))}; its first line has {names}",
            )
            while chunk := list(islice(rows, CHUNK)):
                odd = next((k for k, row in enumerate(chunk) if len(row) != len(names)), None)
                if odd is not None:
                    raise InputError(
                        f"{path}: sample {line + odd + 1} has {len(chunk[odd])} fields, expected {len(names)}"
                    )
                column = dict(zip(names, zip(*chunk)))
                clicks.append(np.array(column[label], np.int8))
                require(
                    bool(np.isin(clicks[-1], (0, 1)).all()), f"{path}: {label} is {set(column[label])}, expected 0 and 1"
                )  # fmt: skip
                values = (list(map(change[n], column[n])) if n in change else column[n] for n in coded)
                ids.append(np.stack([codes.of(each) for codes, each in zip(numbered, values)], 1))
                if dense:
                    counts.append(
                        np.stack([np.array([v or 0 for v in column[n]], np.float32) for n in dense], 1)
                    )
                line += len(chunk)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as {source}'s lines ({error})") from error
    require(line > 0, f"{path}: has no lines of data")
    inputs = np.concatenate(ids)
    for column in inputs.T:
        often = np.bincount(column) >= at_least
        column[:] = np.where(often, often.cumsum(), 0)[column]
    others = {}
    if dense:
        found = np.concatenate(counts)
        found += np.array([4 if name == "I2" else 1 for name in dense], np.float32)
        others["dense"] = torch.from_numpy(np.log(np.maximum(found, 1, out=found), out=found))
    return Samples(
        torch.from_numpy(inputs), torch.from_numpy(np.concatenate(clicks).astype(np.int64)), classes=("none", "click"), others=others,
        columns=tuple(coded), source=source, notes=(f"values in fewer than {at_least} lines share number 0",),
    )  # fmt: skip
