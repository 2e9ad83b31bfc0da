"""Pruning, unlearning and what was forgotten, on small networks."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament import edit
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, NotFiniteError
from lineament.core.norms import recalibrate
from lineament.edit import PruneOptions, forgetting, prune, targets
from lineament.train import fit


def net_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3),
    ).eval()  # fmt: skip


X = torch.randn(96, 1, 4, 4, generator=torch.Generator().manual_seed(1))
Y = (X.mean((1, 2, 3)) > 0).long() + (X[:, 0, 0, 0] > 0.5).long()


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = net_of()
    fit(net, (X, Y), optimizer=lambda n: torch.optim.Adam(n.parameters(), 1e-2), epochs=20, batch_size=32)
    return net.eval()


@pytest.mark.parametrize("criterion", ["saliency", "fidelity", "energy", "magnitude", "random"])
@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_every_criterion_gives_the_size_and_leaves_the_network(trained, criterion, order):
    with unchanged(trained):
        found = prune(trained, X, keep=0.5, criterion=criterion, order=order)
    assert [tuple(found.sizes[n]) for n in ("0", "3", "8")] == [(8, 4), (12, 6), (16, 8)]
    assert found.parameters[1] == sum(p.numel() for p in found.model.parameters()) < found.parameters[0]
    assert found.flops[1] < found.flops[0] and found.share < 0.5
    assert all(repaired <= cut + 1e-9 for cut, repaired in found.errors.values())
    assert type(found.model) is type(trained) and not any(m._forward_hooks for m in found.model.modules())
    assert torch.export.export(found.model, (X[:2],)).module()(X[:2]).shape == (2, 3)


def test_repairs_bring_the_answers_closer(trained):
    def distance(**how) -> float:
        other = prune(trained, X, keep=0.5, criterion="magnitude", **how).model
        with torch.no_grad():
            return float((trained(X) - other(X)).square().mean())

    alone = distance(compensate=None, recalibrate=False)
    repaired = {how: distance(compensate=how) for how in ("delta", "refit", "taps")}
    assert all(d < alone for d in repaired.values()) and repaired["taps"] < repaired["delta"]


def test_silenced_equals_taken_out(trained):
    found = prune(trained, X, keep=0.5, compensate=None, recalibrate=False, options=PruneOptions(bias=False))
    masked = net_of()
    masked.load_state_dict(trained.state_dict())
    with torch.no_grad():
        for name, reader, block in (("0", "3", 1), ("3", "8", 4), ("8", "10", 1)):
            kept = torch.zeros(found.sizes[name][0]).index_fill(0, found.kept[name], 1)
            weight = masked.get_submodule(reader).weight
            weight.mul_(kept.repeat_interleave(block).view(1, -1, *(1,) * (weight.ndim - 2)))
        torch.testing.assert_close(found.model(X), masked(X))


@pytest.mark.parametrize("target", [{"params": 2.0}, {"flops": 2.0}, {"params": 1.2, "remove": 0.7}])
def test_targets_are_reached(trained, target):
    found = prune(trained, X, **target)
    kind = next(k for k in target if k != "remove")
    before, after = getattr(found, {"params": "parameters", "flops": "flops"}[kind])
    assert target[kind] <= before / after < 2 * target[kind]


def test_budgets_are_shared_by_group_or_by_rank(trained):
    ranked = prune(trained, X, keep=0.5, options=PruneOptions(allot="global"))
    assert sum(after for _, after in ranked.sizes.values()) == 18
    multiple = prune(trained, X, keep=0.6, options=PruneOptions(multiple=4, sites="3"))
    assert multiple.sizes == {"3": (12, 8)}
    one = prune(trained, X, remove=0.5)  # the paper's rule in one pass
    assert all(after <= before for before, after in one.sizes.values())


def test_a_duplicated_unit_costs_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        net[0].weight[3:], net[0].bias[3:] = net[0].weight[:3], net[0].bias[:3]
    x = torch.randn(60, 3, dtype=torch.float64)
    found = prune(net, x, keep=5 / 6, options=PruneOptions(lam=0.0))
    torch.testing.assert_close(found.model(x), net(x))


def test_the_mean_of_what_went_goes_into_the_bias():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 2)).double()
    x = torch.randn(60, 3, dtype=torch.float64)
    found = prune(net, x, keep=0.5, compensate=None)
    torch.testing.assert_close(found.model(x).mean(0), net(x).mean(0))


def test_statistics_on_the_same_data_are_the_same(trained):
    net = net_of()
    net.load_state_dict(trained.state_dict())
    recalibrate(net, [X])
    once = {n: b.clone() for n, b in net.named_buffers() if "running" in n}
    recalibrate(net, [X, X])
    assert all(torch.allclose(b, dict(net.named_buffers())[n]) for n, b in once.items())


@pytest.mark.parametrize("criterion", [None, "random"])
def test_a_killed_pruning_goes_on_with_the_same_bits(trained, tmp_path, monkeypatch, criterion):
    whole = prune(trained, X, keep=0.5, criterion=criterion)
    from lineament.edit import silencing

    step, calls = silencing.Plan._step, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(silencing.Plan, "_step", killed)
    options = PruneOptions(checkpoint=Checkpoint(tmp_path, {"x": 1}))
    with pytest.raises(KeyboardInterrupt):
        prune(trained, X, keep=0.5, criterion=criterion, options=options)
    options = PruneOptions(checkpoint=Checkpoint(tmp_path, {"x": 1}))
    again = prune(trained, X, keep=0.5, criterion=criterion, options=options)
    assert len(calls) == 4
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)


def test_a_folder_is_loaded_into_the_own_network(trained, tmp_path):
    found = prune(trained, X, keep=0.5)
    again = edit.load(found.save(tmp_path / "net"), net_of).eval()
    torch.testing.assert_close(again(X), found.model(X), rtol=0, atol=0)
    with pytest.raises(InputError, match="pass the function"):
        edit.load(tmp_path / "net")
    with pytest.raises(InputError, match=r"surgery\.json"):
        edit.load(tmp_path, net_of)


BAD = [
    ({}, "no target"),
    ({"keep": 0.5, "params": 2.0}, "keep and params"),
    ({"remove": 1.0}, "remove"),
    ({"keep": 0.0}, "keep"),
    ({"params": 1e6}, "the nearest is"),
    ({"remove": 0.01, "params": 2.0}, "pass a larger share"),
    ({"keep": 0.5, "criterion": "salience"}, "nearest: 'saliency'"),
    ({"keep": 0.5, "options": PruneOptions(sites="9")}, "no group '9'"),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_targets_are_refused(trained, given, said):
    with pytest.raises(InputError, match=said):
        prune(trained, X, **given)


def test_bad_data_are_refused(trained):
    with pytest.raises(NotFiniteError):
        prune(trained, torch.full_like(X, torch.nan), keep=0.5)
    with pytest.raises(InputError, match="empty"):
        prune(trained, X[:0], keep=0.5)
    with pytest.raises(InputError, match="no group of channels"):
        prune(nn.Linear(2, 2), torch.ones(4, 2), keep=0.5)


@pytest.mark.parametrize("criterion", ["saliency", "fidelity", "energy", "magnitude", "random"])
def test_unlearning_changes_its_pairs_and_nothing_else(trained, criterion):
    rows = Y == 2
    with unchanged(trained):
        found = edit.unlearn(trained, (X[rows], Y[rows]), share=0.1, criterion=criterion)
    assert list(found.pairs) == ["8"] and int(found.pairs["8"].sum()) == 77 and found.edit == "zero"
    changed = found.model[8].weight != trained[8].weight
    assert bool((~changed | found.pairs["8"]).all()) and bool(
        (found.model[8].weight[found.pairs["8"]] == 0).all()
    )
    for (name, a), b in zip(trained.named_parameters(), found.model.parameters()):
        assert torch.equal(a, b) or name == "8.weight"


def test_the_default_share_is_the_smallest_that_forgets(trained):
    inside = Y == 2
    own, rest = (X[inside], Y[inside]), (X[~inside], Y[~inside])
    found = edit.unlearn(trained, own, retain=rest)
    assert found.before is not None and found.before.share == 0 and found.reached

    def hits(model, data) -> float:
        with torch.no_grad():
            return float((model(data[0]).argmax(1) == data[1]).double().mean())

    for each in (found.before, *found.tried):
        model = edit.unlearn(trained, own, share=each.share).model if each.share else trained
        assert (each.forget, each.retain) == (hits(model, own), hits(model, rest))
    wanted = 1 / 3  # chance, of three classes
    chosen = next(t for t in found.tried if t.share == found.share)
    assert chosen.forget <= wanted and all(t.forget > wanted for t in found.tried if t.share < found.share)
    below = max((t.share for t in found.tried if t.share < found.share), default=found.share)
    assert found.share <= 1.1 * below + 1e-12 or found.share == found.tried[0].share
    assert edit.unlearn(trained, own[0]).share == found.share  # the class that is answered most often there
    asked = edit.unlearn(trained, own, target=0.6)
    assert asked.share <= found.share and all(t.retain is None for t in asked.tried)


def test_a_share_that_none_reaches_is_said(trained):
    inside = Y == 2
    found = edit.unlearn(trained, (X[inside], Y[inside]), target=0.0, sites=["8"], criterion="random")
    least = min(t.forget for t in found.tried)
    assert found.reached == (least == 0)
    assert next(t.forget for t in found.tried if t.share == found.share) == least
    with pytest.raises(InputError, match="target: got a share as well"):
        edit.unlearn(trained, X[inside], share=0.1, target=0.1)
    with pytest.raises(InputError, match="are no classes of samples"):
        edit.unlearn(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(9, 5, 3))


def test_negating_twice_restores(trained):
    rows = X[Y == 2]
    once = edit.unlearn(trained, rows, share=0.05, edit="negate", sites=["3", "8"], criterion="magnitude")
    twice = edit.unlearn(once.model, rows, share=0.05, edit="negate", sites=["3", "8"], criterion="magnitude")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), twice.model.parameters()))
    with pytest.raises(InputError, match="samples of one class"):
        edit.unlearn(trained, (X, Y))


def test_a_muted_class_is_not_erased(trained):
    forget, retain = ((X[rows], Y[rows]) for rows in (Y == 2, Y != 2))
    muted = edit.mute(trained, 2, X)
    with unchanged(trained), unchanged(muted):
        found = edit.forgotten(trained, muted, forget, retain, unseen=forget, steps=40)
    assert found.after.forget == 0 < found.before.forget and found.verdict == "muted"
    assert max(found.after.probe.values()) == max(found.before.probe.values()) > 0.7
    assert found.before.membership == 0.5 and abs(float(found.after.called.sum()) - 1) < 1e-9
    assert "muted" in found.sentence and found.after.retain >= found.before.retain
    again = edit.forgotten(trained, trained, forget, retain, retrained=trained, steps=1)
    assert again.verdict == "kept"
    with pytest.raises(InputError, match="holds samples of class 2"):
        edit.forgotten(trained, muted, forget, (X, Y))
    with pytest.raises(InputError, match="label"):
        edit.mute(trained, 7, X)


def test_erased_is_said_only_beside_a_network_that_never_knew():
    low = forgetting.Knowledge(0.0, 0.9, {"a": 0.6}, 80, 5, torch.ones(3) / 3, None)
    high = dataclasses.replace(low, probe={"a": 0.9})
    verdict = forgetting._verdict
    assert verdict(low, low) == "erased" and verdict(low, None) == "muted" and verdict(high, low) == "muted"
    assert verdict(dataclasses.replace(low, samples=16), low) == "muted"


class Sleeping(nn.Module):
    """A forward that takes given milliseconds, in turns."""

    def __init__(self, *milliseconds: float):
        super().__init__()
        self.linear, self.turns = nn.Linear(2, 2), itertools.cycle(milliseconds)

    def forward(self, x):
        time.sleep(next(self.turns) / 1000)
        return self.linear(x)


def test_forwards_are_timed_in_turns_and_say_when_other_work_hides_the_difference():
    x = torch.ones(1, 2)
    twice = targets.timed(Sleeping(20), Sleeping(10), x, budget=0.3)
    assert twice.steady and 1.5 < twice.factor < 2.5
    hidden = targets.timed(Sleeping(10), Sleeping(10, 30, 10), x, budget=0.3)
    assert not hidden.steady and "could not be told" in hidden.sentence


def test_a_latency_that_cannot_be_measured_is_refused(trained, monkeypatch):
    monkeypatch.setattr(targets, "timed", lambda *args: targets.Timing((0.02, 0.01), (0.5, 2.0, 4.0)))
    with pytest.raises(InputError, match=r"latency: other work .* flops="):
        prune(trained, X, latency=1.5)


def test_a_language_model_keeps_one_width_or_opens_by_its_own_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(40, (8, 6))
    data = [{"input_ids": ids}]
    one = prune(model, data, keep=0.5)
    opened = transformers.AutoModelForCausalLM.from_pretrained(one.save(tmp_path / "one"))
    assert opened.config.intermediate_size == 12
    free = prune(model, data, keep=0.5, options=PruneOptions(widths="free"))
    sizes = [after for _, after in free.sizes.values()]
    assert sum(sizes) == 24 and sizes[0] != sizes[1]
    again = edit.load(free.save(tmp_path / "free"))
    torch.testing.assert_close(again(ids).logits, free.model(ids).logits)
    with pytest.raises(InputError, match="several widths"):
        prune(model, data, remove=0.1)
    assert prune(model, data, remove=0.3, options=PruneOptions(widths="free")).sizes
    with pytest.raises(InputError, match="widths: got 'two'"):
        prune(model, data, keep=0.5, options=PruneOptions(widths="two"))
