"""Pictures of faces in users' folders, and lists of what is compared: read when they are needed, looked up before a training begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lineament.core.checks import InputError, require
from lineament.load.folders import files_by_class, images_below, readable


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Files as RGB bytes [3, size, size] with labels, each opened when it is asked for, several at a time: millions fit."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int], size: int):
        self.files, self.labels, self.size = files, torch.tensor(labels, dtype=torch.int64), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self._read(self.files[row]), self.labels[row]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:
            return list(zip(pool.map(self._read, [self.files[row] for row in rows]), self.labels[list(rows)]))

    def batches(self, size: int) -> Iterator[Tensor]:
        """All pictures in their order, so many at a time."""
        for rows in torch.arange(len(self)).split(size):
            yield torch.stack([picture for picture, _ in self.__getitems__(rows.tolist())])

    def _read(self, file: Path) -> Tensor:
        picture = readable([(str(file), file)], (self.size, self.size), 1)[0][0]
        return picture.movedim(-1, 0) if picture.ndim == 3 else picture.expand(3, -1, -1)


def people_of(option: str, folder: str, size: int, least: int = 1) -> Pictures:
    """The pictures of a folder with one folder a person."""
    path = _there(option, folder)
    try:
        people, files = files_by_class(path)
    except InputError as error:
        raise InputError(f"{option}: {str(error).removeprefix('data: ')}") from None
    require(
        len(people) >= least, f"{option}: {folder!r} holds {len(people)} person, expected at least {least}"
    )
    return Pictures([file for file, _ in files], [person for _, person in files], size)


def strangers_of(option: str, folder: str, size: int) -> Pictures:
    """All pictures below a folder, whoever they show."""
    files = images_below(_there(option, folder))
    require(len(files) > 0, f"{option}: {folder!r} holds no pictures")
    return Pictures(files, [0] * len(files), size)


def _there(option: str, folder: str) -> Path:
    path = Path(folder).expanduser()
    require(path.is_dir(), f"{option}: {folder!r} is no folder")
    return path


@dataclass(frozen=True)
class Listed:
    """Pairs of rows [n, 2] of some pictures or templates, and whether each is of one person [n]."""

    pairs: Tensor
    same: Tensor


class Lists:
    """Lists as text: entries between blanks, or between tabs where there is one. Pictures that they name are numbered in ``files`` once each.

    Args:
        folder: where the named pictures lie; beside the list by default.
    """

    def __init__(self, folder: str | None):
        self.folder = None if folder is None else _there("picture_folder", folder)
        self.files: dict[Path, int] = {}

    def pairs(self, option: str, file: str, *, folds: int = 10) -> Listed:
        """Lines ``picture picture 0|1``; each tenth must have pairs of both kinds, as verification by folds asks."""
        rows = list(_lines(option, file, ("picture", "picture", "0|1")))
        found = _listed(
            option, file, [[self._row(option, file, n, name) for name in row[:2]] for n, row in rows], rows
        )
        for fold, part in enumerate(found.same.tensor_split(folds), 1):
            mixed = len(part) > 1 and 0 < int(part.sum()) < len(part)
            require(
                mixed,
                f"{option}: pairs of tenth {fold} of {file!r} are of one kind, expected both in each; shuffle its lines",
            )
        return found

    def templates(self, option: str, file: str, pair_file: str) -> tuple[Tensor, Tensor, Tensor, Listed]:
        """Lines ``picture template medium``: rows of pictures, their templates and media, numbered; and the pairs ``template template 0|1`` of the other list."""
        pictures, numbers, media = [], {}, {}
        for n, (name, template, medium) in _lines(option, file, ("picture", "template", "medium")):
            number = numbers.setdefault(template, len(numbers))
            pictures.append((self._row(option, file, n, name), number, media.setdefault(medium, len(media))))
        rows = list(_lines("template_pairs", pair_file, ("template", "template", "0|1")))
        for n, row in rows:
            for name in row[:2]:
                require(
                    name in numbers,
                    f"template_pairs: line {n} of {pair_file!r} names {name!r}, expected a template of {file!r}",
                )
        listed = _listed(
            "template_pairs", pair_file, [[numbers[name] for name in row[:2]] for _, row in rows], rows
        )
        picture, template, medium = torch.tensor(pictures).T
        return picture, template, medium, listed

    def _row(self, option: str, file: str, line: int, name: str) -> int:
        path = (self.folder or Path(file).expanduser().parent) / name
        if path not in self.files:
            require(
                path.is_file(),
                f"{option}: line {line} of {file!r} names {name!r}, which is not in {str(self.folder or path.parent)!r}; say where by picture_folder",
            )
        return self.files.setdefault(path, len(self.files))


def _listed(option: str, file: str, pairs: list[list[int]], rows: list[tuple[int, list[str]]]) -> Listed:
    for n, row in rows:
        require(row[2] in ("0", "1"), f"{option}: line {n} of {file!r} ends with {row[2]!r}, expected 0 or 1")
    same = torch.tensor([row[2] == "1" for _, row in rows])
    require(
        0 < int(same.sum()) < len(same), f"{option}: {file!r} has pairs of one kind, expected some of both"
    )
    return Listed(torch.tensor(pairs), same)


def _lines(option: str, file: str, entries: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """The numbers and entries of a list's lines; empty ones are passed over."""
    path = Path(file).expanduser()
    require(path.is_file(), f"{option}: {file!r} is no file")
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError:
        raise InputError(f"{option}: {file!r} is no text in UTF-8") from None
    filled = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    require(len(filled) > 0, f"{option}: {file!r} is empty, expected lines {' '.join(entries)!r}")
    for n, line in filled:
        found = [part.strip() for part in (line.split("\t") if "\t" in line else line.split())]
        require(
            len(found) == len(entries),
            f"{option}: line {n} of {file!r} has {len(found)} entries, expected {' '.join(entries)!r}",
        )
        yield n, found
