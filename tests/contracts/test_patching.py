"""What every way of patching keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.patching.activation import activation_patching, patch_nodes
from lineament.explain.patching.attribution import attribution_patching
from lineament.explain.patching.circuit_nodes import component_nodes
from lineament.explain.patching.circuits import node_effects
from lineament.explain.patching.components import KINDS
from lineament.explain.patching.edges import edge_patching
from lineament.explain.patching.integrated import integrated_patching
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.patching.result import Node
from tests.contracts.language_models import prompts, tiny
from tests.contracts.unchanged import unchanged

METRIC = logit_difference([5, 6, 7], [8, 9, 10])


def nodes_by(method):
    def call(model, clean, corrupt, metric, **options):
        dictionaries = component_nodes(model, ["z", "mlp_out"])
        return node_effects(
            model, clean, corrupt, metric, dictionaries=dictionaries, method=method, **options
        )

    return call


METHODS = {
    "activation": activation_patching,
    "attribution": attribution_patching,
    "relevance": relevance_patching,
    "integrated, sites": lambda *a, **o: integrated_patching(*a, steps=2, **o),
    "integrated, inputs": lambda *a, **o: integrated_patching(*a, steps=2, path="input", **o),
    "AtP*": lambda *a, **o: attribution_patching(*a, sites=["q", "k"], qk_fix=True, grad_drop=True, **o),
    "edges": edge_patching,
    "edges, qkv": lambda *a, **o: edge_patching(*a, inputs="qkv heads", **o),
    "nodes, relp": nodes_by("relp"),
    "nodes, ig": nodes_by("ig"),
    "nodes, exact": nodes_by("exact"),
}
NORMALISED = [m for m in METHODS if not m.startswith("nodes")]


def numbers(result):
    """Every score of a result by example, (batch, ...)."""
    found = getattr(result, "per_example", None)
    if found is None:
        found = {**result.features, **{f"{k} error": v for k, v in result.errors.items()}}
    parts = [found] if isinstance(found, torch.Tensor) else list(found.values())
    return torch.cat([p.flatten(1) for p in parts], 1)


@pytest.mark.parametrize("name", METHODS)
class TestContract:
    def test_scores_are_finite_and_of_the_models_dtype(self, name):
        model, (clean, corrupt) = tiny("gpt2"), prompts()
        scores = numbers(METHODS[name](model, clean, corrupt, METRIC))
        assert len(scores) == 3 and scores.dtype == torch.float32 and not scores.requires_grad
        assert torch.isfinite(scores[~scores.isnan()]).all() and scores.nan_to_num().abs().max() > 0
        assert scores.isnan().any() == name.startswith("edges")

    def test_a_batch_is_its_examples(self, name):
        model, (clean, corrupt) = tiny("gpt2", torch.float64), prompts()
        options = {"normalise": False} if name in NORMALISED else {}
        whole = numbers(METHODS[name](model, clean, corrupt, METRIC, **options))
        for k in range(3):
            metric = logit_difference([5 + k], [8 + k])
            alone = numbers(METHODS[name](model, clean[k : k + 1], corrupt[k : k + 1], metric, **options))
            torch.testing.assert_close(whole[k : k + 1], alone, equal_nan=True)

    def test_memory_layout_and_the_callers_modes_change_nothing(self, name):
        model, (clean, corrupt) = tiny("gpt2"), prompts()
        reference = numbers(METHODS[name](model, clean, corrupt, METRIC))
        strided = clean.T.contiguous().T
        assert not strided.is_contiguous()
        same = {"equal_nan": True, "atol": 0, "rtol": 0}
        torch.testing.assert_close(numbers(METHODS[name](model, strided, corrupt, METRIC)), reference, **same)
        model.train()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(
                    numbers(METHODS[name](model, clean.clone(), corrupt, METRIC)), reference, **same
                )

    def test_the_number_of_threads_changes_nothing_beyond_rounding(self, name):
        model, (clean, corrupt) = tiny("gpt2", torch.float64), prompts()
        before = torch.get_num_threads()
        try:
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(numbers(METHODS[name](model, clean, corrupt, METRIC)))
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(*found, equal_nan=True)

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_the_model_is_left_as_it_was_also_after_an_error(self, name, family):
        model, (clean, corrupt) = tiny(family), prompts()
        model.train()
        next(model.parameters()).requires_grad_(False)
        with unchanged(model):
            METHODS[name](model, clean, corrupt, METRIC)

        def broken(logits):
            raise RuntimeError("broken")

        with unchanged(model), pytest.raises(RuntimeError, match="broken"):
            METHODS[name](model, clean, corrupt, broken)
        calls = []

        def later(logits):
            # The third forward fails: in the middle of the patches, or of the way.
            calls.append(0)
            if len(calls) > 2:
                raise RuntimeError("broken")
            return METRIC(logits)

        with unchanged(model), pytest.raises(RuntimeError, match="broken"):
            METHODS[name](model, clean, corrupt, later)
            later(later(later(torch.zeros(3, 1, 50))))

    def test_bad_prompts_are_refused_by_name(self, name):
        model, (clean, corrupt) = tiny("gpt2"), prompts()
        method = METHODS[name]
        with pytest.raises(
            InputError, match=r"expected the same shape, token by token[\s\S]*\[.*\][\s\S]*\[.*\]"
        ):
            method(model, clean, corrupt[:, :-1], METRIC)
        with pytest.raises(InputError, match="at least one element"):
            method(model, clean[:0], corrupt[:0], METRIC)
        with pytest.raises(InputError, match="outside the vocabulary of 50"):
            method(model, clean, corrupt + 60, METRIC)
        with pytest.raises(InputError, match="more than the model's 32 positions"):
            method(model, clean.repeat(1, 6), corrupt.repeat(1, 6), METRIC)
        with pytest.raises(InputError, match="expected token numbers"):
            method(model, clean.float(), corrupt.float(), METRIC)
        with pytest.raises(InputError, match="tokenizer: got None"):
            method(model, ["a"], ["b"], METRIC)

    def test_bad_metrics_are_refused_by_name(self, name):
        model, (clean, corrupt) = tiny("gpt2"), prompts()
        method = METHODS[name]
        with pytest.raises(InputError, match="one number for each of the 3 examples"):
            method(model, clean, corrupt, lambda logits: logits.mean())
        with pytest.raises(InputError, match="outside the vocabulary of 50"):
            method(model, clean, corrupt, logit_difference([5, 6, 70], [8, 9, 10]))
        with pytest.raises(InputError, match="expected a function"):
            method(model, clean, corrupt, 3)
        if name in NORMALISED:
            with pytest.raises(InputError, match="alike"):
                method(model, clean, clean, METRIC)

    def test_equal_prompts_have_no_effects(self, name):
        model, (clean, _) = tiny("gpt2"), prompts()
        options = {"normalise": False} if name in NORMALISED else {}
        assert numbers(METHODS[name](model, clean, clean, METRIC, **options)).nan_to_num().abs().max() < 1e-4

    def test_results_are_plain_data_on_demand(self, name):
        import json

        model, (clean, corrupt) = tiny("gpt2"), prompts()
        assert json.loads(json.dumps(METHODS[name](model, clean, corrupt, METRIC).to_dict(), allow_nan=False))


@pytest.mark.parametrize("method", [activation_patching, relevance_patching])
def test_bad_options_are_refused_by_name(method):
    model, (clean, corrupt) = tiny("gpt2"), prompts()
    for options, words in (
        ({"sites": "resid_per"}, "nearest: 'resid_pre'"),
        ({"direction": "denoise"}, "nearest: 'denoising'"),
        ({"corruption": "zero"}, "direction='noising'"),
        ({"positions": [9]}, "from -6 to 5"),
        ({"positions": "all"}, "positions"),
        ({"sites": {"resid_pre": "h.*"}}, "no site"),
        ({"sites": {"blocks": "transformer.h.*"}}, "at least one kind"),
        ({"attention_mask": torch.ones(3, 5)}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 0, 1, 1]] * 3)}, "in its middle"),
    ):
        with pytest.raises(InputError, match=words):
            method(model, clean, corrupt, METRIC, **options)
    with pytest.raises(InputError, match="corrupt: got None"):
        method(model, clean, None, METRIC)
    with pytest.raises(InputError, match="parallel residual"):
        method(tiny("pythia"), clean, corrupt, METRIC, sites="resid_mid")
    with pytest.raises(InputError, match="architecture of 'Sequential' is not known"):
        method(nn.Sequential(nn.Linear(2, 2)), torch.ones(2, 2), torch.zeros(2, 2), lambda y: y[:, 0])
    if method is activation_patching:
        with pytest.raises(InputError, match="batch_size"):
            method(model, clean, corrupt, METRIC, batch_size="all")


def test_shared_modules_are_no_one_place():
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(2, 4, 3)
    for method in (activation_patching, relevance_patching):
        with pytest.raises(InputError, match="ran twice in one forward"):
            method(net, x[0], x[1], lambda y: y[:, 0], sites={"hidden": "0"})


@pytest.mark.parametrize("family", ["gpt2", "pythia", "neox-serial", "llama", "gemma3"])
def test_nodes_patched_by_themselves_are_those_of_activation_patching(family):
    """Every kind of place that is ranked, at one position or at all: the same numbers as in the whole map; a group is patched at once."""
    model, (clean, corrupt) = tiny(family, torch.float64), prompts()
    kinds = [k for k in KINDS if not (k == "resid_mid" and family == "pythia")]
    for positions in ("each", "together"):
        whole = activation_patching(model, clean, corrupt, METRIC, sites=kinds, positions=positions)
        nodes = [node for kind in kinds for node in whole.top(2, kind=kind)]
        alone = patch_nodes(model, clean, corrupt, METRIC, nodes)
        assert alone.shape == (len(nodes), 3)
        torch.testing.assert_close(alone.mean(1).tolist(), [node.score for node in nodes])
    streams = [Node("resid_pre", 1, None, None, 0.0), Node("z", 0, 1, 2, 0.0)]
    both, first = patch_nodes(model, clean, corrupt, METRIC, [streams, streams[0]])
    torch.testing.assert_close(both, first)  # what the later block reads is replaced whole
    heads = [[Node("z", 0, None, h, 0.0) for h in range(4)], Node("attn_out", 0, None, None, 0.0)]
    if family != "gemma3":  # whose attention output is behind a norm
        every, output = patch_nodes(model, clean, corrupt, METRIC, heads)
        torch.testing.assert_close(every, output)


def test_a_node_that_the_model_has_not_is_named():
    model, (clean, corrupt) = tiny("gpt2"), prompts()
    with pytest.raises(InputError, match="there is no 'z' in layer 7; expected layers from 0 to 1"):
        patch_nodes(model, clean, corrupt, METRIC, [Node("z", 7, None, 0, 0.0)])
