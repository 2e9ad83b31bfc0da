"""Local training, the statistics of batch norms, and the attacker's copies of a defence."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.privacy import Local, Message, Search, defence_of, guessed_targets, reconstruct
from lineament.privacy.defences import Chain, Prune
from lineament.privacy.leakage import LeakageOptions, leakage
from lineament.privacy.local import local_of
from lineament.privacy.messages import dummy_gradient, fixed
from lineament.privacy.statistics import statistics_gap

LIMITS = (torch.zeros(1), torch.ones(1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 5)).eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(
        [0, 0, 1, 3, 3, 3]
    )


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    ).train()  # fmt: skip


def trained(net: nn.Module, x: torch.Tensor, y: torch.Tensor, local: Local) -> nn.Module:
    """The same local training by torch's own optimizers."""
    twin = copy.deepcopy(net)
    kinds = {
        "sgd": lambda p: torch.optim.SGD(
            p, local.rate, momentum=local.momentum, weight_decay=local.weight_decay
        ),
        "adam": lambda p: torch.optim.Adam(p, local.rate, weight_decay=local.weight_decay),
    }
    optimizer = kinds[local.optimizer](twin.parameters())
    for rows in local.minibatches(len(x)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x[rows]), y[rows]).backward()
        optimizer.step()
    return twin


@pytest.mark.parametrize(
    "local",
    [
        Local(2, 0.1, batch_size=4),
        Local(2, 0.1, batch_size=4, momentum=0.9, weight_decay=0.01),
        Local(2, 0.01, batch_size=3, optimizer="adam", weight_decay=0.01),
        Local(3, 0.1, batch_size=2, order="known", seed=3),
    ],
    ids=str,
)
def test_local_training_is_that_of_torch(net, batch, local):
    net, x, y = net.double(), batch[0].double(), batch[1]
    twin = trained(net, x, y, local)
    for sent, before, after in zip(
        Message.of(net, x, y, local=local).tensors, net.parameters(), twin.parameters()
    ):
        assert torch.allclose(sent, before - after, atol=1e-9)


def test_an_unknown_order_is_not_the_attackers():
    hidden, known = (Local(2, 0.1, batch_size=2, order=order) for order in ("unknown", "known"))
    assert [r.tolist() for r in hidden.minibatches(6)] == [r.tolist() for r in known.minibatches(6)]
    assert known.guessed() == known and hidden.guessed().order == "given"
    assert [r.tolist() for r in hidden.guessed().minibatches(4)] == [[0, 1], [2, 3]] * 2
    assert sorted(torch.cat(known.minibatches(6)[:3]).tolist()) == list(range(6))
    assert hidden.minibatches(6)[0].tolist() != [0, 1] or hidden.minibatches(6)[3].tolist() != [0, 1]


@pytest.mark.parametrize(
    "local", [Local(rate=1e-3), Local(2, 1e-4, momentum=0.9, weight_decay=1e-2)], ids=str
)
def test_labels_are_read_off_a_change_of_weights_as_off_a_gradient(net, batch, local):
    x, y = batch
    public = torch.rand(200, 1, 8, 8)
    for message in (Message.of(net, x, y), Message.of(net, x, y, local=local)):
        found, rule = guessed_targets(net, message, x[:1], public)
        assert (found.tolist(), rule) == (y.tolist(), "counts")
    plain = Message.of(net, x, y).tensors
    read = Message.of(net, x, y, local=local).gradient(net)
    assert all(torch.allclose(a, b, atol=0.02 * float(a.abs().max())) for a, b in zip(plain, read))


def test_adam_sends_signs_from_which_counts_cannot_be_read(net, batch):
    x, y = batch
    message = Message.of(net, x[:1], y[:1], local=Local(rate=1e-3, optimizer="adam"))
    assert guessed_targets(net, message, x[:1], batch[0])[1] == "bias"
    compute = dummy_gradient(net, y[None, :1], local=message.local)
    guess = torch.rand(1, 1, 1, 8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(
        sum((g[0] * t).sum() for g, t in zip(compute(guess), message.tensors)), guess
    )
    assert bool(slope.isfinite().all()) and float(slope.abs().max()) > 0


def test_buffers_of_one_step_give_the_batchs_statistics_and_those_of_two_do_not(batch, tmp_path):
    x, y = batch
    net = normed()
    for epochs in (1, 2):
        twin = trained(net, x, y, Local(epochs, 0.1))
        np.savez(tmp_path / "after.npz", *[v.detach().numpy() for v in twin.state_dict().values()])
        read = Message.read(net, tmp_path / "after.npz", count=6, local=Local(epochs, 0.1))
        made = Message.of(net, x, y, local=Local(epochs, 0.1))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(read.tensors, made.tensors))
        assert sorted(read.statistics) == sorted(made.statistics) == (["1", "4"] if epochs == 1 else [])
        for name, pair in made.statistics.items():
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(read.statistics[name], pair))
    with pytest.raises(InputError, match=r"buffers of the batch norm '1' moved"):
        Message.read(net.eval(), tmp_path / "after.npz", count=6)


def test_the_statistics_are_matched_where_they_were_sent_and_lead_nearer(batch):
    x, y = batch[0][:2], batch[1][2:4]
    net = normed()
    message = Message.of(net, x, y, defence=defence_of("noise=0.3"))
    sent = {name: (mean[None], variance[None]) for name, (mean, variance) in message.statistics.items()}
    gap = statistics_gap(*fixed(net), sent)
    assert float(gap(x[None])) < 1e-4 < 1e-1 < float(gap(torch.rand_like(x)[None]))
    many = statistics_gap(
        *fixed(net), {n: (torch.cat([m, m]), torch.cat([v, v])) for n, (m, v) in sent.items()}
    )
    assert torch.allclose(
        many(torch.stack([x, x.flip(3)])), torch.cat([gap(x[None]), gap(x.flip(3)[None])]), atol=1e-5
    )

    def gap_found(weight: float) -> float:
        how = Search(steps=30, restarts=1, statistics=weight)
        found = reconstruct(net, [message], y[None], (1, 8, 8), attack="ig", search=how, bounds=LIMITS)
        return float(gap(found.pictures))

    assert gap_found(0.1) < 0.5 * gap_found(0.0)


def test_masks_are_also_mirrored_off_the_message(net, batch):
    assert Prune(90.0).copies() == {"": Prune(90.0), "zeros of the message": Prune(90.0, by="message")}
    both = defence_of("clip=1,prune=90").copies()
    assert list(both) == ["", "zeros of the message"] and all(isinstance(one, Chain) for one in both.values())
    x, y = batch
    found = leakage(
        net, x[:2], y[:2], public=x[2:], prior=None, options=LeakageOptions([defence_of("prune=90")], ["ig"], Search(steps=4, restarts=1)), bounds=LIMITS
    )  # fmt: skip
    assert [a.attack for a in found.attacked] == ["ig", "ig, zeros of the message"]
    assert not torch.equal(found.attacked[0].pictures, found.attacked[1].pictures)
    assert found.attacked[0].wrong is not None and found.attacked[0].wrong.shape == (2,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch=2", "epochs"),
        ("epochs=x", "whole number"),
        ("epochs", "NAME=VALUE"),
        ("momentum=0.9,optimizer=adam", "momentum"),
        ("order=random", "unknown"),
        ("rate=0", "rate"),
    ],
)
def test_local_training_that_cannot_be_is_named(text, says):
    with pytest.raises(InputError, match=says):
        local_of(text)
