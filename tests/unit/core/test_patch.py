"""Replacing what passes, and finding it in whatever modules take and return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from tests.contracts.networks import network
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture, patch


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


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
    with pytest.raises(InputError, match="'text' passed, which holds no tensor"), patch(net, {"0": 0.0}):
        net(torch.ones(1))


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
