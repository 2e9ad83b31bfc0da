"""GIFD's rivals: presets of the same search, an evolution strategy, generators of one's own, restarts as a group, the closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.privacy import Decoder, Local, Message, Search, reconstruct
from lineament.privacy.constraints import rate
from lineament.privacy.costs import chosen_tensors, matching_cost
from lineament.privacy.defences import defence_of
from lineament.privacy.evolution import evolve
from lineament.privacy.inversion import Stage, invert
from lineament.privacy.leakage import LeakageOptions, leakage
from lineament.privacy.messages import dummy_gradient
from lineament.privacy.rivals import group_term, own_generators

LIMITS = (torch.zeros(1), torch.ones(1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(384, 5))


@pytest.fixture
def prior() -> Decoder:
    torch.manual_seed(3)
    made = nn.Sequential(
        nn.Sequential(nn.Linear(4, 32), nn.Unflatten(1, (2, 4, 4)), nn.Tanh()), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3, padding=1)
    )  # fmt: skip
    return Decoder(made, 4, torch.sigmoid)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3])


def searched(net, prior, batch, attack, **how):
    x, y = batch
    told = [Message.of(net, x[k : k + 1], y[k : k + 1]) for k in range(2)]
    return reconstruct(
        net, told, y[:, None], (1, 8, 8), prior=prior, attack=attack, search=Search(**{"steps": 20, "restarts": 2, **how}), bounds=LIMITS
    )  # fmt: skip


@pytest.mark.parametrize(
    "attack", ["gias", "gi", "idlg", "dlg", "latent", "no ball", "no regulariser", "one layer"]
)
def test_every_rival_finds_something_and_the_same_again(net, prior, batch, attack):
    state = {k: v.clone() for k, v in (*net.state_dict().items(), *prior.generator.state_dict().items())}
    found, again = (searched(net, prior, batch, attack) for _ in range(2))
    assert torch.equal(found.pictures, again.pictures) and found.pictures.shape == (2, 1, 1, 8, 8)
    short = searched(net, prior, batch, attack, steps=1)
    assert bool((found.scores < short.scores).all())
    assert all(
        torch.equal(v, state[k])
        for k, v in (*net.state_dict().items(), *prior.generator.state_dict().items())
    )


def test_one_layer_is_searched_behind_the_code_and_no_other(net, prior, batch):
    x, y = batch
    told = [Message.of(net, x[:1], y[:1])]
    how = {"rate": 0.1, "variation": 0.0, "radius": None, "restarts": 1, "patience": None}
    found = reconstruct(
        net, told, y[:1, None], (1, 8, 8), prior=prior, attack="one layer", search=Search(steps=10, layer=2, **how), bounds=LIMITS
    )  # fmt: skip
    assert found.stage_scores.shape == (1, 2) and found.steps == 30  # (1 + 2 layers) of 10, in two halves
    compute = dummy_gradient(net, y[:1, None])
    start = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    stages = [Stage(15, 0.1), Stage(15, 0.03, layer=2)]
    plain = invert(
        lambda z: prior.blocks(z, None), prior.render, lambda v: [g[0] for g in compute(v[None])],
        lambda g: matching_cost(g, told[0].tensors), start, stages, bounds=LIMITS,
    )  # fmt: skip
    assert plain.variables[1].shape == (1, 2, 8, 8)  # the last block's input
    assert torch.allclose(found.stage_scores[0], torch.tensor(plain.scores), atol=1e-6)
    for layer in (0, 3):
        with pytest.raises(InputError, match="layer"):
            searched(net, prior, batch, "one layer", layer=layer)


def test_without_regularisers_the_trace_is_the_matching_cost(net, prior, batch):
    with_it, without = (
        searched(net, prior, batch, attack, variation=0.5, radius=None, steps=3) for attack in ("no ball", "no regulariser")
    )  # fmt: skip
    plain = searched(net, prior, batch, "gifd", variation=0.0, radius=None, steps=3)
    assert torch.equal(without.trace[0], plain.trace[0]) and float(with_it.trace[0][0]) > float(
        without.trace[0][0]
    )


def test_weights_of_ones_own_go_where_no_code_leads(net, prior, batch):
    latent = searched(net, prior, batch, "latent", steps=60, cost="l2")
    gias = searched(net, prior, batch, "gias", steps=60, cost="l2", weight_rate=0.02)
    assert bool((gias.scores < 0.5 * latent.scores).all())
    assert gias.steps == latent.steps  # half on the code, half on the weights
    with pytest.raises(InputError, match="expected a Decoder"):
        own_generators(object(), torch.zeros(1, 4))  # pyright: ignore[reportArgumentType]


def test_an_evolution_strategy_needs_no_slopes(net, prior, batch):
    pytest.importorskip("cma")
    best, trace = evolve(lambda z: (z - 1).square().sum(1).round(decimals=3), torch.zeros(3), rounds=60)
    assert torch.allclose(best, torch.ones(3), atol=0.1) and trace == sorted(trace, reverse=True)
    assert torch.equal(
        best, evolve(lambda z: (z - 1).square().sum(1).round(decimals=3), torch.zeros(3), rounds=60)[0]
    )
    found = searched(net, prior, batch, "ggl", restarts=1, divergence=0.0)
    first = searched(net, prior, batch, "ggl", restarts=1, divergence=0.0, steps=1)
    assert found.pictures.shape == (2, 1, 1, 8, 8) and bool((found.scores < first.scores).all())
    with pytest.raises(InputError, match="finite objective"):
        evolve(lambda z: z.sum(1) * torch.nan, torch.zeros(2), rounds=1)


def test_where_the_evolution_strategy_is_missing_the_remedy_is_named(net, prior, batch, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    with pytest.raises(InputError, match=r"lineament\[privacy\]"):
        searched(net, prior, batch, "ggl")


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lbfgs"])
def test_each_optimizer_finds_the_lowest_point_of_a_bowl(optimizer):
    rate = {"adam": 0.2, "sgd": 0.05, "lbfgs": 1.0}[optimizer]
    wanted = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(4))
    weight = torch.tensor([1.0, 3.0, 5.0, 8.0]).view(1, 1, 2, 2)
    found = invert(
        lambda z: [lambda v: v.view(1, 1, 2, 2)], lambda x: x, lambda x: [x], lambda g: (weight * (g[0] - wanted).square()).sum()[None],
        torch.zeros(1, 4), [Stage(60, rate, sphere=False, optimizer=optimizer)], bounds=LIMITS,
    )  # fmt: skip
    assert torch.allclose(found.best, wanted, atol=0.03) and len(found.objective) >= 60


def test_line_searches_keep_rows_apart(net, batch):
    together = searched(net, None, batch, "idlg", optimizer="lbfgs", restarts=1)
    x, y = batch
    one = reconstruct(
        net, [Message.of(net, x[:1], y[:1])], y[None, :1], (1, 8, 8), attack="idlg", search=Search(steps=20, restarts=1, optimizer="lbfgs"), bounds=LIMITS
    )  # fmt: skip
    assert torch.allclose(together.pictures[0], one.pictures[0])
    adam = searched(net, None, batch, "idlg", restarts=1)
    assert bool((together.scores < adam.scores).all())  # what it was chosen for, of a smooth network


def test_labels_are_searched_beside_pixels_as_in_the_published_loop(net, batch):
    """Zhu et al. 2019, algorithm 1, written plainly: a dummy picture and dummy label logits, squared distance of gradients, one optimizer for both."""
    x, y = (t.double() if t.is_floating_point() else t for t in batch)
    net = net.double()
    search, wrong = Search(steps=12, restarts=1, rate=0.05), torch.tensor([[4], [4]])
    told = [Message.of(net, x[k : k + 1], y[k : k + 1]) for k in range(2)]
    found = reconstruct(net, told, wrong, (1, 8, 8), attack="dlg", search=search, bounds=LIMITS, seed=7)
    start = torch.randn(2, 1, 64 + 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    totals = torch.zeros(12, dtype=torch.float64)
    for k, message in enumerate(told):
        dummy = (0.1 * start[k, :, :64]).view(1, 1, 8, 8).requires_grad_()
        logits = start[k, :, 64:].clone().requires_grad_()
        optimizer = torch.optim.Adam([dummy, logits])
        for step in range(12):
            optimizer.param_groups[0]["lr"] = rate(step / 12, 0.05)
            loss = -(logits.softmax(1) * net(dummy).log_softmax(1)).sum(1).mean()
            grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
            apart = sum(((a - b) ** 2).sum() for a, b in zip(grads, message.tensors)) / len(grads)
            totals[step] += apart.detach()
            dummy.grad, logits.grad = torch.autograd.grad(apart, [dummy, logits])
            optimizer.step()
        assert int(logits.argmax()) == int(found.targets[k])
    assert torch.allclose(found.trace[0], totals, rtol=1e-9)


def test_joint_labels_end_at_the_true_ones_of_a_smooth_network(net, batch):
    x, y = (t.double() if t.is_floating_point() else t for t in batch)
    net = net.double()
    told = [Message.of(net, x[k : k + 1], y[k : k + 1]) for k in range(2)]
    search = Search(steps=150, restarts=2, optimizer="lbfgs")
    found = reconstruct(
        net, told, (y[:, None] + 1) % 5, (1, 8, 8), attack="dlg", search=search, bounds=LIMITS
    )
    assert found.targets.tolist() == y[:, None].tolist()
    assert float((found.pictures[:, 0] - x).abs().max()) < 0.05
    given = leakage(
        net, x, y, public=torch.rand(8, 1, 8, 8).double(), prior=None, options=LeakageOptions(attacks=["dlg", "idlg"], search=Search(steps=2, restarts=1)), bounds=LIMITS
    )  # fmt: skip
    assert [a.rule for a in given.attacked] == ["searched with the picture", "bias"]


def test_restarts_are_held_together_from_a_step_on():
    term = group_term(2, 40, side=2)
    x = torch.tensor([0.0, 2.0, 5.0, 5.0]).view(4, 1, 1, 1, 1)
    assert [float(term(x, step)) for step in (0, 9)] == [0.0, 0.0]
    assert float(term(x, 10)) == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert float(term(x + 1, 11)) == pytest.approx((0 + 2 + 1 + 1) / 4)  # from the mean as it was
    assert float(term(x + 1, 12)) == pytest.approx(0.5)  # renewed every second step


def test_the_closed_form_is_an_attack_of_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Sigmoid(), nn.Linear(5, 3))
    x = torch.rand(2, 1, 8, 8)
    for local in (None, Local(rate=0.01, weight_decay=0.1)):
        told = [Message.of(net, x[k : k + 1], torch.tensor([k]), local=local) for k in range(2)]
        found = reconstruct(
            net, told, torch.tensor([[0], [1]]), (1, 8, 8), attack="closed form", bounds=LIMITS
        )
        assert torch.allclose(found.pictures[:, 0], x, atol=1e-3) and found.steps == 0
        assert float(found.scores.max()) < 1e-4
    with pytest.raises(InputError, match="linear first layer"):
        reconstruct(
            net, [Message.of(net, x, torch.tensor([0, 1]))], torch.tensor([[0, 1]]), (1, 8, 8), attack="closed form", bounds=LIMITS
        )  # fmt: skip


def test_a_prior_of_another_size_is_refused(net, prior, batch):
    with pytest.raises(InputError, match=r"pictures \(1, 8, 8\), the audited ones are \(1, 12, 12\)"):
        x, y = torch.rand(1, 1, 12, 12), batch[1][:1]
        wide = nn.Sequential(nn.Flatten(), nn.Linear(144, 5))
        reconstruct(wide, [Message.of(wide, x, y)], y[None], (1, 12, 12), prior=prior, bounds=LIMITS)


def test_costs_look_at_the_tensors_and_weights_that_are_chosen(net, prior, batch):
    x, y = batch
    told = [Message.of(net, x[k : k + 1], y[k : k + 1]) for k in range(2)]
    sent = told[0].tensors
    kept = {"all": [0, 1, 2, 3], "first 2": [0, 1], "last 1": [3], "topk 1": [int(torch.stack([t.norm() for t in sent]).argmax())]}  # fmt: skip
    for tensors, places in kept.items():
        for weights in ("equal", "linear", "exp"):
            how = Search(steps=3, restarts=1, cost="l2", tensors=tensors, weights=weights)
            found = reconstruct(net, told, y[:, None], (1, 8, 8), prior=prior, search=how, bounds=LIMITS)
            again = Message.of(net, found.pictures[0], found.targets[0]).tensors
            wanted = matching_cost(again, sent, "l2", weights=weights, tensors=places)  # pyright: ignore[reportArgumentType]
            assert float(found.scores[0]) == pytest.approx(float(wanted), rel=1e-3)
    assert len(chosen_tensors(sent, "random", 2)) == 2 and chosen_tensors(sent, "random", 2, seed=1) == chosen_tensors(sent, "random", 2, seed=1)  # fmt: skip
    for wrong in ("topk", "all 3", "first x", "best 3"):
        with pytest.raises(InputError, match="tensors"):
            Search(tensors=wrong)


def test_radii_are_those_of_the_layers_themselves(net, prior, batch):
    free = searched(net, prior, batch, "gifd", radii=(1e6,), feature_rate=0.1)
    none = searched(net, prior, batch, "no ball", radii=(1e-6,), feature_rate=0.1)
    assert torch.allclose(free.pictures, none.pictures, atol=1e-5)
    per_entry = searched(net, prior, batch, "gifd", radius=0.5 / 32, layers=1)
    absolute = searched(net, prior, batch, "gifd", radii=(0.5,), layers=1)
    assert torch.allclose(per_entry.pictures, absolute.pictures)
    with pytest.raises(InputError, match="radii"):
        Search(radii=(0.0,))


@pytest.mark.parametrize("attack", ["gifd", "ig", "gias"])
def test_pictures_that_are_differentiated_in_chunks_are_found_all_the_same(net, prior, attack):
    net, x, y = net.double(), torch.rand(5, 1, 8, 8).double(), torch.tensor([0, 3, 3, 1, 2])
    prior.generator.double()
    told = [Message.of(net, x, y, defence=defence_of(text)) for text in ("prune=50", "prune=50")]
    found = [
        reconstruct(
            net, told, torch.stack([y, y]), (1, 8, 8), prior=prior, attack=attack, search=Search(steps=8, restarts=1, chunk=chunk), bounds=LIMITS
        )
        for chunk in (None, 2)
    ]  # fmt: skip
    assert torch.allclose(found[0].pictures, found[1].pictures, atol=1e-8)
    assert torch.allclose(found[0].scores, found[1].scores, atol=1e-10)


def test_chunks_are_refused_where_pictures_meet(net, batch):
    x, y = batch
    for told, attack, says in (
        (Message.of(net, x, y, local=Local(rate=0.1)), "ig", "local steps"),
        (Message.of(net, x, y), "dlg", "labels are searched"),
    ):
        with pytest.raises(InputError, match=says):
            reconstruct(net, [told], y[None], (1, 8, 8), attack=attack, search=Search(chunk=1), bounds=LIMITS)
    mixed = nn.Sequential(nn.BatchNorm2d(1), *net).train()
    with pytest.raises(InputError, match="pictures meet in the batch norm '0'"):
        reconstruct(
            mixed,
            [Message.of(mixed, x, y)],
            y[None],
            (1, 8, 8),
            attack="ig",
            search=Search(chunk=1),
            bounds=LIMITS,
        )
