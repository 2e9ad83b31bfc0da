"""Naming, recording, replacing and differentiating what passes in a network."""

from __future__ import annotations

import doctest
import gc
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn
from torch.utils.checkpoint import checkpoint

from lineament.core.checks import InputError
from lineament.core.sites import capture, patch, record, sites


class Residual(nn.Module):
    """All the in-place traps of an image network in one block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.Identity()

    def forward(self, x):
        identity = self.skip(x)
        out = self.bn(self.conv(self.relu(self.first(x))))
        out += identity
        return self.relu(out)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Residual(), Residual(), nn.Flatten(), nn.Linear(48, 5)).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def out_of_place(net, x):
    """What passes at each site of ``network``, computed by hand without any in-place operation."""
    seen = {}
    for index in range(2):
        block = net[index]
        seen[f"{index}:in"] = x
        first = seen[f"{index}.first"] = torch.conv2d(x, block.first.weight, block.first.bias, padding=1)
        second = torch.relu(first)
        conv = seen[f"{index}.conv"] = torch.conv2d(second, block.conv.weight, block.conv.bias, padding=1)
        bn = seen[f"{index}.bn"] = nn.functional.batch_norm(
            conv, block.bn.running_mean, block.bn.running_var, block.bn.weight, block.bn.bias
        )
        seen[f"{index}.skip"] = x
        x = seen[f"{index}"] = torch.relu(bn + x)
    seen["2"] = x.flatten(1)
    seen[""] = seen["3"] = nn.functional.linear(seen["2"], net[3].weight, net[3].bias)
    return seen


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_are_those_of_named_modules_and_globs_choose_among_them():
    net = network()
    assert sites(net) == [name for name, _ in net.named_modules() if name]
    assert sites(net, "*.conv") == ["0.conv", "1.conv"]
    assert sites(net, "[01]:in") == ["0:in", "1:in"]
    assert sites(net, "0.conv:out") == ["0.conv:out"]
    assert sites(net, "") == [""] and sites(net, ":in") == [":in"]
    assert sites(nn.Linear(1, 1)) == []


def test_an_unknown_site_names_the_nearest():
    net = network()
    with pytest.raises(InputError, match=r"'0\.konv' is no site of Sequential; nearest: '0\.conv'"):
        sites(net, "0.konv")
    with pytest.raises(InputError, match=r"nearest: '0\.conv'"):
        sites(net, "0.konv:in")
    for wrong in ("*.attn", "0.conv:z", "0.conv[0]", "0.conv:in[0]"):
        with pytest.raises(InputError, match="sites: "):
            sites(net, wrong)
    with pytest.raises(InputError, match="expected at least one site"), capture(net, []):
        pass
    wrong: Any = 3
    with pytest.raises(InputError, match="got 3, expected a string"):
        capture(net, [wrong]).__enter__()
    with pytest.raises(InputError, match=r"got 3, expected a torch\.nn\.Module"):
        capture(wrong, "0").__enter__()


def test_odd_module_names_are_names_before_they_are_patterns(x):
    net = nn.ModuleDict({"a[0]": nn.Identity(), "b:in": nn.Identity(), "a0": nn.Identity()})
    assert sites(net, "a[0]") == ["a[0]"] and sites(net, "b:in") == ["b:in"]
    with capture(net, ["a[0]", "b:in"]) as acts:
        net["a[0]"](x)
        net["b:in"](x + 1)
    assert torch.equal(acts["a[0]"], x) and torch.equal(acts["b:in"], x + 1)


def test_a_module_that_holds_one_above_it_is_walked_once():
    net = nn.Sequential(nn.Linear(1, 1))
    net[0].owner = net
    assert sites(net) == ["0"]


# --- recording -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_values_are_right_whatever_is_done_in_place_later(x, gradients, grad_mode):
    net = network()
    expected = out_of_place(net, x)
    plain = net(x)
    with (
        unchanged(net),
        torch.set_grad_enabled(grad_mode),
        capture(net, list(expected), gradients=gradients) as acts,
    ):
        output = net(x)
    assert torch.equal(output, plain)
    assert list(acts) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(acts[name], value.detach(), rtol=1e-5, atol=1e-6, check_stride=False)
        assert acts[name].requires_grad == (gradients and grad_mode)


def test_gradients_are_those_of_the_network_written_without_in_place_operations(x):
    net = network().double()
    x = x.double()
    names = ["0.first", "0.conv", "0.bn", "0", "1:in", "1.bn", "1.skip", "2", ""]
    with unchanged(net), capture(net, names, gradients=True) as acts:
        score = net(x)[:, 1].square().sum()
        found = acts.gradients(score)
    # By hand: the gradient at a site is that of the score as a function of what passes there, all else held.
    for name in names:
        at = out_of_place(net, x)[name].detach().requires_grad_()
        with patch(net, {name: at}):
            by_hand = torch.autograd.grad(net(x)[:, 1].square().sum(), at)[0]
        torch.testing.assert_close(found[name], by_hand, msg=name)
    finite = 1e-6 * torch.randn_like(acts["0.bn"])
    with patch(net, {"0.bn": lambda t: t + finite}), torch.no_grad():
        moved = net(x)[:, 1].square().sum()
    assert (moved - score.detach()).item() == pytest.approx((found["0.bn"] * finite).sum().item(), rel=1e-3)


def test_the_gradient_at_an_input_leaves_out_the_ways_around_it():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.twice.weight, 2.0)

        def forward(self, x):
            return self.twice(x) + 10 * x

    net = Around()
    with capture(net, ["twice:in", ":in"], gradients=True) as acts:
        score = net(torch.ones(1, 1)).sum()
    assert {name: g.item() for name, g in acts.gradients(score).items()} == {"twice:in": 2.0, ":in": 12.0}


def test_gradients_of_a_frozen_model_of_unused_sites_and_of_gradients():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).requires_grad_(False)
    nn.init.constant_(net[1].weight, 3.0)
    with unchanged(net), capture(net, ["0", "1"], gradients=True) as acts:
        net(torch.ones(1, 2))
    score = (acts["0"] ** 3).sum()
    first = acts.gradients(score, create_graph=True)
    assert torch.equal(first["1"], torch.zeros(1, 1))
    torch.testing.assert_close(first["0"], 3 * acts["0"] ** 2)
    second = torch.autograd.grad(first["0"].sum(), acts["0"])[0]
    torch.testing.assert_close(second, 6 * acts["0"])


def test_gradients_say_what_is_missing():
    net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1))
    ids = torch.tensor([[0, 1]])
    with capture(net, "0") as acts:
        score = net(ids).sum()
        with pytest.raises(InputError, match="without gradients=True"):
            acts.gradients(score)
    with capture(net, [":in", "0"], gradients=True) as acts:
        score = net(ids)
        with pytest.raises(InputError, match=r"shape \(1, 2, 1\), expected a tensor with one element"):
            acts.gradients(score)
        with pytest.raises(InputError, match="':in' holds an int64"):
            acts.gradients(score.sum())
    with capture(net, "0", gradients=True) as acts, torch.no_grad():
        score = net(ids).sum()
        with pytest.raises(InputError, match="no_grad"):
            acts.gradients(score)


def test_what_is_recorded_is_the_callers_own(x):
    net = network()
    with capture(net, "0") as acts, torch.no_grad():
        before = net(x)
        acts["0"].zero_()
        assert torch.equal(net(x), before)
        assert acts["0"].abs().sum() > 0  # of the second forward


def test_every_call_is_recorded_and_every_forward_starts_afresh(x):
    net = network()
    with capture(net, ["0.relu", "0"]) as acts:
        net(x)
        assert len(acts.calls("0.relu")) == 2
        with pytest.raises(InputError, match=r"reached 2 times.*use \.calls\('0\.relu'\)"):
            acts["0.relu"]
        net(x + 1)
        assert len(acts.calls("0.relu")) == 2
        assert torch.equal(acts["0"], record(net, x + 1, "0")["0"])
    assert torch.equal(acts.calls("0.relu")[1], acts["0"])


def test_without_a_forward_of_the_model_the_calls_of_its_parts_count(x):
    net = network()
    with capture(net, ["0", "1"]) as acts:
        net[0](x)
        net[0](x + 1)
    assert len(acts.calls("0")) == 2
    with pytest.raises(InputError, match=r"'1' was not reached: Residual did not run"):
        acts["1"]


def test_shared_modules_have_all_their_names():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    assert sites(net) == ["0", "1"]
    with capture(net, ["0", "2"]) as acts:
        net(torch.ones(1, 2))
    assert len(acts.calls("0")) == len(acts.calls("2")) == 2


def test_names_that_were_not_captured_and_sites_that_were_not_reached(x):
    net = network()
    with capture(net, ["0.conv", "1"]) as acts:
        with pytest.raises(InputError, match=r"'0\.conv' was not reached"):
            acts["0.conv"]
        net(x)
    with pytest.raises(KeyError, match=r"'0\.konv' was not captured; nearest: '0\.conv'"):
        acts["0.konv"]
    assert "0.conv:out" in acts and acts["0.conv:out"].equal(acts["0.conv"])
    assert "0.conv:in" not in acts and acts.get("2") is None
    assert len(acts) == 2 and set(dict(acts)) == {"0.conv", "1"}


def test_everything_is_removed_after_an_exception_and_what_was_recorded_stays(x):
    net = network()

    def fail(_):
        raise ZeroDivisionError

    with unchanged(net):
        with pytest.raises(ZeroDivisionError), capture(net, ["0", "1"]) as acts, patch(net, {"1.conv": fail}):
            net(x)
        assert acts["0"].shape == x.shape
        with pytest.raises(InputError), capture(net, ["0", "nowhere"]):
            pass
        with pytest.raises(InputError), patch(net, {"0": 0.0, "nowhere": 0.0}):
            pass
        with pytest.raises(KeyboardInterrupt), capture(net, "0", stop_early=True):
            raise KeyboardInterrupt
    net(x + 1)
    assert torch.equal(acts["0"], record(net, x, "0")["0"])


def test_nothing_keeps_the_recorded_tensors_alive(x):
    net = network()
    with capture(net, "0", gradients=True) as acts:
        net(x)
    gone = []
    torch.utils.weak.weakref.finalize(acts, gone.append, 1)
    del acts
    gc.collect()
    assert gone == [1]


def test_which_sites_a_forward_came_by(x):
    net = nn.ModuleDict({"used": nn.Identity(), "unused": nn.Identity()})
    with capture(net, "*") as acts:
        assert acts.reached() == []
        net["used"](x)
        net["used"](x)
    assert acts.reached() == ["used"]


# --- early stop ------------------------------------------------------------------------------------------------------


def test_a_forward_ends_once_every_site_was_reached(x):
    net = network()
    ran = []
    handle = net[3].register_forward_hook(lambda *_: ran.append(1))
    with capture(net, ["0", "1.conv"], stop_early=True) as acts:
        assert net(x) is None
        assert net(x + 1) is None
    assert not ran and torch.equal(acts["1.conv"], record(net, x + 1, "1.conv")["1.conv"])
    assert not ran and net(x) is not None and ran
    handle.remove()


def test_stop_early_waits_for_the_blocks_around_and_inside(x):
    net = network()
    with capture(net, "3") as outer, capture(net, "0", stop_early=True) as inner:
        assert net(x) is not None
    assert outer["3"].shape == (2, 5) and inner["0"].shape == x.shape
    with capture(net, "0", stop_early=True) as outer, capture(net, "1", stop_early=True) as inner:
        assert net(x) is None
    assert outer["0"].shape == inner["1"].shape == x.shape
    with capture(net, "0", stop_early=True) as outer, capture(net[0], "conv", stop_early=True) as inner:
        assert net(x) is None
    assert inner["conv"].shape == x.shape


def test_a_model_that_catches_exceptions_is_stopped_all_the_same():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Identity()

        def forward(self, x):
            try:
                x = self.first(x)
            except Exception:
                x = x * 0
            return self.second(x)

    with capture(Careful(), "first", stop_early=True) as acts:
        assert acts  # a mapping with one name
    net = Careful()
    with capture(net, "first", stop_early=True):
        assert net(torch.ones(1)) is None


def test_blocks_may_close_in_any_order(x):
    net = network()
    with unchanged(net):
        first, second = capture(net, "0"), capture(net, "1", stop_early=True)
        a, b = first.__enter__(), second.__enter__()
        net(x)
        first.__exit__(None, None, None)
        kept = a["0"]
        assert net(x + 1) is None
        assert torch.equal(a["0"], kept) and not torch.equal(b["1"], record(net, x, "1")["1"])
        second.__exit__(None, None, None)


def test_record_is_one_forward_in_eval_mode(x):
    net = network().train()
    with unchanged(net):
        found = record(net, (x,), ["0", "*.bn"])
    assert list(found) == ["0", "0.bn", "1.bn"] and not found["0"].requires_grad
    torch.testing.assert_close(found["0"], out_of_place(net, x)["0"].detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(record(net, {"input": x}, ":in")[":in"], x)


# --- what modules take and return ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: torch.Tensor
    second: str


@dataclass(frozen=True)
class Answer:
    loss: torch.Tensor
    scores: torch.Tensor
    note: str = "kept"


class Speaker(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x, *, mask=None):
        return self.form(x)


FORMS = {
    "tuple": (lambda x: (None, x, "kept"), lambda y: y[1], lambda y: y[2] == "kept" and y[0] is None),
    "list": (lambda x: [x, 3], lambda y: y[0], lambda y: y[1] == 3 and isinstance(y, list)),
    "dict": (lambda x: {"loss": x.sum(), "a": x}, lambda y: y["a"], lambda y: list(y) == ["loss", "a"]),
    "namedtuple": (lambda x: Pair(x, "kept"), lambda y: y.first, lambda y: y.second == "kept"),
    "dataclass": (lambda x: Answer(x.sum(), x), lambda y: y.scores, lambda y: y.note == "kept"),
    "nested": (lambda x: ([], {"a": (x,)}), lambda y: y[1]["a"][0], lambda y: y[0] == []),
    "structseq": (lambda x: x.max(0), lambda y: y.values, lambda y: (y.indices == 0).all()),
}


@pytest.mark.parametrize(("form", "get", "rest"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("gradients", [False, True])
def test_the_first_tensor_of_any_structure_and_the_rest_of_it_kept(form, get, rest, gradients):
    net = nn.Sequential(Speaker(form))
    x = torch.ones(1, 2)
    value = get(form(x))
    with capture(net, "0", gradients=gradients) as acts:
        output = net(x)
    assert torch.equal(acts["0"], value) and type(output) is type(form(x)) and rest(output)
    with patch(net, {"0": lambda t: t + 5}):
        output = net(x)
    assert torch.equal(get(output), value + 5) and type(output) is type(form(x)) and rest(output)


def test_keyword_arguments_count_in_the_order_of_the_signature():
    class Keywords(nn.Module):
        def forward(self, hidden, mask=None, extra=None):
            return hidden * mask

    net = nn.Sequential()
    net.inner = Keywords()
    hidden, mask = torch.full((2,), 2.0), torch.full((2,), 3.0)
    with capture(net, "inner:in", gradients=True) as acts, patch(net, {"inner:in": lambda t: t + 1}):
        output = net.inner(mask=mask, extra="kept", hidden=hidden)
    assert acts["inner:in"].tolist() == [3.0, 3.0] and output.tolist() == [9.0, 9.0]
    with capture(net, "inner:in") as acts:
        net.inner(hidden, mask=mask)
    assert torch.equal(acts["inner:in"], hidden)


def test_a_site_without_a_tensor_says_so():
    net = nn.Sequential(Speaker(lambda x: "text"))
    with capture(net, "0") as acts:
        net(torch.ones(1))
    with pytest.raises(InputError, match=r"site '0': Speaker passed 'text', which holds no tensor"):
        acts["0"]
    with pytest.raises(InputError, match="no tensor to replace"), patch(net, {"0": 0.0}):
        net(torch.ones(1))


# --- patching --------------------------------------------------------------------------------------------------------


def test_patch_by_value_by_function_and_back(x):
    net = network()
    whole = net(x)
    with unchanged(net):
        with patch(net, {"1": 0.0}):
            torch.testing.assert_close(net(x), net[3].bias.expand(2, 5))
        with patch(net, {"3": torch.arange(5.0)}), capture(net, ["3", ""]) as acts:
            assert torch.equal(net(x), torch.arange(5.0).expand(2, 5))
        assert torch.equal(acts["3"], acts[""])
        with patch(net, {"*.conv": lambda t: t.clamp_(max=0)}):
            assert not torch.equal(net(x), whole)
        with patch(net, {":in": lambda t: t * 0}):
            torch.testing.assert_close(net(x), net(x * 0))
    assert torch.equal(net(x), whole)


def test_the_input_of_others_is_not_changed_by_a_function_that_works_in_place(x):
    net = network()
    kept = x.clone()
    zeroed = net(x * 0)

    def zero(t):
        t.zero_()
        return t

    with patch(net, {":in": zero}):
        assert torch.equal(net(x), zeroed)
    assert torch.equal(x, kept)


def test_the_callers_value_survives_in_place_operations(x):
    net = network()
    value = torch.randn(2, 3, 4, 4)
    kept = value.clone()
    stash = []
    with patch(net, {"0.bn": value, "1.bn": lambda t: stash.append(t) or t}), torch.no_grad():
        net(x)
        net(x)
    assert torch.equal(value, kept) and (stash[0] < 0).any()


def test_gradients_flow_through_a_patch(x):
    net = network()
    value = torch.zeros(3, 1, 1, requires_grad=True)
    with patch(net, {"0": value}):
        net(x).sum().backward()
    assert value.grad is not None and value.grad.shape == (3, 1, 1) and value.grad.abs().sum() > 0
    scale = torch.ones((), requires_grad=True)
    with patch(net, {"1": lambda t: t * scale}), capture(net, ["1"], gradients=True) as acts:
        score = net(x).sum()
    torch.testing.assert_close(
        torch.autograd.grad(score, scale, retain_graph=True)[0],
        (acts.gradients(score)["1"] * acts["1"]).sum().detach(),
    )


def test_patches_nest_the_outer_first_and_capture_sees_the_last(x):
    net = nn.Sequential(nn.Identity())
    one = torch.ones(1)
    with patch(net, {"0": lambda t: t + 1}), patch(net, {"0": lambda t: t * 10}):
        assert net(one).item() == 20
    with capture(net, ["0", "0:in"]) as acts, patch(net, {"0": lambda t: t + 1, "0:in": 5.0}):
        net(one)
    assert acts["0"].item() == 6 and acts["0:in"].item() == 5
    for gradients in (False, True):
        with capture(net, "0", gradients=gradients) as a, capture(net, "0", gradients=True) as b:
            net(one)
        assert a["0"].item() == b["0"].item() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.ones(4, 5), r"a float32 tensor of shape \(4, 5\), expected one that broadcasts to \(2, 5\)"),
        (torch.ones(1, 2, 5), r"broadcasts to \(2, 5\)"),
        (lambda t: None, "the function returned None, expected a tensor"),
        (lambda t: t.sum(1), r"shape \(2,\), expected one that broadcasts to \(2, 5\)"),
        (torch.ones(5, dtype=torch.complex64), "cannot stand for"),
    ],
)
def test_a_patch_that_does_not_fit_says_what_does(x, change, message):
    net = network()
    with pytest.raises(InputError, match=message), unchanged(net), patch(net, {"3": change}):
        net(x)


def test_patch_refuses_what_is_no_change(x):
    net = network()
    wrong: Any = "zero"
    with pytest.raises(InputError, match="got 'zero', expected a tensor, a number or a function"):
        patch(net, {"3": wrong}).__enter__()
    with pytest.raises(InputError, match="expected a mapping"):
        patch(net, wrong).__enter__()


# --- under PyTorch's modes and transforms ----------------------------------------------------------------------------


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


# --- compiled models -------------------------------------------------------------------------------------------------


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
        from lineament.core.sites import capture
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


def test_the_examples_of_the_guide():
    pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
    guide = Path(__file__).parents[2] / "docs" / "core" / "sites.md"
    failed, run = doctest.testfile(
        str(guide), module_relative=False, optionflags=doctest.IGNORE_EXCEPTION_DETAIL
    )
    assert run > 15 and not failed
