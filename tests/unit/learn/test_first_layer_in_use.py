"""TrAct in a training: undone without a trace, with autocast, accumulation, compilers, processes, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.multiprocessing as mp
from tests.contracts.unchanged import unchanged
from tests.processes import free_port
from torch import nn
from torch.nn.utils import parametrizations, prune

from lineament.core.checks import InputError
from lineament.core.curvature.matrices import fisher, gauss_newton, hessian
from lineament.core.gradients import per_sample_gradients
from lineament.explain.saliency.maps import saliency
from lineament.learn.tract.layer import tract
from lineament.measure.landscape.axes import random_axes
from lineament.measure.landscape.grids import plane


def convnet() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
        )


def batch(count: int = 8, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=draw), torch.arange(count) % 5


def backward(model, x, y, scale: float = 1.0) -> torch.Tensor:
    (scale * nn.functional.cross_entropy(model(x), y)).backward()
    return next(model.parameters()).grad.clone()


def test_nothing_is_left_behind_also_after_exceptions():
    net, (x, _) = convnet().eval(), batch()
    with unchanged(net):
        with tract(net) as handle:
            assert isinstance(net[0], nn.Conv2d) and type(net[0]) is not nn.Conv2d
            net(x)
            assert handle.layer == "0" and handle.module is net[0]
        handle.undo()
    with unchanged(net), pytest.raises(RuntimeError, match="channels"), tract(net):
        net(x[:, :2])
    with unchanged(net), pytest.raises(InputError, match="expected a tensor"), tract(net):
        net[0]("text")
    for bad in (
        {"lam": -1},
        {"layer": "9"},
        {"every": 0},
        {"nonfinite": "ignore"},
        {"momentum": 1.0},
        {"samples": 0},
    ):
        with unchanged(net), pytest.raises(InputError):
            tract(net, **bad)


def test_parameters_stay_the_same_objects_and_an_earlier_optimizer_goes_on():
    net, (x, y) = convnet(), batch()
    before, names = list(net.parameters()), list(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = tract(net)
    assert (
        all(a is b for a, b in zip(before, net.parameters(), strict=True)) and list(net.state_dict()) == names
    )
    old = net[0].weight.detach().clone()
    gradient = backward(net, x, y)
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), old - 0.1 * gradient)
    handle.undo()
    net.zero_grad()
    plain = backward(net, x, y)
    assert handle.gradient.count == 1 and torch.isfinite(plain).all()
    net.load_state_dict(convnet().state_dict())


def test_the_handle_need_not_be_kept():
    net, (x, y) = convnet(), batch()
    plain = backward(net, x, y)
    with tract(net):
        net.zero_grad()
        wanted = backward(net, x, y)
    tract(net)
    gc.collect()
    net.zero_grad()
    assert torch.equal(backward(net, x, y), wanted) and not torch.allclose(plain, wanted)
    gone = weakref.ref(net[0])
    del net
    gc.collect()
    assert gone() is None


def test_no_gradient_no_work():
    net, (x, _) = convnet(), batch()
    with tract(net) as handle:
        with torch.no_grad():
            net(x)
        images = x.clone().requires_grad_()
        torch.autograd.grad(net(images).sum(), images)
        assert handle.gradient.count == 0
        assert net[0].weight is net[0]._parameters["weight"]


@pytest.mark.parametrize("matrix", [hessian, gauss_newton, fisher])
def test_curvature_during_a_training_is_that_of_the_loss(matrix):
    net, data = convnet().double(), [(batch()[0].double(), batch()[1])]
    size = sum(p.numel() for p in net.parameters())
    vector = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    wanted = matrix(net, nn.functional.cross_entropy, data) @ vector
    with tract(net) as handle:
        found = matrix(net, nn.functional.cross_entropy, data) @ vector
        assert handle.gradient.count == 0
        backward(net, *data[0])
        assert handle.gradient.count == 1
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_measured_gradients_during_a_training_are_those_of_the_loss():
    net, (x, y) = convnet(), batch()

    def measured():
        each = per_sample_gradients(net, nn.functional.cross_entropy, x, y)
        axes = random_axes(net)
        around = plane(net, nn.functional.cross_entropy, [(x, y)], axes, steps=3, metrics=["gradient_norm"])
        return [*each.values(), around.metrics["gradient_norm"], saliency(net, x, y, site="0:in")]

    wanted = measured()
    with tract(net):
        for a, b in zip(measured(), wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_copies_and_pickles_are_plain_layers():
    net, (x, y) = convnet(), batch()
    plain = backward(net, x, y)
    with tract(net):
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert type(other[0]) is nn.Conv2d
            other.zero_grad()
            torch.testing.assert_close(backward(other, x, y), plain)
        assert type(net[0]) is not nn.Conv2d


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class PaddedLater(nn.Conv2d):
    """As timm's Conv2dSame."""

    def forward(self, x):
        x = nn.functional.pad(x, (0, 1, 1, 1))
        return nn.functional.conv2d(
            x, self.weight, self.bias, self.stride, 0, self.dilation, groups=self.groups
        )


class Dilated(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, dilation=2)


class Grouped(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x.repeat(1, 2, 1, 1), self.weight, groups=2)


class Scaled(nn.Linear):
    def forward(self, x, scale=3.0):
        return super().forward(scale * x)


class Shifted(nn.Embedding):
    def forward(self, x):
        return nn.functional.embedding(input=x + 1, weight=self.weight)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("layer", "shape", "rows"),
    [
        (Standardised(3, 4, 3), (2, 3, 6, 6), lambda x: nn.functional.unfold(x, 3)),
        (
            PaddedLater(3, 4, 3, stride=2),
            (2, 3, 6, 6),
            lambda x: nn.functional.unfold(nn.functional.pad(x, (0, 1, 1, 1)), 3, stride=2),
        ),
        (PaddedLater(3, 4, 7), (2, 3, 5, 6), lambda x: nn.functional.unfold(nn.functional.pad(x, (0, 1, 1, 1)), 7)),
        (Dilated(3, 4, 3), (2, 3, 9, 6), lambda x: nn.functional.unfold(x, 3, dilation=2)),
        (Grouped(3, 4, 3), (2, 3, 6, 6), lambda x: nn.functional.unfold(x, 3)),  # both groups have the same rows
        (Scaled(6, 3), (9, 6), lambda x: 3 * x.T),
        (Scaled(20, 3), (9, 20), lambda x: 3 * x.T),
        (Shifted(6, 3), (9,), lambda x: nn.functional.one_hot(x + 1, 6).T.double()),
    ],
)  # fmt: skip
def test_a_forward_of_its_own_decides_what_the_weight_is_multiplied_with(layer, shape, rows, compiled):
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape).double() if len(shape) > 1 else torch.arange(9) % 4
    z = layer(x)
    z.retain_grad()
    z.square().sum().backward()
    X, G = (t.flatten(2).transpose(0, 1).flatten(1) if len(shape) == 4 else t for t in (rows(x), z.grad))
    G = G if len(shape) == 4 else G.T
    matrix = X @ X.T / X.shape[1] + 0.1 * torch.eye(len(X), dtype=torch.double)
    wanted = torch.linalg.solve(matrix, X @ G.T)
    if isinstance(layer, Standardised):
        wanted = wanted - wanted.mean(0)
    wanted = wanted if isinstance(layer, nn.Embedding) else wanted.T.reshape(layer.weight.shape)
    layer.zero_grad()
    net = nn.Sequential(layer)
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    with tract(run):
        run(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, wanted)


class Multiplied(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


def test_a_forward_that_hides_the_rows_is_refused():
    layer, x = Multiplied(6, 3), torch.randn(9, 6)
    with (
        pytest.raises(InputError, match=r"forward of Multiplied uses its weight otherwise than in F\.linear"),
        tract(layer),
    ):
        layer(x)
    with tract(layer), torch.no_grad():
        layer(x)
    layer = Standardised(3, 4, 3)
    with (
        pytest.raises(InputError, match="changes its weight before it uses it"),
        tract(layer, accumulate=torch.optim.SGD(layer.parameters())),
    ):
        layer(batch()[0])


def test_hooks_and_parametrizations_stay():
    net, calls = convnet(), []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    with tract(net):
        net(batch()[0])
    assert len(calls) == 1

    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3)), nn.Tanh()).double()
    names, inputs = list(net.state_dict()), torch.randn(20, 6, dtype=torch.double)
    with tract(net) as handle:
        assert list(net.state_dict()) == names
        net(inputs).sum().backward()
        assert handle.gradient.count == 1
        with pytest.raises(InputError, match="parametrized"):
            tract(
                nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3))),
                accumulate=torch.optim.SGD(net.parameters()),
            )
    # The norm's gradient is the corrected gradient's part along the direction.
    v, effective = net[0].parametrizations.weight.original1, net[0].weight.detach().requires_grad_()
    torch.tanh(inputs @ effective.T + net[0].bias.detach()).sum().backward()
    corrected = torch.linalg.solve(
        inputs.T @ inputs / 20 + 0.1 * torch.eye(6, dtype=torch.double), effective.grad.T
    ).T
    wanted = (corrected * v / v.norm(dim=1, keepdim=True)).sum(1, keepdim=True)
    torch.testing.assert_close(net[0].parametrizations.weight.original0.grad, wanted.detach())


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor:FutureWarning")
@pytest.mark.parametrize(
    "hooked",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.random_unstructured(m, "weight", 0.5)],
)
def test_weights_that_a_hook_computes_before_each_forward(hooked):
    net, x = nn.Sequential(nn.Linear(6, 3)).double().eval(), torch.randn(20, 6).double()
    hooked(net[0])
    names = list(net.state_dict())
    (source,) = (p for name, p in net.named_parameters() if name in ("0.weight_v", "0.weight_orig"))
    net(x)
    # The gradient of the weight in use is corrected, and goes on to what it is made of.
    D = torch.linalg.solve(x.T @ x / 20 + 0.1 * torch.eye(6).double(), x.T @ torch.ones(20, 3).double()).T
    wanted = torch.autograd.grad(net[0].weight, source, D)[0]
    with tract(net) as handle:
        net(x).sum().backward()
        assert list(net.state_dict()) == names and handle.gradient.count == 1
    torch.testing.assert_close(source.grad, wanted)
    assert list(net.state_dict()) == names
    net(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision_weights(dtype):
    net, (x, y) = convnet(), batch(32)
    with tract(net):
        exact = backward(net, x, y)
        net.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            found = backward(net, x, y)
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 0.05
    layer = nn.Linear(6, 3).to(dtype)
    with tract(layer):
        layer(torch.randn(20, 6).to(dtype)).sum().backward()
    assert layer.weight.grad.dtype == dtype and torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("to_none", [True, False])
def test_accumulated_micro_batches_are_one_large_batch(to_none):
    net, (x, y) = convnet().double().eval(), batch(12)
    x = x.double()
    with tract(net):
        whole = backward(net, x, y)
        net.zero_grad()
        for rows in (slice(0, 6), slice(6, 12)):
            each = backward(net, x[rows], y[rows], 0.5)
    assert float((each - whole).norm() / whole.norm()) > 1e-3
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with tract(net, accumulate=optimizer) as handle:
        for _ in range(2):
            net.zero_grad(to_none)
            for rows in (slice(0, 3), slice(3, 12)):
                backward(net, x[rows], y[rows], len(y[rows]) / 12)
            optimizer.step()
            torch.testing.assert_close(net[0].weight.grad, whole)
        # A round that was given up leaves nothing in the next; correct() can come before clipping.
        net.zero_grad(to_none)
        backward(net, 100 * x[:3], y[:3])
        net.zero_grad(to_none)
        backward(net, x, y)
        handle.correct()
        torch.testing.assert_close(net[0].weight.grad, whole)
        optimizer.step()
        torch.testing.assert_close(net[0].weight.grad, whole)
        with pytest.raises(InputError, match="closure"):
            optimizer.step(lambda: 0.0)
    assert not optimizer._optimizer_step_pre_hooks


def test_rows_of_a_micro_batch_without_a_gradient_count():
    net, (x, y) = convnet().double().eval(), batch(12)
    x, seen = x.double(), (torch.arange(12) >= 5).double()

    def loss(rows):
        losses = nn.functional.cross_entropy(net(x[rows]), y[rows], reduction="none")
        return (losses * seen[rows]).sum()

    with tract(net):
        loss(slice(0, 12)).backward()
    whole = net[0].weight.grad.clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with tract(net, accumulate=optimizer):
        net.zero_grad(set_to_none=False)
        for rows in (slice(0, 5), slice(5, 12)):
            loss(rows).backward()
        optimizer.step()
    torch.testing.assert_close(net[0].weight.grad, whole)


def test_accumulation_refuses_what_it_cannot_do():
    net = convnet()
    optimizer = torch.optim.SGD(net[4].parameters())
    with pytest.raises(InputError, match="does not hold the weight of layer '0'"):
        tract(net, accumulate=optimizer)
    with pytest.raises(InputError, match="expected the optimizer"):
        tract(net, accumulate=4)
    with pytest.raises(InputError, match="leave samples, every and momentum out"):
        tract(net, accumulate=torch.optim.SGD(net.parameters()), every=2)
    with tract(net) as handle, pytest.raises(InputError, match="corrects its gradient by itself"):
        handle.correct()


def test_the_stochastic_form():
    layer = nn.Linear(5, 2).double()
    draw = torch.Generator().manual_seed(0)
    xs = [torch.randn(4000, 5, generator=draw, dtype=torch.double) for _ in range(4)]

    def found(x, moment):
        plain = torch.ones(2, 4000, dtype=torch.double) @ x
        return plain @ torch.linalg.inv(moment + 0.1 * torch.eye(5, dtype=torch.double))

    def run(**options):
        with tract(layer, **options):
            out = []
            for x in xs:
                layer.zero_grad()
                layer(x).sum().backward()
                out.append(layer.weight.grad.clone())
            return out

    moments = [x.T @ x / len(x) for x in xs]
    for k, gradient in enumerate(run(every=3)):
        torch.testing.assert_close(gradient, found(xs[k], moments[3 * (k // 3)]))
    mean, weight = torch.zeros(5, 5, dtype=torch.double), 0.0
    for k, gradient in enumerate(run(momentum=0.7)):
        mean, weight = 0.7 * mean + 0.3 * moments[k], 0.7 * weight + 0.3
        torch.testing.assert_close(gradient, found(xs[k], mean / weight))
    exact = run()
    few, many = (run(samples=n)[0] for n in (20, 3000))
    errors = [float((g - exact[0]).norm() / exact[0].norm()) for g in (few, many)]
    assert 0 < errors[1] < errors[0] and errors[1] < 0.1
    torch.testing.assert_close(run(samples=50, seed=3), run(samples=50, seed=3))
    assert not torch.equal(run(samples=50, seed=3)[0], run(samples=50, seed=4)[0])
    torch.testing.assert_close(run(samples=4000), exact)


@pytest.mark.parametrize("groups", [1, 3])
def test_random_patches_are_those_of_the_layer(groups):
    layer = nn.Conv2d(3, 3, 3, padding=1, groups=groups).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    grads = []
    for options in ({}, {"samples": 127}, {"momentum": 0.5, "samples": 100}):
        layer.zero_grad()
        with tract(layer, lam=1.0, **options):
            layer(x).square().sum().backward()
        grads.append(layer.weight.grad)
    # 127 of 128 patches drawn with replacement: another sample of the same patches, not other numbers.
    assert 0 < float((grads[1] - grads[0]).norm() / grads[0].norm()) < 0.5


def test_a_resumed_training_is_the_uninterrupted_one():
    options = {"samples": 30, "every": 2, "momentum": 0.5, "seed": 1}

    def steps(net, handle, optimizer, numbers):
        for k in numbers:
            optimizer.zero_grad()
            backward(net, *batch(seed=k))
            optimizer.step()

    def fresh():
        net = convnet()
        return net, tract(net, **options), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    whole = fresh()
    steps(*whole, range(7))
    first = fresh()
    steps(*first, range(3))
    saved = copy.deepcopy([first[0].state_dict(), first[1].gradient.state_dict(), first[2].state_dict()])
    again = fresh()
    again[0].load_state_dict(saved[0])
    again[1].gradient.load_state_dict(saved[1])
    again[2].load_state_dict(saved[2])
    steps(*again, range(3, 7))
    for a, b in zip(whole[0].state_dict().values(), again[0].state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="lacks"):
        again[1].gradient.load_state_dict({})


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}], ids=["exact", "running mean"])
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_values_that_are_not_finite(options, where):
    bad = torch.randn(20, 6)
    weights = torch.ones(20, 3)
    (bad if where == "input" else weights)[0, 0] = float("nan")

    def run(nonfinite):
        layer = nn.Linear(6, 3)
        with tract(layer, nonfinite=nonfinite, **options) as handle:
            (layer(bad) * weights).sum().backward()
            seen = layer.weight.grad.clone()
            layer.zero_grad()
            layer(torch.randn(20, 6)).sum().backward()
            assert torch.isfinite(layer.weight.grad).all() and handle.gradient.count >= 1
        return seen

    assert not run("skip").any()
    assert torch.isnan(run("pass")).any()
    with pytest.raises(InputError, match=r"layer '': .*NaN or infinite.*nonfinite='skip'"):
        run("raise")


def test_which_layer_is_first():
    with tract(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1))) as handle:
        assert handle.layer == "2"
    with pytest.raises(InputError, match="Sequential has no linear, convolution or embedding layer"):
        tract(nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(3, 2, 1)))
    net = convnet()
    with pytest.raises(InputError, match=r"got '5', which is no module.*there are: '0', '4'"):
        tract(net, layer="5")
    with pytest.raises(
        InputError, match=r"'1', which is a BatchNorm2d.*candidates: '0' \(Conv2d\), '4' \(Linear\)"
    ):
        tract(net, layer="1")
    net[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match="layer '0': its weight is frozen"):
        tract(net)
    with pytest.raises(InputError, match="shape is not known yet"):
        tract(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(InputError, match="max_norm"):
        tract(nn.Embedding(5, 2, max_norm=1.0))
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module"):
        tract("net")
    net = convnet()
    with tract(net), pytest.raises(InputError, match="already"):
        tract(net)


def test_shared_layers_are_refused():
    layer = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"the same module is used as '0', '2'.*candidates"):
        tract(nn.Sequential(layer, nn.ReLU(), layer))
    net = nn.ModuleDict({"tokens": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7)})
    net["head"].weight = net["tokens"].weight
    with pytest.raises(InputError, match=r"weight is shared with 'head.weight'.*'body' \(Linear\)"):
        tract(net)


def test_a_layer_behind_trainable_ones():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.stem = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(self.stem(x))

    net, x = Backwards(), torch.randn(5, 3)
    with (
        unchanged(net),
        pytest.raises(InputError, match=r"'head': its input comes from trainable layers.*'stem'"),
        tract(net),
    ):
        net(x)
    with pytest.warns(UserWarning, match="outside the paper"), tract(net, layer="head"):
        net(x).sum().backward()
    with tract(net, layer="stem"):
        net(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("rows", [9, 3])
def test_a_warning_for_inputs_of_another_scale(rows):
    layer, x = nn.Linear(4, 2), torch.full((rows, 4), 200.0)
    with tract(layer):
        with pytest.warns(UserWarning, match="mean square of its inputs is 4e\\+04"):
            layer(x).sum().backward()
        with warnings.catch_warnings():  # said once
            warnings.simplefilter("error")
            layer(x).sum().backward()
    conv = nn.Conv2d(3, 2, 4)
    with pytest.warns(UserWarning, match="mean square of its inputs is 0.0001"), tract(conv):
        conv(torch.full((1, 3, 4, 4), 0.01)).sum().backward()


def test_double_backward_is_refused_and_checkpointing_is_not():
    layer, x = nn.Linear(4, 2), torch.randn(9, 4)
    with tract(layer):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()
        net = nn.Sequential(layer, nn.Tanh())
        grads = []
        for run in (net, lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)):
            net.zero_grad()
            run(x).sum().backward()
            grads.append(layer.weight.grad.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "embedding", "wide"])
def test_compiled_with_one_graph_before_and_after(kind):
    if kind == "conv":
        net, x = convnet(), batch()[0]
    elif kind == "wide":
        net, x = nn.Sequential(nn.Linear(30, 4), nn.Tanh()), torch.randn(6, 30)
    else:
        net, x = nn.Sequential(nn.Embedding(9, 4), nn.Tanh()), torch.arange(12).view(3, 4) % 9
    w = torch.randn_like(net(x))

    def gradient(model):
        net.zero_grad()
        (model(x) * w).sum().backward()
        return net[0].weight.grad.clone()

    plain = gradient(net)
    with tract(net):
        wanted = gradient(net)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled), plain)
    with tract(compiled) as handle:
        assert handle.layer == "_orig_mod.0"
        torch.testing.assert_close(gradient(compiled), wanted)
        handle.gradient.lam = 1e9  # no new compilation is needed
        assert float(gradient(compiled).norm()) < 1e-6 * float(wanted.norm())
    torch.testing.assert_close(gradient(compiled), plain)
    torch.compiler.reset()


def distributed(rank: int, port: int, answers) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    x, y = batch(12)
    mine = slice(0, 6) if rank == 0 else slice(6, 12)
    for options in ({}, {"process_group": "world"}, {"process_group": "world", "accumulate": True}):
        net = convnet().double().eval()
        model = nn.parallel.DistributedDataParallel(net)
        options = dict(options)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        if options.pop("accumulate", False):
            options["accumulate"] = optimizer
        with tract(model, **options):
            backward(model, x[mine].double(), y[mine])
            optimizer.step()
        answers.put((rank, net[0].weight.grad.tolist()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_the_joint_batch():
    context = mp.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=distributed, args=(rank, port, answers))
        for port in [free_port()]
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = {0: [], 1: []}
    for _ in range(6):
        rank, gradient = answers.get(timeout=120)
        found[rank].append(torch.tensor(gradient, dtype=torch.double))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    net, (x, y) = convnet().double().eval(), batch(12)
    x = x.double()
    with tract(net):
        each = []
        for rows in (slice(0, 6), slice(6, 12)):
            net.zero_grad()
            each.append(backward(net, x[rows], y[rows]))
        net.zero_grad()
        joint = backward(net, x, y)
    for rank in (0, 1):
        torch.testing.assert_close(found[rank][0], (each[0] + each[1]) / 2)
        torch.testing.assert_close(found[rank][1], joint)
        torch.testing.assert_close(found[rank][2], joint)


def test_a_group_needs_torch_distributed():
    with pytest.raises(InputError, match="init_process_group"):
        tract(convnet(), process_group="world")
