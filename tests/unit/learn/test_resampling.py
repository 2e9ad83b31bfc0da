"""USEFUL: what its stages train on, restarting, early outputs, the sampler."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lineament.core.checks import InputError
from lineament.learn.useful.early_outputs import outputs_of, recalibrated
from lineament.learn.useful.resampling import UpsamplingSampler, find_slow, trainer, useful

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + 0.5 * X[:, 1] > 0).long()
LOADER = [(X[:25], Y[:25]), (X[25:], Y[25:])]


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


FIT = trainer((X, Y), optimizer=sgd, batch_size=16)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_the_early_part_leaves_the_model_at_its_start():
    model = net()
    before = copy.deepcopy(model)
    early = find_slow(model, FIT, LOADER, epochs=40)
    assert same(model, before)
    # 2 % to 15 % of 40, one more epoch and one for the smoothing.
    assert 2 <= early.epoch <= 6 and len(early.errors) == 8
    fixed = find_slow(model, FIT, LOADER, epochs=40, separating=early.epoch)
    assert torch.equal(fixed.selection.mask, early.selection.mask)
    json.dumps(early.to_dict())
    early.plot()


def test_the_final_training_starts_from_the_same_weights_on_the_enlarged_data():
    model, plain, seen = net(), net(), []

    def watched(model, rows, epochs, **options):
        seen.append((copy.deepcopy(model), rows, options))
        yield from FIT(model, rows, epochs, **options)

    done = useful(model, watched, LOADER, epochs=6, separating=3, factor=3)
    assert same(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], torch.arange(60))
    assert torch.equal(seen[1][1], done.early.selection.indices(3)) and len(done.errors) == 6
    list(FIT(plain, done.rows, 6))
    assert same(model, plain)
    assert done.cost == pytest.approx(len(done.rows) / 60 + 3 / 6)
    useful(net(), watched, LOADER, epochs=2, separating=1, weigh=True)
    assert seen[-1][2]["weights"].max() == 2
    useful(model, watched, LOADER, epochs=2, separating=1, restart=lambda m: m[0].reset_parameters())
    assert not same(seen[-1][0], seen[-2][0])
    done.plot()


def test_an_order_that_changes_after_the_first_walks_is_seen():
    class Turning(list):
        walks = 0

        def __iter__(self):
            self.walks += 1
            return iter([(x.flip(0), y.flip(0)) for x, y in LOADER] if self.walks > 2 else LOADER)

    with pytest.raises(InputError, match="other labels at each walk"):
        find_slow(net(), FIT, Turning(), epochs=5, separating=1)


def test_a_class_without_examples_is_left_out_where_that_is_allowed():
    wide = nn.Sequential(nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=r"classes \[2\]"):
        early = find_slow(wide, FIT, LOADER, epochs=5, separating=1, allow_empty=True)
    assert early.selection.counts[2].tolist() == [0, 0] and bool(early.selection.mask.any())


def test_a_factor_of_one_is_plain_training():
    model, plain = net(), net()
    useful(model, FIT, LOADER, epochs=3, separating=1, factor=1)
    list(FIT(plain, torch.arange(60), 3))
    assert same(model, plain)


def test_outputs_leave_no_trace_and_statistics_come_back():
    model = net()
    with unchanged(model):
        scores, labels, features = outputs_of(model, LOADER, site="2", recalibrate=True)
    assert scores.shape == (60, 2) and torch.equal(labels, Y) and features.shape == (60, 8)
    with recalibrated(model, [(X, Y)]):
        inner = model[0](X)
        assert torch.allclose(model[1].running_mean, inner.mean(0), atol=1e-5)
    with unchanged(model), pytest.raises(RuntimeError), recalibrated(model, LOADER):
        raise RuntimeError


def test_the_sampler_repeats_indices_and_shares_them_among_processes():
    rows = torch.tensor([0, 1, 1, 2, 3, 3, 4])
    sampler = UpsamplingSampler(rows, seed=5)
    loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=3, sampler=sampler)
    first, second = (torch.cat([b for (b,) in loader]) for _ in range(2))
    assert torch.equal(first.sort().values, rows) and not torch.equal(first, second)
    sampler.set_epoch(0)
    assert torch.equal(torch.cat([b for (b,) in loader]), first)
    other = UpsamplingSampler(rows, seed=5)
    other.load_state_dict({"epoch": 1})
    assert torch.equal(torch.tensor(list(other)), second)
    parts = [list(UpsamplingSampler(rows, seed=5, rank=r, replicas=3)) for r in range(3)]
    assert {len(p) for p in parts} == {3}
    merged = [parts[i % 3][i // 3] for i in range(9)]
    assert merged[:7] == first.tolist() and merged[7:] == first.tolist()[:2]


def test_what_cannot_be_used_is_named():
    never = lambda model, rows, epochs: pytest.fail("trained")  # noqa: E731
    with pytest.raises(InputError, match=r"1 of 2 classes have no example, first class \[1\]"):
        find_slow(net(), never, [(X, torch.zeros(60).long())], epochs=5, separating=1)
    with pytest.raises(InputError, match=r"labels: .*2"):
        find_slow(net(), never, [(X, torch.arange(60) % 3)], epochs=5, separating=1)
    with pytest.raises(InputError, match="data: it is empty"):
        find_slow(net(), never, [], epochs=5, separating=1)
    with pytest.raises(InputError, match="walked again"):
        find_slow(net(), FIT, iter(LOADER), epochs=5, separating=1)
    with pytest.raises(InputError, match=r"other labels at each walk.*shuffle=False"):
        shuffled = DataLoader(TensorDataset(X, Y), batch_size=30, shuffle=True)
        find_slow(net(), never, shuffled, epochs=5, separating=1)
    with pytest.raises(InputError, match=r"data: 1 of 60 samples hold NaN .*leave out sample 31 "):
        bad = torch.where(torch.arange(60)[:, None] == 31, torch.inf, X)
        find_slow(net(), never, [(bad[:25], Y[:25]), (bad[25:], Y[25:])], epochs=5, separating=1)
    with pytest.raises(InputError, match="separating"):
        find_slow(net(), FIT, LOADER, epochs=5, separating=9)
    with pytest.raises(InputError, match="too few to see"):
        find_slow(net(), FIT, LOADER, epochs=2)
    with pytest.raises(InputError, match="ended after 1 epochs"):
        find_slow(net(), lambda m, r, e: [0.5], LOADER, epochs=5, separating=3)
    with pytest.raises(InputError, match="site"):
        find_slow(net(), FIT, LOADER, epochs=5, separating=1, output="features")
    with pytest.raises(InputError, match="rank"):
        UpsamplingSampler(torch.arange(4), rank=2, replicas=2)
    for options in ({"factor": 3}, {"balance": "shares"}):
        with pytest.raises(InputError, match="rows are indices already"):
            UpsamplingSampler(torch.arange(5), **options)
    with pytest.raises(InputError, match="negative"):
        UpsamplingSampler(torch.tensor([-1]))
    model = net()
    before = copy.deepcopy(model)
    model[0].weight.data[0, 0] = before[0].weight.data[0, 0]
    with pytest.raises(InputError, match="training error"):
        find_slow(model, lambda m, r, e: [float("nan")], LOADER, epochs=5, separating=1)
    assert same(model, before)
