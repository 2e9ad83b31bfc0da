"""Input that cannot be used, case by case: which prompt, which token, which image, and what to do instead."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.token_models import byte_tokenizer, model
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.faithfulness.deletion import deletion_insertion
from lineament.explain.faithfulness.input_gradients import attribution, input_gradient
from lineament.explain.faithfulness.pixel_scores import infidelity, score_maps, sensitivity
from lineament.explain.faithfulness.retraining import accuracy, diffroar
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.edges import edge_patching
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.saliency.maps import saliency
from lineament.explain.tokens.recursion import reagent
from lineament.train.attacks import pgd
from lineament.train.stacked import Training

TEXT = "the cat sat on the mat"


@pytest.mark.parametrize("method", [activation_patching, relevance_patching, edge_patching])
def test_encoder_decoders_are_not_patched(method):
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder-decoder"):
        method(
            model("t5"),
            [TEXT],
            ["the dog sat on the mat"],
            logit_difference([5], [6]),
            tokenizer=byte_tokenizer(),
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_prompts_of_several_lengths_in_float64_give_numbers(name, attention):
    net = model(name, attention).double()
    clean, corrupt = [TEXT, "the cat ran"], ["the dog sat on the mat", "the dog ran"]
    options = {"tokenizer": byte_tokenizer(), "normalise": False, "sites": "mlp_out", "positions": "together"}
    both = relevance_patching(net, clean, corrupt, logit_difference([281, 282], [299, 300]), **options)
    for k, (right, wrong) in enumerate(((281, 299), (282, 300))):
        alone = relevance_patching(
            net, clean[k : k + 1], corrupt[k : k + 1], logit_difference([right], [wrong]), **options
        )
        # RMS norms of transformers compute in float32.
        torch.testing.assert_close(
            both.per_example["mlp_out"][k], alone.per_example["mlp_out"][0], rtol=1e-4, atol=1e-6
        )
    found = reagent(net, clean, tokenizer=byte_tokenizer(), steps=2, probes=2)
    for k, text in enumerate(clean):
        alone = reagent(net, text, tokenizer=byte_tokenizer(), steps=2, probes=2, seed=k)
        torch.testing.assert_close(found[k].scores, alone.scores)


def test_padding_that_a_model_cannot_hide_is_told():
    net = model("llama", "eager").double()
    ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9]])
    other = ids.clone()
    other[:, -1] = 40
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(
        InputError, match=r"the logits hold NaN.*pad on the right, or load with attn_implementation='sdpa'"
    ):
        activation_patching(net, ids, other, logit_difference([1, 1], [2, 2]), attention_mask=mask)


# Images.


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def data():
    x = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0, 0, 0] * 3).long().clamp_max(2)
    return x[:200], y[:200], x[200:], y[200:]


X, Y = data()[:2]
CALLS = {
    "input_gradient": lambda net, x: input_gradient(net, x),
    "saliency": lambda net, x: saliency(net, x, site="0"),
    "faithfulness": lambda net, x: deletion_insertion(net, x, torch.rand(len(x), 1, 8, 8)),
    "infidelity": lambda net, x: infidelity(net, x, torch.rand(len(x), 1, *x.shape[-2:])),
    "score_maps": lambda net, x: score_maps(net, x, {"a": torch.rand(len(x), 1, *x.shape[-2:])}),
    "sensitivity": lambda net, x: sensitivity(lambda z: input_gradient(net, z), x),
    "pgd": lambda net, x: pgd(net, x, torch.zeros(len(x)).long(), norm="l2", eps=1.0, step=0.1, steps=1),
    "accuracy": lambda net, x: accuracy(net, x, torch.zeros(len(x)).long()),
    "training": lambda net, x: Training(network, epochs=1, select="last")(x, torch.zeros(len(x)).long(), 0),
    "diffroar": lambda net, x: diffroar(
        attribution(net), Training(network, epochs=1), (x, torch.arange(4) % 3, x, torch.arange(4) % 3)
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 8, 8)])
def test_images_of_another_size_are_named_by_their_shape(call, shape):
    message = rf"model: Sequential does not take (images|inputs) of shape \({shape[0]}, {shape[1]}, {shape[2]}\) in float32"
    with pytest.raises(InputError, match=message):
        CALLS[call](network(), torch.rand(4, *shape))


def test_images_of_another_precision_are_named():
    with pytest.raises(
        InputError, match=r"in float32 \(.*dtype|in float32 \(.*should be the same|in float32 \(.*type"
    ):
        pgd(network().half(), X[:4], Y[:4], norm="l2", eps=1.0, step=0.1, steps=1)
    assert input_gradient(network().bfloat16(), X[:4]).dtype == torch.bfloat16


def test_a_fault_of_the_models_own_keeps_its_name():
    net = network()
    net[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match=r"^broken$"):
        input_gradient(net, X[:4])


@pytest.mark.parametrize(
    "call",
    [
        lambda: input_gradient(network(), X[:4], torch.tensor([0, 1, 2, 7]), kind="loss"),
        lambda: deletion_insertion(network(), X[:4], torch.rand(4, 1, 8, 8), [0, 1, 2, 7]),
        lambda: pgd(network(), X[:4], torch.tensor([0, 1, 2, 7]), norm="l2", eps=1.0, step=0.1, steps=1),
        lambda: accuracy(network(), X[:4], torch.tensor([0, 1, 2, 7])),
        lambda: Training(network, epochs=1, select="last")(X[:4], torch.tensor([0, 1, 2, 7]), 0),
        lambda: Training(network, epochs=1, at_once=2).stacked([X, X], torch.where(torch.arange(200) == 3, 7, Y), [0, 1]),
    ],
)  # fmt: skip
def test_labels_from_another_range_are_named_by_place(call):
    with pytest.raises(
        InputError, match=r"targets: got label 7 at position 3, expected labels from 0 to 2 \(3 classes\)"
    ):
        call()


def test_a_model_with_one_output_has_no_accuracy():
    with pytest.raises(InputError, match="with at least two classes"):
        accuracy(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), X, Y)
