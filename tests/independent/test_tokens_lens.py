"""What the tokens lens says of prompts, measured again in a few lines of PyTorch: the next token, how far back its reasons lie, and their test."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from lineament.audit.language_run import audit_language
from lineament.load.prompts import Prompts

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
WORDS = ["<s>", "</s>", "the", "cat", "dog", "saw", "a", "man", "and", "ran", "home", "very", "old"]
TEXTS = (
    "the cat saw a man",
    "a dog ran home and saw the man",
    "the very old man ran",
    " ".join(WORDS[2:] * 2),
)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    from lineament.data.patching_tasks import save_language_model
    from lineament.load.language_models import load_language_model

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    made = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    folder = tmp_path_factory.mktemp("independent")
    save_language_model(made, WORDS, folder / "model")
    model, tokenizer = load_language_model(str(folder / "model"))
    report = audit_language(
        (model, tokenizer), Prompts(TEXTS, (), "here", 4), out=folder / "r", lenses=["tokens"]
    )
    return model.eval(), report["tokens"]


def softmaxed(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1].double().softmax(-1)


def test_the_next_token_and_how_far_back_half_of_the_scores_lie(audited):
    model, section = audited
    reaches = []
    for said, text in zip(section.numbers["prompts"], TEXTS):
        words = text.split()[-12:]
        assert [WORDS[i] for i in said["ids"]] == words == [token.strip() for token in said["tokens"]]
        p = softmaxed(model, input_ids=torch.tensor([said["ids"]]))[0]
        assert int(p.argmax()) == said["target"]
        assert float(p.max()) == pytest.approx(said["probability"], rel=1e-4)
        assert sum(said["scores"]) == pytest.approx(1, rel=1e-4) and min(said["scores"]) >= 0
        half, back = 0.0, 0
        while half < 0.5 * sum(said["scores"]):
            back += 1
            half += said["scores"][-back]
        reaches.append(back)
    assert section.numbers["reach"] == reaches
    assert section.numbers["middle"] == statistics.median(reaches)
    assert section.numbers["near"] == sum(back <= 4 for back in reaches) / len(reaches)
    assert f"(median of {len(TEXTS)} prompts)" in section.sentence


def test_a_prompt_that_was_cut_is_said(audited):
    _, section = audited
    assert (section.numbers["cut"], section.numbers["longest"]) == (1, 12)
    assert "1 prompt was longer than 12 tokens, of which the last 12 are explained" in section.sentence


def test_the_judgement_is_that_of_own_draws(audited):
    """Soft comprehensiveness and sufficiency: parts of each word's embedding are taken away, or kept, in proportion to its score."""
    model, section = audited
    generator = torch.Generator().manual_seed(5)
    for number, said in enumerate(section.numbers["prompts"]):
        vectors = model.get_input_embeddings()(torch.tensor(said["ids"])).detach()
        scores = torch.tensor(said["scores"])[:, None]
        whole = softmaxed(model, inputs_embeds=vectors[None])[0]

        def away(kept, whole=whole, vectors=vectors):
            p = softmaxed(model, inputs_embeds=vectors * kept)
            return ((p.sqrt() - whole.sqrt()).square().sum(-1) / 2).sqrt()

        draws = torch.rand(400, *vectors.shape, generator=generator)
        nothing = float(away(torch.zeros(1, *vectors.shape)))
        taken, kept = away((draws < 1 - scores).float()) / nothing, away((draws < scores).float())
        sufficient = (nothing - kept).clamp_min(0) / nothing
        for ours, name in ((taken, "nc_ours"), (sufficient, "ns_ours")):
            # The lens made 32 draws.
            error = 4 * float(ours.std()) * math.sqrt(1 / 32 + 1 / 400)
            assert section.numbers["soft"][name][number] == pytest.approx(float(ours.mean()), abs=error)


def test_the_lead_and_its_interval_are_over_prompts(audited):
    _, section = audited
    for name in ("ns", "nc"):
        ours, dealt = (
            torch.tensor(section.numbers["soft"][f"{name}_{k}"], dtype=torch.double)
            for k in ("ours", "dealt")
        )
        lead = ours - dealt
        half = 1.96 * float(lead.std()) / math.sqrt(len(lead))
        mean, low, high = section.numbers["gain"][name]
        assert (mean, low, high) == pytest.approx(
            (float(lead.mean()), float(lead.mean()) - half, float(lead.mean()) + half), rel=1e-5
        )
    holds = section.numbers["gain"]["nc"][1] > 0 and section.numbers["gain"]["ns"][0] > 0
    assert ("the tokens named do decide" in section.sentence) == holds
