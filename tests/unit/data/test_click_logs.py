"""Readers of Criteo's, Avazu's and MovieLens 1M's own files: numbers by hand, lines over several chunks, and what is wrong with a file."""

from __future__ import annotations

import gzip
import math

import pytest
import torch

from lineament.core.checks import InputError
from lineament.data import avazu, click_logs, criteo, movielens_1m


def criteo_line(click, counts, values):
    return "\t".join([str(click), *counts, *values, *["68fd1e64"] * (26 - len(values))]) + "\n"


@pytest.mark.parametrize("packed", [False, True])
def test_criteo_takes_logarithms_numbers_values_and_prunes_rare_ones(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(click_logs, "CHUNK", 2)
    counts = ["0", "-3", "", "8103", *["1"] * 9]
    first = [["aa", ""], ["bb", ""], ["aa", "cc"], ["dd", ""], ["dd", '"']]
    lines = "".join(criteo_line(k % 2, counts, values) for k, values in enumerate(first))
    folder = tmp_path / "criteo"
    folder.mkdir()
    if packed:
        (folder / "train.txt.gz").write_bytes(gzip.compress(lines.encode()))
    else:
        (folder / "train.txt").write_text(lines)
    found = criteo(tmp_path, at_least=2)
    assert found.inputs[:, 0].tolist() == [1, 0, 1, 2, 2] and found.inputs[:, 1].tolist() == [1, 1, 0, 1, 0]
    assert found.targets.tolist() == [0, 1, 0, 1, 0] and found.inputs.dtype == torch.int32
    wanted = [0, 0, 0, math.log(8104), *[math.log(2)] * 9]
    torch.testing.assert_close(found.others["dense"], torch.tensor([wanted] * 5))
    assert criteo(tmp_path, at_least=1).inputs[:, 0].tolist() == [1, 2, 1, 3, 3]


def test_a_broken_criteo_file_is_refused_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(click_logs, "CHUNK", 2)
    with pytest.raises(InputError, match=r"expected criteo's train\.txt"):
        criteo(tmp_path)
    good = criteo_line(1, ["1"] * 13, [])
    for bad, said in (
        (good * 2 + "1\t2\n", "sample 3 has 2 fields, expected 40"),
        (criteo_line(5, ["1"] * 13, []), "label is {'5'}, expected 0 and 1"),
        (criteo_line(1, ["x"] * 13, []), "cannot be read as Criteo's lines"),
        ("", "no lines of data"),
    ):
        (tmp_path / "train.txt").write_text(bad)
        with pytest.raises(InputError, match=said):
            criteo(tmp_path)


def test_avazu_keeps_the_hour_of_the_day_and_leaves_the_line_number_out(tmp_path):
    names = ["id", "click", *click_logs.AVAZU]
    rows = [["1", "0", "14102100", *["a"] * 21], ["2", "1", "14102123", *["a"] * 20, "b"], ["3", "1", "14102200", *["a"] * 21]]  # fmt: skip
    (tmp_path / "train.csv").write_text("\n".join(map(",".join, [names, *rows])))
    found = avazu(tmp_path, at_least=1)
    assert found.inputs[:, 0].tolist() == [1, 2, 1] and found.inputs[:, -1].tolist() == [1, 2, 1]
    assert found.inputs.shape == (3, 22) and found.columns[-1] == "C21" and not found.others
    (tmp_path / "train.csv").write_text(",".join(names).replace("site_id", "site"))
    with pytest.raises(InputError, match="has no column 'site_id'"):
        avazu(tmp_path)


def test_movielens_1m_under_both_rules_of_labels(tmp_path):
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    (folder / "movies.dat").write_bytes(
        "3::Café (1990)::Drama\n9::Heat: A (1995)::Action\n".encode("latin-1")
    )
    (folder / "ratings.dat").write_text("1::9::3::70\n2::9::4::80\n1::3::2::90\n2::3::5::95\n")
    literal, without = movielens_1m(tmp_path, labels="3 or more"), movielens_1m(tmp_path)
    assert literal.targets.tolist() == [1, 1, 0, 1] and without.targets.tolist() == [1, 0, 1]
    assert literal.inputs.tolist() == [[0] * 6, [1, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert without.inputs[:, 0].tolist() == [0, 1, 0] and without.extras["time"].tolist() == [80, 90, 95]
    for file, text, said in (
        ("ratings.dat", "1::7::5::70", "of a user or film"),
        ("ratings.dat", "1::9::5", "expected 4, divided by ::"),
        ("ratings.dat", "1::9::x::70", "expected whole numbers"),
        ("ratings.dat", "1::9::3::70", "no rating that is left"),
    ):
        (folder / file).write_text(text)
        with pytest.raises(InputError, match=said):
            movielens_1m(tmp_path)
    with pytest.raises(InputError, match="labels: got '3'"):
        movielens_1m(tmp_path, labels="3")  # pyright: ignore
