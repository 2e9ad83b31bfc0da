"""Messages, defences, labels, priors and the search, by the oracles of the specification."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lineament.core.checks import InputError
from lineament.privacy import Decoder, Local, Message, Search, defence_of, invert, reconstruct, train_prior
from lineament.privacy.constraints import l1_projection, rate
from lineament.privacy.costs import matching_cost
from lineament.privacy.defences import Aggregate, Clip, Defence, Noise, Private, Prune
from lineament.privacy.inversion import Stage
from lineament.privacy.labels import guessed_targets, inferred_labels
from lineament.privacy.leakage import LeakageOptions, leakage, psnr
from lineament.privacy.messages import dummy_gradient
from lineament.privacy.rivals import closed_form

LIMITS = (torch.zeros(1), torch.ones(1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()  # fmt: skip


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 4])


@pytest.fixture
def prior() -> Decoder:
    torch.manual_seed(3)
    made = nn.Sequential(
        nn.Sequential(nn.Linear(6, 32), nn.Unflatten(1, (2, 4, 4)), nn.Tanh()), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3, padding=1)
    )  # fmt: skip
    return Decoder(made, 6, torch.sigmoid)


def test_a_message_is_the_gradient_of_the_mean_loss_and_leaves_the_model_alone(net, batch):
    x, y = batch
    before = {k: v.clone() for k, v in net.state_dict().items()}
    told = Message.of(net, x, y)
    loss = nn.functional.cross_entropy(net(x), y)
    for mine, plain in zip(told.tensors, torch.autograd.grad(loss, list(net.parameters()))):
        assert torch.allclose(mine, plain, atol=1e-6)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_local_steps_are_unrolled(net, batch):
    x, y = batch
    told = Message.of(net, x, y, local=Local(epochs=3, rate=0.1))
    twin = pickle.loads(pickle.dumps(net))
    descent = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        descent.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        descent.step()
    for sent, before, after in zip(told.tensors, net.parameters(), twin.parameters()):
        assert torch.allclose(sent, before - after, atol=1e-6)


def test_batch_norm_in_training_mode_uses_the_batch_and_says_what_its_buffers_give_away():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2)
    ).train()
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    told = Message.of(net, x, y)
    twin = pickle.loads(pickle.dumps(net))
    loss = nn.functional.cross_entropy(twin(x), y)
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(told.tensors, torch.autograd.grad(loss, list(twin.parameters())))
    )
    assert int(net[1].num_batches_tracked) == 0
    inside = net[0](x)
    mean, variance = told.statistics["1"]
    assert torch.allclose(mean, inside.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance, inside.var((0, 2, 3)), atol=1e-5)


def test_saved_updates_are_read(net, batch, tmp_path):
    x, y = batch
    told = Message.of(net, x, y, local=Local(rate=0.5))
    after = {k: v - d for (k, v), d in zip(net.state_dict().items(), told.tensors)}
    save_file(after, tmp_path / "after.safetensors")
    np.savez(tmp_path / "after.npz", *[v.numpy() for v in after.values()])
    for name in ("after.safetensors", "after.npz"):
        read = Message.read(net, tmp_path / name, count=3)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(read.tensors, told.tensors))
    save_file(dict(net.state_dict()), tmp_path / "same.safetensors")
    with pytest.raises(InputError, match="same weights as before"):
        Message.read(net, tmp_path / "same.safetensors", count=3)
    np.savez(tmp_path / "fewer.npz", np.zeros(2))
    with pytest.raises(InputError, match="1 arrays, expected 6"):
        Message.read(net, tmp_path / "fewer.npz", count=3)


def test_dummy_gradients_of_rows_are_those_of_each_row(net, batch):
    x, y = batch
    rows = dummy_gradient(net, y[:, None])(x[:, None])
    for k in range(3):
        one = Message.of(net, x[k : k + 1], y[k : k + 1]).tensors
        assert all(torch.allclose(r[k], t, atol=1e-6) for r, t in zip(rows, one))


@pytest.mark.parametrize(
    "text",
    [
        "clip=0.5",
        "prune=90",
        "noise=0.1",
        "private=1:0.5",
        "gaussian=1",
        "truncate=10:0.01",
        "bits=8",
        "soteria=50",
        "clip=1,prune=50",
    ],
)
def test_every_defence_gives_a_message_that_can_be_searched(net, batch, text):
    x, y = batch
    defence = defence_of(text)
    told = Message.of(net, x[:1], y[:1], defence=defence)
    guess = [g.requires_grad_() for g in Message.of(net, x[1:2], y[1:2]).tensors]
    mirrored = defence.mirror(guess, told.tensors)
    assert [m.shape for m in mirrored] == [p.shape for p in net.parameters()]
    slopes = torch.autograd.grad(matching_cost(mirrored, told.tensors), guess)
    assert all(s.isfinite().all() for s in slopes)
    assert torch.equal(told.tensors[0], Message.of(net, x[:1], y[:1], defence=defence).tensors[0])


@pytest.mark.parametrize("defence", [Prune(50.0), Clip(0.1)])
def test_on_the_true_batch_the_mirror_is_the_defence(net, batch, defence):
    x, y = batch
    told = Message.of(net, x, y, defence=defence)
    plain = Message.of(net, x, y)
    for a, b in zip(defence.mirror(plain.tensors, told.tensors), told.tensors):
        assert torch.allclose(a, b, atol=1e-7)


def test_clipping_is_invisible_to_the_cosine(net, batch):
    x, y = batch
    sent = Message.of(net, x[:1], y[:1]).tensors
    guess = Message.of(net, x[1:2], y[1:2]).tensors
    with_clip, without = (matching_cost(d.mirror(guess, sent), sent) for d in (Clip(0.01), Defence()))
    assert torch.allclose(with_clip, without, atol=1e-6)


def test_private_clips_each_picture_and_aggregation_takes_the_mean(net, batch):
    x, y = batch
    told = Message.of(net, x, y, defence=Private(0.1, 0.0)).tensors
    each = [Message.of(net, x[k : k + 1], y[k : k + 1]).tensors for k in range(3)]
    norms = [sum(float(t.square().sum()) for t in one) ** 0.5 for one in each]
    wanted = sum(one[0] * min(1, 0.1 / (n + 1e-6)) for one, n in zip(each, norms)) / 3
    assert torch.allclose(told[0], wanted, atol=1e-6)
    shared = Message.of(net, x[:1], y[:1], defence=Aggregate([each[1], each[2]])).tensors
    assert torch.allclose(shared[0], (each[0][0] + each[1][0] + each[2][0]) / 3, atol=1e-6)


def test_secure_aggregation_sends_the_mean_of_clients(net, batch):
    x, y = batch
    defence = defence_of("secagg=3")
    found = Message.of(net, x[:1], y[:1], defence=defence, others=(x[1:], y[1:])).tensors
    each = [Message.of(net, x[k : k + 1], y[k : k + 1]).tensors for k in range(3)]
    for k, own in enumerate(found):
        assert torch.allclose(own, (each[0][k] + each[1][k] + each[2][k]) / 3, atol=1e-6)
    assert str(defence) == "secagg 3" and torch.allclose(defence.mirror(each[0], found)[0] * 3, each[0][0])
    # More clients than pictures: they have some of them again, and the message is the same again.
    many = [Message.of(net, x[:2], y[:2], defence=defence_of("secagg=4"), others=(x[1:], y[1:]), seed=s).tensors[0] for s in (0, 0, 1)]  # fmt: skip
    assert torch.equal(many[0], many[1]) and not torch.equal(many[0], many[2])
    for how, says in (
        ({}, "others: secure aggregation"),
        ({"others": (x[:0], y[:0])}, "others: got 0 pictures"),
    ):
        with pytest.raises(InputError, match=says):
            Message.of(net, x[:1], y[:1], defence=defence, **how)
    for text in ("secagg=1", "secagg=2.5"):
        with pytest.raises(InputError, match="defence: in 'secagg"):
            defence_of(text)


def test_labels_by_counts_repeat_as_they_should(net):
    x = torch.rand(8, 1, 8, 8)
    y = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3])
    public = torch.rand(200, 1, 8, 8)
    found, rule = guessed_targets(net, Message.of(net, x, y), x[:1], public)
    assert (found.tolist(), rule) == (y.tolist(), "counts")


def test_a_linear_first_layer_gives_the_picture_itself():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    x = torch.rand(1, 1, 8, 8)
    assert torch.allclose(closed_form(net, Message.of(net, x, torch.tensor([3]))), x.flatten(), atol=1e-4)
    assert closed_form(net, Message.of(net, x.repeat(2, 1, 1, 1), torch.tensor([3, 1]))) is None


def test_rows_are_searched_as_if_alone(net, batch, prior):
    x, y = batch
    told = [Message.of(net, x[k : k + 1], y[k : k + 1]) for k in range(3)]
    how = Search(steps=6, restarts=1, patience=None)
    together = reconstruct(net, told, y[:, None], (1, 8, 8), prior=prior, search=how, bounds=LIMITS)
    start = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    compute = dummy_gradient(net, y[1:2, None])
    alone = invert(
        lambda z: prior.blocks(z, None), prior.render, lambda v: compute(v[None]),
        lambda g: matching_cost([t[0] for t in g], told[1].tensors)[None], start[1:2],
        [Stage(6, 0.1), Stage(6, 0.03, 0.04 * 32), Stage(6, 0.03, 0.04 * 128)], bounds=LIMITS, variation=1e-3,
    )  # fmt: skip
    assert torch.allclose(together.pictures[1], alone.best, atol=1e-4)
    assert torch.allclose(together.scores[1], alone.score[0], atol=1e-5)


def test_no_layers_is_the_code_alone_and_more_layers_never_score_worse(net, batch, prior):
    x, y = batch
    told = [Message.of(net, x[:1], y[:1])]

    def found(layers: int):
        how = Search(steps=8, restarts=1, layers=layers, patience=None)
        return reconstruct(net, told, y[None, :1], (1, 8, 8), prior=prior, search=how, bounds=LIMITS)

    scores = [float(found(k).scores) for k in range(3)]
    assert scores == sorted(scores, reverse=True)
    latent = reconstruct(
        net, told, y[None, :1], (1, 8, 8), prior=prior, attack="latent", search=Search(steps=8, restarts=1, layers=0), bounds=LIMITS
    )  # fmt: skip
    assert torch.equal(latent.pictures, found(0).pictures)


def test_both_ways_to_differentiate_agree(net, batch):
    """Double backward against the derivative of <w, g> in the direction of the matching cost's own gradient."""
    net = net.double()
    x, y = batch[0].double(), batch[1]
    sent = Message.of(net, x[:1], y[:1]).tensors
    compute = dummy_gradient(net, y[None, :1])
    guess = x[1:2].clone().requires_grad_()
    found = compute(guess[None])
    straight = torch.autograd.grad(matching_cost([g[0] for g in found], sent), guess)[0]
    leaves = [g[0].detach().requires_grad_() for g in found]
    w = torch.autograd.grad(matching_cost(leaves, sent), leaves)
    again = compute(guess[None])
    other = torch.autograd.grad(sum((g[0] * d).sum() for g, d in zip(again, w)), guess)[0]
    assert torch.allclose(straight, other, atol=1e-12)


def test_schedule_and_ball():
    assert (rate(0.0, 2.0), rate(0.25, 2.0), rate(1.0, 2.0)) == (0.0, 2.0, 0.0)
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))
    y = l1_projection(x, 3.0)
    assert (y.abs().sum(1) <= 3.0 * (1 + 1e-5)).all() and torch.allclose(l1_projection(y, 3.0), y, atol=1e-6)
    assert torch.equal(l1_projection(x, 1e6), x) and (y * x >= 0).all()
    assert torch.equal(l1_projection(torch.zeros(1, 4), 1.0), torch.zeros(1, 4))


def test_long_rows_are_projected_as_sorting_would():
    x = torch.randn(3, 70_000, generator=torch.Generator().manual_seed(2)).double()
    x[2] *= 1e-6  # inside the ball already
    warm = torch.zeros(3, dtype=torch.float64)
    for moved in (
        x,
        x + 1e-3 * x.roll(1, 1),
        0.2 * x,
    ):  # from nothing, from a near tau, from one beyond most entries
        size = moved.abs().sort(1, descending=True).values
        place = torch.arange(1, 70_001)
        last = (place * size > size.cumsum(1) - 900.0).sum(1, keepdim=True) - 1
        tau = ((size.cumsum(1).gather(1, last) - 900.0) / (last + 1)).clamp(min=0)
        wanted = moved.sign() * (moved.abs() - tau).clamp(min=0)
        assert torch.allclose(l1_projection(moved, 900.0, warm=warm), wanted, atol=1e-9)
        assert torch.allclose(warm, tau[:, 0], atol=1e-9)
        assert torch.allclose(l1_projection(moved.float(), 900.0).double(), wanted, atol=1e-6)
    assert torch.equal(l1_projection(x, 900.0)[2], x[2])
    assert bool(l1_projection(x.where(x != x[0, 0], torch.nan), 900.0)[0].isnan().any())


@pytest.mark.parametrize("kind", ["vae", "dcgan"])
def test_priors_are_reproducible_and_stay_in_range(kind):
    x = torch.rand(24, 1, 8, 8)
    state = torch.get_rng_state()
    made = [train_prior(x, kind=kind, steps=3, width=8, code=4, seed=5) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    code = torch.randn(2, 4)
    pictures = [p.render(p.generator(code)) for p in made]
    assert torch.equal(*pictures) and pictures[0].shape == (2, 1, 8, 8)
    assert float(pictures[0].min()) >= float(x.min()) and float(pictures[0].max()) <= float(x.max())


def test_what_is_found_is_scored_beside_what_is_known_without_the_message(net, batch, prior):
    x, y = batch
    public = torch.rand(10, 1, 8, 8)
    found = leakage(
        net, x, y, public=public, prior=prior, options=LeakageOptions([Defence(), Noise(0.1)], ["latent"], Search(steps=2, restarts=2)), bounds=LIMITS
    )  # fmt: skip
    assert [a.defence for a in found.attacked] == ["nothing", "noise 0.1"]
    assert set(found.without) == {"the mean of public pictures", "the nearest of 2 samples of the prior"}
    best = max(found.without.values(), key=lambda v: float(v.mean()))
    assert found.guess is not None and torch.allclose(psnr(found.guess, found.truth), best)
    alone = leakage(net, x, y, public=public, prior=prior, options=LeakageOptions(attacks=["latent"], search=Search(steps=1, restarts=1)), bounds=LIMITS)  # fmt: skip
    assert set(alone.without) == {"the mean of public pictures", "a sample of the prior"}
    plain, noisy = found.prices
    assert plain.cosine == pytest.approx(1, abs=1e-5) and plain.progress == pytest.approx(1, abs=1e-4)
    assert noisy.cosine < 0.9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n, x, y, p: Message.of(n, x, torch.tensor([0, 1, 9])), "9"),
        (lambda n, x, y, p: Message.of(n, x[:0], y[:0]), "got none"),
        (lambda n, x, y, p: Message.of(n.append(nn.Dropout()).train(), x, y), "dropout"),
        (lambda n, x, y, p: Message.of(n, x * torch.nan, y), "not finite"),
        (lambda n, x, y, p: leakage(n, x, y, public=torch.cat([x[1:2], x[:1] + 1]), prior=p, bounds=LIMITS), "audited pictures"),
        (lambda n, x, y, p: _search(n, x, y, p, layers=7), "got 7, but this prior has 2"),
        (lambda n, x, y, p: _search(n, x, y, p, radius=0.0), "radius"),
        (lambda n, x, y, p: _search(n, x, y, p, cost="cosine"), "cost"),
        (lambda n, x, y, p: Decoder(nn.Linear(2, 2), 2), "nn.Sequential"),
        (lambda n, x, y, p: defence_of("clap=3"), "clip"),
        (lambda n, x, y, p: defence_of("clip=x"), "numbers after the ="),
        (lambda n, x, y, p: Clip(0.0), "bound"),
        (lambda n, x, y, p: Message.of(n, (255 * x).byte(), y), "model: Sequential does not take images .* uint8"),
        (lambda n, x, y, p: Message.of(n, x.numpy(), y), "expected a torch.Tensor"),
        (lambda n, x, y, p: Search(radius=0), "radius=None"),
        (lambda n, x, y, p: _search(n, x, y, None), "'gifd' searches a generator"),
        (lambda n, x, y, p: _search(n, x, y, p.generator), "Decoder"),
        (lambda n, x, y, p: _search(n, x, y, Decoder(p.generator, 7)), "codes of 7 numbers"),
        (lambda n, x, y, p: _search(n, x, y, p, limits=LIMITS[::-1]), "first below the second"),
        (lambda n, x, y, p: train_prior(x[:0]), "images"),
        (lambda n, x, y, p: inferred_labels(torch.zeros(2, 3), 4), "each but once"),
        (lambda n, x, y, p: _search(n, x, y + 9, p), "got label 9"),
        (lambda n, x, y, p: _search(n, x, y, p, shape=(1, 6, 6)), r"no pictures \(1, 6, 6\)"),
        (lambda n, x, y, p: _search(n, x, y, p, limits=(torch.zeros(3), torch.ones(3))), "3 and 3 values"),
        (lambda n, x, y, p: _search(n.double(), x.double(), y, p, told=Message.of(n.float(), x[:1], y[:1]), after=n.double), "float32.*float64"),
        (lambda n, x, y, p: _search(n, x, y, p, rate=1e30, attack="dlg"), "no restart has a finite score"),
        (lambda n, x, y, p: Message.of(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 5)).train(), x[:1], y[:1]), "one value a channel"),
    ],
)  # fmt: skip
def test_bad_input_is_named(net, batch, prior, change, says):
    with pytest.raises(InputError, match=says):
        change(net, *batch, prior)


def _search(
    net, x, y, prior, *, shape=(1, 8, 8), limits=LIMITS, attack="gifd", told=None, after=lambda: None, **how
):
    told = Message.of(net, x[:1], y[:1].clamp(max=4)) if told is None else told
    after()
    reconstruct(
        net, [told], y[None, :1], shape, prior=prior, attack=attack, search=Search(**how), bounds=limits
    )


def test_a_message_of_another_model_is_refused(net, batch, prior):
    x, y = batch
    told = Message.of(net, x[:1], y[:1])
    other = dataclasses.replace(told, tensors=told.tensors[:-1])
    with pytest.raises(InputError, match="5 tensors, expected 6"):
        reconstruct(net, [other], y[None, :1], (1, 8, 8), prior=prior, bounds=LIMITS)
    other = dataclasses.replace(told, tensors=(*told.tensors[:4], told.tensors[4].T, told.tensors[5]))
    with pytest.raises(InputError, match=r"tensor 4 has the shape \(64, 5\), expected \(5, 64\)"):
        reconstruct(net, [other], y[None, :1], (1, 8, 8), prior=prior, bounds=LIMITS)


@pytest.mark.parametrize("labels", [[2, 2, 4], [0, 0, 3, 3], [1], [5, 5, 5]])
def test_the_bias_gradient_tells_repeated_labels(labels):
    """Of a network that knows nothing yet, the mean of p - y over the batch; row sums can name each class but once."""
    classes, batch = 6, len(labels)
    bias = torch.full((classes,), 1 / classes)
    for label in labels:
        bias[label] -= 1 / batch
    weight = bias[:, None] * torch.ones(1, 3)
    assert inferred_labels(weight, batch, rule="bias", bias=bias) == labels
    assert len(set(inferred_labels(weight, batch))) == batch


class _Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(nn.functional.dropout(x.flatten(1), 0.3, self.training))


def test_dropout_that_is_no_module_is_found_and_the_generator_of_the_user_stays(batch):
    x, y = batch
    net = _Drawn()
    state = torch.get_rng_state()
    with pytest.raises(InputError, match="differently each time"):
        Message.of(net, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    told = Message.of(net.eval(), x, y)
    with pytest.raises(InputError, match="differently each time"):
        reconstruct(net.train(), [told], y[None], (1, 8, 8), attack="ig", bounds=LIMITS)


@pytest.mark.parametrize("attack", ["ig", "idlg"])
def test_a_message_of_zeros_is_searched_in_vain(net, batch, attack):
    x, y = batch
    told = Message.of(net, x[:1], y[:1])
    silent = dataclasses.replace(told, tensors=tuple(t * 0 for t in told.tensors))
    how = Search(steps=3, restarts=1)
    found = reconstruct(
        net, [silent, told], y[:1].expand(2, 1), (1, 8, 8), attack=attack, search=how, bounds=LIMITS
    )
    assert bool(found.pictures.isfinite().all())
    if attack == "ig":
        assert found.scores[0] == 1


def test_given_labels_need_no_linear_head(batch):
    x, y = batch
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    others = torch.rand(6, 1, 8, 8)

    def audit(attacks, known):
        how = LeakageOptions(attacks=attacks, search=Search(steps=2, restarts=1), known_labels=known)
        return leakage(net, x, y, public=others, prior=None, options=how, bounds=LIMITS).attacked[0].rule

    assert audit(["ig"], True) == "given"
    assert audit(["dlg"], False) == "searched with the picture"
    with pytest.raises(InputError, match="known_labels=True"):
        audit(["ig"], False)


def test_arrays_of_an_update_go_by_order_or_name(net, batch, tmp_path):
    after = {k: (v - 0.1).numpy() for k, v in net.state_dict().items()}
    np.savez(tmp_path / "named.npz", **dict(reversed(after.items())))
    np.savez(tmp_path / "big.npz", *[v.astype(">f4") for v in after.values()])
    for name in ("named", "big"):
        told = Message.read(net, tmp_path / f"{name}.npz", count=1)
        assert all(torch.allclose(t, torch.tensor(0.1), atol=1e-6) for t in told.tensors)
    swapped = list(after.values())
    swapped[0], swapped[1] = swapped[1], swapped[0]
    np.savez(tmp_path / "swapped.npz", *swapped)
    np.savez(tmp_path / "words.npz", *list(after.values())[1:], np.array(["a"]))
    np.savez(tmp_path / "whole.npz", *[v.astype(int) for v in after.values()])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "big.npz").read_bytes()[:200])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name, says in (
        ("swapped", "array 0 has the shape .* of '0.weight'"),
        ("words", "cannot be read"),
        ("whole", "'0.weight' in int64"),
        ("cut", "cannot be read"),
        ("empty", "cannot be read"),
    ):
        with pytest.raises(InputError, match=says):
            Message.read(net, tmp_path / f"{name}.npz", count=1)
