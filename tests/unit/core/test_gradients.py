"""Per-sample gradients, flat views and distances between gradient lists."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.core import gradients
from lineament.core.checks import InputError


def lists(seed: int, shapes=((3, 2, 2), (3,), (2, 3))) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_flatten_and_unflatten_are_inverse_also_for_rows():
    tensors = lists(0)
    flat = gradients.flatten(tensors)
    assert all(torch.equal(a, b) for a, b in zip(gradients.unflatten(flat, tensors), tensors))
    rows = gradients.unflatten(torch.stack([flat, 2 * flat]), tensors)
    assert torch.equal(rows[0][1], 2 * tensors[0])
    with pytest.raises(InputError, match="expected 21 entries"):
        gradients.unflatten(flat[:-1], tensors)


@pytest.mark.parametrize("kind", ["l2", "l1", "max", "cosine", "layer", "layer_cosine"])
def test_distance_is_zero_at_itself_and_twice_differentiable(kind):
    a, b = lists(0), lists(1)
    own = gradients.distance(a, a, kind, eps=0.0)
    assert abs(own.item()) < 1e-12
    assert gradients.distance(a, b, kind).item() > 0.1
    if kind not in ("l1", "max"):

        def function(*tensors):
            return gradients.distance(tensors[:3], tensors[3:], kind)

        assert torch.autograd.gradgradcheck(function, (*a, *b))


@pytest.mark.parametrize("kind", gradients.KINDS)
def test_distances_weigh_tensors_and_look_at_those_that_are_chosen(kind):
    a, b = lists(0), lists(1)
    at, w = [0, 2], torch.tensor([2.0, 9.0, 0.5], dtype=torch.float64)
    found = gradients.distance(a, b, kind, eps=0.0, weights=w, tensors=at)
    if kind == "cosine":  # weights count in all three products
        x, y = (torch.cat([w[i].sqrt() * g[i].flatten() for i in at]) for g in (a, b))
        expected = gradients.distance([x], [y], kind, eps=0.0)
    else:
        expected = sum(w[i] * gradients.distance([a[i]], [b[i]], kind, eps=0.0) for i in at)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    slopes = torch.autograd.grad(found, [*a, *b], allow_unused=True)
    assert slopes[1] is None and slopes[4] is None and all(s is not None for s in (slopes[0], slopes[3]))
    for wrong, says in (({"weights": [1.0]}, "weights: got 1"), ({"tensors": [3]}, "tensors: got 3"), ({"tensors": []}, "tensors: got none")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            gradients.distance(a, b, kind, **wrong)


def test_layer_cosine_takes_one_cosine_for_each_output_unit():
    a, b = lists(0), lists(1)
    expected = sum(
        (1 - F.cosine_similarity(x[o].flatten(), y[o].flatten(), dim=0))
        for x, y in zip(a, b)
        if x.ndim > 1
        for o in range(len(x))
    )
    assert torch.isclose(gradients.distance(a, b, "layer_cosine", eps=0.0), expected)


def test_a_unit_without_gradient_gives_no_nan():
    a, b = [torch.zeros(2, 3, requires_grad=True)], [torch.ones(2, 3)]
    found = torch.autograd.grad(gradients.distance(a, b, "layer_cosine"), a)[0]
    assert torch.isfinite(found).all()


def test_distance_names_unequal_shapes_and_unknown_kinds():
    with pytest.raises(InputError, match="expected the same"):
        gradients.distance(lists(0), lists(1)[:2])
    with pytest.raises(InputError, match="nearest: 'layer_cosine'"):
        gradients.distance(lists(0), lists(1), "layercosine")


@pytest.mark.parametrize("chunk", [None, 3])
def test_per_sample_gradients_are_those_of_a_loop(chunk):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    ).double()
    net(torch.randn(8, 1, 6, 6).double())
    net.train()
    stats = net[1].running_mean.clone()
    x, y = torch.randn(5, 1, 6, 6).double(), torch.randint(0, 4, (5,))
    found = gradients.per_sample_gradients(net, F.cross_entropy, x, y, chunk=chunk)
    assert net.training and torch.equal(net[1].running_mean, stats)
    assert all(p.grad is None for p in net.parameters())
    net.eval()
    for i in range(5):
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        for (name, _), g in zip(net.named_parameters(), torch.autograd.grad(loss, list(net.parameters()))):
            torch.testing.assert_close(found[name][i], g)


def test_per_sample_gradients_refuse_unknown_parameters_and_unequal_lengths():
    net = nn.Linear(2, 2)
    with pytest.raises(InputError, match="names no parameter; nearest: 'weight'"):
        gradients.per_sample_gradients(
            net, F.cross_entropy, torch.ones(2, 2), torch.zeros(2).long(), params=["wieght"]
        )
    with pytest.raises(InputError, match="expected 2 of them"):
        gradients.per_sample_gradients(net, F.cross_entropy, torch.ones(2, 2), torch.zeros(3).long())


def test_per_sample_gradients_refuse_a_batch_norm_that_always_mixes_samples():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(InputError, match="'1' is a batch norm without running statistics"):
        gradients.per_sample_gradients(net, F.cross_entropy, torch.ones(2, 2), torch.zeros(2).long())


def test_layer_is_one_cosine_for_each_tensor():
    a, b = lists(0), lists(1)
    expected = sum(1 - F.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in zip(a, b))
    assert torch.isclose(gradients.distance(a, b, "layer", eps=0.0), expected)


def test_layer_cosine_ignores_biases_and_the_scale_of_a_unit():
    a, b = lists(0), lists(1)
    other = [b[0] * torch.tensor([2.0, 5.0, 1.0]).reshape(3, 1, 1), b[1] + 7, 3 * b[2]]
    found = gradients.distance(a, other, "layer_cosine", eps=0.0)
    assert torch.isclose(found, gradients.distance(a, b, "layer_cosine", eps=0.0))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, *g):
        return 2 * g[0] * ctx.saved_tensors[0]


class Through(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        found = self.layer(x)
        return (found[0] if isinstance(found, tuple) else Square.apply(found)).flatten(1)


LAYERS = {
    "gru": lambda: nn.GRU(1, 1),
    "rnn": lambda: nn.RNN(1, 1),
    "float64 lstm": lambda: nn.LSTM(1, 1).double(),
    "own function": lambda: nn.Linear(1, 2),
    "max_norm": lambda: nn.Embedding(5, 2, max_norm=0.5),
    "sparse": lambda: nn.Embedding(5, 2, sparse=True),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Sparse CSR")
def test_what_vmap_cannot_run_goes_sample_by_sample(layer):
    torch.manual_seed(0)
    net = Through(layer())
    like = next(net.parameters())
    x = torch.randint(0, 5, (3, 2)) if isinstance(net.layer, nn.Embedding) else torch.randn(3, 4, 1).to(like)
    before = [p.clone() for p in net.parameters()]
    found = gradients.per_sample_gradients(net, lambda z, y: z.square().mean(), x, torch.zeros(3))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))
    for index in range(3):
        net.zero_grad()
        net(x[index : index + 1]).square().mean().backward()
        for name, p in net.named_parameters():
            own = p.grad.to_dense() if p.grad.is_sparse else p.grad
            torch.testing.assert_close(found[name][index], own)
