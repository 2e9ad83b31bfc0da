"""The options of `lineament train` composed around the loop: what they do, what they leave alone, and where a run goes on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lineament.cli.train_fit import fit, split
from lineament.cli.train_options import OPTIMIZERS, Options
from lineament.cli.train_result import Fitted
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError
from lineament.optim import SAM
from lineament.train.processes import Processes

pytest.importorskip("accelerate", reason="needs the extra lm")

X = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + 0.3 * X[:, 1] > 0).long() + (X[:, 2] > 1).long()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def trained(model: nn.Module | None = None, inputs=X, y=Y, run=None, **options) -> tuple[nn.Module, Fitted]:
    model = network() if model is None else model
    read = inputs if callable(inputs) else lambda rows: inputs[rows]
    given = Options(**{"epochs": 4, "batch_size": 16, **options})
    return model, fit(model, read, y, given, processes=Processes("cpu"), **(run or {}))


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


def untimed(done: Fitted) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in done.history]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("around", [{}, {"sam": 0.05}, {"asam": 0.5}])
def test_every_optimizer_learns_with_and_without_sam(optimizer, around):
    lr = 0.05 if optimizer == "sgd" else 0.02
    model, done = trained(optimizer=optimizer, lr=lr, epochs=15, **around)
    assert done.history[-1]["train_loss"] < 0.8 * done.history[0]["train_loss"]
    assert done.last is not None and done.last > 0.75
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "sam": 0.05},
        {"optimizer": "adam", "useful": 2},
        {"useful": "auto", "sam": 0.1, "seed": 2**63 - 1},
        {"optimizer": "diffgrad", "useful": 2, "asam": 0.5, "tract": 0.1, "schedule": "step"},
    ],
)
@pytest.mark.parametrize("cut", [3, "early"])
def test_a_run_that_is_cut_off_goes_on_to_the_same_weights(tmp_path, options, cut):
    options = {"epochs": 5, **options}
    whole, expected = trained(**options)
    calls = 0

    def inputs(rows):
        nonlocal calls
        calls += 1
        if cut == "early" and calls == 5:
            raise KeyboardInterrupt
        return X[rows]

    def stop(history):
        if len(history) == cut:
            raise KeyboardInterrupt

    stored, said = (lambda: {"checkpoint": Checkpoint(tmp_path / "stages", {})}), []
    with pytest.raises(KeyboardInterrupt):
        trained(inputs=inputs, run={**stored(), "record": stop}, **options)
    # After an epoch the weights come from the checkpoint.
    resumed, found = trained(network(9 if cut == 3 else 0), run={**stored(), "note": said.append}, **options)
    assert same(whole, resumed) and untimed(found) == untimed(expected)
    assert any("going on after epoch 2" in line for line in said) == (cut == 3)


def test_useful_trains_plainly_first_then_shows_the_slow_examples_twice_and_starts_again(monkeypatch):
    seen: list[torch.Tensor] = []
    made: list[torch.optim.Optimizer] = []
    weights: list[torch.Tensor] = []
    original = Options.make

    def inputs(rows):
        seen.append(rows)
        return X[rows]

    def make(self, model, *, plain=False):
        made.append(original(self, model, plain=plain))
        return made[-1]

    monkeypatch.setattr(Options, "make", make)
    model = network()
    start = copy.deepcopy(model.state_dict())
    watch = {"record": lambda _: weights.append(model[0].weight.detach().clone())}
    _, done = trained(model, inputs, run=watch, useful=2, sam=0.05, validation=0.0)
    assert [isinstance(o, SAM) for o in made] == [False, True] and made[1].model is model
    assert done.early is not None and done.early["epoch"] == 2
    slow = done.early["slow"]
    assert 0 < slow < 120 and sum(done.early["slow_by_class"]) == slow
    last = torch.cat(seen[-math.ceil((120 + slow) / 16) :]).bincount(minlength=120)
    assert int((last == 2).sum()) >= slow - 1 and int(last.max()) == 2 and len(weights) == 4
    # The final training starts at the initial weights: one epoch from them is near.
    assert float((weights[0] - start["0.weight"]).abs().max()) < 0.5


def test_useful_names_the_samples_that_hold_nan():
    x = X.clone()
    train, _ = split(Y, 0.2, seed=0)
    x[train[[7, 90]]] = float("nan")
    said = f"2 of {len(train)} samples hold NaN .*leave out samples {int(train[7])}, {int(train[90])} "
    with pytest.raises(InputError, match=said):
        trained(inputs=x, validation=0.2, on_nan="skip", useful=1)
    cleaning = network()
    cleaning.register_forward_pre_hook(lambda _, args: args[0].nan_to_num())
    trained(cleaning, inputs=x, validation=0.2, useful=1)


class Counted(nn.Module):
    def __init__(self, sparse: bool):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(5, 8, sparse=sparse), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.table((x + 2).long().clamp(0, 4)).mean(1))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"tract": 0.1}])
def test_sparse_gradients_train_as_dense_ones(tmp_path, options):
    (sparse, _), (dense, _) = (trained(Counted(kind), **options) for kind in (True, False))
    for a, b in zip(sparse.parameters(), dense.parameters()):
        torch.testing.assert_close(a, b)
    trained(Counted(True), run={"checkpoint": Checkpoint(tmp_path / "stages", {})}, epochs=2, **options)


@pytest.mark.parametrize(
    "options", [{"optimizer": "adam"}, {"optimizer": "diffgrad"}, {"weight_decay": 0.1}, {"sam": 0.1}]
)
def test_sparse_gradients_that_no_one_takes_are_refused(options):
    with pytest.raises(InputError, match=r"the gradient of 'table' is sparse, which only sgd .*sparse=False"):
        trained(Counted(True), **options)


def test_rates_follow_the_schedule():
    cosine, step = Options(), Options(schedule="step")
    assert [cosine.factor(d) for d in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)
    assert [step.factor(d) for d in (0.0, 0.49, 0.5, 0.75)] == [1.0, 1.0, 0.1, 0.01]
    assert Options(schedule="none").factor(0.9) == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"lr": math.inf}, "lr: got inf"),
        ({"weight_decay": math.nan}, "weight_decay: got nan"),
        ({"momentum": 1.0}, "momentum"),
        ({"optimizer": "adam", "momentum": 0.9}, "adam takes none"),
        ({"optimizer": "diffgrat"}, "nearest: 'diffgrad'"),
        ({"schedule": "cosin"}, "nearest: 'cosine'"),
        ({"sam": -0.1}, "sam: got -0.1"),
        ({"sam": 0.1, "asam": 0.1}, "at most one"),
        ({"tract": math.nan}, "tract: got nan"),
        ({"useful": 5}, "useful"),
        ({"useful": "aut"}, "expected an epoch or 'auto'"),
        ({"useful": "auto", "epochs": 2}, "too few"),
        ({"validation": 1.0}, "validation"),
        ({"validation": 0.001}, "holds none out"),
        ({"epochs": 0}, "epochs"),
        (
            {"seed": 2**63},
            r"seed: got 9223372036854775808, expected an integer in \[0, 9223372036854775807\]",
        ),
        ({"on_nan": "ignore"}, "on_nan"),
    ],
)
def test_options_that_cannot_be(options, said):
    model = network()
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=said):
        trained(model, **options)
    assert same(model, before)


def test_data_that_cannot_be():
    with pytest.raises(InputError, match="class 1 has no example"):
        trained(y=Y.clamp(max=1) * 2)
    with pytest.raises(InputError, match="at least two classes"):
        trained(y=Y * 0)
    with pytest.raises(InputError, match="nothing to train"):
        trained(network().requires_grad_(False))


def test_a_class_of_one_is_trained_on():
    targets = torch.tensor([0] * 20 + [1])
    train, held = split(targets, 0.5, seed=0)
    assert 20 in train.tolist() and len(held) == 10
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(21))


def test_tract_changes_the_first_layer_only_while_it_trains_and_nan_is_left_out():
    plain, _ = trained()
    model, done = trained(tract=0.1)
    assert done.tract_layer == "0" and not same(plain, model) and type(model[0]) is nn.Linear
    again, _ = trained(tract=0.1)
    assert same(model, again)
    x = X.clone()
    x[7] = float("nan")
    broken = network()
    with pytest.raises(InputError, match="at step"):
        trained(broken, inputs=x, tract=0.1, validation=0.0)
    assert type(broken[0]) is nn.Linear
    for options in ({"tract": 0.1}, {"optimizer": "adam"}):
        model, done = trained(inputs=x, validation=0.0, on_nan="skip", **options)
        assert [entry["skipped"] for entry in done.history] == [1] * 4
        assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    with pytest.raises(InputError, match="layer"):
        trained(nn.Sequential(nn.BatchNorm1d(6)), tract=0.1, y=Y)


def test_a_result_survives_its_file(tmp_path):
    import json

    _, done = trained(useful=1, sam=0.05)
    file = tmp_path / "train.json"
    file.write_text(json.dumps(done.to_dict()))
    found = Fitted.read(file)
    assert found == done
    assert found.words() == f"lr 0.05, momentum 0.9, cosine, 4 epochs of batches of 16, seed 0, sam 0.05, useful (epoch 1, {done.early['slow'] / done.samples:.0%} twice)"  # fmt: skip
    assert found.plot(what="accuracy").get_ylabel() == "accuracy"
    for text in ("[]", "{}", '{"options": {}, "history": [], "samples": 1, "validation_samples": 0}', "{"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"no train\.json"):
            Fitted.read(file)


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(InputError, match=r"install lineament\[train\]"):
        Processes()
