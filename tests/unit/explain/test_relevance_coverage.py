"""Which module gets which rule, what is refused, and that nothing stays on the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.contracts.language_models import prompts, tiny
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.relevance.rules import PRESETS, relevance_rules


def test_a_rule_that_matches_nothing_is_an_error():
    gpt2 = tiny("gpt2")
    for rules, words in (
        (["ln", "half"], "'half' matched no module"),
        ("half", "'half'"),
        ("LN", "'LN', which is not a choice"),
    ):
        with pytest.raises(InputError, match=words), relevance_rules(gpt2, rules):
            pass
    with relevance_rules(gpt2) as coverage:
        assert "half" not in coverage.modules

    class Odd(nn.Module):
        def forward(self, x):
            return x.exp()

    with (
        pytest.raises(InputError, match="leaf modules: Odd"),
        relevance_rules(nn.Sequential(nn.Linear(2, 2), Odd()).eval()),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"nearest: 'transformer\.h\.0\.mlp'"),
        relevance_rules(gpt2, ["relp", {"transformer.h.0.mpl": "gradient"}]),
    ):
        pass
    with pytest.raises(InputError, match="'ah' and 'uniform'"), relevance_rules(gpt2, ["ah", "uniform"]):
        pass
    with relevance_rules(nn.Sequential(nn.Linear(2, 2)).eval()) as coverage:
        assert coverage.modules == {}


def test_a_rule_whose_modules_do_not_run_is_an_error():
    """What switching a flag after loading did silently in the official code."""

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.act = nn.Linear(3, 3), nn.GELU()

        def forward(self, x):
            return F.gelu(self.body(x))

    x = torch.randn(2, 4, 3)
    with pytest.raises(InputError, match="none of which ran"):
        relevance_patching(Idle(), x[0], x[1], lambda y: y[:, 0], sites={"hidden": "body"})


def test_users_modules_by_class_name_and_glob():
    class MyAct(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(2 * x)

    net = nn.Sequential(nn.Linear(3, 4), MyAct(), nn.LayerNorm(4), MyAct()).double().eval()
    x = torch.randn(5, 3).double()
    with relevance_rules(net, {MyAct: "identity", nn.LayerNorm: "ln"}) as coverage:
        net(x.requires_grad_())
    assert coverage.calls == {"identity": {"1": 1, "3": 1}, "ln": {"2": 1}}
    with relevance_rules(net, {net[1]: "identity"}) as coverage:
        assert coverage.modules == {"identity": {"1": "MyAct"}}
    with relevance_rules(net, ["ln", {"[13]": "identity"}]) as coverage:
        assert set(coverage.modules) == {"ln", "identity"}


@pytest.mark.parametrize("rules", [*PRESETS, "epsilon", "gamma"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_nothing_is_left_behind(rules, family):
    model, (clean, _) = tiny(family), prompts()
    before = torch.autograd.grad(model(clean).logits.square().mean(), list(model.parameters()))
    with unchanged(model):
        with relevance_rules(model, rules):
            model(clean)
        with pytest.raises(RuntimeError, match="stop"), relevance_rules(model, rules):
            model(clean).logits.sum().backward(inputs=[torch.zeros(1, requires_grad=True)], retain_graph=True)
            raise RuntimeError("stop")
    after = torch.autograd.grad(model(clean).logits.square().mean(), list(model.parameters()))
    for a, b in zip(before, after):
        assert torch.equal(a, b)


def test_training_mode_is_refused():
    with (
        pytest.raises(InputError, match=r"call model.eval\(\)"),
        relevance_rules(nn.Sequential(nn.Dropout())),
    ):
        pass
