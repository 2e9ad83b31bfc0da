"""Naming, recording and differentiating what passes in a network."""

from __future__ import annotations

import doctest
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.networks import network, out_of_place
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture, patch, record
from lineament.core.sites.hooks import BEHIND, replace, tap
from lineament.core.sites.naming import resolve, sites


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


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
    with capture(net, "**") as acts:
        assert acts.reached() == []
        net["used"](x)
        net["used"](x)
    assert acts.reached() == ["used"]


class Everything(nn.Module):
    """Blocks in a list, which never runs itself; one that returns no tensor, one that runs twice, one that is never called."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2)])
        self.twice, self.unused, self.count = nn.Tanh(), nn.Linear(3, 3), Count()

    def forward(self, x):
        for block in self.h:
            x = self.twice(block(x))
        self.count(x)
        return x


class Count(nn.Module):
    def forward(self, x):
        return len(x)


def test_everything_that_passes_is_kept_and_the_rest_skipped():
    net, x = Everything(), torch.randn(2, 3)
    for chosen in ((), ("**",)):
        with capture(net, *chosen, gradients=True) as acts:
            score = net(x).sum()
        passed = ["h.0", "h.0.0", "h.0.1", "h.1", "h.1.0", "h.1.1"]
        assert list(acts) == passed == list(acts.gradients(score)) and len(acts) == 6
        assert torch.equal(dict(acts)["h.0"], net.h[0](x)) and len(acts.calls("twice")) == 2
        assert acts.reached() == ["h.0", "h.0.0", "h.0.1", "h.1", "h.1.0", "h.1.1", "twice"]
    assert list(record(net, x, "**")) == passed
    with capture(net, ["**", "unused"]) as acts:
        net(x)
    with pytest.raises(InputError, match="'unused' was not reached"):
        dict(acts)


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("h.*", ["h.0", "h.1"]),
        ("*", ["h", "twice", "unused", "count"]),
        ("h.**", ["h.0", "h.0.0", "h.0.1", "h.1", "h.1.0", "h.1.1"]),
        ("**.0", ["h.0", "h.0.0", "h.1.0"]),
        ("h.[!0].?", ["h.1.0", "h.1.1"]),
        ("**1:in", ["h.0.1:in", "h.1:in", "h.1.1:in"]),
    ],
)
def test_a_star_stops_at_a_dot_and_two_cross_it(glob, found):
    assert sites(Everything(), glob) == found


def test_a_star_that_would_have_to_cross_a_dot_says_so():
    with pytest.raises(
        InputError, match=r"'h\*1' is no site of Everything; \* stops at a dot, 'h\*\*1' crosses it"
    ):
        sites(Everything(), "h*1")


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


def test_hooks_run_by_rank_whatever_the_order_in_which_they_were_set(x):
    net = network()
    seen = []

    def note(name, change=0.0):
        def see(tensor):
            seen.append((name, float(tensor.detach().flatten()[0])))
            return tensor + change if change else None

        return see

    start = float(net[0](x).detach().flatten()[0])
    with (
        unchanged(net),
        tap(net, {"0": note("behind")}, rank=BEHIND),
        tap(net, {"0": note("tap")}),
        replace(net, {"0": note("change", 1.0)}),
        replace(net, {"0:out": note("second change", 10.0)}),
    ):
        net(x)
    assert [name for name, _ in seen] == ["change", "second change", "tap", "behind"]
    assert [value - start for _, value in seen] == pytest.approx([0, 1, 11, 11], abs=1e-5)


def test_a_tap_sees_the_tensor_itself_and_may_give_it_another_graph(x):
    net = network()
    same, received = [], []
    with tap(net, {":in": lambda t: same.append(t is x)}):
        net(x)
    assert same == [True]

    def own_graph(tensor):
        onward = tensor.detach().requires_grad_()
        onward.register_hook(received.append)
        return onward

    with tap(net, {"1:in": own_graph}):
        net(x).sum().backward()
    with capture(net, "1:in", gradients=True) as acts:
        score = net(x).sum()
    torch.testing.assert_close(received[0], acts.gradients(score)["1:in"])
    assert net[0].conv.weight.grad is None
    with pytest.raises(InputError, match="is no site of"), tap(net, {"nowhere": print}):
        pass


def test_a_sites_key_is_that_of_the_tensor_that_passes():
    net = network()
    found = {**resolve(net, ["0.conv", "0.conv:in", "*.conv:out"])}
    assert found["0.conv"].key == found["0.conv:out"].key != found["0.conv:in"].key
    assert found["0.conv"].input.key == found["0.conv:in"].key and found["0.conv"] in {found["0.conv"]}


def test_the_examples_of_the_guide():
    pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
    guide = Path(__file__).parents[3] / "docs" / "core" / "sites.md"
    failed, run = doctest.testfile(
        str(guide), module_relative=False, optionflags=doctest.IGNORE_EXCEPTION_DETAIL
    )
    assert run > 15 and not failed
