"""Globs mean the same wherever they are taken: ``*`` stops at a dot, ``**`` crosses it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.core.checks import InputError
from lineament.core.curvature.matrices import hessian
from lineament.core.gradients import per_sample_gradients
from lineament.core.sites.activations import capture
from lineament.explain.relevance.rules import relevance_rules
from lineament.measure.landscape.axes import random_axes


def network():
    return nn.ModuleDict({"stem": nn.Linear(3, 3), "body": nn.ModuleDict({"inner": nn.Linear(3, 2)})})


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = network()

    def forward(self, x):
        return self.parts["body"]["inner"](F.silu(self.parts["stem"](x)))


DATA = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]


def sites(model, glob):
    with capture(model, glob) as acts:
        model(DATA[0][0])
    return set(acts)


def rules(model, glob):
    with relevance_rules(model.eval(), {glob: "epsilon"}) as coverage:
        return set(coverage.modules["epsilon"])


def parameters(call):
    return lambda model, glob: {name.rpartition(".")[0] for name in call(model, f"{glob}.weight")}


TAKERS = {
    "capture": sites,
    "relevance_rules": rules,
    "hessian": parameters(lambda m, glob: hessian(m, F.cross_entropy, DATA, params=glob).names),
    "per_sample_gradients": parameters(
        lambda m, glob: per_sample_gradients(m, F.cross_entropy, *DATA[0], params=glob)
    ),
    "random_axes": parameters(lambda m, glob: random_axes(m, 1, params=glob)[0].names),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_a_star_stops_at_a_dot_and_two_cross_it(taker):
    take = TAKERS[taker]
    # A container is a module of its own.
    assert take(Nested(), "parts.*") - {"parts.body"} == {"parts.stem"}
    assert take(Nested(), "parts.body.*") == {"parts.body.inner"}
    assert take(Nested(), "parts.**.inner") == {"parts.body.inner"}


@pytest.mark.parametrize("taker", ["hessian", "random_axes", "relevance_rules"])
def test_a_star_that_would_have_to_cross_a_dot_is_said(taker):
    with pytest.raises(InputError, match=r"'\*' stops at a dot: 'parts(\.\*\*)?.*\*\*.*' would name 1"):
        TAKERS[taker](Nested(), "parts.*inner")
