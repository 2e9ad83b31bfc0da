"""Data in the files that people have, made as their tools make them: arrays side by side, tensors, tables, MNIST, CIFAR, functions."""

from __future__ import annotations

import gzip
import pickle
import struct
import textwrap
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lineament.core.checks import InputError
from lineament.load.columns import chosen_rows
from lineament.load.data import load_data

X = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
Y = np.arange(12) % 4


def all_rows(total):
    return chosen_rows(total, samples=1000, seed=0)


def write(path, text):
    path.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("names", "given", "targets"),
    [(("x", "y"), "x.npy", None), (("images", "labels"), "images.npy", None), (("x", "y"), "", None),
     (("test_images", "test_labels"), "test_images.npy", None), (("photos", "kinds"), "photos.npy", "kinds.npy")],
)  # fmt: skip
def test_npy_files_side_by_side(names, given, targets, tmp_path):
    np.save(tmp_path / f"{names[0]}.npy", X)
    np.save(tmp_path / f"{names[1]}.npy", Y)
    found = load_data(tmp_path / given, targets=targets, samples=5)
    assert torch.equal(found.inputs, torch.from_numpy(X)[found.index]) and found.total == 12
    assert torch.equal(found.targets, torch.from_numpy(Y)[found.index])


def test_npy_files_that_cannot_be_used(tmp_path):
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(InputError, match=r"targets: .*no array called 'y'"):
        load_data(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", np.array([object()] * 12), allow_pickle=True)
    with pytest.raises(InputError, match="holds Python objects"):
        load_data(tmp_path / "x.npy")
    (tmp_path / "y.npy").write_bytes(b"none")
    with pytest.raises(InputError, match=r"no \.npy file|damaged header"):
        load_data(tmp_path / "x.npy")


@pytest.mark.parametrize("form", ["dictionary", "pair", "named", "half", "safetensors"])
def test_tensors_of_torch_save_and_safetensors(form, tmp_path):
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    path = tmp_path / ("data.safetensors" if form == "safetensors" else "data.pt")
    contents = {
        "dictionary": {"images": x, "labels": y, "classes": ["n", "e", "s", "w"]},
        "pair": (x, y),
        "named": {"train": {"first": x, "second": y}},
        "half": {"x": x.half(), "y": y},
        "safetensors": {"x": x, "y": y},
    }
    save_file(contents[form], path) if form == "safetensors" else torch.save(contents[form], path)
    names = {"inputs": "train.first", "targets": "train.second"} if form == "named" else {}
    found = load_data(path, samples=5, **names)
    assert torch.equal(found.inputs, x[found.index].to(found.inputs.dtype)) and torch.equal(
        found.targets, y[found.index]
    )
    assert found.inputs.dtype == (torch.float32 if form == "half" else torch.uint8)
    assert found.classes == (("n", "e", "s", "w") if form == "dictionary" else ())


def test_a_pickled_data_set_is_refused_with_an_export_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), "data.pt")
    with pytest.raises(InputError, match=r"^data: .*TensorDataset") as caught:
        load_data("data.pt")
    exec("\n".join(str(caught.value).split("\n    ")[1:]), {})
    assert load_data("data-weights.pt", inputs="0", targets="1").targets.tolist() == Y.tolist()


TABLE = """
    age,income,"city, state",note,label
    30,1000.5,"Bonn, NRW",,yes
    40,2000,"a ""quoted"" town",x,no
    ,3000,Ulm,y,yes
    50,4000,"two
    lines",z,no
"""


def test_a_table_of_named_columns(tmp_path):
    found = load_data(write(tmp_path / "people.csv", TABLE))
    assert found.inputs.tolist() == [[30, 1000.5], [40, 2000], [50, 4000]] and found.total == 4
    assert found.targets.tolist() == [1, 0, 0] and found.classes == ("no", "yes")
    assert found.index.tolist() == [0, 1, 3]
    assert "columns that hold no numbers are left out: 'city, state', 'note'" in found.notes
    assert "1 of 4 rows read are left out for an empty cell: row 3 ('age')" in found.notes
    assert "inputs are 2 columns ('age', 'income'), targets 'label'" in found.notes


def test_columns_of_a_table_are_chosen_by_name(tmp_path):
    path = write(tmp_path / "people.csv", TABLE)
    found = load_data(path, inputs="income", targets="age", groups="label")
    assert found.inputs.tolist() == [[1000.5], [2000.0], [4000.0]] and found.targets.tolist() == [30, 40, 50]
    assert found.group_names == ("no", "yes") and found.groups.tolist() == [1, 0, 0]
    several = load_data(path, inputs="age", targets="income,age")
    assert several.targets.tolist() == [[1000.5, 30], [2000, 40], [4000, 50]]
    for options, said in (
        ({"targets": "lable"}, "targets: 'lable' is not in the data; nearest: 'label'"),
        ({"inputs": "age,incme"}, "inputs: 'incme' is not in the data; nearest: 'income'"),
        ({"inputs": "city, state"}, "inputs: column 'city, state' holds 'Bonn, NRW', expected numbers"),
        ({"groups": "place"}, "groups: 'place' is not in the data"),
    ):
        with pytest.raises(InputError, match=said):
            load_data(path, **options)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_marks_between_cells(mark, tmp_path):
    path = write(tmp_path / ("a.tsv" if mark == "\t" else "a.csv"), f"\ufeffa{mark}y\n1{mark}0\n2{mark}1\n")
    found = load_data(path)
    assert found.inputs.tolist() == [[1], [2]] and found.targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("a,y\n", "has no rows"),
        ("1,2\n3,4\n", "begins with numbers"),
        ("a,a,y\n1,2,0\n", "two columns called 'a'"),
        ("a,y\n1,0\n2\n", "row 2 of .* has 1 cells, expected 2"),
        ("a,b\n1,0\n2,1\n", "targets: the data has no array called 'label'"),
        ("words,y\nhello,0\nworld,1\n", "no column of numbers beside 'y'"),
        ('a,y\n"1,0\n2,1\n', "cannot be read as a table"),
        ("a,y\n,0\nNA,1\n", "no column of numbers|every row"),
    ],
)
def test_tables_that_cannot_be_used(text, said, tmp_path):
    with pytest.raises(InputError, match=said):
        load_data(write(tmp_path / "a.csv", text))


def test_mixed_labels_are_names_and_a_table_of_two_rows_is_read(tmp_path):
    found = load_data(write(tmp_path / "a.csv", "a,y\n1,0\n2,cat\n"))
    assert found.classes == ("0", "cat") and found.targets.tolist() == [0, 1]


def test_a_rare_name_that_was_not_chosen_keeps_its_place(tmp_path):
    path = write(tmp_path / "a.csv", "a,y\n" + "1,dog\n" * 30 + "1,ant\n" + "1,cat\n" * 30)
    assert load_data(path, samples=10, seed=1).classes == ("ant", "cat", "dog")


def test_a_long_table_is_never_held(tmp_path):
    path = tmp_path / "long.csv"
    line = "0.25,0.5,0.75,1.0,1.5,2.0,3.0,7\n"
    path.write_text("a,b,c,d,e,f,g,y\n" + line * 60_000)
    tracemalloc.start()
    found = load_data(path, samples=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.total == 60_000 and found.inputs.shape == (100, 7) and peak < 2e6 < path.stat().st_size * 1.1


def test_parquet(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="comes with the extra 'hub'")
    import pyarrow.parquet as pq

    rows = {
        "age": [30, 40, None, 50],
        "income": [1.5, 2.0, 3.0, 4.0],
        "town": ["a", "b", "c", "d"],
        "label": ["y", "n", "y", "n"],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=2)
    found = load_data(tmp_path / "a.parquet")
    assert found.inputs.tolist() == [[30, 1.5], [40, 2], [50, 4]] and found.classes == ("n", "y")
    assert found.targets.tolist() == [1, 0, 0] and found.total == 4
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="no readable parquet file"):
        load_data(tmp_path / "b.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"need the package 'pyarrow'.*\.csv"):
        load_data(tmp_path / "a.parquet")


def idx(path, values):
    head = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    data = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
def test_mnist(end, place, tmp_path):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for part, k in (("train", 8), ("t10k", 12)):
        idx(folder / f"{part}-images-idx3-ubyte{end}", X[:k, 0])
        idx(folder / f"{part}-labels-idx1-ubyte{end}", Y[:k])
    found = load_data(tmp_path, samples=5)
    assert np.array_equal(found.inputs, X[found.index.numpy(), 0]) and found.total == 12
    assert found.targets.tolist() == Y[found.index.numpy()].tolist() and "split 'test'" in found.notes
    assert load_data(tmp_path, split="train").total == 8
    for part in (None, "train"):
        assert load_data(folder / f"train-images-idx3-ubyte{end}", split=part).total == 8
    with pytest.raises(
        InputError, match=r"split: got 'test', but 'train-.*' is one part, 'train'; pass its folder"
    ):
        load_data(folder / f"train-images-idx3-ubyte{end}", split="test")
    with pytest.raises(InputError, match="split: 'val' is not in the data"):
        load_data(tmp_path, split="val")
    idx(folder / f"t10k-labels-idx1-ubyte{end}", Y[:5])
    with pytest.raises(InputError, match="one label for each image"):
        load_data(tmp_path)
    (folder / f"t10k-images-idx3-ubyte{end}").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(InputError, match=r"cannot be read|expected an IDX file"):
        load_data(tmp_path)


def test_a_gzipped_file_that_unpacks_to_far_more_is_not_unpacked(tmp_path):
    head = b"\0\0\x08\3" + struct.pack(">3I", 12, 32, 32)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(60_000_000)))
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", Y)
    tracemalloc.start()
    assert load_data(tmp_path).inputs.shape == (12, 32, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def cifar_python(folder, hundred, x=X, dump=lambda value: pickle.dumps(value, 2)):
    folder.mkdir(exist_ok=True)
    key, meta = ("fine_labels", "meta") if hundred else ("labels", "batches.meta")
    names = ("train", "test") if hundred else ("data_batch_1", "data_batch_2", "test_batch")
    for name in names:
        (folder / name).write_bytes(
            dump({"data": x.reshape(len(x), -1), key: Y.tolist(), "batch_label": b"one"})
        )
    title = "fine_label_names" if hundred else "label_names"
    (folder / meta).write_bytes(dump({title: ["n", "e", "s", "w"]}))


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_of_python(hundred, protocol, tmp_path):
    folder = tmp_path / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    cifar_python(folder, hundred, dump=lambda value: pickle.dumps(value, protocol))
    for place in (folder, tmp_path):
        found = load_data(place, samples=7)
        assert np.array_equal(found.inputs, X[found.index.numpy()]) and found.classes == ("n", "e", "s", "w")
        assert found.targets.tolist() == Y[found.index.numpy()].tolist()
    assert load_data(folder, split="train").total == (12 if hundred else 24)


def test_cifar_as_python_2_wrote_it(tmp_path):
    """Keys and labels of bytes, and the array by its old name."""
    cifar_python(
        tmp_path / "c",
        False,
        dump=lambda v: pickle.dumps({k.encode(): w for k, w in v.items()}, 2).replace(
            b"numpy._core", b"numpy.core"
        ),
    )
    assert np.array_equal(load_data(tmp_path / "c").inputs, X)


def test_cifar_of_binary_files(tmp_path):
    records = np.concatenate([Y[:, None].astype(np.uint8), X.reshape(12, -1)], 1)
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes())
    (tmp_path / "batches.meta.txt").write_text("n\ne\ns\nw\n")
    found = load_data(tmp_path, samples=7)
    assert np.array_equal(found.inputs, X[found.index.numpy()]) and found.classes == ("n", "e", "s", "w")
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes()[:-1])
    with pytest.raises(InputError, match="no whole number of CIFAR"):
        load_data(tmp_path)


class Bomb:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place), "w"))


@pytest.mark.parametrize("where", ["beside", "inside the array", "as the whole"])
def test_hostile_cifar_batches_are_refused(where, tmp_path):
    bomb = Bomb(tmp_path / "exploded")
    folder = tmp_path / "c"

    def dump(value):
        if where == "inside the array" and "data" in value:
            value = {**value, "data": np.array([bomb] * 2, dtype=object)}
        return pickle.dumps(bomb if where == "as the whole" else {**value, "bomb": bomb}, 2)

    cifar_python(folder, False, dump=dump)
    with pytest.raises(
        InputError, match=r"names \w+\.open, expected arrays and strings only|holds object, expected numbers"
    ):
        load_data(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_with_its_labels_in_a_file(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(4):
        Image.new("L", (5, 4), 10 * k).save(tmp_path / "images" / f"{k}.png")
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    write(
        tmp_path / "labels.csv",
        "filename,label,site\nimages/0.png,cat,x\n1.png,dog,y\n2,cat,x\n3.png,cow,x\n",
    )
    found = load_data(tmp_path, groups="site")
    assert found.inputs[:, 0, 0].tolist() == [0, 10, 20] and found.inputs.shape == (3, 4, 5)
    assert found.classes == ("cat", "cow", "dog") and found.targets.tolist() == [0, 2, 0]
    assert found.groups.tolist() == [0, 1, 0] and "1 of 4 images are left out" in found.notes[0]
    write(tmp_path / "labels.csv", "filename,label\n../../etc/passwd,cat\n")
    with pytest.raises(InputError, match="expected files in"):
        load_data(tmp_path)
    write(tmp_path / "labels.csv", "where,label\n0.png,cat\n")
    with pytest.raises(InputError, match="inputs: the data has no array called 'file'"):
        load_data(tmp_path)


CODE = """
    import numpy as np, torch
    from torch.utils.data import DataLoader, TensorDataset
    x, y = torch.arange(24.0).view(12, 2), torch.arange(12) % 3
    ready = TensorDataset(x, y)
    pair = lambda: (x, y)
    arrays = lambda: (x.numpy(), y.numpy())
    loader = lambda: DataLoader(ready, batch_size=5)
    path = lambda: PATH
    wrong = lambda: 5
    def broken(): raise RuntimeError("no data here")
"""


def test_a_function_of_a_file_returns_any_form(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=np.arange(24.0).reshape(12, 2), y=np.arange(12) % 3)
    code = write(tmp_path / "mine.py", textwrap.dedent(CODE).replace("PATH", repr(str(tmp_path / "a.npz"))))
    for name in ("ready", "pair", "arrays", "loader", "path"):
        found = load_data(f"{code}:{name}")
        assert found.inputs.flatten().tolist() == list(range(24)) and found.targets.tolist() == [
            k % 3 for k in range(12)
        ]
    for name, said in (
        ("wrong", "got 5, expected a pair"),
        ("broken", r"broken\(\) failed \(RuntimeError: no data here\)"),
        ("lodaer", "has no 'lodaer'; nearest: 'loader'"),
    ):
        with pytest.raises(InputError, match=f"^data: .*{said}"):
            load_data(f"{code}:{name}")
    with pytest.raises(InputError, match=r"^data: file '.*none\.py' does not exist"):
        load_data(f"{tmp_path}/none.py:make")


class Rows(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, row):
        return {"pixel_values": torch.full((2,), float(row)), "labels": row % 2}


class Three(Rows):
    def __getitem__(self, row):
        return torch.full((2,), float(row)), row % 2, f"file {row}"


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.full((2,), float(row)), row % 2) for row in range(10**9))


@pytest.mark.parametrize(
    "data",
    [Rows(), Three(), Stream(), DataLoader(Rows(), 4), DataLoader(Three(), 4), DataLoader(Stream(), 4)],
)
def test_data_sets_of_dictionaries_of_more_than_a_pair_and_without_a_length(data):
    found = load_data(data, samples=6)
    assert found.inputs[:, 0].tolist() == list(range(6)) and found.targets.tolist() == [0, 1] * 3


def test_the_command_reads_what_python_reads(tmp_path, monkeypatch):
    from lineament.cli import main

    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "net.py", "from torch import nn\nmake = lambda: nn.Linear(2, 2)\n" + textwrap.dedent(CODE)
    )
    write(tmp_path / "a.csv", "a,b,y\n" + "".join(f"{k},{k * k},{k % 2}\n" for k in range(20)))
    for k, data in enumerate(("a.csv", "net.py:two")):
        if data == "net.py:two":
            write(tmp_path / "net.py", (tmp_path / "net.py").read_text() + "two = lambda: (x, y % 2)\n")
        assert main(["audit", "net.py:make", data, "--lenses", "accuracy", "--out", f"o{k}"]) == 0
