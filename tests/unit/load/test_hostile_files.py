"""Data files that are not what their endings say, or far larger than they look: refused or read in little memory, and nothing in them is run."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tests.unit.audit.text_models import tokenizer

from lineament.core.checks import InputError
from lineament.load.data import load_data

ENDINGS = (".npz", ".npy", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt", ".conll", ".gz", "")


class Bomb:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place), "w"))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("texts", ["", "classes", "tokens", "masked"])
def test_pickles_in_place_of_data_are_refused_under_every_name(ending, protocol, texts, tmp_path):
    """Whether numbers or texts are read."""
    place, path = tmp_path / "exploded", tmp_path / f"evil{ending}"
    path.write_bytes(pickle.dumps({"x": Bomb(place), "y": [0, 1]}, protocol))
    options = {"tokenizer": tokenizer(), "text_task": texts} if texts else {}
    with pytest.raises(InputError, match=r"evil|targets: |inputs: |no token of any text"):
        load_data(path, **options)
    assert not place.exists()


@pytest.fixture
def peak():
    """The most memory that was resident since the fixture began, in bytes."""
    status = Path("/proc/self/status")
    if sys.platform != "linux":
        pytest.skip("memory is read from /proc")

    def resident(name: str) -> int:
        return 1024 * next(
            int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)
        )

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    return lambda: resident("VmHWM") - before


def test_an_archive_that_unpacks_to_far_more_is_read_as_a_stream(tmp_path, peak):
    """400 MB in 400 kB: three samples of it take little."""
    path, rows, width = tmp_path / "bomb.npz", 4_000, 100_000
    np.savez_compressed(path, y=np.arange(rows) % 2)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (rows, width)}
        )
        part = bytes(10 * width)
        for _ in range(rows // 10):
            file.write(part)
    assert path.stat().st_size < 4e6
    found = load_data(path, samples=3)
    assert tuple(found.inputs.shape) == (3, width) and found.total == rows
    assert peak() < 100e6


@pytest.mark.slow
def test_a_million_rows_are_read_in_little_memory(tmp_path, peak):
    path = tmp_path / "long.csv"
    part = '0.25,"0.5",7\n' * 10_000
    with path.open("w") as file:
        file.write('age,"mark, last",y\n')
        for _ in range(100):
            file.write(part)
    found = load_data(path, samples=500)
    assert (
        found.total == 1_000_000
        and found.columns == ("age", "mark, last")
        and found.inputs[7].tolist() == [0.25, 0.5]
    )
    assert peak() < 100e6
