"""Padding that comes as ids without a mask: every method says so, and none reads it as text."""

from __future__ import annotations

import pytest
import torch

from lineament.core.checks import InputError
from lineament.explain import (
    activation_patching,
    attribute_tokens,
    attribution_patching,
    edge_patching,
    explain_continuation,
    integrated_patching,
    logit_difference,
    node_effects,
    patch_nodes,
    relevance_patching,
    soft_faithfulness,
)
from lineament.explain.patching.circuit_nodes import component_nodes
from lineament.explain.patching.result import Node
from lineament.explain.tokens.methods import METHODS

pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
from tests.contracts.language_models import tiny


class Words:
    """A tokenizer of which only the padding matters: id 2, as in the small models."""

    pad_token_id, bos_token_id, eos_token_id, cls_token_id, unk_token_id = 2, 0, 1, None, None
    all_special_ids = (0, 1, 2)

    def __init__(self, pad=2):
        self.pad_token_id = pad

    def decode(self, ids):
        return " ".join(f"<{i}>" for i in ids)

    def convert_ids_to_tokens(self, ids):
        return [f"<{i}>" for i in ids]


NODE = Node("resid_pre", 0, None, None, 0.0)
PATCHING = {
    "activation": activation_patching,
    "nodes": lambda *a, **o: patch_nodes(*a, [NODE], **o),
    "attribution": attribution_patching,
    "relevance": relevance_patching,
    "integrated": integrated_patching,
    "edges": edge_patching,
    "circuits": lambda model, *a, **o: node_effects(
        model, *a, dictionaries=component_nodes(model, ["mlp_out"]), **o
    ),
}
CLEAN, CORRUPT = [5, 7, 9, 11], [5, 8, 9, 11]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", PATCHING)
def test_patching_refuses_padding_without_a_mask(method, side):
    model, metric = tiny("gpt2"), logit_difference([5, 5], [6, 6])
    rows = [
        torch.tensor([[*row, 12, 13], [2, 2, *row] if side == "left" else [*row, 2, 2]])
        for row in (CLEAN, CORRUPT)
    ]
    with pytest.raises(
        InputError, match=r"clean: it holds 2 padding tokens .'<2>', id 2.*give attention_mask"
    ):
        PATCHING[method](model, *rows, metric, tokenizer=Words())
    # With a mask, the padded row is what it is alone.
    if method == "activation":
        mask = (rows[0] != 2).long()
        both = activation_patching(
            model, *rows, metric, tokenizer=Words(), attention_mask=mask, normalise=False
        )
        alone = activation_patching(
            model,
            *(torch.tensor([row]) for row in (CLEAN, CORRUPT)),
            logit_difference([5], [6]),
            normalise=False,
        )
        at = slice(2, 6) if side == "left" else slice(0, 4)
        for kind, scores in alone.per_example.items():
            torch.testing.assert_close(both.per_example[kind][1][:, at], scores[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ids", [[2, *CLEAN], [*CLEAN, 2], [*CLEAN, 2, 2]])
@pytest.mark.parametrize("method", METHODS)
def test_token_methods_refuse_padding(method, ids):
    with pytest.raises(
        InputError, match=r"prompt: it holds . padding tokens .*give each prompt without padding"
    ):
        attribute_tokens(tiny("gpt2"), ids, tokenizer=Words(), method=method)


def test_what_judges_and_continues_refuses_it_too():
    model, ids = tiny("gpt2"), [*CLEAN, 2]
    for call in (
        lambda: soft_faithfulness(model, ids, torch.ones(1, 5), tokenizer=Words()),
        lambda: explain_continuation(model, ids, [3], tokenizer=Words()),
    ):
        with pytest.raises(InputError, match="padding tokens"):
            call()


def test_the_end_of_text_as_padding_is_padding_where_it_repeats():
    model, metric, words = tiny("gpt2"), logit_difference([5], [6]), Words(pad=1)
    once = [torch.tensor([[1, *row]]) for row in (CLEAN, CORRUPT)]
    activation_patching(model, *once, metric, tokenizer=words)  # it begins the text
    twice = [torch.tensor([[1, 1, *row]]) for row in (CLEAN, CORRUPT)]
    with pytest.raises(InputError, match="clean: it holds 2 padding tokens"):
        activation_patching(model, *twice, metric, tokenizer=words)
