"""Trained networks: every form is loaded, nothing is unpickled, what does not match is named."""

from __future__ import annotations

import json
import textwrap
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lineament.cli.option_values import classes
from lineament.core.checks import InputError
from lineament.core.models import frozen
from lineament.core.sites.depth import default_sites
from lineament.load.data import load_data
from lineament.load.input_layout import expected_input
from lineament.load.models import load_model
from lineament.load.weights import digest

NET = """
    from torch import nn
    from beside import WIDTH

    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))

    class Small(nn.Linear):
        def __init__(self):
            super().__init__(16, 3)

    ready = nn.Linear(4, 2)
    number = 3

    def none():
        return {"no": "network"}

    def broken():
        raise RuntimeError("no weights here")

    def needs(width):
        return nn.Linear(width, 2)
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(textwrap.dedent(NET))
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    return str(tmp_path / "net.py")


def test_factory_in_a_file_and_in_a_module(net, tmp_path, monkeypatch):
    assert isinstance(load_model(f"{net}:make").model[1], nn.Linear)
    assert load_model(f"{net}:Small").model.weight.shape == (3, 16)
    assert load_model(f"{net}:ready").model.in_features == 4
    assert "is a network, not a factory" in load_model(f"{net}:ready").notes[0]
    assert load_model(f"{net}:make").notes == ("no weights given: the network is as the factory makes it",)
    monkeypatch.chdir(tmp_path)
    assert len(load_model("net:make").model) == 4
    assert not load_model("net:make").model.training


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mkae", r"has no 'mkae'; nearest: 'make'"),
        ("number", "is 3, expected a function or class"),
        ("none", r"returned .* \(dict\), expected a torch.nn.Module"),
        ("broken", r"broken\(\) failed \(RuntimeError: no weights here\)"),
        ("needs", r"net.py:needs needs 'width', expected a function or class that takes no arguments"),
    ],
)
def test_factories_that_make_no_network(net, name, message):
    with pytest.raises(InputError, match=message):
        load_model(f"{net}:{name}")


def test_files_that_are_no_model(tmp_path, net):
    cases = {
        "a.pt": "is corrupt or no file of torch",
        "a.txt": "of kind",
        "a.npz": "holds data, expected a network.* MODEL comes before DATA",
        "w.safetensors": "weights without a network",
    }
    for name, message in cases.items():
        (tmp_path / name).write_bytes(b"\x80\x04" if name != "a.txt" else b"hello")
        if name == "w.safetensors":
            save_file({"weight": torch.ones(1)}, tmp_path / name)
        with pytest.raises(InputError, match=message):
            load_model(str(tmp_path / name))
    (tmp_path / "bad.py").write_text("1 / 0")
    for text, message in (
        (f"{tmp_path}/bad.py:make", r"importing .* failed \(ZeroDivisionError"),
        (f"{tmp_path}/none.py:make", "does not exist"),
        (net, r"names no factory; expected '.*net.py:NAME'"),
        (str(tmp_path / "gone.pt2"), "does not exist"),
        (str(tmp_path), r"holds no config\.json"),
        ("nowhere_at_all:make", r"importing 'nowhere_at_all' failed \(ModuleNotFoundError"),
    ):
        with pytest.raises(InputError, match=message):
            load_model(text)


def test_weights_fit_exactly_or_are_refused(net, tmp_path):
    state = load_model(f"{net}:make").model.state_dict()
    good = {name: torch.ones_like(value) for name, value in state.items()}
    path = tmp_path / "w.safetensors"
    save_file(good, path)
    assert float(load_model(f"{net}:make", weights=path).model[3].weight.sum()) == 18
    wrong = {**good, "extra": torch.ones(1), "1.weight": torch.ones(2, 2)}
    del wrong["3.bias"]
    save_file(wrong, path)
    with pytest.raises(InputError) as caught:
        load_model(f"{net}:make", weights=path)
    text = str(caught.value)
    assert "missing in the file: 3.bias" in text and "unexpected in the file: extra" in text
    assert "1.weight is (2, 2) in the file and (6, 16) in the model" in text
    save_file({**good, "1.bias": torch.full((6,), float("nan"))}, path)
    with pytest.raises(InputError, match=r"NaN or infinite values in weights: 1\.bias"):
        load_model(f"{net}:make", weights=path)


def test_corrupt_or_missing_weights(net, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(load_model(f"{net}:make").model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="no safetensors file or is corrupt"):
        load_model(f"{net}:make", weights=path)
    with pytest.raises(InputError, match="does not exist"):
        load_model(f"{net}:make", weights=tmp_path / "gone.safetensors")


def test_tied_weights_load(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    from safetensors.torch import save_model

    save_model(Tied(), str(tmp_path / "w.safetensors"))
    found = load_model(Tied(), weights=tmp_path / "w.safetensors").model
    assert found.a.weight is found.b.weight


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_export(tmp_path, dynamic):
    path = tmp_path / "net.pt2"
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    net = Body().eval()
    torch.export.save(torch.export.export(net, (torch.zeros(4, 1, 8, 8),), dynamic_shapes=shapes), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_model(str(path))
    assert found.batch == (None if dynamic else 4) and found.size == (8, 8)
    x = torch.rand(4, 1, 8, 8)
    assert torch.allclose(found.model(x), net(x), atol=1e-6)
    assert default_sites(found.model, x)[-1] == "head:in"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"corrupt or no torch\.export file"):
        load_model(str(path))


@pytest.mark.slow
def test_an_export_that_cannot_be_nested_is_read_flat(tmp_path, monkeypatch):
    net = Body().eval()
    torch.export.save(torch.export.export(net, (torch.zeros(4, 1, 8, 8),)), tmp_path / "net.pt2")
    monkeypatch.setattr(torch.export, "unflatten", lambda program: 1 / 0)
    found = load_model(str(tmp_path / "net.pt2"))
    x = torch.rand(4, 1, 8, 8)
    with frozen(found.model):
        assert torch.allclose(found.model(x), net(x), atol=1e-6)


@pytest.mark.slow
def test_export_with_a_pickle_inside_is_refused(tmp_path):
    """``torch.export.load`` falls back to unrestricted unpickling; what needs that is refused before."""
    import pickle
    import zipfile

    bomb = tmp_path / "exploded"

    class Bomb:
        def __reduce__(self):
            return (open, (str(bomb), "w"))

    path, evil = tmp_path / "net.pt2", tmp_path / "evil.pt2"
    torch.export.save(torch.export.export(Body().eval(), (torch.zeros(2, 1, 8, 8),)), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, pickle.dumps(Bomb()) if name.endswith("sample_inputs/model.pt") else data)
    with pytest.raises(InputError, match="pickled Python objects"):
        load_model(str(evil))
    assert not bomb.exists()


@pytest.fixture
def resnet(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3,
        id2label={0: "cat", 1: "dog", 2: "<b>"}, label2id={"cat": 0, "dog": 1, "<b>": 2},
    )  # fmt: skip
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def test_hugging_face_directory(resnet):
    preprocessor = {
        "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2], "do_normalize": True,
    }  # fmt: skip
    (resnet / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    found = load_model(str(resnet))
    assert (found.size, found.mean, found.std) == ((32, 32), (0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    assert found.classes == ("cat", "dog", "<b>")
    with pytest.raises(InputError, match="brings its own weights"):
        load_model(str(resnet), weights="w.safetensors")


def test_hugging_face_weights_must_match(resnet):
    from safetensors.torch import load_file

    state = load_file(resnet / "model.safetensors")
    renamed = {name.replace("classifier.1.weight", "old.weight"): value for name, value in state.items()}
    save_file(renamed, resnet / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"missing in the file: classifier\.1\.weight; unexpected in the file: old"
    ):
        load_model(str(resnet))


def test_hugging_face_directory_of_an_older_form(resnet, tmp_path):
    """``pytorch_model.bin``, which is read without a pickle's freedom, or refused before anything runs."""
    from safetensors.torch import load_file

    state = load_file(resnet / "model.safetensors")
    (resnet / "model.safetensors").unlink()
    torch.save(state, resnet / "pytorch_model.bin")
    found = load_model(str(resnet)).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({**state, "bomb": Bomb()}, resnet / "pytorch_model.bin")
    with pytest.raises(InputError, match="could restore"):
        load_model(str(resnet))
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def far_hub(monkeypatch):
    """A hub that takes the call and never answers; counts who calls."""
    import socket
    import time

    import lineament.load.hub as hub

    constants = pytest.importorskip("huggingface_hub", reason="the extra 'hub' is not installed").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_PATIENCE", 0.4)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.perf_counter()
        yield server
        assert time.perf_counter() - began < 20  # with its own retries it took 46


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nets.dig", "no file or folder here; nearest: 'nets:dig'"),
        ("torch.nn.Linear", "nearest: 'torch.nn:Linear'"),
        ("nets", r"nearest: 'nets\.py:NAME'"),
        ("resnet.p2", r"nearest: 'resnet\.pt2'"),
        ("folder/inside", "no name of the Hugging Face hub"),
        ("two words", "no name of the Hugging Face hub"),
        ("a/b/c", "no name of the Hugging Face hub"),
        ("nobody/no-such-model", "the hub does not answer; without network, pass a saved directory"),
    ],
)
def test_a_name_that_is_nothing_here_is_answered_at_once(name, said, tmp_path, monkeypatch, far_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text("1 / 0")
    (tmp_path / "resnet.pt2").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=said):
        load_model(name)


def test_data_and_language_models_by_name_are_answered_at_once_too(tmp_path, monkeypatch, far_hub):
    from lineament.load.data import load_data
    from lineament.load.language_models import load_language_model

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name, said in (
        ("digts", "nearest: 'digits'"),
        ("photo", "nearest: 'photos'"),
        ("no/such", "does not answer"),
    ):
        with pytest.raises(InputError, match=f"^data: '{name}' is no file or folder here.*{said}"):
            load_data(name)
    with pytest.raises(InputError, match=r"^model: 'no/such' is no file or folder here.*does not answer"):
        load_language_model("no/such")


def test_a_hub_that_says_no_is_believed(monkeypatch, tmp_path, far_hub):
    import threading

    def answer():
        caller, _ = far_hub.accept()
        with caller:
            caller.recv(4096)
            caller.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(InputError, match="the Hugging Face hub has none of that name"):
        load_model("nobody/no-such-model")


def test_digest_tells_networks_apart():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert digest(a) == digest(b)
    with torch.no_grad():
        b.weight[0, 0] += 1e-6
    assert digest(a) != digest(b)


def test_default_sites_are_in_depth_order_and_end_before_the_head(resnet):
    x = torch.zeros(2, 3, 32, 32)
    found = default_sites(load_model(str(resnet)).model, x)
    assert found == (
        "resnet.encoder.stages.0",
        "resnet.encoder.stages.1",
        "classifier.1:in",
    )
    deep = nn.Sequential(
        *[layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.ReLU())], nn.Linear(4, 2)
    )
    chosen = default_sites(deep, torch.zeros(2, 4))
    assert len(chosen) == 8 and chosen[0] == "1" and chosen[-1] == "40:in"
    assert default_sites(nn.Linear(4, 2), torch.zeros(2, 4)) == ()
    assert "3 channels" in expected_input(load_model(str(resnet)).model).text


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda folder: load_model(f"{folder}/net.py:make"), "nets.py"),
        (lambda folder: load_model(f"{folder}/net.py"), "nets.py"),
        (lambda folder: load_model(f"{folder}/net.pt2"), "nets.pt2"),
        (lambda folder: load_model(nn.Linear(1, 1), weights=folder / "net.pt"), "nets.pt"),
        (lambda folder: load_data(f"{folder}/net.npz", samples=4), "nets.npz"),
        (lambda folder: classes(f"{folder}/net.txt"), "nets.txt"),
    ],
    ids=["factory", "file", "export", "weights", "data", "classes"],
)
def test_a_file_that_is_not_there_names_the_nearest_of_its_kind(tmp_path, call, near):
    for ending in ("py", "pt", "pt2", "npz", "txt"):
        (tmp_path / f"nets.{ending}").touch()
    with pytest.raises(InputError, match=f"does not exist; nearest: '{tmp_path}/{near}'"):
        call(tmp_path)
