"""Outputs and targets are taken for what they are: probabilities, labels of several kinds, values, token ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.audit.run import audit
from lineament.cli import main
from lineament.core.checks import InputError
from lineament.core.curvature.matrices import hessian
from lineament.load.data import load_data
from lineament.load.loaded import Loaded
from lineament.load.model_and_data import bring_together


def rows(count=60, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(classes, (count,), generator=generator)


def network(width=3, *tail, seed=1):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, width), *tail)
    with torch.no_grad():
        net[0].weight.copy_(2 * torch.randn(width, 4, generator=generator))
        net[0].bias.copy_(torch.randn(width, generator=generator))
    return net.eval()


def fitted(net, data, **options):
    return bring_together(Loaded(net, "net", "module"), load_data(data), **options)


class Squeezed(nn.Module):
    """One column too few, as `squeeze` leaves it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).squeeze()


ENDS = {
    "logits": ((), 3, ""),
    "softmax": ((nn.Softmax(1),), 3, "none below 0, rows sum to 1"),
    "log-softmax": ((nn.LogSoftmax(1),), 3, "log-probabilities"),
    "sigmoid, one output": ((nn.Sigmoid(),), 1, "(1 - p, p)"),
    "logit, one output": ((), 1, "(0, z)"),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_probabilities_are_read_as_such(end, dtype):
    """Confidence, loss and curvature are those of the logits that the network ends in."""
    tail, width, said = ENDS[end]
    x, y = rows(classes=max(width, 2))
    x = x.to(dtype).float()
    net = network(width, *tail).to(dtype)
    z = network(width).to(dtype)(x.to(dtype)).float()
    z = torch.cat([torch.zeros_like(z), z], 1) if width == 1 else z
    close = 5e-2 if dtype == torch.bfloat16 else 1e-4
    with fitted(net, (x, y)) as found:
        assert any(said in note for note in found.notes)
        confidence = found.outputs.softmax(1).max(1).values
        assert torch.allclose(confidence, z.softmax(1).max(1).values, atol=close)
        assert torch.allclose(
            found.losses(found.outputs, y), F.cross_entropy(z, y, reduction="none"), atol=close, rtol=close
        )
        if dtype != torch.bfloat16:
            operator = hessian(net, found.loss, found.batches())
            v = torch.randn(operator.shape[0], dtype=dtype, generator=torch.Generator().manual_seed(4))
            ours = operator @ v
    if dtype != torch.bfloat16:
        plain = network(width).to(dtype)
        wide = (lambda z: torch.cat([torch.zeros_like(z), z], 1)) if width == 1 else (lambda z: z)
        theirs = hessian(plain, lambda z, y: F.cross_entropy(wide(z), y), [(x.to(dtype), y)]) @ v
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-3)
    assert not net._forward_hooks


def test_values_between_0_and_1_are_no_probabilities_of_a_regression():
    x, _ = rows()
    net = network(1, nn.Sigmoid())
    with fitted(net, (x, torch.rand(60, 1, generator=torch.Generator().manual_seed(2)))) as found:
        assert found.task == "regression" and torch.allclose(found.outputs, net(x))


def test_the_report_of_a_softmax_network(tmp_path):
    x, y = rows(400)
    net = network(3, nn.Softmax(1))
    p = net(x)
    y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3))[
        :, 0
    ]  # calibrated by construction
    found = audit(net, (x, y), out=tmp_path / "r", lenses=["accuracy"])
    known = found["accuracy"].numbers["calibration"]
    assert known["confidence"] == pytest.approx(float(p.max(1).values.mean()), abs=1e-5)
    assert known["accuracy"] == pytest.approx(float((p.argmax(1) == y).double().mean()), abs=1e-9)
    assert not any("confident" in f.sentence for f in found["accuracy"].findings)
    assert "its outputs are probabilities" in found.json.read_text().lower()


def test_training_a_softmax_network_uses_the_logarithm(tmp_path):
    """`lineament train`: one step on a network that ends in softmax is the step of the network without it."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def made(*tail):\n    torch.manual_seed(0)\n    return nn.Sequential(nn.Linear(4, 3), *tail)\n"
        "def soft(): return made(nn.Softmax(1))\ndef plain(): return made(nn.Identity())\n"
    )
    x, y = rows()
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
    from safetensors.torch import load_file

    weights = []
    for name in ("soft", "plain"):
        out = tmp_path / name
        assert (
            main(
                [
                    "train",
                    f"{tmp_path}/net.py:{name}",
                    f"{tmp_path}/d.npz",
                    "--out",
                    str(out),
                    "--epochs",
                    "2",
                ]
            )
            == 0
        )
        weights.append(load_file(next(out.glob("*.safetensors")))["0.weight"])
    assert torch.allclose(weights[0], weights[1], atol=1e-5)


LABELS = {
    "float": lambda y: y.float(),
    "int": lambda y: y.long(),
    "bool": lambda y: y.bool(),
}


@pytest.mark.parametrize("kind", LABELS)
def test_several_labels_of_every_dtype(kind):
    x, _ = rows()
    y = (network(3)(x) > 0).long()
    with fitted(network(3), (x, LABELS[kind](y))) as found:
        assert found.task == "multi-label" and torch.equal(found.targets, y.float())


@pytest.mark.parametrize("tail", [(), (nn.Sigmoid(),)], ids=["logits", "sigmoid"])
def test_several_labels_a_sample(tail, tmp_path):
    x, _ = rows(300)
    z = network(3)(x)
    y = (z > 0).long()
    y[::20, 0] = 1 - y[::20, 0]
    found = audit(network(3, *tail), (x, y), out=tmp_path / "r")
    section = found["accuracy"]
    right = ((z > 0) == y.bool()).double()
    assert section.numbers["task"] == "multi-label"
    assert section.numbers["overall"]["accuracy"] == pytest.approx(float(right.mean()))
    assert [s["accuracy"] for s in section.numbers["labels"]] == pytest.approx(right.mean(0).tolist())
    assert section.numbers["exact"]["accuracy"] == pytest.approx(float(right.all(1).double().mean()))
    loss = float(F.binary_cross_entropy_with_logits(z.double(), y.double()))
    assert {s.name: s.status for s in found.sections}["collapse"] == "skipped" and "several labels" in found[
        "collapse"
    ].sentence
    assert (
        found["landscape"].numbers["loss"] == pytest.approx(loss, rel=0.3)
        and found["landscape"].status != "failed"
    )
    assert all(s.status != "failed" for s in found.sections)


@pytest.mark.parametrize("values", [np.int64, np.float32, np.bool_])
def test_one_hot_targets_are_class_labels(values, tmp_path):
    x, y = rows()
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=np.eye(3)[y.numpy()].astype(values))
    with fitted(network(3), str(tmp_path / "d.npz")) as found:
        assert found.task == "classification" and torch.equal(found.targets, y)
        assert any("one-hot" in note for note in found.notes)
    with fitted(network(3), (x, F.one_hot(y, 3).float()), task="regression") as found:
        assert found.task == "regression"


@pytest.mark.parametrize("shape", ["(batch,)", "(batch, 1)"])
@pytest.mark.parametrize("targets", ["(batch,)", "(batch, 1)"])
def test_regression_of_one_value(shape, targets, tmp_path):
    x, _ = rows(65)  # the last batch is a single sample
    net = network(1)
    y = net(x).detach()[:, 0] + 0.1 * torch.randn(65, generator=torch.Generator().manual_seed(5))
    model = Squeezed(net) if shape == "(batch,)" else net
    found = audit(model, (x, y if targets == "(batch,)" else y[:, None]), out=tmp_path / "r")
    error = (net(x)[:, 0] - y).abs().mean()
    assert found["accuracy"].numbers["overall"]["mae"] == pytest.approx(float(error), rel=1e-4)
    assert all(s.status != "failed" for s in found.sections), [s.sentence for s in found.sections]


def test_zeros_and_ones_stored_as_real_numbers_are_two_classes():
    x, y = rows(classes=2)
    for width in (1, 2):
        with fitted(network(width), (x, y.float())) as found:
            assert found.task == "classification" and torch.equal(found.targets, y)
    with (
        pytest.raises(InputError, match="expected one class label a sample"),
        fitted(network(2), (x, torch.rand(60, 2)), task="classification"),
    ):
        pass


class Reader(nn.Module):
    """A text model on token ids."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        make = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}.get(kind)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.body = (
            make(8, 8, batch_first=True) if make else encoder if kind == "transformer" else nn.Identity()
        )
        self.head = nn.Linear(8, 2)

    def forward(self, ids):
        found = self.body(self.embed(ids))
        found = found[0] if isinstance(found, tuple) else found
        return self.head(found.mean(1))


READERS = ["lstm", "gru", "rnn", "transformer", "bag"]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("kind", READERS)
def test_token_ids_stay_whole_numbers(kind, dtype):
    ids = np.random.default_rng(0).integers(0, 50, (20, 6))
    model = Reader(kind).eval()
    with fitted(model, (ids.astype(dtype), np.arange(20) % 2)) as found:
        assert torch.allclose(found.outputs, model(torch.from_numpy(ids)), atol=1e-6)
        assert any("token ids" in note for note in found.notes)
    with (
        pytest.raises(InputError, match="token ids from 0 to 60: its embeddings have 50 rows"),
        fitted(model, (np.full((4, 6), 60) * np.arange(4)[:, None].clip(0, 1), np.arange(4) % 2)),
    ):
        pass


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_audit_and_train_of_a_text_model(kind, tmp_path):
    import inspect

    (tmp_path / "net.py").write_text(
        f"import torch\nfrom torch import nn\n{inspect.getsource(Reader)}\ndef make(): return Reader({kind!r})\n"
    )
    ids = np.random.default_rng(0).integers(0, 50, (64, 6))
    np.savez(tmp_path / "d.npz", x=ids, y=(ids[:, 0] > 25).astype(int))
    model, data = f"{tmp_path}/net.py:make", f"{tmp_path}/d.npz"
    assert main(["audit", model, data, "--out", str(tmp_path / "r")]) == 0
    import json

    told = json.loads((tmp_path / "r" / "report.json").read_text())
    assert [s["name"] for s in told["sections"] if s["status"] == "failed"] == []
    assert main(["train", model, data, "--out", str(tmp_path / "t"), "--epochs", "1"]) == 0


def test_whole_numbers_without_an_embedding_are_values():
    x = torch.arange(240).reshape(60, 4) % 7
    net = network(3)
    with fitted(net, (x, torch.arange(60) % 3)) as found:
        assert torch.allclose(found.outputs, net(x.float()))
