"""Checkpoints as their tools write them: read where that is safe, told what was unwrapped, and refused without running anything where it is not."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import textwrap
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lineament.core.checks import InputError
from lineament.load.checkpoints import read_checkpoint
from lineament.load.models import load_model
from lineament.load.weights import load_weights


def network(classes=3):
    torch.manual_seed(classes)
    net = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), flat=nn.Flatten(), fc=nn.Linear(16, classes)
        )
    )
    net.norm.running_mean += torch.rand(4)
    return net


class Wrapped(nn.Module):
    """As Lightning modules and two-part networks hold the trained one."""

    def __init__(self, name, **others):
        super().__init__()
        self.add_module(name, network())
        for other, module in others.items():
            self.add_module(other, module)


def compiled(net):
    return torch.compile(net)


def loaded_as(path, classes=3):
    torch.manual_seed(99)
    net = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), flat=nn.Flatten(), fc=nn.Linear(16, classes)
        )
    )
    return net, load_weights(net, path)


def same(net, other):
    return all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))


STATE = dict(network().state_dict())
LIGHTNING = {
    "epoch": 4, "global_step": 900, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1},
    "state_dict": {**{f"model.{n}": v for n, v in STATE.items()}, "loss.weight": torch.ones(3)},
    "optimizer_states": [torch.optim.Adam(network().parameters()).state_dict()], "callbacks": {}, "loops": None,
}  # fmt: skip
AVERAGE = torch.optim.swa_utils.AveragedModel(network())
FORMS = {
    "bare": (STATE, ""),
    "state_dict": ({"epoch": 1, "best_prec1": torch.tensor(76.1), "state_dict": STATE}, "'state_dict'"),
    "model": ({"model": STATE, "args": {"lr": 0.1}}, "'model'"),
    "model_state_dict": ({"model_state_dict": STATE, "loss": 0.3}, "'model_state_dict'"),
    "net": ({"net": STATE, "acc": 91.2}, "'net'"),
    "ema": ({"ema": STATE, "decay": 0.99}, "'ema'"),
    "nested": ({"checkpoint": {"model": {"state_dict": STATE}}}, "'checkpoint.model.state_dict'"),
    "list": ([{"state_dict": STATE}, 3], "'0.state_dict'"),
    "lightning": (LIGHTNING, "'state_dict' of .*, without the prefix 'model.', 1 tensor beside them left out: state_dict.loss.weight"),
    "parallel": ({"state_dict": nn.DataParallel(network()).state_dict()}, "without the prefix 'module.'"),
    "compiled": (compiled(network()).state_dict(), "without the prefix '_orig_mod.'"),
    "compiled in parallel": ({f"module._orig_mod.{n}": v for n, v in STATE.items()}, "prefixes 'module.' and '_orig_mod.'"),
    "backbone": (Wrapped("backbone", head=nn.Linear(3, 2)).state_dict(), "prefix 'backbone.', 2 tensors beside them left out: head.weight, head.bias"),
    "averaged": (AVERAGE.state_dict(), "prefix 'module.', 1 tensor beside them left out: n_averaged"),
    "both": ({"model": STATE, "model_ema": {n: v + 1 for n, v in STATE.items()}}, "'model' of .*, 'model_ema' would fit too"),
    "ema first": ({"ema": {n: v + 1 for n, v in STATE.items()}, "module": STATE}, "'module' of .*, 'ema' would fit too"),
    "old norm": ({n: v for n, v in STATE.items() if "batches" not in n}, "num_batches_tracked is missing in 1 layers"),
    "half": ({n: v.bfloat16().float().bfloat16() if v.is_floating_point() else v for n, v in STATE.items()}, "read as float32, saved as bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_in_every_container_and_told_in_one_line(form, tmp_path):
    content, said = FORMS[form]
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    net, notes = loaded_as(path)
    if form == "half":
        assert torch.equal(net.conv.weight, network().conv.weight.bfloat16().float())
    elif form == "old norm":
        assert torch.equal(net.norm.running_mean, network().norm.running_mean)
    else:
        assert same(net, network())
    assert len(notes) == bool(said) and all(re.search(said, note) and "\n" not in note for note in notes)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".th", ".ckpt", ".bin", ".pkl", ".tar", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_ending_and_both_forms_of_torch_save(ending, zipped, tmp_path):
    path = tmp_path / f"net{ending}"
    torch.save({"state_dict": STATE}, path, _use_new_zipfile_serialization=zipped)
    assert same(loaded_as(path)[0], network())


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_were_saved_on_a_gpu(zipped, tmp_path, monkeypatch):
    path = tmp_path / "gpu.pth"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(
        {"state_dict": STATE, "best_prec1": torch.tensor(0.7)}, path, _use_new_zipfile_serialization=zipped
    )
    monkeypatch.undo()
    net, notes = loaded_as(path)
    assert same(net, network()) and net.conv.weight.device.type == "cpu" and "'state_dict'" in notes[0]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("given", ["index", "folder", "shard"])
def test_shards_are_read_by_their_index(ending, given, tmp_path):
    stem = "model" if ending == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{k}-of-00002.{ending}" for k in (1, 2)]
    where = {name: files[k % 2] for k, name in enumerate(STATE)}
    for file in files:
        part = {name: value for name, value in STATE.items() if where[name] == file}
        (save_file if ending == "safetensors" else torch.save)(part, tmp_path / file)
    index = tmp_path / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    path = {"index": index, "folder": tmp_path, "shard": tmp_path / files[0]}[given]
    assert same(loaded_as(path)[0], network())
    (tmp_path / files[1]).unlink()
    with pytest.raises(InputError, match=r"00002-of-00002.*not beside it"):
        loaded_as(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "is no index of shards"),
        ('{"weight_map": ["a"]}', "is no index of shards"),
        ('{"weight_map": {"a": "../other.bin"}}', "expected files beside the index"),
        ('{"weight_map": {"a": "x.index.json"}}', "expected files beside the index"),
        ('{"weight_map": {"a": "here.bin"}}', "lack a; are all files whole"),
    ],
)
def test_an_index_that_cannot_be_used(content, said, tmp_path):
    torch.save({"b": torch.ones(1)}, tmp_path / "here.bin")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_checkpoint(tmp_path / "model.safetensors.index.json")


def test_a_head_of_another_size_is_said_and_the_network_stays(tmp_path):
    torch.save(
        {"state_dict": {f"module.{n}": v for n, v in network(1000).state_dict().items()}}, tmp_path / "a.pth"
    )
    net = network()
    with pytest.raises(
        InputError,
        match=r"fc\.weight is \(1000, 16\) in the file and \(3, 16\) in the model.*only its layer 'fc' .*with 1000 instead of 3",
    ):
        load_weights(net, tmp_path / "a.pth")
    assert same(net, network())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({n: v for n, v in STATE.items() if n != "fc.bias"}, r"missing in the file: fc\.bias"),
        ({**STATE, "extra": torch.ones(1)}, "unexpected in the file: extra"),
        ({"module": {**STATE, "extra": torch.ones(1)}}, "unexpected in the file: extra"),
        ({"epoch": 3, "lr": 0.1}, r"holds no tensors \(it holds 'epoch', 'lr'\)"),
        ([], "holds no tensors"),
        ({"left": STATE, "right": {n: v + 1 for n, v in STATE.items()}}, "holds 2 networks that fit Sequential: 'left', 'right'"),
        ({"other.weight": torch.ones(2)}, "missing in the file: conv.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(content, said, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=said):
        loaded_as(tmp_path / "a.pt")


def refused():
    return {
        "numpy": ({"state_dict": STATE, "best_acc": np.float64(0.9)}, "numpy"),
        "arguments": ({"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}, r"argparse\.Namespace"),
        "module": (network(), "Sequential"),
        "module in a container": ({"model": network(), "epoch": 2}, "Sequential"),
    }


@pytest.mark.parametrize("form", refused())
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_refuses_is_told_with_an_export_that_works(form, zipped, tmp_path, monkeypatch):
    content, reason = refused()[form]
    monkeypatch.chdir(tmp_path)
    torch.save(content, "best.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=f"holds '[^']*{reason}") as caught:
        loaded_as("best.pth")
    said, *export = str(caught.value).split("\n    ")
    assert "\n" not in said and len(export) == 3
    exec("\n".join(export), {})  # as the user would run it
    assert same(loaded_as("best-weights.pt")[0], network())


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place), "w"))


@pytest.mark.parametrize(
    "ending",
    [".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin", ".pkl", ".tar", ".index.json", ".pt2", ".onnx"],
)
@pytest.mark.parametrize("written", ["zip", "legacy", "pickle", "text pickle"])
def test_hostile_pickles_are_refused_under_every_name(ending, written, tmp_path):
    """As weights, as a network and as data."""
    from lineament.load.data import load_data

    place, path = tmp_path / "exploded", tmp_path / f"evil{ending}"
    if written in ("zip", "legacy"):
        torch.save({"state_dict": Bomb(place)}, path, _use_new_zipfile_serialization=written == "zip")
    else:
        path.write_bytes(pickle.dumps(Bomb(place), 0 if written == "text pickle" else None))
    for use in (loaded_as, lambda path: load_model(str(path)), load_data):
        with pytest.raises(InputError, match=r"evil"):
            use(path)
    assert not place.exists()


def test_a_shard_that_is_hostile_is_refused(tmp_path):
    torch.save({"a": Bomb(tmp_path / "exploded")}, tmp_path / "one.bin")
    (tmp_path / "m.bin.index.json").write_text(json.dumps({"weight_map": {"a": "one.bin"}}))
    with pytest.raises(InputError, match="could restore"):
        loaded_as(tmp_path / "m.bin.index.json")
    assert not (tmp_path / "exploded").exists()


def test_an_archive_that_would_unpack_to_more_than_it_is_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as good, zipfile.ZipFile(tmp_path / "b.pt", "w") as bomb:
        for name in good.namelist():
            data = good.read(name) if not name.endswith("data/0") else bytes(50_000_000)
            bomb.writestr(name, data, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.pt").stat().st_size < 100_000
    with pytest.raises(InputError, match=r"would unpack to 50,\d{3},\d{3} bytes from"):
        loaded_as(tmp_path / "b.pt")


def test_a_tensor_that_claims_more_than_it_holds_makes_nothing_of_that_size(tmp_path):
    torch.save({**STATE, "fc.weight": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"fc\.weight is \(1000000, 1000000\) in the file"):
        loaded_as(tmp_path / "a.pt")


@pytest.mark.parametrize("cut", [0.001, 0.1, 0.98])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off(cut, zipped, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(InputError, match="corrupt"):
        loaded_as(path)


@pytest.mark.parametrize("form", ["weights", "module", "empty"])
def test_a_checkpoint_given_as_the_model_is_told_how_a_factory_looks(form, tmp_path):
    path = tmp_path / "best.pth"
    torch.save({"weights": {"state_dict": STATE}, "module": network(), "empty": {}}[form], path)
    with pytest.raises(InputError) as caught:
        load_model(str(path))
    text = str(caught.value)
    assert "'net.py:make'" in text and "def make():" in text and "`weights`" in text
    said = {"weights": "7 tensors", "module": "Sequential", "empty": "no tensors"}
    assert said[form].replace("7", str(len(STATE))) in text


def test_a_torchscript_archive_given_as_the_model_runs(tmp_path):
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.jit.script(network().eval()).save(tmp_path / "net.pt")
    found = load_model(str(tmp_path / "net.pt"))
    with torch.no_grad():
        assert torch.allclose(found.model(x), network().eval()(x), atol=1e-6)
    assert found.kind == "script" and "TorchScript archive" in found.notes[0]
    with pytest.raises(InputError, match="brings its own weights"):
        load_model(str(tmp_path / "net.pt"), weights=tmp_path / "net.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "net.pt").read_bytes()[:-300])
    with pytest.raises(InputError, match=r"cut\.pt"):
        load_model(str(tmp_path / "cut.pt"))


def test_an_onnx_file_runs_or_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_bytes(b"no protocol buffer")
    monkeypatch.setitem(__import__("sys").modules, "onnx2torch", None)
    with pytest.raises(InputError, match=r"install lineament\[onnx\]"):
        load_model(str(tmp_path / "net.onnx"))
    monkeypatch.undo()
    pytest.importorskip("onnx2torch")
    with pytest.raises(InputError, match="cannot be converted from ONNX"):
        load_model(str(tmp_path / "net.onnx"))
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(network().eval(), (x,), tmp_path / "good.onnx")
    with torch.no_grad():
        assert torch.allclose(
            load_model(str(tmp_path / "good.onnx")).model(x), network().eval()(x), atol=1e-5
        )


def test_scripted_weights_are_exported_as_the_message_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(network()).save("net.pt")
    with pytest.raises(InputError, match="TorchScript archive") as caught:
        loaded_as("net.pt")
    exec("\n".join(str(caught.value).split("\n    ")[1:]), {})
    assert same(loaded_as("net-weights.pt")[0], network())


def test_the_command_takes_what_the_message_shows(tmp_path, monkeypatch, capsys):
    from lineament.cli import main

    monkeypatch.chdir(tmp_path)
    torch.save(
        {"best_prec1": torch.tensor(0.4), "state_dict": {f"module.{n}": v for n, v in STATE.items()}},
        "best.pth",
    )
    rng = np.random.default_rng(0)
    np.savez("data.npz", x=rng.random((30, 1, 4, 4), dtype=np.float32), y=np.arange(30) % 3)
    assert main(["audit", "best.pth", "data.npz"]) == 2
    shown = capsys.readouterr().err.removeprefix("lineament: reading the model and the data\n")
    assert shown.startswith("lineament: MODEL: 'best.pth' holds weights") and "--weights" in shown
    source = textwrap.dedent(shown[shown.index("    def make") :])
    net = "nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), flat=nn.Flatten(), fc=nn.Linear(16, 3)))"
    (tmp_path / "net.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n" + source.replace("Network()", net)
    )
    assert (
        main(
            [
                "audit",
                "net.py:make",
                "data.npz",
                "--weights",
                "best.pth",
                "--lenses",
                "accuracy",
                "--out",
                "o",
            ]
        )
        == 0
    )
    assert "without the prefix 'module.'" in (tmp_path / "o" / "report.json").read_text()
