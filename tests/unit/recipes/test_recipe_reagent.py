"""The ReAGent recipe: its task has the answer it says, and a run in miniature is whole, resumable and leaves an ordinary model."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tests.contracts.token_models import byte_tokenizer, model

from lineament.core.checks import InputError
from lineament.data.analogy_prompts import analogy_prompts
from lineament.recipes import reagent as recipe
from lineament.recipes.reagent.claims import Attributed
from lineament.recipes.reagent.task import MARKER, QUESTION, TOKENS, as_directory, examples, network, trained
from lineament.recipes.reagent.users import distractor_table, user_prompts

TINY = replace(recipe.Config.preset("quick"), prompts=4, draws=4, train_steps=40)


def test_the_task_says_what_decides():
    ids, target, places = examples(200, torch.Generator().manual_seed(0))
    assert (
        ids.shape == (200, TOKENS) and (ids[:, -1] == QUESTION).all() and ((ids == MARKER).sum(1) == 1).all()
    )
    rows = torch.arange(200)
    assert (
        (ids[rows, places] == MARKER).all()
        and (ids[rows, places + 1] == target).all()
        and int(target.max()) < MARKER
    )
    assert recipe.precision([torch.eye(16)[1] + torch.eye(16)[3]], torch.tensor([3])) == 0.5


def test_the_model_is_an_ordinary_directory(tmp_path):
    loaded, words = as_directory(network().state_dict(), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file() and (
        tmp_path / "model" / "config.json"
    ).is_file()
    assert words("a b ! c ?")["input_ids"] == [0, 1, MARKER, 2, QUESTION] and words.all_special_ids == []
    assert loaded.config._attn_implementation == "eager"


@pytest.mark.slow
def test_training_solves_the_task():
    net = network()
    net.load_state_dict(trained(0, 150))
    ids, target, _ = examples(300, torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert float((net.eval()(ids).logits[:, -1].argmax(1) == target).double().mean()) > 0.9


@pytest.mark.slow
def test_a_run_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "BUDGETS", (1, 3))
    monkeypatch.setattr(recipe, "EXTRA", ("occlusion",))
    monkeypatch.setattr(
        recipe, "VARIANTS", {n: ({"steps": 3} if "steps" in n else {}) for n in recipe.VARIANTS}
    )
    first = recipe.run(TINY, out=tmp_path)
    assert len(first.claims) == 7 and len(first.figures) == 2 and len(first.tables) == 4
    assert all((tmp_path / figure.file).is_file() for figure in first.figures)
    assert all(claim.holds or claim.reason for claim in first.claims)
    monkeypatch.setattr(recipe, "trained", lambda *a: pytest.fail("a finished stage runs again"))
    again = recipe.run(TINY, out=tmp_path)
    assert again.claims == first.claims and again.tables == first.tables


@pytest.mark.slow
def test_a_users_model_and_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "EXTRA", ())
    monkeypatch.setattr(recipe, "VARIANTS", {n: {"steps": 2} for n in recipe.VARIANTS})
    model("gpt2").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("the cat sat on the\n\nthe dog ran to the old house\n")
    config = replace(
        recipe.Config.preset("paper"), model_folder=str(tmp_path / "model"), prompts_file=str(tmp_path / "prompts.txt"),
        sampler="uniform", draws=3,
    )  # fmt: skip
    outcome = recipe.run(config, out=tmp_path / "out")
    assert len(outcome.claims) == 5 and len(outcome.figures) == 1
    (tmp_path / "starts.txt").write_text("the old man\nthe cat\n")
    whole = replace(config, sequence_file=str(tmp_path / "starts.txt"), new_tokens=3, keep=0.5)
    outcome = recipe.run(whole, out=tmp_path / "whole")
    assert len(outcome.claims) == 7 and outcome.tables[-1].title.startswith("Sequence level")
    assert [row[0] for row in outcome.tables[-1].rows] == ["reagent", *recipe.BASELINES]
    with pytest.raises(InputError, match="of 360 the model completes 0 rightly; give a file"):
        recipe.run(replace(config, prompts_file=None), out=tmp_path / "other")
    with pytest.raises(InputError, match=r"sequence_file: .* does not exist"):
        recipe.run(replace(config, sequence_file="none.txt"), out=tmp_path / "other")
    model("t5").save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="is an encoder-decoder"):
        recipe.run(replace(config, model_folder=str(tmp_path / "t5")), out=tmp_path / "third")
    counted = recipe.run(replace(config, keep=2.0, prompts=1), out=tmp_path / "counted")
    assert counted.config["keep"] == 2 and isinstance(counted.config["keep"], int)
    with pytest.raises(InputError, match="model_folder"):
        recipe.run(replace(config, model_folder=str(tmp_path)), out=tmp_path / "third")


def test_analogies_that_the_model_completes_are_kept_with_their_distractors():
    words = whole_words()
    net = Completes(words)
    prompts, inside = user_prompts(net, words, None, 20, 0)
    assert len(prompts) == 20 == len(inside)
    for prompt, mask in zip(prompts, inside):
        ids = words(prompt)["input_ids"]
        told = words.decode([i for i, yes in zip(ids, mask.tolist()) if yes])
        between = prompt[prompt.index("(") : prompt.index(")")]
        assert re.findall(r"\w+", told) == re.findall(r"\w+", between)
    table = distractor_table({"even": Attributed([torch.ones(len(m)) for m in inside])}, inside)
    assert table.rows[0][1] == table.rows[1][1] and 0.2 < table.rows[0][1] < 0.6


def whole_words():
    """A tokenizer of the analogies' own words and signs."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = analogy_prompts(360)
    text = [p + a for p, a in zip(made.prompts, made.answers)]
    kind = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]"), "isolated")
    parts = sorted({w for t in text for w, _ in kind.pre_tokenize_str(t)})
    found = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["<unk>", *parts])}, unk_token="<unk>"))
    found.pre_tokenizer = kind
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>")


class Completes(torch.nn.Module):
    """Knows the answer of every second analogy, and nothing else."""

    def __init__(self, words):
        super().__init__()
        made = analogy_prompts(360)
        self.known = {
            tuple(words(p)["input_ids"]): words(a)["input_ids"][0]
            for p, a in list(zip(made.prompts, made.answers))[::2]
        }
        self.size = len(words)

    def forward(self, input_ids):
        answers = [self.known.get(tuple(row), 0) for row in input_ids.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(answers), self.size).float()
