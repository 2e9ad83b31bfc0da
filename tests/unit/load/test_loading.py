"""Users' data: every form is read, within the budget, and whatever cannot be used is named."""

from __future__ import annotations

import pickle
import sys
import zipfile
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lineament.core.checks import InputError
from lineament.data.samples import Samples
from lineament.load.array_files import NpzFile
from lineament.load.data import load_data, training_part

HOSTILE = ["<script>alert(1)<", "a\u202eb", "quote\"'&", "tab\there"]


def save(path, **found):
    np.savez_compressed(path, **found)
    return path


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (30, 5, 6), dtype=np.uint8)


def test_npz_reads_the_chosen_rows_and_only_those(tmp_path, images):
    x = np.arange(10_000 * 7, dtype=np.float64).reshape(10_000, 7)
    path = save(tmp_path / "a.npz", x=x, y=np.arange(10_000) % 3)
    found = load_data(path, samples=50, seed=3)
    assert len(found) == 50 and found.total == 10_000
    assert torch.equal(found.inputs, torch.from_numpy(x[found.index.numpy()]).float())
    assert torch.equal(found.targets, found.index % 3)
    assert torch.equal(found.index, load_data(path, samples=50, seed=3).index)
    assert not torch.equal(found.index, load_data(path, samples=50, seed=4).index)


def test_npz_holds_no_more_than_the_budget(tmp_path):
    import tracemalloc

    path = save(tmp_path / "a.npz", x=np.zeros((200, 500, 500), np.uint8), y=np.arange(200) % 2)
    tracemalloc.start()
    found = load_data(path, samples=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.inputs.shape == (4, 500, 500)
    assert peak < 20e6, f"{peak / 1e6:.0f} MB for 1 MB of samples out of 50 MB"


@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_in_either_memory_order(tmp_path, images, order):
    path = save(tmp_path / "a.npz", images=np.asarray(images, order=order), labels=np.arange(30) % 2)
    found = load_data(path, samples=11)
    assert found.inputs.dtype == torch.uint8
    assert np.array_equal(found.inputs.numpy(), images[found.index.numpy()])


def test_npz_names_targets_classes_and_groups(tmp_path, images):
    path = save(
        tmp_path / "a.npz",
        pictures=images,
        kind=np.array(["cat", "dog", "<b>"] * 10),
        site=np.array(["north", "south"] * 15),
    )
    found = load_data(path, inputs="pictures", targets="kind", groups="site")
    assert found.classes == ("<b>", "cat", "dog") and found.targets[:3].tolist() == [1, 2, 0]
    assert found.group_names == ("north", "south") and found.groups is not None
    assert found.groups[:4].tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match=r"groups: 'sites' is not in the data; nearest: 'site'"):
        load_data(path, inputs="pictures", targets="kind", groups="sites")
    with pytest.raises(InputError, match=r"say which of 'pictures', 'kind', 'site'"):
        load_data(path)


def test_npz_targets_go_with_their_inputs(tmp_path, images):
    path = save(
        tmp_path / "a.npz", x_train=images, y_train=np.ones(30, int), x_test=images[:4], y_test=np.arange(4)
    )
    found = load_data(path)
    assert found.targets.tolist() == [0, 1, 2, 3]


def test_groups_from_files_follow_the_budget(tmp_path, images):
    path = save(tmp_path / "a.npz", x=images, y=np.arange(30) % 2)
    (tmp_path / "g.txt").write_text("\n".join(f"g{i % 3}" for i in range(30)))
    np.save(tmp_path / "g.npy", np.arange(30) % 3)
    for name in ("g.txt", "g.npy"):
        found = load_data(path, samples=9, groups=str(tmp_path / name))
        assert found.groups is not None and torch.equal(found.groups, found.index % 3)
    np.save(tmp_path / "short.npy", np.arange(7))
    with pytest.raises(InputError, match="expected one entry for each of 30 samples"):
        load_data(path, groups=str(tmp_path / "short.npy"))


def test_npz_that_cannot_be_used(tmp_path, images):
    y = np.arange(30) % 2
    cases = {
        "empty": ({"x": images[:0], "y": y[:0]}, "it is empty"),
        "lengths": ({"x": images, "y": y[:7]}, "expected as many samples in both"),
        "nan": ({"x": np.where(images > 250, np.nan, 1.0), "y": y}, r"NaN or infinite values in \d+ of 30"),
        "rows": ({"x": images, "y": 3 * np.eye(2, dtype=int)[y]}, "a row of 0s and 1s"),
        "words": ({"x": np.array([["a"]] * 30), "y": y}, "expected images or numbers"),
        "complex": ({"x": images, "y": y.astype(complex)}, "expected class numbers"),
        "scalar": ({"x": images, "y": np.array(3)}, "is a single number"),
    }
    for name, (found, message) in cases.items():
        with pytest.raises(InputError, match=message):
            load_data(save(tmp_path / f"{name}.npz", **found))


def test_npz_of_python_objects_is_never_unpickled(tmp_path, images):
    bomb = tmp_path / "exploded"

    class Bomb:
        def __reduce__(self):
            return (open, (str(bomb), "w"))

    path = tmp_path / "a.npz"
    np.savez(path, x=np.array([Bomb()] * 2, dtype=object), y=np.arange(2))
    with pytest.raises(InputError, match="holds Python objects, which only a pickle can restore"):
        load_data(path)
    assert not bomb.exists()


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_corrupt_npz(tmp_path, images, cut):
    path = save(tmp_path / "a.npz", x=images, y=np.arange(30))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"corrupt or no \.npz file"):
        load_data(path)


def test_npz_with_a_damaged_middle(tmp_path, images):
    path = tmp_path / "a.npz"
    np.savez(path, x=images, y=np.arange(30))
    raw = bytearray(path.read_bytes())
    raw[400:440] = bytes(40)
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"corrupt|damaged|ends too early"):
        load_data(path)


def test_npz_whose_header_lies(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("x", (10, 4)), ("y", (10,))):
            archive.writestr(
                f"{name}.npy",
                b"\x93NUMPY\x01\x00v\x00"
                + f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n" + b"\0" * 8,
            )  # fmt: skip
    with pytest.raises(InputError, match="ends too early"):
        load_data(path)


def test_missing_or_foreign_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_data(tmp_path / "nothing.npz")
    other = tmp_path / "data.pkl"
    other.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(InputError, match=r"kind '\.pkl', expected arrays \(\.npz"):
        load_data(other)


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(HOSTILE):
        for i in range(3):
            place = tmp_path / "photos" / name
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (60 * number, 10 * i, 0)).save(place / f"<img src=x>{i}.png")
    return tmp_path / "photos"


def test_image_folder_keeps_hostile_names_raw(folder):
    found = load_data(folder)
    assert found.classes == tuple(sorted(HOSTILE)) and found.inputs.shape == (12, 6, 8, 3)
    assert found.targets.bincount().tolist() == [3, 3, 3, 3]
    assert load_data(folder, image_size=(4, 5)).inputs.shape == (12, 4, 5, 3)
    assert len(load_data(folder, samples=5)) == 5


def test_image_folder_reads_no_more_than_the_budget(folder, monkeypatch):
    from lineament.load import folders

    opened = []
    real = folders._read
    monkeypatch.setattr(folders, "_read", lambda file: opened.append(file) or real(file))
    load_data(folder, samples=5)
    assert len(opened) == 5


def test_image_folders_that_cannot_be_used(tmp_path, folder):
    Image.new("RGB", (9, 9)).save(folder / HOSTILE[0] / "z.png")
    with pytest.raises(InputError, match=r"different sizes.*`image_size`"):
        load_data(folder)
    (folder / HOSTILE[1] / "broken.jpg").write_bytes(b"no image")
    found = load_data(folder, image_size=4)
    assert len(found) == 13 and found.total == 14
    assert any("1 of 14 images are left out: image" in note and "broken.jpg" in note for note in found.notes)
    (tmp_path / "all" / "cat").mkdir(parents=True)
    (tmp_path / "all" / "cat" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"none of 1 images can be read; .*broken\.jpg.*cannot be read"):
        load_data(tmp_path / "all")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="holds no folders with images"):
        load_data(tmp_path / "bare")
    np.savez(tmp_path / "bare" / "first.npz", x=np.zeros((2, 3)), y=np.arange(2))
    with pytest.raises(InputError, match=r"1 \.npz files; pass one: .*first\.npz"):
        load_data(tmp_path / "bare")
    for split in ("train", "test"):
        (tmp_path / "splits" / split / "cat").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "splits" / split / "cat" / "a.png")
    with pytest.raises(InputError, match=r"splits test, train, not classes; pass one"):
        load_data(tmp_path / "splits")


def test_grey_image_folder(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (7, 5), 9).save(tmp_path / name / "i.png")
    assert load_data(tmp_path).inputs.shape == (2, 5, 7)


def test_digits():
    found = load_data("digits")
    assert found.inputs.shape == (1797, 1, 8, 8) and float(found.inputs.max()) == 1.0


def test_stream_reads_across_blocks(tmp_path, monkeypatch):
    """Rows are found also where the array is read in many blocks."""
    x = np.random.default_rng(0).standard_normal((1000, 1100))
    path = save(tmp_path / "a.npz", x=x, y=np.zeros(1000, int))
    rows = np.array([0, 1, 476, 477, 999])
    with zipfile.ZipFile(path) as archive:
        assert np.array_equal(NpzFile(archive).rows("x", rows), x[rows])


def test_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    from datasets import ClassLabel, DatasetDict, Features, Value
    from datasets import Image as Picture

    features = Features(image=Picture(), label=ClassLabel(names=HOSTILE[:2]), place=Value("string"))
    rows = {
        "image": [Image.new("L", (6, 6), 10 * i) for i in range(8)],
        "label": [0, 1] * 4,
        "place": ["x", "x", "y", "y"] * 2,
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "one")
    found = load_data(tmp_path / "one", groups="place")
    assert found.inputs.shape == (8, 6, 6) and found.classes == tuple(HOSTILE[:2])
    assert found.groups is not None and found.groups.tolist() == [0, 0, 1, 1] * 2
    DatasetDict(train=table, test=table.select(range(2))).save_to_disk(tmp_path / "both")
    assert len(load_data(tmp_path / "both")) == 2
    assert len(load_data(tmp_path / "both", split="train", samples=3)) == 3
    with pytest.raises(InputError, match=r"split: 'tset' is not in the data; nearest: 'test'"):
        load_data(tmp_path / "both", split="tset")
    with pytest.raises(InputError, match="'nowhere' is not in the data"):
        load_data(tmp_path / "one", groups="nowhere")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"cut")
    with pytest.raises(InputError, match="no readable Hugging Face data set"):
        load_data(tmp_path / "one")


def test_without_the_hub_extra(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"install lineament\[hub\]"):
        load_data(tmp_path)


def test_a_class_folder_without_images_keeps_its_number(tmp_path):
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).mkdir()
    for name in ("ant", "cat"):
        Image.new("L", (4, 4), 200).save(tmp_path / name / "a.png")
    found = load_data(str(tmp_path), samples=10)
    assert found.classes == ("ant", "bee", "cat") and found.targets.tolist() == [0, 2]
    assert any("'bee'" in note for note in found.notes)


def test_pictures_of_sixteen_bits_are_not_clipped(tmp_path):
    for name, value in (("dark", 64 << 8), ("light", 200 << 8)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / name / "a.png")
    found = load_data(str(tmp_path), samples=10)
    assert found.inputs.dtype == torch.uint8 and found.inputs[:, 0, 0].tolist() == [64, 200]


@pytest.mark.parametrize(
    ("size", "said"), [((99_999, 99_999), "pixels an image"), ((7_000, 7_000), "of this machine's memory")]
)
def test_a_size_that_no_memory_holds_is_refused_before_any_image_is_enlarged(
    tmp_path, monkeypatch, size, said
):
    """The system would end the process, and say nothing."""
    import os

    (tmp_path / "cat").mkdir()
    for index in range(3):
        Image.new("L", (4, 4)).save(tmp_path / "cat" / f"{index}.png")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 16}.__getitem__)
    with pytest.raises(InputError, match=f"image_size: .*{said}"):
        load_data(tmp_path, image_size=size)


def test_a_header_that_claims_more_than_the_file_holds_makes_nothing_of_that_size(tmp_path):
    path = save(tmp_path / "claims.npz", y=np.arange(10) % 2)
    with zipfile.ZipFile(path, "a") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (10, 10**6, 10**6)}
        )
    with pytest.raises(InputError, match="ends too early"):
        load_data(path)


def in_memory_forms():
    x, y = torch.arange(60.0).view(20, 3), torch.arange(20) % 4
    pair = TensorDataset(x, y)
    return {
        "tensors": (x, y),
        "arrays": (x.numpy(), y.numpy()),
        "lists": (x.tolist(), y.tolist()),
        "samples": Samples(x, y),
        "dataset": pair,
        "subset": Subset(pair, range(20)),
        "loader": DataLoader(pair, batch_size=6),
    }


@pytest.mark.parametrize("form", in_memory_forms())
def test_data_in_memory_come_in_every_form(form):
    data = in_memory_forms()[form]
    whole = load_data(data, groups=["a", "b"] * 10, classes=["n", "e", "s", "w"])
    assert torch.equal(whole.inputs, torch.arange(60.0).view(20, 3)) and whole.classes == ("n", "e", "s", "w")
    assert whole.targets.tolist() == [k % 4 for k in range(20)] and whole.groups.tolist() == [0, 1] * 10
    some = load_data(data, samples=7, seed=1)
    assert len(some) == 7 and torch.equal(some.inputs[:, 0], 3.0 * some.index)
    assert form == "loader" or some.total == 20


def test_data_in_memory_of_another_form_are_refused():
    for data, said in (
        (5, "expected a pair"),
        ((torch.zeros(3, 2), torch.zeros(2)), "3 inputs and 2 targets"),
        (DataLoader(TensorDataset(torch.zeros(0, 2), torch.zeros(0))), "it is empty"),
        ((torch.full((2, 2), torch.nan), torch.tensor([0, 1])), "NaN or infinite values in 2 of 2"),
    ):
        with pytest.raises(InputError, match=said):
            load_data(data)


def test_a_dataset_larger_than_the_memory_is_not_read_whole():
    class Large(Dataset):
        fetched: ClassVar[list] = []

        def __len__(self):
            return 10**9

        def __getitem__(self, row):
            self.fetched.append(row)
            return torch.zeros(2), row % 2

    found = load_data(Large(), samples=5)
    assert len(Large.fetched) == 5 and found.total == 10**9 and found.index.tolist() == Large.fetched


def test_a_part_of_arrays_and_folders(tmp_path):
    """A part is served, or refused: never left aside."""
    x = torch.arange(10.0)[:, None].expand(10, 4).numpy()
    y = np.arange(10) % 2
    np.savez(tmp_path / "parts.npz", x_train=x, y_train=y, x_test=x[:4] + 100, y_test=y[:4])
    np.savez(tmp_path / "turned.npz", train_images=x, train_labels=y, test_images=x[:4], test_labels=y[:4])
    np.savez(tmp_path / "whole.npz", x=x, y=y)
    for name in ("parts.npz", "turned.npz"):
        at = tmp_path / name
        assert len(load_data(at, split="train")) == 10 and len(load_data(at, split="test")) == 4
        assert training_part(at) == "train" and training_part(at, inputs="x_test") is None
        with pytest.raises(InputError, match="split: got 'validation'"):
            load_data(at, split="validation")
    assert len(load_data(tmp_path / "parts.npz")) == 4  # as ever: what a network has not seen
    for part, count in (("train", 3), ("test", 2)):
        for k in range(count):
            (tmp_path / "photos" / part / "cat").mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(tmp_path / "photos" / part / "cat" / f"{k}.png")
    assert len(load_data(tmp_path / "photos", split="train")) == 3
    (tmp_path / "table.csv").write_text("a,label\n1,0\n2,1\n")
    for name in ("whole.npz", "table.csv", "photos/test"):
        assert training_part(tmp_path / name) is None
        with pytest.raises(InputError, match=r"split: got 'train', but .* is not in parts"):
            load_data(tmp_path / name, split="train")
    (tmp_path / "own.py").write_text("import torch\ndata = torch.zeros(2, 1), torch.arange(2)\n")
    for whole in ("digits", (x, y), f"{tmp_path / 'own.py'}:data"):
        with pytest.raises(InputError, match=r"split: got 'train', but .* no parts; leave it out"):
            load_data(whole, split="train")
    assert [load_data("shortcut-digits", split=part).total for part in ("train", "test")] == [1200, 597]
