"""The ReAGent recipe: its task has the answer it says, and a run in miniature is whole, resumable and leaves an ordinary model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.contracts.token_models import byte_tokenizer, model

from lineament.core.checks import InputError
from lineament.recipes import reagent as recipe
from lineament.recipes._reagent_task import MARKER, QUESTION, TOKENS, as_directory, examples, network, train

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
    net.load_state_dict(train(0, 150))
    ids, target, _ = examples(300, torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert float((net.eval()(ids).logits[:, -1].argmax(1) == target).double().mean()) > 0.9


@pytest.mark.slow
def test_a_run_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "BUDGETS", (1, 3))
    monkeypatch.setattr(recipe, "EXTRA", ("occlusion",))
    small = {"stop": "dummy", "min_steps": 3, "max_steps": 3}
    monkeypatch.setattr(
        recipe, "VARIANTS", {n: (small if "steps" in n else {"max_steps": 6}) for n in recipe.VARIANTS}
    )
    first = recipe.run(TINY, out=tmp_path)
    assert len(first.claims) == 7 and len(first.figures) == 2 and len(first.tables) == 4
    assert all((tmp_path / figure.file).is_file() for figure in first.figures)
    assert all(claim.holds or claim.reason for claim in first.claims)
    monkeypatch.setattr(recipe, "train", lambda *a: pytest.fail("a finished stage runs again"))
    again = recipe.run(TINY, out=tmp_path)
    assert again.claims == first.claims and again.tables == first.tables


@pytest.mark.slow
def test_a_users_model_and_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "EXTRA", ())
    monkeypatch.setattr(
        recipe, "VARIANTS", {n: {"stop": "dummy", "min_steps": 2, "max_steps": 2} for n in recipe.VARIANTS}
    )
    model("gpt2").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("the cat sat on the\n\nthe dog ran to the old house\n")
    config = replace(
        recipe.Config.preset("paper"), model_folder=str(tmp_path / "model"), prompts_file=str(tmp_path / "prompts.txt"),
        sampler="uniform", draws=3,
    )  # fmt: skip
    outcome = recipe.run(config, out=tmp_path / "out")
    assert len(outcome.claims) == 5 and len(outcome.figures) == 1
    with pytest.raises(InputError, match="--prompts-file"):
        recipe.run(replace(config, prompts_file=None), out=tmp_path / "other")
    with pytest.raises(InputError, match="--model-folder"):
        recipe.run(replace(config, model_folder=str(tmp_path)), out=tmp_path / "third")
