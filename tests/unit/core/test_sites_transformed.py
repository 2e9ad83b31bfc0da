"""Recording and replacing under PyTorch's modes and transforms, and in compiled models."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from tests.contracts.networks import network, out_of_place
from tests.contracts.unchanged import unchanged
from torch import nn
from torch.utils.checkpoint import checkpoint

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture, patch, record
from lineament.core.sites.naming import sites


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_no_grad_inference_mode_and_autocast(x):
    net = network()
    with torch.no_grad(), capture(net, "0", gradients=True) as acts:
        net(x)
    assert not acts["0"].requires_grad
    with torch.inference_mode(), capture(net, "0") as acts, patch(net, {"1": 0.0}):
        net(x)
    assert acts["0"].shape == x.shape
    with torch.autocast("cpu", torch.bfloat16), capture(net, ["3", "0.conv"], gradients=True) as acts:
        score = net(x).float().sum()
    assert acts["3"].dtype == acts["0.conv"].dtype == torch.bfloat16
    assert acts.gradients(score)["0.conv"].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), patch(net, {"3": torch.ones(5, dtype=torch.float64)}):
        assert net(x).dtype == torch.bfloat16


def test_inside_vmap_grad_and_functional_call(x):
    net = network()
    parameters = dict(net.named_parameters())

    def loss(values, sample):
        output = torch.func.functional_call(net, values, (sample[None],))
        return output.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = per_sample(parameters, x)
    with unchanged(net), capture(net, ["0", "3"]) as acts:
        found = per_sample(parameters, x)
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    # What vmap hid comes back as the first dimension, before the batch of one that the function made.
    assert acts["0"].shape == (2, 1, 3, 4, 4)
    torch.testing.assert_close(acts["0"][:, 0], record(net, x, "0")["0"], rtol=1e-5, atol=1e-6)


def test_nested_vmaps_come_back_outermost_first():
    net = nn.Sequential(nn.Identity())
    x = torch.arange(24.0).reshape(2, 3, 4)
    with capture(net, "0") as acts:
        torch.func.vmap(torch.func.vmap(net, in_dims=1), in_dims=0)(x)
    assert torch.equal(acts["0"], x.transpose(1, 2))
    with capture(net, "0") as acts:
        torch.func.vmap(torch.func.vmap(net, in_dims=0), in_dims=2)(x)
    assert torch.equal(acts["0"], x.permute(2, 0, 1))


def test_capture_and_patch_inside_a_transformed_function(x):
    net = network().double()
    x = x.double()

    def energy(sample):
        with capture(net, "0.bn", gradients=True) as acts:
            net(sample[None])
        return acts["0.bn"].square().sum()

    found = torch.func.vmap(torch.func.grad(energy))(x)
    again = x.clone().requires_grad_()
    bn = net[0].bn(net[0].conv(torch.relu(net[0].first(again))))
    torch.testing.assert_close(found, torch.autograd.grad(bn.square().sum(), again)[0])

    def scaled(factor):
        with patch(net, {"1": lambda t: t * factor}):
            return net(x)[0, 0]

    factors = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    slopes = torch.func.vmap(torch.func.grad(scaled))(factors)
    torch.testing.assert_close(
        slopes, (record(net, x, "1")["1"].flatten(1) @ net[3].weight.T)[0, 0].expand(3)
    )
    jvp = torch.func.jvp(scaled, (factors[1],), (factors[2],))[1]
    torch.testing.assert_close(jvp, slopes[0])


def test_an_ensemble_by_vmap_over_parameters(x):
    nets = [network(seed) for seed in (0, 1)]
    stacked, buffers = torch.func.stack_module_state(nets)
    with capture(nets[0], "0") as acts:
        torch.func.vmap(
            lambda p, b: torch.func.functional_call(nets[0], (p, b), (x,)), randomness="different"
        )(stacked, buffers)
    for index, net in enumerate(nets):
        torch.testing.assert_close(acts["0"][index], record(net, x, "0")["0"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_records_the_forward_only(x, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            x = checkpoint(self.net[0], x, use_reentrant=reentrant)
            return self.net[3](self.net[2](self.net[1](x)))

    model = Checkpointed()
    x.requires_grad_()
    expected = torch.autograd.grad(model.net(x).sum(), x)[0]
    with capture(model, "net.0.bn", gradients=not reentrant) as acts:
        score = model(x).sum()
        score.backward()
        torch.testing.assert_close(x.grad, expected)
        assert len(acts.calls("net.0.bn")) == 1


def test_a_copy_made_inside_the_block_is_free_of_it(x):
    import copy
    import pickle

    net = network()
    with capture(net, "0") as acts:
        twin = copy.deepcopy(net)
        net(x)
    kept = acts["0"]
    assert twin(x + 1) is not None and torch.equal(acts["0"], kept)
    with capture(net, "0", stop_early=True):
        assert network().load_state_dict(net.state_dict())
    pickle.dumps(net)
    assert torch.equal(twin(x), net(x))


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _counting(counter):
    def backend(graph, inputs):
        def run(*args):
            counter.append(1)
            return graph.forward(*args)

        return run

    return backend


@pytest.mark.slow
def test_a_compiled_model_before_and_after_its_first_call(x, compiler):
    net = network()
    expected = out_of_place(net, x)
    runs = []
    compiled = torch.compile(net, backend=_counting(runs))
    assert sites(compiled) == sites(net)
    for _ in range(2):  # first before anything is compiled, then with compiled code in the cache
        with unchanged(net), capture(compiled, ["0.bn", "_orig_mod.1", ""], gradients=True) as acts:
            score = compiled(x).sum()
        for name in ("0.bn", "1", ""):
            torch.testing.assert_close(acts[name], expected[name], rtol=1e-5, atol=1e-6)
        assert acts.gradients(score)["1"].abs().sum() > 0 and acts["_orig_mod.1"] is not None
        with patch(compiled, {"1": 0.0}):
            torch.testing.assert_close(compiled(x), net[3].bias.expand(2, 5))
        with capture(compiled, "0", stop_early=True):
            assert compiled(x) is None
        assert torch.equal(record(compiled, x, "0")["0"], record(net, x, "0")["0"])
        before = len(runs)
        torch.testing.assert_close(compiled(x), net(x))
        assert len(runs) > before  # outside, compiled code runs
    with pytest.raises(InputError, match=r"nearest: '0\.conv'"):
        sites(compiled, "_orig_mod.0.konv")


@pytest.mark.slow
def test_compiled_parts_module_compile_and_compiled_functions(x, compiler):
    net = network()
    expected = out_of_place(net, x)
    backend = _counting([])
    net[0] = torch.compile(net[0], backend=backend)
    net[1].compile(backend=backend)
    net.compile(backend=backend)
    step = torch.compile(lambda t: net(t) * 2, backend=backend)
    for _ in range(2):
        with unchanged(net), capture(net, ["0.bn", "0", "1.bn", "3"]) as acts:
            step(x)
        for name in acts:
            torch.testing.assert_close(acts[name], expected[name], rtol=1e-5, atol=1e-6)
        with capture(net, "1.bn", stop_early=True):
            assert net(x) is None
        step(x)


@pytest.mark.slow
def test_a_function_that_captures_can_be_compiled(x, compiler):
    net = network()

    def probe(t):
        with capture(net, "0") as acts:
            net(t)
        return acts["0"].sum()

    compiled = torch.compile(probe, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), probe(x))
    assert not net[0]._forward_hooks


@pytest.mark.slow
def test_a_model_compiled_inside_the_first_block_of_a_process():
    code = """
        import torch
        from lineament.core.sites.activations import capture
        net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(inplace=True), torch.nn.Linear(2, 2))
        x = torch.randn(3, 2)
        with capture(net, "0", gradients=True) as acts:
            compiled = torch.compile(net, backend="eager")
            for _ in range(2):
                compiled(x)
                assert torch.equal(acts["0"], net[0](x))
        with capture(net, "0", stop_early=True) as acts:
            assert compiled(x) is None
        assert torch.equal(compiled(x), net(x)) and not net[0]._forward_hooks
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
