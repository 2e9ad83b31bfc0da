"""The training loop: it is the loop that anyone would write, it resumes to the bit, and it leaves nothing behind."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, NotFiniteError
from lineament.optim import SAM
from lineament.train import callbacks as cb
from lineament.train.loop import epochs, fit

X = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + 0.3 * X[:, 1] > 0).long() + (X[:, 2] > 1).long()


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
        )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def sam(model: nn.Module) -> torch.optim.Optimizer:
    return SAM(sgd(model), rho=0.05, model=model)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def untimed(history):
    return [dataclasses.replace(record, seconds=0.0) for record in history]


def fitted(model=None, data=(X, Y), **options):
    model = network() if model is None else model
    given = {"optimizer": sgd, "epochs": 3, "batch_size": 16, **options}
    return model, fit(model, data, **given)


def test_it_is_the_loop_that_anyone_would_write():
    ours, theirs = nn.Linear(6, 3), nn.Linear(6, 3)
    theirs.load_state_dict(ours.state_dict())
    _, done = fitted(ours, seed=5)
    optimizer, generator, losses = sgd(theirs), torch.Generator().manual_seed(5), []
    for _ in range(3):
        for rows in torch.randperm(120, generator=generator).split(16):
            loss = F.cross_entropy(theirs(X[rows]), Y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(rows))
    assert same(ours, theirs)
    assert done.curve("loss") == pytest.approx([sum(losses[k : k + 8]) / 120 for k in (0, 8, 16)])
    assert done.curve("lr") == [0.1] * 3 and done.plot().get_ylabel() == "loss"


@pytest.mark.parametrize("data", ["arrays", "samples", "dataset", "loader", "mapping", "view"])
def test_data_in_every_form_train_alike(data):
    @dataclasses.dataclass(frozen=True)
    class Samples(torch.utils.data.Dataset):
        inputs: torch.Tensor
        targets: torch.Tensor

    class View:
        def __len__(self):
            return 120

        def __getitem__(self, rows):
            return X[rows]

    class Named(nn.Linear):
        def forward(self, input_ids):
            return super().forward(input_ids)

    forms = {
        "arrays": (X.numpy(), Y.numpy()),
        "samples": Samples(X, Y),
        "dataset": TensorDataset(X, Y),
        "loader": [(X[rows], Y[rows]) for rows in torch.arange(120).split(16)],
        "mapping": ({"input_ids": X}, Y),
        "view": (View(), Y),
    }
    torch.manual_seed(0)
    first, second = Named(6, 3), Named(6, 3)
    second.load_state_dict(first.state_dict())
    given = cb.Validation(forms[data])
    _, done = fitted(
        first, forms[data], callbacks=[given, *([] if data == "loader" else [cb.Rows(shuffle=False)])]
    )
    _, expected = fitted(second, callbacks=[cb.Validation((X, Y)), cb.Rows(shuffle=False)])
    assert same(first, second) and done.curve("validation_loss") == pytest.approx(
        expected.curve("validation_loss")
    )
    fitted(nn.Linear(6, 3), DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True))


def test_nothing_is_left_behind():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, done = fitted(network().eval())
    second, again = fitted()
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert same(first, second) and untimed(done.history) == untimed(again.history)
    assert not first.training and second.training and all(p.grad is None for p in first.parameters())
    assert not same(first, fitted(seed=1)[0])
    with pytest.raises(NotFiniteError):
        fitted(first, (X * float("nan"), Y))
    assert not any(m.training for m in first.modules()) and torch.equal(torch.get_rng_state(), before[0])
    walk = epochs(first, (X, Y), optimizer=sgd, epochs=9)
    next(walk)
    assert not first.training and torch.equal(torch.get_rng_state(), before[0])
    walk.close()
    assert all(p.grad is None for p in first.parameters())


RESUMED = {
    "step": lambda: [cb.Schedule(lambda o, total: OneCycleLR(o, 0.2, total_steps=total), by="step")],
    "epoch": lambda: [cb.Schedule(lambda o, total: StepLR(o, 2, 0.5)), cb.Augment(noise), cb.MixUp(0.3)],
    "best": lambda: [cb.Cosine(0.1), cb.Validation((X, Y)), cb.KeepBest()],
    "stopped": lambda: [cb.KeepBest("loss", patience=1), cb.Rate(lambda done: 1.0 if done < 0.6 else 1e3)],
    "weights": lambda: [cb.Rows(lambda epoch: torch.arange(60 + epoch)), cb.ExampleWeights(torch.rand(120))],
}


def noise(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator)


@pytest.mark.parametrize("optimizer", [sgd, sam])
@pytest.mark.parametrize("kind", RESUMED)
def test_a_training_that_was_cut_off_goes_on_with_the_same_bits(tmp_path, kind, optimizer):
    torch.manual_seed(0)
    made = [RESUMED[kind]() for _ in range(4)]
    if kind == "weights":
        made = [[part[0], made[0][1]] for part in made]
    options = {"optimizer": optimizer, "epochs": 7, "batch_size": 16}
    whole, again = network(), network(9)  # the weights of the second come from the checkpoint
    expected = fit(whole, (X, Y), callbacks=made[0], **options)
    for number, _ in enumerate(
        epochs(network(), (X, Y), callbacks=made[1], checkpoint=Checkpoint(tmp_path, {}), **options)
    ):
        if number == 3:
            break
    stored = {"checkpoint": Checkpoint(tmp_path, {}), **options}
    resumed = fit(again, (X, Y), callbacks=made[2], **stored)
    assert same(whole, again) and untimed(resumed.history) == untimed(expected.history)
    finished = network(9)
    assert untimed(fit(finished, (X, Y), callbacks=made[3], **stored).history) == untimed(expected.history)
    assert same(whole, finished)


@pytest.mark.parametrize("optimizer", [sgd, sam])
def test_what_is_not_finite_raises_with_the_step_or_is_skipped_whole(optimizer):
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    bad = X.clone()
    bad[order[20], 1] = float("nan")  # in the second batch of the first epoch
    with pytest.raises(
        NotFiniteError,
        match=r"training: the loss is NaN or infinite at step 2 of epoch 1 \(step 2 in all\); .*nonfinite='skip'",
    ):
        fitted(broken := network(), (bad, Y), optimizer=optimizer)
    assert all(bool(torch.isfinite(value).all()) for value in broken.state_dict().values())
    # The same without that batch, by a loader; dropout would draw otherwise.
    first, second = network(), network()
    first[3].p = second[3].p = 0.0
    _, done = fitted(first, (bad, Y), optimizer=optimizer, nonfinite="skip", epochs=1)
    parts = [rows for k, rows in enumerate(order.split(16)) if k != 1]
    fitted(second, [(X[rows], Y[rows]) for rows in parts], optimizer=optimizer, epochs=1)
    assert same(first, second) and done.history[0].skipped == 1
    with pytest.raises(NotFiniteError, match="all 8 steps of epoch 1"):
        fitted(data=(X * float("nan"), Y), nonfinite="skip")


def test_an_infinite_gradient_of_a_finite_loss_is_seen():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.w.sqrt() + x[:, :3] * 0

    model = Root()
    with pytest.raises(NotFiniteError, match="gradient is NaN or infinite at step 1 of epoch 1"):
        fitted(model)
    assert torch.equal(model.w, torch.zeros(3))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.LayerNorm])
def test_a_last_batch_of_one_is_left_to_another_epoch_where_there_is_batch_norm(kind):
    seen = []
    model = nn.Sequential(nn.Linear(6, 3), kind(3))
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    fitted(model, (X[:33], Y[:33]), epochs=2)
    assert seen == ([16, 16] if kind is nn.BatchNorm1d else [16, 16, 1]) * 2


def test_rates_and_measurements_and_the_order_of_the_calls():
    called = []

    class Spy:
        def __enter__(self):
            called.append("enter")

        def __exit__(self, *_):
            called.append("exit")

        def __getattr__(self, name):
            if not name.startswith("on_"):
                raise AttributeError(name)
            return lambda run, *_: called.append(name)

    _, done = fitted(
        epochs=2,
        batch_size=60,
        callbacks=[cb.Cosine(), Spy(), cb.Measure(every=5, weights=lambda m: (m.training, 7.0))],
    )
    every = ["on_batch", "on_gradients", "on_step"]
    assert called == ["enter", "on_start", *(["on_epoch", *every * 2, "on_epoch_end"] * 2), "on_end", "exit"]
    assert done.curve("weights") == [None, (False, 7.0)] and done.curve("lr") == [0.1, 0.05]
    assert done.to_dict()["history"][1]["weights"] == (False, 7.0)
    with pytest.raises(InputError, match="nearest: 'loss'"):
        done.curve("los")


def test_copies_and_weights_are_the_same_in_full_batches():
    rows = torch.cat([torch.arange(120), torch.arange(40)])
    weights = 1.0 + (torch.arange(120) < 40).double()
    torch.manual_seed(0)
    one, two = nn.Linear(6, 3), nn.Linear(6, 3)
    two.load_state_dict(one.state_dict())
    fitted(one, batch_size=200, callbacks=[cb.Rows(rows)])
    fitted(two, batch_size=200, callbacks=[cb.ExampleWeights(weights)])
    torch.testing.assert_close(one.weight, two.weight)


def test_mixed_batches_have_the_loss_of_soft_targets():
    seen = []

    def loss(outputs, targets):
        seen.append(targets)
        return F.cross_entropy(outputs, targets)

    model = nn.Linear(6, 3)
    inputs = []
    model.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    fitted(model, loss=loss, epochs=1, batch_size=120, callbacks=[cb.Rows(shuffle=False), cb.MixUp(1.0)])
    target, other = seen
    found = (inputs[0] - X[0]).norm(dim=1).argmin()  # some sample is mixed with the first
    assert found >= 0 and not torch.equal(target, other)
    assert torch.equal(target, Y) and torch.equal(other.sort().values, Y.sort().values)


def test_several_optimizers_step_together():
    one, two = network(), network()
    fitted(one, optimizer=lambda m: (torch.optim.SGD(m[0].parameters(), 0.1), torch.optim.SGD(m[1:].parameters(), 0.1)), callbacks=[cb.Cosine()])  # fmt: skip
    fitted(two, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1), callbacks=[cb.Cosine()])
    assert same(one, two)


def test_early_stopping_keeps_the_best_epoch():
    best = cb.KeepBest("loss", patience=2)
    rates = cb.Rate(lambda done: 1.0 if done < 0.3 else -5.0)  # learns, then climbs
    model, done = fitted(nn.Linear(6, 3), epochs=20, callbacks=[rates, cb.Validation((X, Y)), best])
    assert len(done.history) == best.epoch + 3 < 20
    again, _ = fitted(copy.deepcopy(model), epochs=1, callbacks=[v := cb.Validation((X, Y)), cb.Rate(lambda done: 0.0)])  # fmt: skip
    assert done.curve("loss")[best.epoch] == min(done.curve("loss")) and same(model, again) and v


@pytest.mark.parametrize("form", ["tensors", "a mapping", "weights", "mixed"])
def test_a_batch_in_parts_steps_as_a_whole(form):
    """Also where the parts are of different sizes, of which the batch's mean is not the mean of means."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return self.linear(x)

    def trained(*more):
        torch.manual_seed(0)
        extra = {"weights": [cb.ExampleWeights(torch.rand(120))], "mixed": [cb.MixUp(1.0)]}.get(form, [])
        data = ({"x": X}, Y) if form == "a mapping" else (X, Y)
        return fitted(Named(), data, callbacks=[*extra, *more], batch_size=50, seed=3)

    (whole, done), (parts, same_done) = trained(), trained(cb.Accumulate(3))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole.parameters(), parts.parameters()))
    assert same_done.curve("loss") == pytest.approx(done.curve("loss"))
    assert same_done.curve("accuracy") == done.curve("accuracy")
    seen = []
    model = network()
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(len(outputs)))
    fitted(model, epochs=1, batch_size=120, callbacks=[cb.Accumulate(7)])
    assert sum(seen) == 120 and len(seen) == 7 and max(seen) - min(seen) == 1


def test_gradients_are_clipped_and_precision_is_mixed():
    kinds = []
    model = network()
    model[0].register_forward_hook(lambda *args: kinds.append(args[2].dtype))
    fitted(model, callbacks=[cb.Autocast()], epochs=1)
    assert set(kinds) == {torch.bfloat16} and model[0].weight.dtype == torch.float32
    still, start = network(), network()
    fitted(still, epochs=1, batch_size=120, optimizer=lambda m: torch.optim.SGD(m.parameters(), 1.0), callbacks=[cb.ClipGradients(1e-3)])  # fmt: skip
    moved = sum(
        float((a - b).detach().square().sum()) for a, b in zip(still.parameters(), start.parameters())
    )
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-3)


def test_what_cannot_be_used_is_named():
    for options, said in [
        ({"epochs": 0}, "epochs: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"nonfinite": "ignore"}, "nonfinite: got 'ignore'"),
        ({"seed": -1}, "seed: got -1"),
        ({"data": (X[:50], Y)}, "50 inputs and 120 targets"),
        ({"data": iter([(X, Y)])}, "walked again"),
        ({"data": X}, "expected \\(inputs, targets\\)"),
        ({"data": []}, "gave no batch"),
        ({"data": (X, Y + 3)}, "targets: got label 3"),
        ({"model": network().requires_grad_(False)}, "nothing to train"),
        ({"model": nn.Linear(5, 3)}, r"does not take inputs of shape \(6,\)"),
        ({"callbacks": [cb.Rows(torch.tensor([500]))]}, "indices from 500"),
        ({"callbacks": [cb.KeepBest("accurracy")]}, "nearest: 'accuracy'"),
        ({"data": [(X, Y)], "callbacks": [cb.Rows(shuffle=False)]}, "loader"),
        ({"data": [(X, Y)], "callbacks": [cb.ExampleWeights(torch.ones(120))]}, "loader"),
    ]:
        with pytest.raises(InputError, match=said):
            fitted(**options)
    with pytest.raises(NotFiniteError, match="left NaN or infinite weights in"):
        fitted(epochs=1, batch_size=120, optimizer=lambda m: torch.optim.SGD(m.parameters(), float("inf")))
