"""Models that take several inputs, answer with several outputs, or take sequences of several lengths: as Python holds such data."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lineament.audit.run import AuditOptions, audit
from lineament.core.checks import InputError
from lineament.load.data import load_data
from lineament.load.loaded import Loaded
from lineament.load.model_and_data import bring_together

X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
MASK = (torch.rand(30, 5, generator=torch.Generator().manual_seed(1)) > 0.3).float()
Y = torch.arange(30) % 3


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x, mask):
        return self.inner(x * mask)


class Batch(Masked):
    def forward(self, **batch):
        return self.inner(batch["x"] * batch["mask"])


class Rows(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return len(X)

    def __getitem__(self, k):
        if self.form == "tuple":
            return (X[k], MASK[k]), int(Y[k])
        return {"x": X[k], "mask": MASK[k], "label": int(Y[k]), "file": f"{k}.png"}


def forms():
    return {
        "pair of a tuple": ((X, MASK), Y),
        "pair of a dictionary": ({"x": X, "mask": MASK}, Y),
        "data set of tuples": Rows("tuple"),
        "data set of dictionaries": Rows("dict"),
        "loader of tuples": DataLoader(Rows("tuple"), batch_size=7),
        "loader of dictionaries": DataLoader(Rows("dict"), batch_size=7),
    }


def together(net, data, **options):
    return bring_together(Loaded(net.eval(), "net", "module"), load_data(data), batch_size=8, **options)


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("kind", [Masked, Batch])
def test_all_inputs_reach_the_model(form, kind):
    net = kind()
    if kind is Batch and "tuple" in form:
        pytest.skip("inputs without names cannot go to forward(**batch)")
    expected = Masked()(X, MASK)
    with together(net, forms()[form]) as found:
        assert torch.allclose(found.outputs, expected, atol=1e-6)
        some = torch.tensor([20, 3])
        assert torch.allclose(found.answer(some), expected[some], atol=1e-6)
        inputs, targets = found.batches()[0]
        assert len(inputs) == 2 and targets.tolist() == Y[:8].tolist()


def test_what_the_forward_does_not_take_is_left_out_and_said():
    class One(nn.Module):
        def forward(self, features):
            return features[:, :3]

    with together(One(), ({"x": X, "row": torch.arange(30)}, Y)) as found:
        assert torch.equal(found.outputs, X[:, :3])
        assert any("'row' is no argument of One.forward" in note for note in found.notes)


def test_every_lens_audits_a_model_of_several_inputs(tmp_path):
    found = audit(Masked(), ({"x": X, "mask": MASK}, Y), out=tmp_path / "r")
    status = {section.name: section.status for section in found.sections}
    assert {status.pop(name) for name in ("gaze", "shortcuts", "complexity")} == {"skipped"} and not {
        "failed",
        "skipped",
    } & {*status.values()}
    assert (
        '"Input", "x: 5, mask: 5"' in found.json.read_text().replace("\n", "").replace("  ", "")
        or "x: 5, mask: 5" in found.html.read_text()
    )


@dataclass
class Answer:
    features: torch.Tensor
    classes: torch.Tensor


OUTPUTS = {
    "tuple": (lambda a, b: (a, b), 1),
    "list": (lambda a, b: [a, b], "1"),
    "dict": (lambda a, b: {"features": a, "classes": b}, "classes"),
    "dataclass": (Answer, "classes"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_output_that_is_named_is_looked_at(kind, tmp_path):
    make, which = OUTPUTS[kind]

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return make(x, self.head(x))

    net = Two().eval()
    with together(net, (X, Y), output=which) as found:
        assert torch.allclose(found.outputs, net.head(X), atol=1e-6)
    assert not net._forward_hooks
    with pytest.raises(InputError, match="`output`"):
        audit(net, (X, Y), out=tmp_path / "r")
    with pytest.raises(InputError, match="output: the model has none called 'clases'"):
        audit(net, (X, Y), out=tmp_path / "r", options=AuditOptions(output="clases"))


class Sequence(Dataset):
    """Sequences of 3 to 8 steps."""

    def __len__(self):
        return 24

    def __getitem__(self, k):
        return torch.full((3 + k % 6, 2), float(k)), k % 2


def padding(batch):
    x = nn.utils.rnn.pad_sequence([x for x, _ in batch], batch_first=True)
    return x, torch.tensor([y for _, y in batch])


class Mean(nn.Module):
    """A step of padding would change it."""

    def forward(self, x):
        return torch.stack([x.mean((1, 2)), torch.full((len(x),), float(x.shape[1]))], 1)


def test_sequences_of_several_lengths_go_without_padding():
    expected = torch.tensor([[float(k), 3.0 + k % 6] for k in range(24)])
    with together(Mean(), Sequence()) as found:
        assert torch.allclose(found.outputs, expected)
        assert any("3 to 8 steps" in note for note in found.notes)
    # A loader's own batches keep the padding that its collate function gave them, and no more.
    loader = DataLoader(Sequence(), batch_size=6, collate_fn=padding)
    with torch.no_grad():
        own = torch.cat([Mean()(x) for x, _ in loader])
    with together(Mean(), loader) as found:
        assert torch.allclose(found.outputs, own)


def test_a_mask_of_padding_says_where_sequences_end():
    ids = torch.arange(1, 13).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])

    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(20, 2)

        def forward(self, input_ids, attention_mask):
            assert bool(attention_mask.all()), "no padding comes here"
            return self.words(input_ids).sum(1)

    net = Count()
    data = ({"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1, 0]))
    with together(net, data) as found, torch.no_grad():
        expected = torch.stack([net.words(row[: int(m.sum())]).sum(0) for row, m in zip(ids, mask)])
        assert torch.allclose(found.outputs, expected, atol=1e-6)


def test_shapes_that_are_no_sequences_are_refused():
    class Odd(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, k):
            return torch.zeros(3, 4 + k), k

    with pytest.raises(InputError, match=r"data: samples have shapes \(3, 4\) and \(3, 5\)"):
        load_data(Odd())


def test_a_list_with_an_array_for_each_sample():
    found = load_data(([torch.ones(2, 3), torch.ones(4, 3)], [0, 1]))
    assert found.inputs.shape == (2, 4, 3) and found.lengths.tolist() == [2, 4] and not found.others
    assert load_data(([torch.ones(2, 3), torch.ones(2, 3)], [0, 1])).inputs.shape == (2, 2, 3)


def test_a_data_set_of_tensors_is_as_it_was():
    found = load_data(TensorDataset(X, Y))
    assert torch.equal(found.inputs, X) and found.lengths is None and not found.others


def test_training_on_the_command_line_refuses_sequences_of_several_lengths(tmp_path, monkeypatch, capsys):
    from lineament.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n"
        "def data(): return [torch.ones(2, 3), torch.ones(4, 3)] * 5, [0, 1] * 5\n"
    )
    assert main(["train", "net.py:make", "net.py:data", "--out", "run"]) == 2
    assert "samples differ in length, expected all alike" in capsys.readouterr().err


class Swapped(Masked):
    """Other names than the arrays have, the mask first."""

    def forward(self, keep, values):
        return super().forward(values, keep)


@pytest.mark.parametrize(
    ("model", "given"), [(Masked, []), (Masked, ["--inputs", "x,mask"]), (Swapped, ["--inputs", "mask,x"])]
)
@pytest.mark.parametrize("ending", [".npz", ".pt"])
def test_one_file_of_arrays_for_several_inputs(model, given, ending, tmp_path, monkeypatch):
    """By the names of the forward's arguments, or in the order asked for, on the command line; what is no input stays out."""
    from lineament import cli

    arrays = {"x": X, "mask": MASK, "y": Y, "site": Y % 2}
    file = tmp_path / f"a{ending}"
    if ending == ".npz":
        np.savez(file, **{name: value.numpy() for name, value in arrays.items()})
    else:
        torch.save(arrays, file)
    monkeypatch.setattr("tests.unit.load.test_several_inputs.made", model, raising=False)
    command = [
        "audit",
        "tests.unit.load.test_several_inputs:made",
        str(file),
        "--lens",
        "accuracy",
        "--groups",
        "site",
    ]
    assert cli.main([*command, *given, "--out", str(tmp_path / "r")]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    with torch.no_grad():
        right = (Masked()(X, MASK).argmax(1) == Y).double().mean()
    assert report["sections"][0]["numbers"]["overall"]["accuracy"] == pytest.approx(float(right))
    assert not any("left out" in note for note in report["notes"])


def test_arrays_of_another_number_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=X.numpy(), mask=MASK.numpy()[:9], y=Y.numpy())
    with pytest.raises(InputError, match=r"array 'mask' has shape \(9, 5\) and 'y' \(30,\)"):
        load_data(tmp_path / "a.npz", inputs="x,mask")
    with pytest.raises(InputError, match="inputs: 'msk' is not in the data; nearest: 'mask'"):
        load_data(tmp_path / "a.npz", inputs="x,msk")
