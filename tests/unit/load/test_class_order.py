"""Class names given in an order are the model's outputs, wherever the data's own names come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lineament.audit.run import audit
from lineament.cli import main
from lineament.core.checks import InputError
from lineament.load.columns import in_order
from lineament.load.data import load_data
from lineament.load.loaded import Loaded
from lineament.load.model_and_data import bring_together

NAMES = ["ship", "airplane", "automobile"]  # in the model's order, which is not the alphabet's
NET = """
import torch
from torch import nn
class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = nn.Parameter(torch.tensor([0.0, 0.4, 0.8]))
    def forward(self, x):
        return -50 * (x.flatten(1).mean(1, keepdim=True) - self.levels) ** 2
def make():
    return Brightness()
"""
TRUE = np.arange(12) % 3
IMAGES = np.repeat(np.repeat((TRUE * 102).astype(np.uint8)[:, None, None], 4, 1), 4, 2)
WORDS = np.array(NAMES)[TRUE]


class Pairs(Dataset):
    def __init__(self, targets, classes=None):
        self.targets = targets
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return 12

    def __getitem__(self, k):
        return torch.from_numpy(IMAGES[k]), self.targets[k]


def folder(path):
    for k, name in enumerate(WORDS):
        (path / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[k]).save(path / "images" / name / f"{k}.png")
    return str(path / "images")


def archive(path, **arrays):
    np.savez(path / "data.npz", x=IMAGES, **arrays)
    return str(path / "data.npz")


def hub(path, *, coded):
    datasets = pytest.importorskip("datasets")
    own = sorted(NAMES)
    label = datasets.ClassLabel(names=own) if coded else datasets.Value("string")
    values = [own.index(w) for w in WORDS] if coded else WORDS.tolist()
    features = datasets.Features({"x": datasets.Array2D((4, 4), "uint8"), "label": label})
    datasets.Dataset.from_dict({"x": IMAGES, "label": values}, features=features).save_to_disk(path / "set")
    return str(path / "set")


ALPHABET = np.array([sorted(NAMES).index(word) for word in WORDS])
# What holds the names, and whether the order is given with the call (else the data themselves tell it).
SOURCES = {
    "pair of names": (lambda p: (IMAGES, WORDS), True),
    "dataset of names": (lambda p: Pairs([str(w) for w in WORDS]), True),
    "loader of names": (lambda p: DataLoader(Pairs([str(w) for w in WORDS]), 5), True),
    "dataset with classes": (lambda p: Pairs(ALPHABET.tolist(), sorted(NAMES)), True),
    "loader with classes": (lambda p: DataLoader(Pairs(ALPHABET.tolist(), sorted(NAMES)), 5), True),
    "file of names": (lambda p: archive(p, y=WORDS), True),
    "file of names with their order": (lambda p: archive(p, y=WORDS, classes=np.array(NAMES)), False),
    "file of numbers and names": (lambda p: archive(p, y=ALPHABET, classes=np.array(sorted(NAMES))), True),
    "file of bytes": (lambda p: archive(p, y=WORDS.astype("S")), True),
    "image folder": (folder, True),
    "data set with class labels": (lambda p: hub(p, coded=True), True),
    "data set of strings": (lambda p: hub(p, coded=False), True),
}
FILES = [name for name in SOURCES if "pair" not in name and "loader" not in name and "dataset" not in name]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("words", [NAMES, ["Ship", "AIRPLANE", "automobile"]], ids=["exact", "case"])
def test_names_follow_the_given_order(source, words, tmp_path):
    make, needed = SOURCES[source]
    found = load_data(make(tmp_path), classes=words if needed else None, samples=12)
    level = found.inputs.flatten(1).float().mean(1) / 102
    assert torch.equal(found.targets, level.round().long())
    assert found.classes == tuple(words if needed else NAMES)


@pytest.mark.parametrize("source", [s for s in SOURCES if SOURCES[s][1] or "with their" in s])
def test_names_follow_those_of_the_model(source, tmp_path):
    """``id2label`` of a Hugging Face model."""
    scope: dict = {}
    exec(NET, scope)
    loaded = Loaded(scope["make"](), "net", "hugging face", classes=tuple(NAMES))
    with bring_together(loaded, load_data(SOURCES[source][0](tmp_path), samples=12)) as fitted:
        assert torch.equal(fitted.outputs.argmax(1), fitted.targets) and fitted.classes == tuple(NAMES)


@pytest.mark.parametrize("source", FILES)
def test_the_command_takes_the_order(source, tmp_path, capsys):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    make, needed = SOURCES[source]
    given = (
        ["--classes", "ship, airplane, automobile"]
        if "file" in source
        else ["--classes", str(tmp_path / "names.txt")]
    )
    command = [
        "audit",
        f"{tmp_path}/net.py:make",
        make(tmp_path),
        "--out",
        str(tmp_path / "r"),
        "--lenses",
        "accuracy",
    ]
    assert main([*command, *(given if needed else [])]) == 0
    assert "right for 12 of 12" in (tmp_path / "r" / "report.html").read_text().replace("\xa0", " ")


def test_a_rare_name_that_was_not_chosen_keeps_its_place(tmp_path):
    words = np.array(["b"] * 30 + ["c"] * 30 + ["a"])
    np.savez(tmp_path / "d.npz", x=np.zeros((61, 2)), y=words)
    found = load_data(str(tmp_path / "d.npz"), samples=4)
    assert found.classes == ("a", "b", "c") and found.targets.unique().tolist() == [1, 2]


def test_names_of_which_some_are_given_are_refused(tmp_path):
    with pytest.raises(InputError, match="class 'ship' is not among the 3 names given; nearest: 'shop'"):
        load_data((IMAGES, WORDS), classes=["airplane", "automobile", "shop"])
    with pytest.raises(InputError, match="none of the 2 names is one of the data's 3 classes"):
        load_data((IMAGES, WORDS), classes=["a", "b"])
    with pytest.raises(InputError, match="'ship' is there twice"):
        load_data((IMAGES, WORDS), classes=[*NAMES, "ship"])
    renamed = load_data((IMAGES, WORDS), classes=["Flugzeug", "Auto", "Schiff"])
    assert renamed.targets.tolist() == ALPHABET.tolist() and "called by the given names" in renamed.notes[-1]


def test_columns_of_labels_follow_their_names():
    from lineament.data.samples import Samples

    two = Samples(torch.zeros(2, 1), torch.tensor([[1, 0], [1, 1]]), ("wet", "dry"))
    assert in_order(two, ["dry", "icy", "wet"]).targets.tolist() == [[0, 0, 1], [1, 0, 1]]


@pytest.mark.parametrize("classes", [3, 2])
def test_outputs_in_another_order_are_told(classes, tmp_path):
    """No order given, few answers right, and one exchange of the outputs explains nearly all."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (400,), generator=generator)
    x = torch.eye(classes)[(y + 1) % classes] + 0.2 * torch.randn(400, classes, generator=generator)
    net = nn.Linear(classes, classes)
    with torch.no_grad():
        net.weight.copy_(5 * torch.eye(classes))
    section = audit(net, (x, y), out=tmp_path / "a", lenses=["accuracy"])["accuracy"]
    told = [f.sentence for f in section.findings if "another order" in f.sentence]
    assert len(told) == 1 and section.findings[0].severity == "warning"
    assert section.numbers["reordered"]["accuracy"] > 0.95
    right = audit(net, (x, (y + 1) % classes), out=tmp_path / "b", lenses=["accuracy"])["accuracy"]
    chance = audit(
        net, (torch.randn(400, classes, generator=generator), y), out=tmp_path / "c", lenses=["accuracy"]
    )["accuracy"]
    assert not any("another order" in f.sentence for s in (right, chance) for f in s.findings)
