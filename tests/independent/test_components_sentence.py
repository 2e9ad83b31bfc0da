"""The sentence about components, measured again with plain hooks: the head that it names is patched by hand on the same prompts."""

from __future__ import annotations

import re

import pytest
import torch

from lineament.audit.language_run import audit_language
from lineament.load.prompts import PromptPair, Prompts

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
WORDS = ["<s>", "</s>", "the", "cat", "dog", "saw", "a", "man", "and", "ran", "home", "very", "old"]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    from lineament.data.patching_tasks import save_language_model
    from lineament.load.language_models import load_language_model

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    made = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    folder = tmp_path_factory.mktemp("independent")
    save_language_model(made, WORDS, folder / "model")
    model, tokenizer = load_language_model(str(folder / "model"))
    ends = ("man", "dog", "cat", "home", "old", "saw")
    pairs = tuple(PromptPair(f"the cat saw a {w}", f"the dog ran a {w}", " cat", " dog") for w in ends)
    prompts = Prompts(tuple(p.clean for p in pairs), pairs, "made here", len(pairs))
    report = audit_language((model, tokenizer), prompts, out=folder / "r", lenses=["components"])
    return model, tokenizer, pairs, report["components"]


def by_hand(model, tokenizer, pairs, heads):
    """The share of the mean logit difference that comes back when these (layer, head) are taken from the clean run."""
    ids = {
        side: torch.tensor([tokenizer(getattr(p, side))["input_ids"] for p in pairs])
        for side in ("clean", "corrupt")
    }
    right, wrong = (tokenizer(word)["input_ids"][0] for word in (" cat", " dog"))
    kept = {}

    def difference(tokens, hook):
        handles = [
            block.attn.c_proj.register_forward_pre_hook(lambda m, a, k=k: hook(k, a[0]))
            for k, block in enumerate(model.transformer.h)
        ]
        with torch.no_grad():
            last = model(tokens).logits[:, -1]
        for handle in handles:
            handle.remove()
        return float((last[:, right] - last[:, wrong]).mean())

    def keep(layer, z):
        kept[layer] = z.clone()

    def patch(layer, z):
        z = z.clone()
        for own, head in heads:
            if own == layer:
                z[..., 8 * head : 8 * head + 8] = kept[layer][..., 8 * head : 8 * head + 8]
        return (z,)

    clean, corrupt = difference(ids["clean"], keep), difference(ids["corrupt"], lambda *_: None)
    return (difference(ids["corrupt"], patch) - corrupt) / (clean - corrupt)


def number(text):
    return float(text.replace("−", "-"))


def test_the_head_that_the_sentence_names_brings_back_what_it_says(audited):
    model, tokenizer, pairs, section = audited
    every = {
        (layer, head): by_hand(model, tokenizer, pairs, [(layer, head)])
        for layer in range(2)
        for head in range(4)
    }
    said = re.search(r"head (\d) of layer (\d) matters most: it brings back (\S+?)\s%", section.sentence)
    assert said, section.sentence
    head, layer = int(said[1]), int(said[2])
    assert abs(100 * every[layer, head] - number(said[3])) <= 0.51
    assert abs(every[layer, head]) == max(map(abs, every.values()))
    estimate = section.numbers["heads"][layer][head]
    assert abs(estimate - every[layer, head]) > 0.02, "a network on which the estimate would have been wrong"


def test_table_number_and_finding_say_the_same(audited):
    model, tokenizer, pairs, section = audited
    for row in section.tables[0].rows:
        if row[0].startswith("attention head"):
            share = by_hand(model, tokenizer, pairs, [(row[1], int(row[0].split()[-1]))])
            assert row[3] == pytest.approx(share, abs=1e-4)
    heads = [
        (each["layer"], each["head"], each["score"])
        for each in section.numbers["patched"]
        if each["kind"] == "z"
    ]
    five = sorted(heads, key=lambda h: -h[2])[:5]
    together = by_hand(model, tokenizer, pairs, [h[:2] for h in five])
    said = re.search(r"the 5 best heads patched at once bring back (\S+?)\s%", section.sentence)
    assert said and abs(100 * together - number(said[1])) <= 0.51
    assert section.number in section.sentence
    assert section.findings[0].severity == "warning" or section.number in section.findings[0].sentence
