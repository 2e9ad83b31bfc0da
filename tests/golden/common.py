"""Reference numbers, read with their cases, hyper-parameters and tolerances from cases.json; and a record of what was compared.

A folder of numbers has a ``cases.json``; sub-folders may bring their own. An adaptor is a dict {kind: check}, where ``check(file)`` reads
inputs by ``file.input(array)``, hyper-parameters by ``file[name]``, and hands results to ``file.compare(array, found)``. An output is never
read, so no result can depend on the number that it is compared with. An array that is neither read nor compared fails the file.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

OWN = Path(__file__).parent / "data"
ROOT = Path(os.environ.get("LINEAMENT_GOLDEN", OWN))
Checks = Mapping[str, Callable[["File"], None]]


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}


class Scope:
    """A case of a file: its hyper-parameters, and the file's arrays."""

    def __init__(self, file: File, name: str, values: dict[str, Any]):
        self.file, self.name, self.values = file, name, values

    def __getitem__(self, parameter: str) -> Any:
        """A hyper-parameter; ``{"from": ...}`` is looked up in the arrays or in a JSON file beside them."""
        assert parameter in self.values, (
            f"cases.json has no {parameter!r} for {self.file.path.name} {self.name}"
        )
        value = self.values[parameter]
        if not isinstance(value, dict) or set(value) != {"from"}:
            return value
        source, _, pointer = value["from"].partition("#/")
        if pointer:
            return self.file.beside(source).input(joined(pointer.split("/")))
        found = self.input(source)
        return found.item() if isinstance(found, Tensor) and found.ndim == 0 else found

    def get(self, parameter: str, default: Any = None) -> Any:
        return self[parameter] if parameter in self.values else default

    def has(self, array: str) -> bool:
        return array in self.file.data

    def arrays(self, pattern: str) -> dict[str, re.Match[str]]:
        """The names of the arrays that match a regular expression."""
        return {name: m for name in self.file.data if (m := re.fullmatch(pattern, name))}

    def length(self, array: str) -> int:
        """The first size of a stored tensor."""
        return len(self.file.data[array])

    def input(self, array: str) -> Any:
        """A stored tensor (of a JSON file, the value) that results are computed from."""
        return self.file.read(array)

    def compare(
        self, array: str, found: Any, dtype: torch.dtype = torch.float64, either: Tensor | None = None
    ) -> None:
        """Require ``found`` (or what it returns) to be the stored array within its tolerance; nothing is done where there is none.

        Entries of ``either`` are ties, in which any value is right.
        """
        if self.has(array):
            found = found() if callable(found) else found
            found = torch.as_tensor(found, dtype=torch.float64 if isinstance(found, float) else None)
            tolerance = self.tolerance(array, dtype) | ({} if either is None else {"either": either})
            self.file.record(array, found.detach(), tolerance, self.name)

    def differs(self, array: str, found: Tensor) -> None:
        """Require ``found`` not to be the stored array: what a fault of the reference code gives."""
        stored = self.input(array)
        assert mismatch(found, stored, self.tolerance(array, torch.float64)), f"{array} is reproduced"

    @property
    def dtypes(self) -> list[torch.dtype]:
        """float64, and float32 where there is a tolerance for it."""
        low = any(
            "float32" in (t or {}) for t in (self.values.get("tolerance"), self.file.spec.get("tolerance"))
        )
        return [torch.float64, torch.float32] if low else [torch.float64]

    def tolerance(self, array: str, dtype: torch.dtype) -> dict[str, Any]:
        """The case's own tolerance, else the file's; in either the array's, else the general one."""
        low, general = dtype == torch.float32, self.file.spec.get("tolerance")
        if general is None:  # settings: nothing measured
            return {"rtol": 0, "atol": 0}
        for whole in (self.values.get("tolerance") or {}, general):
            for found in (*(t for p, t in whole.get("arrays", {}).items() if self.fits(p, array)), whole):
                if low and "float32" in found:
                    return found["float32"]
                told = {"rtol", "atol"} & found.keys()
                if told and not (
                    low and any(found[key] for key in told)
                ):  # what is to be equal is so in float32 too
                    return {"rtol": 0, "atol": 0, **found}
        raise AssertionError(f"cases.json has no tolerance for {self.file.path.name}, {array}")

    def fits(self, pattern: str, array: str) -> bool:
        """Whether an array pattern of cases.json names this array (or, of a JSON file, a part of what it names)."""

        def choices(hole: re.Match[str]) -> str:
            given = [self.name] if self.name else list(self.file.spec["cases"])
            if hole[1] != "case":
                given = listed(self.values.get(hole[1]))
            return "(?:" + "|".join(re.escape(str(v)) for v in given) + ")"

        parts = re.split(r"(\{\w+\})", pattern)
        made = "".join(re.sub(r"\{(\w+)\}", choices, p) if p.startswith("{") else re.escape(p) for p in parts)
        return re.match(f"{made}(?=$|[.[])", re.sub(r"\[\d+\]", "[]", array)) is not None


class File(Scope):
    """A file of numbers, its hyper-parameters (``defaults`` of cases.json), its ``cases``, and what was read and compared of it."""

    def __init__(self, path: Path, spec: dict[str, Any], only: str = ""):
        self.path, self.spec, self.only = path, spec, only
        super().__init__(self, "", spec.get("defaults", {}))
        self.compared: list[tuple[str, Tensor, dict[str, Any], str]] = []
        self.inputs: set[str] = set()
        self.problems: list[str] = []
        self.at_once = False  # raise at the first difference
        self.opened: dict[str, File] = {path.name: self}

    @cached_property
    def nodes(self) -> dict[str, Any]:
        """Every part of a JSON file by its name, ``a.b[0].c``."""
        return dict(nodes(json.loads(self.path.read_text())))

    @cached_property
    def data(self) -> dict[str, Any]:
        """{array: tensor}; of a JSON file the leaves are the arrays, texts too."""
        if self.path.suffix == ".json":
            return {name: tensor(value) for name, value in self.nodes.items() if not branches(value)}
        with np.load(self.path, allow_pickle=False) as stored:
            arrays = {name: np.asarray(stored[name]) for name in stored.files}
        texts = {name: a.tolist() for name, a in arrays.items() if a.dtype.kind == "U"}
        return {name: texts[name] if name in texts else torch.from_numpy(a) for name, a in arrays.items()}

    @cached_property
    def cases(self) -> list[Scope]:
        """The cases that the file has arrays of."""
        told = {name: case for name, case in self.spec.get("cases", {}).items() if self.only in ("", name)}
        there = {name: re.compile(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])") for name in told}
        return [
            Scope(self, name, {**self.values, **case})
            for name, case in told.items()
            if any(there[name].search(array) for array in self.data)
        ]

    def read(self, array: str) -> Any:
        known = self.nodes if self.path.suffix == ".json" else self.data
        # An entry of a list of numbers, which is one array.
        entry = re.fullmatch(r"(.+?)((\[\d+\])+)", array)
        if array not in known and entry and isinstance(known.get(entry[1]), list):
            value = self.read(entry[1])
            for place in re.findall(r"\d+", entry[2]):
                value = value[int(place)]
            return value
        assert array in known, f"{self.path.name} has no {array!r}"
        below = (f"{array}.", f"{array}[")
        self.inputs |= {name for name in self.data if name == array or name.startswith(below)}
        return copy.deepcopy(known[array])

    def record(self, array: str, found: Tensor, tolerance: dict[str, Any], case: str) -> None:
        self.compared.append((array, found.clone(), tolerance, case))
        if problem := mismatch(found, self.data[array], tolerance):
            self.problems.append(f"{case or 'file'}: {array}: {problem}")
            if self.at_once:
                raise AssertionError(self.problems[-1])

    def beside(self, name: str) -> File:
        """Another file of the folder, or of one above it."""
        if name not in self.opened:
            path = next(p for folder in self.path.parents if (p := folder / name).exists())
            other = self.opened[name] = opened(path)
            other.opened, other.problems, other.at_once = self.opened, self.problems, self.at_once
        return self.opened[name]

    def partners(self, kind: str) -> list[File]:
        """The files of a kind beside this one, first the one that takes values from it or from which it does, then that of its name."""

        def far(file: File) -> tuple[bool, bool]:
            links = [(self.path.name, file.spec), (file.path.name, self.spec)]
            return not any(
                f"{name}#" in json.dumps(spec) for name, spec in links
            ), file.path.stem != self.path.stem

        found = [f for path in paths(self.path.parent, "*") if (f := opened(path)).spec["kind"] == kind]
        return [self.beside(f.path.name) for f in sorted(found, key=far)]


def listed(value: Any) -> list[Any]:
    """The entries of a list, or the one value."""
    return value if isinstance(value, list) else [value]


def joined(parts: list[str]) -> str:
    return "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in parts).removeprefix(".")


def branches(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))


def nodes(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(name, part) of a JSON value and of every part of it."""
    yield joined(list(at)), value
    if branches(value):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(part, (*at, str(key)))


def tensor(value: Any) -> Any:
    """A number or (nested) list of numbers, null being NaN; texts and lists with texts stay."""
    if isinstance(value, (str, bool)):
        return value if isinstance(value, str) else torch.tensor(value)
    if texts(value):
        return value
    made = np.array(value)
    return torch.from_numpy(made.astype(float) if made.dtype == object or not made.size else made)


def texts(value: Any) -> bool:
    """Whether a (nested) list has a text in it."""
    return any(map(texts, value)) if isinstance(value, list) else isinstance(value, str)


def paths(folder: Path, pattern: str = "**/*") -> list[Path]:
    """Every file of a folder and below it but what says what they are; so none is passed over."""
    return sorted(
        p for p in folder.glob(pattern) if p.is_file() and p.name not in ("cases.json", "README.md")
    )


def opened(path: Path) -> File:
    """The file, as the nearest cases.json above it that knows it says."""
    assert path.suffix in (".npz", ".json"), f"{path}: no adaptor reads this kind of file"
    for folder in path.parents:
        if (folder / "cases.json").exists():
            told = json.loads((folder / "cases.json").read_text())["files"]
            for name in (path.relative_to(folder).as_posix(), path.name):
                if name in told:
                    return File(path, told[name])
    raise AssertionError(f"{path}: no cases.json says what this file holds")


def mismatch(found: Tensor, stored: Tensor, tolerance: dict[str, Any]) -> str:
    """How ``found`` differs from ``stored`` beyond |stored| * rtol + atol, or nothing."""
    if found.shape != stored.shape:
        return f"has the shape {tuple(found.shape)}, stored is {tuple(stored.shape)}"
    found, stored = (torch.view_as_real(v) if v.is_complex() else v.double() for v in (found, stored))
    scale = stored.abs()
    if tolerance.get("relative_to") == "largest" and scale.numel():
        scale = scale.nan_to_num(0).max().expand_as(scale)
    limit = tolerance["atol"] + tolerance["rtol"] * scale.nan_to_num(0)
    if "first_entries" in tolerance:
        limit = torch.full_like(stored, 0) + limit
        limit[: tolerance["first_entries"]] = tolerance["first_atol"]
    wrong = ~((found - stored).abs() <= limit) & (found != stored) & ~(found.isnan() & stored.isnan())
    if "either" in tolerance:
        wrong &= ~tolerance["either"]
    if not wrong.any():
        return ""
    place = tuple(int(v) for v in wrong.nonzero()[0])
    return f"{int(wrong.sum())} of {wrong.numel()} differ, first {float(found[place])!r} for {float(stored[place])!r} at {place}"


def run(file: File, checks: Checks) -> File:
    kind = file.spec["kind"]
    assert kind in checks, f"{file.path.name}: no adaptor for the kind {kind!r}"
    checks[kind](file)
    # Hyper-parameters that cases.json takes from the arrays are no results, also where no case of the file asks for them.
    told = [v["from"] for v in file.values.values() if isinstance(v, dict) and set(v) == {"from"}]
    seen = file.inputs | {array for array, *_ in file.compared} | set(told)
    left = [
        array
        for array, value in file.data.items()
        if array not in seen and not isinstance(value, (str, list))
    ]
    if left and not file.only:
        file.problems.append(f"no adaptor compares {left}")
    return file


def with_a_wrong_entry(stored: Tensor) -> Tensor:
    """An output with one finite entry wrong; an empty one with an entry."""
    if not stored.numel():
        return torch.ones(1)
    place = int(stored.flatten().isfinite().int().argmax())
    wrong = stored.flatten().to(torch.complex128 if stored.is_complex() else torch.float64)
    wrong[place] = (
        1 - wrong[place] if stored.dtype == torch.bool else wrong[place].nan_to_num(0).abs() * 2 + 1
    )
    return wrong.view(stored.shape)


def turned_round(stored: Tensor | list[str]) -> Tensor | list[str]:
    """An input that is another one in every entry."""
    if isinstance(stored, list):
        return [f"not {text}" for text in stored]
    if stored.dtype == torch.bool:
        return ~stored
    turned = stored.flip(tuple(range(stored.ndim)))
    if stored.is_floating_point():
        return turned * 1.5 + 0.1
    return turned + 1 if torch.equal(turned, stored) else turned


def others(value: Any) -> Iterator[tuple[Any, ...]]:
    """Wrong values of a hyper-parameter, a few for each number, word or flag in it; lists of words name arrays and stay."""
    if isinstance(value, dict):
        yield from (
            tuple({**value, k: w} for w in wrong) for k, part in value.items() for wrong in others(part)
        )
    elif isinstance(value, list):
        numbers = [(k, part) for k, part in enumerate(value) if not isinstance(part, str)]
        for k, part in numbers:
            yield from (tuple([*value[:k], w, *value[k + 1 :]] for w in wrong) for wrong in others(part))
    elif isinstance(value, str):
        yield (f"not {value}",)
    elif isinstance(value, bool):
        yield (not value,)
    elif value is not None:
        yield (value + 1, value - 1) if isinstance(value, int) else (value + 0.5, value / 10)


def changed_files(file: File) -> Iterator[tuple[str, list[File]]]:
    """The file with one hyper-parameter wrong, in a few ways; those that are arrays of the file are spoiled there."""
    for case, values in {"": file.spec["defaults"], **file.spec["cases"]}.items():
        scope = Scope(file, case, values)
        for key, told in values.items():
            if isinstance(told, dict) and "from" in told:
                told = scope[key] if "#" in told["from"] else None
            for wrong in others(told):
                specs = [copy.deepcopy(file.spec) for _ in wrong]
                for spec, other in zip(specs, wrong):
                    (spec["cases"][case] if case else spec["defaults"])[key] = other
                yield f"{key}={wrong!r} {case}", [File(file.path, spec, only=case) for spec in specs]


def fails(file: File, checks: Checks, array: str = "") -> bool:
    """Whether anything of the file fails, or the comparison of one array."""
    file.at_once = not array
    try:
        problems = run(file, checks).problems
        return any(not array or f": {array}: " in problem for problem in problems)
    except Exception:
        return True


def golden(
    slug: str, checks: Checks, fixed: Collection[str] = ()
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The tests of a method: its numbers are right, every one is compared, and a wrong one would be noticed.

    ``fixed`` names what no number depends on: hyper-parameters of which the library has one value (files with another one fail by their
    numbers), arrays that are told and not used; ``KIND:NAME`` for one kind of file, globs allowed.
    """

    there = paths(ROOT / slug) or [ROOT / slug]
    own = [opened(path) for path in paths(OWN / slug)]

    @pytest.mark.parametrize("path", there, ids=[os.path.relpath(path, ROOT / slug) for path in there])
    def test_golden(path: Path) -> None:
        file = run(opened(path), checks)
        assert not file.problems, f"{path.name}\n" + "\n".join(file.problems)

    @pytest.mark.parametrize("kind", sorted({file.spec["kind"] for file in own}))
    def test_a_wrong_number_is_noticed(kind: str) -> None:
        still = ["tolerance", *(name.removeprefix(f"{kind}:") for name in fixed)]
        # Outputs in every file; inputs and hyper-parameters in one of the kind, for the limiting cases do not depend on all of them.
        noticed: dict[str, bool] = {}
        for file in (f for f in own if f.spec["kind"] == kind):
            base = run(File(file.path, file.spec), checks)
            outputs = {array for array, *_ in base.compared}
            for array in outputs - base.inputs:  # on which no result depends, for none was read
                wrong = with_a_wrong_entry(base.data[array])
                found = any(mismatch(value, wrong, t) for name, value, t, _ in base.compared if name == array)
                noticed[f"{file.path.name} {array}"] = found
            for array in base.inputs if file.path.suffix == ".npz" else ():
                changed = File(file.path, file.spec)
                changed.data[array] = turned_round(base.data[array])
                if not any(fnmatch(array, pattern) for pattern in still):
                    found = noticed.get(array, False) or fails(
                        changed, checks, array if array in outputs else ""
                    )
                    noticed[array] = found
            for what, wrongly in changed_files(base):
                if not any(fnmatch(what.split("=")[0], pattern) for pattern in still):
                    noticed[what] = noticed.get(what, False) or any(fails(f, checks) for f in wrongly)
        unnoticed = sorted(name for name, found in noticed.items() if not found)
        assert not unnoticed, f"{kind}: wrong values go unnoticed: {unnoticed}"

    return test_golden, test_a_wrong_number_is_noticed
