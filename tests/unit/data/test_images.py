"""Images in the forms in which people have them: MNIST, CIFAR, arrays; and their augmentation."""

from __future__ import annotations

import gzip
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lineament.core.checks import InputError
from lineament.data.augmentation import OPERATIONS, flip_and_crop, trivial_augment
from lineament.data.digits import digit_images
from lineament.data.photographs import CIFAR10, Standardise, read_photographs

DIGITS = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
LABELS = (np.arange(30) % 10).astype(np.uint8)
PHOTOGRAPHS = np.random.default_rng(1).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()


def write_mnist(folder, form):
    if form == "arrays of both":
        both = {"x_train": DIGITS, "y_train": LABELS, "x_test": DIGITS[:9], "y_test": LABELS[:9]}
        np.savez(folder / "mnist.npz", **both)
        return
    for split, stem, count in (("train", "train", 30), ("test", "t10k", 9)):
        x, y = DIGITS[:count], LABELS[:count]
        if form == "arrays":
            np.savez(folder / f"mnist_{split}.npz", x=x, y=y)
        else:
            raw = folder / "MNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            (raw / f"{stem}-images-idx3-ubyte").write_bytes(idx(x))
            (raw / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y)))


@pytest.mark.parametrize("form", ["arrays", "arrays of both", "idx"])
def test_mnist_is_read_in_the_forms_that_users_have(tmp_path, form):
    write_mnist(tmp_path, form)
    found = digit_images("auto", "train", count=20, data_folder=tmp_path)
    assert found.source == "MNIST" and found.inputs.shape == (20, 1, 28, 28) and found.total == 30
    assert torch.equal(found.inputs[:, 0], torch.from_numpy(DIGITS)[found.index] / 255)
    assert torch.equal(found.targets, torch.from_numpy(LABELS)[found.index].long())
    assert len(digit_images("mnist", "test", data_folder=tmp_path)) == 9
    whole = digit_images("mnist", data_folder=tmp_path)
    assert len(whole) == 39 and whole.targets[:30].tolist() == LABELS.tolist()


def test_mnist_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    with pytest.raises(InputError, match="MNIST is not in any folder"):
        digit_images("mnist")
    with pytest.raises(InputError, match=f"MNIST is not in {re.escape(str(tmp_path))}"):
        digit_images("mnist", data_folder=tmp_path)
    assert digit_images("auto", data_folder=tmp_path).source == "scikit-learn digits"
    write_mnist(tmp_path, "idx")
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="by its header"):
        digit_images("mnist", data_folder=tmp_path)
    (tmp_path / "mnist_train.npz").write_bytes(b"not a file")
    with pytest.raises(InputError, match="damaged"):
        digit_images("mnist", data_folder=tmp_path)


def test_the_digits_of_the_splits_are_different_ones():
    train, test, whole = (digit_images(split=split) for split in ("train", "test", "all"))
    assert torch.equal(torch.cat([train.index, test.index]).sort().values, torch.arange(1797))
    for part in (train, test):
        assert torch.equal(part.inputs, whole.inputs[part.index])
        assert torch.equal(part.targets, whole.targets[part.index])


def write_photographs(folder, form, name, split):
    if form == "npz":
        np.savez(folder / f"{split}.npz", x=PHOTOGRAPHS.transpose(0, 2, 3, 1), y=LABELS, groups=LABELS % 2)
    elif form == "jpeg":
        files = []
        for image in PHOTOGRAPHS:
            file = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
            files.append(file.getvalue())
        offsets = np.cumsum([0, *map(len, files)])
        raw = np.frombuffer(b"".join(files), np.uint8)
        np.savez(folder / f"{name}_{split}_jpeg.npz", bytes=raw, offsets=offsets, y=LABELS)
    else:
        place = folder / ("cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary")
        place.mkdir(exist_ok=True)
        labels = LABELS[:, None] if name == "cifar10" else np.stack([LABELS // 2, LABELS], 1)
        rows = np.concatenate([labels, PHOTOGRAPHS.reshape(30, -1)], 1)
        if name == "cifar10" and split == "train":
            rows[:20].tofile(place / "data_batch_1.bin")
            rows[20:].tofile(place / "data_batch_2.bin")
        else:
            rows.tofile(place / ("test_batch.bin" if name == "cifar10" else f"{split}.bin"))


@pytest.mark.parametrize("form", ["npz", "jpeg", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_photographs_are_read_in_the_forms_that_users_have(tmp_path, monkeypatch, form, name, split):
    write_photographs(tmp_path, form, name, split)
    monkeypatch.setenv("LINEAMENT_DATA", str(tmp_path))
    found = read_photographs(name, split)
    assert np.array_equal(found.inputs.numpy(), PHOTOGRAPHS) and found.targets.tolist() == LABELS.tolist()
    assert found.classes == CIFAR10 if name == "cifar10" else len(found.classes) == 100
    assert (found.groups is not None) == (form == "npz")
    some = read_photographs(name, split, count=7, seed=1)
    assert len(some) == 7 and np.array_equal(some.inputs.numpy(), PHOTOGRAPHS[some.index.numpy()])


def test_photographs_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    with pytest.raises(InputError, match="data_folder: cifar10 needs a folder"):
        read_photographs("cifar10")
    with pytest.raises(InputError, match=r"neither data_batch_\*\.bin nor train\.npz"):
        read_photographs("cifar10", data_folder=tmp_path)
    with pytest.raises(InputError, match=r"holds no test\.npz"):
        read_photographs("npz", "test", data_folder=tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(b"123")
    with pytest.raises(InputError, match=r"data_batch_1\.bin: 3 bytes are no whole number"):
        read_photographs("cifar10", data_folder=tmp_path)
    for arrays, message in (
        ({"x": np.zeros((2, 5)), "y": np.zeros(2)}, "expected uint8 images"),
        ({"x": PHOTOGRAPHS, "y": LABELS[:7]}, "one for each of 7 labels"),
        ({"images": PHOTOGRAPHS}, r"holds \['images'\], expected 'x' and 'y'"),
    ):
        np.savez(tmp_path / "train.npz", **arrays)
        with pytest.raises(InputError, match=message):
            read_photographs("cifar100", data_folder=tmp_path)
    np.savez(
        tmp_path / "cifar10_test_jpeg.npz",
        bytes=np.zeros(9, np.uint8),
        offsets=np.array([0, 9]),
        y=LABELS[:1],
    )
    with pytest.raises(InputError, match="no JPEG images of one size"):
        read_photographs("cifar10", "test", data_folder=tmp_path)


def test_standardising_uses_the_training_images():
    train, test = torch.from_numpy(PHOTOGRAPHS), torch.from_numpy(PHOTOGRAPHS[:5])
    standardise = Standardise(train)
    found = standardise(train)
    assert torch.allclose(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(found.std((0, 2, 3)), torch.ones(3), atol=1e-5)
    assert torch.equal(standardise(test), found[:5]) and standardise(found) is found


def test_crops_and_flips_keep_the_picture():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8) + 1
    found = flip_and_crop(x, torch.Generator().manual_seed(0))
    assert found.shape == x.shape
    for image, original in zip(found, x):
        inside = image[image > 0]
        assert set(inside.tolist()) <= set(original.flatten().tolist()) and len(inside) >= 3 * 16


def test_augmentation_draws_from_its_generator_only():
    images = torch.randint(256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    for augment in (flip_and_crop, trivial_augment):
        one, two = (augment(images, torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(one, two) and one.shape == images.shape and one.dtype == torch.uint8
        assert not torch.equal(augment(images, torch.Generator().manual_seed(2)), one)
    assert len(OPERATIONS) == 14
    same_images = [bool((a == b).all()) for a, b in zip(trivial_augment(images, torch.Generator()), images)]
    assert 0 < sum(same_images) < 20
    with pytest.raises(InputError, match="uint8"):
        trivial_augment(images.float(), torch.Generator())
