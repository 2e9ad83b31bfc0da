"""Nothing is half-written: an output appears whole, or not at all."""

from __future__ import annotations

import json
import os
import stat

import pytest

from lineament.core.checks import InputError
from lineament.core.files import atomic_write, output_folder, possible_file, write_json, write_text


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.txt"]


def test_folders_are_made_and_the_suffix_is_kept(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "map.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"png")
    assert (tmp_path / "a" / "b" / "map.png").read_bytes() == b"png"


def test_a_file_that_cannot_be_written_is_known_beforehand(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, said in (
        ("", "empty name"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "page.html", "cannot be written"),
    ):
        with pytest.raises(InputError, match=f"--out: .*{said}"):
            possible_file("--out", path)
    assert possible_file("--out", tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_result_is_as_readable_as_any_other_file(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_text(tmp_path / "written", "x")
    assert stat.S_IMODE(os.stat(tmp_path / "written").st_mode) == stat.S_IMODE(os.stat(plain).st_mode)


def test_json_keeps_order_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert list(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"b": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"b": 1, "a": "é"}


def test_an_output_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        output_folder(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        output_folder(tmp_path / "file" / "below")
    assert output_folder(tmp_path / "new" / "deep").is_dir()
