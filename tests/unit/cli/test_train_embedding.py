"""`lineament train --loss`: every loss learns, goes on where it was cut off, and leaves a folder that the audit opens."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lineament import cli
from lineament.cli.embedding_options import EmbeddingOptions
from lineament.cli.loss_options import LOSSES
from lineament.cli.train_embedding import _unlike, split_classes
from lineament.cli.train_fit import fit
from lineament.cli.train_options import Options
from lineament.cli.train_result import Fitted
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError
from lineament.data.identities import identities
from lineament.train.processes import Processes

pytest.importorskip("accelerate", reason="needs the extra lm")

PEOPLE = identities(20, 8, strangers=2, stranger_pictures=2)[0]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16)
    )


def trained(loss: str, run=None, *, data=PEOPLE, epochs=3, train=None, **options) -> tuple[nn.Module, Fitted]:
    given = Options(
        **{"epochs": epochs, "batch_size": 32, "lr": 0.02, **(train or {})},
        embedding=EmbeddingOptions(loss, **options),
    )
    model = network()
    done = fit(model, lambda rows: data.inputs[rows], data.targets, given, processes=Processes("cpu"), **(run or {}))  # fmt: skip
    return model, done


def flat(state: dict) -> dict:
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def untimed(done: Fitted) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in done.history]


MORE = {
    "elastic-arc": {"match": "rank", "unpg": 1.5},
    "cosface": {"sample_classes": 0.5, "head": "mlp", "head_lr": 0.05, "views": ("noise",)},
    "moco": {"queue": 48, "ft": ("pos", "neg"), "ft_start": 1},
    "arcface": {"embedding": "2"},
    "supcon": {"head": "fixed:1.1"},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(tmp_path, loss):
    options = MORE.get(loss, {})
    _, whole = trained(loss, **options)
    before = torch.get_rng_state()

    def stop(history):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(loss, {"checkpoint": Checkpoint(tmp_path / "s", {"a": 1}), "record": stop}, **options)
    _, again = trained(loss, {"checkpoint": Checkpoint(tmp_path / "s", {"a": 1})}, **options)
    assert untimed(again) == untimed(whole)
    state, expected = again.trained.state_dict(), whole.trained.state_dict()
    assert all(torch.equal(v, flat(expected)[k]) for k, v in flat(state).items()) and len(flat(state)) > 6
    log = getattr(whole.trained.loss, "log", None)
    assert log is None or (again.trained.loss.log.curves == log.curves and len(log.curves["step"]) == 12)
    assert before.equal(torch.get_rng_state()), "the global random state is left alone"


def test_training_recognises_people_it_never_saw():
    people = identities(100, 6, strangers=2, stranger_pictures=2)[0]
    options = {"data": people, "margin": (0.2,), "scale": 16.0, "validation_classes": 0.25}
    _, start = trained("arcface", epochs=1, train={"lr": 1e-8}, **options)
    _, done = trained("arcface", epochs=10, train={"lr": 0.1}, **options)
    assert len(done.held_out) == 25 and done.validation_samples == 150
    before, after = start.recognised[0], done.recognised[0]
    assert before is not None and after is not None and after > before + 0.1
    assert all(entry["train_accuracy"] is None for entry in done.history)
    assert done.history[-1]["train_loss"] < done.history[0]["train_loss"]


def test_sphereface_follows_the_scale_and_its_embeddings_stay():
    people = identities(100, 6, strangers=2, stranger_pictures=2)[0]
    losses = {}
    for scale in (8.0, 16.0):
        model, done = trained("sphereface", epochs=8, data=people, scale=scale, train={"lr": 0.1})
        losses[scale] = done.history[0]["train_loss"]
        assert float(model.eval()(people.inputs).detach().norm(dim=1).mean()) > 0.5
    assert losses[16.0] > 1.3 * losses[8.0]


def test_the_mean_cosine_of_unlike_pairs_is_that_of_the_pairs_one_by_one():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(30, 5, generator=generator) + 1, torch.randint(0, 4, (30,), generator=generator)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i in range(30) for j in range(i) if y[i] != y[j]]
    assert _unlike(x, y) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@pytest.mark.parametrize(("end", "crowds"), [("", True), (", nn.BatchNorm1d(6)", False)])
def test_an_embedding_that_crowds_is_told_so_with_what_takes_it_away(faces, capsys, end, crowds):
    """A large bias is one direction for all; a batch norm behind it takes it away."""
    network = NET.partition("def make")[0] + (
        "def make():\n    last = nn.Linear(64, 6)\n    nn.init.constant_(last.bias, 20.0)\n"
        f"    return nn.Sequential(nn.Flatten(), last{end})\n"
    )
    (faces / "net.py").write_text(network)
    assert cli.main([*LINE, "--loss", "cosface", "--lr", "0.001", "--epochs", "30"]) == 0
    shown = capsys.readouterr().out
    raw = json.loads((faces / "run/train.json").read_text())
    unlike = raw["history"][-1]["validation_unlike"]
    assert raw["crowds"] is crowds and (unlike > 0.9) is crowds
    assert ("the embedding crowds" in shown) is crowds
    if crowds:
        assert (
            f"a cosine of {unlike:.3f} on the mean ({raw['before']['validation_unlike']:.3f} before" in shown
        )
    read = Fitted.read(faces / "run/train.json")
    assert read.crowds is crowds and read.before == raw["before"]


def test_the_follower_moves_slowly_and_the_queue_holds_its_keys():
    _, done = trained("moco", queue=40)
    training = done.trained
    own = [p.clone() for p in training.encoder.parameters()]
    behind = list(training.follower.parameters())
    first = list(network().parameters())
    for start, slow, fast in zip(first, behind, own):
        assert torch.dist(start, slow) <= torch.dist(start, fast) + 1e-6
    assert all(not p.requires_grad for p in behind)
    # 128 samples an epoch, 3 epochs: keys of length 1, and the pointer where they ended.
    assert int(training.loss.queue.pointer) == 3 * 128 % 40
    assert torch.allclose(training.loss.queue.rows.norm(dim=1), torch.ones(40), atol=1e-5)


def test_held_out_classes_are_whole_and_the_same_for_a_seed():
    labels = torch.arange(10).repeat(4)
    train, held = split_classes(labels, 0.3, 5)
    assert len(held) == 12 and not set(labels[train].tolist()) & set(labels[held].tolist())
    assert held.equal(split_classes(labels, 0.3, 5)[1])


def test_by_default_two_classes_or_more_are_held_out():
    for classes, expected in ((4, 2), (6, 2), (20, 4)):
        labels = torch.arange(classes).repeat(3)
        assert len(labels[split_classes(labels, None, 0)[1]].unique()) == expected
    with pytest.raises(InputError, match="3 classes are too few to hold 2 out and train on 2; give 0"):
        split_classes(torch.arange(3).repeat(3), None, 0)
    with pytest.raises(InputError, match="of 6 classes holds 1 out"):
        split_classes(torch.arange(6).repeat(3), 0.2, 0)


def test_a_transformation_that_never_starts_is_refused():
    options = EmbeddingOptions("moco", ft=("pos",), ft_start=5)
    assert Options(epochs=6, embedding=options).epochs == 6
    with pytest.raises(InputError, match="ft_start: got 5, and the last of 5 epochs"):
        Options(epochs=5, embedding=options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loss": "arcfase"}, "nearest: 'arcface'"),
        ({"loss": "supcon", "scale": 3.0}, "scale: supcon takes none"),
        ({"loss": "arcface", "sigma": 0.1}, "elastic-arc, elastic-cos do"),
        ({"loss": "elastic-arc", "sigma": -0.1}, "sigma: got -0.1"),
        ({"loss": "arcface", "scale": 0.0}, "scale: got 0"),
        ({"loss": "combined", "margin": (0.5,)}, "expected 3 for combined"),
        (
            {"loss": "arcface", "margin": (4.0,)},
            r"margin: got 4.0, expected radians in \[0, pi\) for arcface",
        ),
        ({"loss": "elastic-arc", "margin": (-1.0,)}, "margin: got -1.0, expected radians"),
        ({"loss": "cosface", "margin": (-1.0,)}, r"margin: got -1.0, expected a number in \[0"),
        ({"loss": "elastic-cos", "margin": (-0.1,)}, "margin: got -0.1"),
        ({"loss": "combined", "margin": (1.0, 3.2, 0.1)}, "m2: got 3.2, expected radians"),
        ({"loss": "combined", "margin": (1.0, 0.2, -0.1)}, "m3: got -0.1"),
        ({"loss": "magface", "margin": (0.8, 0.45)}, "got 0.8,0.45, expected magface's smallest first"),
        ({"loss": "moco", "queue": 1}, "size: got 1"),
        ({"loss": "moco", "ft": ("both",)}, "ft: "),
        ({"loss": "moco", "ft": ("neg",), "ft_start": 3}, "give ft pos, too"),
        ({"loss": "simclr", "temperature": 0.0}, "temperature: got 0"),
        ({"loss": "simclr", "views": ("flop",)}, "nearest: 'flip'"),
        ({"loss": "arcface", "head": "mpl"}, "nearest: 'mlp'"),
        ({"loss": "arcface", "head": "fixed:0"}, "head: got 0"),
        ({"loss": "arcface", "unpg": -1.0}, "whisker: got -1"),
        ({"loss": "arcface", "validation_classes": 1.0}, "validation_classes: got 1"),
    ],
)
def test_what_cannot_be_meant_is_said_before_any_work(given, said):
    with pytest.raises(InputError, match=said):
        EmbeddingOptions(**given)


@pytest.mark.parametrize(
    ("loss", "train"),
    [("moco", {"useful": 2}), ("moco", {"sam": 0.1}), ("moco", {"asam": 0.5}), ("simclr", {"batch_size": 1})],
)
def test_what_does_not_go_with_a_loss(loss, train):
    with pytest.raises(InputError, match=next(iter(train))):
        Options(**train, embedding=EmbeddingOptions(loss))


NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 6))
"""
LINE = [
    "train",
    "net.py:make",
    "faces.npz",
    "--out",
    "run",
    "--epochs",
    "2",
    "--device",
    "cpu",
    "--batch-size",
    "40",
]


@pytest.fixture
def faces(tmp_path, monkeypatch) -> Path:
    """Twelve people, more than the network has outputs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    generator = np.random.default_rng(0)
    y = np.arange(120) % 12
    x = generator.random((12, 8, 8))[y] + 0.2 * generator.random((120, 8, 8))
    np.savez("faces.npz", images=x.astype(np.float32), labels=y)
    return tmp_path


@pytest.mark.parametrize("words", [["elastic-cos", "--sigma", "0.1", "--unpg"], ["moco", "--queue", "64", "--ft", "pos,neg"]])  # fmt: skip
def test_the_command_writes_what_it_says(faces, capsys, words):
    assert cli.main([*LINE, "--loss", *words]) == 0
    shown = capsys.readouterr().out
    assert (
        "of 2 classes held out" in shown
        and "with no false accept among 100 pairs" in shown
        and "--task embedding" in shown
    )
    raw = json.loads((faces / "run/train.json").read_text())
    assert (
        raw["options"]["loss"] == words[0]
        and len(raw["held_out"]) == 2
        and raw["before"]["validation_recall"] is not None
    )
    entry = raw["history"][-1]
    assert 0 <= entry["validation_tar3"] <= entry["validation_tar2"] <= 1 and entry["train_accuracy"] is None
    assert "weight" not in load_file(faces / "run/model.safetensors")
    head = load_file(faces / "run/head.safetensors")
    if words[0] == "moco":
        assert (
            head["loss.queue.rows"].shape == (64, 6)
            and (faces / "run/scores.csv").read_text().count("\n") == 7
        )
    else:
        assert head["loss.head.weight"].shape == (10, 6)
    read = Fitted.read(faces / "run/train.json")
    assert read.options.embedding is not None and read.recognised[0] == entry["validation_tar3"]
    assert cli.main(["train", "--compare", "run"]) == 0
    assert "TAR at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--margin", "0.3"], "--margin: it is for embeddings"),
        (["--loss", "arcface", "--margin", "x"], "--margin: got 'x'"),
        (["--loss", "arcface", "--validation", "0.2"], "expected --validation-classes"),
        (
            ["--loss", "arcface", "--validation-classes", "0.95"],
            "--validation-classes: a share of 0.95 of 12",
        ),
        (["--loss", "arcface", "--embedding", "9"], "--embedding: '9' is no site"),
        (["--loss", "arcface", "--margin", "nan"], "--margin: got nan"),
        (["--loss", "arcface", "--unpg", "-1"], "--unpg: got -1.0"),
        (["--loss", "arcface", "--sample-classes", "2"], "--sample-classes: got 2.0"),
        (["--loss", "moco", "--queue", "1"], "--queue: got 1"),
        (["--loss", "arcface", "--sigma", "1"], "--sigma: arcface takes none"),
    ],
)
def test_a_wrong_line_is_one_line_and_leaves_nothing(faces, capsys, words, said):
    assert cli.main([*LINE, *words]) == 2
    told = ("lineament: reading the model", "lineament: inputs are array")
    lines = [text for text in capsys.readouterr().err.splitlines() if not text.startswith(told)]
    assert len(lines) == 1 and said in lines[0], lines
    assert not (faces / "run").exists()


def test_more_people_than_outputs_name_the_task(faces, capsys):
    assert cli.main(LINE) == 2
    assert "an embedding" in capsys.readouterr().err


def test_options_travel_through_their_file():
    given = Options(
        embedding=EmbeddingOptions("combined", margin=(1.0, 0.2, 0.1), views=("noise",), embedding="2")
    )
    assert copy.copy(Options.read(json.loads(json.dumps(given.to_dict())))).to_dict() == given.to_dict()
