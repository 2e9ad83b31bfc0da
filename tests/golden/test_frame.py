"""The frame of the golden tests: what no adaptor knows or compares fails, and descriptions are found from sub-folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.golden import common
from tests.golden.common import File, golden, opened, paths, run

TOLERANCE = {"rtol": 0, "atol": 1e-9, "arrays": {"{case}_{part}": {"rtol": 0.1}}}
SPEC = {
    "kind": "double",
    "tolerance": TOLERANCE,
    "defaults": {"part": ["twice"], "by": {"from": "set.json#/by"}},
    "cases": {"a": {}, "b": {}},
}


def check(file: File) -> None:
    for case in file.cases:
        case.compare(f"{case.name}_twice", case["by"] * case.input(f"{case.name}_x"))


@pytest.fixture
def folder(tmp_path):
    """One case of two, in a folder below the one that describes it."""
    (tmp_path / "cases.json").write_text(
        json.dumps({"files": {"n.npz": SPEC, "set.json": {**SPEC, "kind": "settings"}}})
    )
    (tmp_path / "set.json").write_text(json.dumps({"by": 2.0}))
    (tmp_path / "below").mkdir()
    np.savez(tmp_path / "below" / "n.npz", a_x=np.ones(3), a_twice=np.array([2.0, 2.1, 2.2]))
    return tmp_path


def test_cases_and_tolerances_are_the_descriptions(folder):
    assert [path.name for path in paths(folder)] == ["n.npz", "set.json"]
    assert run(opened(folder / "below" / "n.npz"), {"double": check}).problems == []
    strict = opened(folder / "below" / "n.npz")
    del strict.spec["tolerance"]["arrays"]
    assert "2 of 3 differ" in run(strict, {"double": check}).problems[0]


def test_what_is_unknown_fails(folder):
    file = opened(folder / "below" / "n.npz")
    file.data["a_thrice"] = torch.ones(3)
    assert run(file, {"double": check}).problems == ["no adaptor compares ['a_thrice']"]
    with pytest.raises(AssertionError, match="no adaptor for the kind 'double'"):
        run(opened(folder / "below" / "n.npz"), {})
    for name, message in (("other.npz", "no cases.json says"), ("notes.txt", "no adaptor reads")):
        (folder / name).touch()
        with pytest.raises(AssertionError, match=message):
            opened(folder / name)


def test_a_result_may_not_depend_on_the_number_it_is_compared_with(folder, monkeypatch):
    def circular(file: File) -> None:
        assert len(file.input("a_x")) == 3
        file.compare("a_twice", file.input("a_twice"))

    monkeypatch.setattr(common, "OWN", folder.parent)
    settings = {"settings": lambda file: file.compare("by", 2.0)}
    golden(folder.name, {"double": check, **settings})[1]("double")
    with pytest.raises(AssertionError, match=r"go unnoticed: .*'a_twice'"):
        golden(folder.name, {"double": circular, **settings})[1]("double")
