"""Wrapped language models are the models inside: token methods and patching give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.explain import activation_patching, attribute_tokens, logit_difference, relevance_patching
from lineament.explain.tokens.methods import METHODS

pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
from tests.contracts.language_models import prompts, tiny
from tests.contracts.token_models import QUICK

WRAPPERS = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "bayesian"])
def test_token_methods_see_the_model_inside(method, wrapper):
    model = tiny("gpt2")
    bare = attribute_tokens(model, [5, 7, 9, 11], method=method, **QUICK.get(method, {}))
    found = attribute_tokens(WRAPPERS[wrapper](model), [5, 7, 9, 11], method=method, **QUICK.get(method, {}))
    torch.testing.assert_close(found.scores, bare.scores)


@pytest.mark.parametrize("method", [activation_patching, relevance_patching])
def test_patching_sees_the_model_inside(method):
    model, (clean, corrupt) = tiny("llama"), prompts()
    metric = logit_difference([5, 6, 7], [8, 9, 10])
    bare = method(model, clean, corrupt, metric, sites=["z", "mlp_out"])
    found = method(nn.DataParallel(model), clean, corrupt, metric, sites=["z", "mlp_out"])
    for kind in bare.scores:
        torch.testing.assert_close(found.scores[kind], bare.scores[kind])
