"""Folders of Hugging Face models whose layers have several widths: what wrote them is read again, by whatever opens a model."""

from __future__ import annotations

import json

import pytest
import torch

from lineament import cli
from lineament.core.checks import InputError
from lineament.edit import PruneOptions, load, prune
from lineament.load.hub import architectures
from lineament.load.language_models import is_language_model, load_language_model
from lineament.load.models import load_model
from lineament.load.narrowed import BUILT_FROM, origin

transformers = pytest.importorskip("transformers")
WORDS = [f"w{i}" for i in range(40)]


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama that was pruned to several widths, with its tokenizer, and the model in memory."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    found = prune(model, torch.randint(40, (8, 12)), keep=0.5, options=PruneOptions(widths="free"))
    assert len({after for _, after in found.sizes.values()}) == 2
    place = found.save(tmp_path_factory.mktemp("narrow") / "network")
    words().save_pretrained(place)
    return place, found.model


def test_every_loader_opens_it(folder):
    place, model = folder
    ids = torch.arange(9)[None]
    assert not (place / "config.json").exists() and origin(place)["class"] == "LlamaForCausalLM"
    assert architectures(place) == ("LlamaForCausalLM",) and is_language_model(place)
    again, tokens = load_language_model(str(place), attention="eager")
    assert again.config._attn_implementation == "eager" and tokens("w3 w1")["input_ids"] == [3, 1]
    for other in (again, load(place)):
        torch.testing.assert_close(other(ids).logits, model(ids).logits)
        assert not other.training


def test_the_audit_opens_it(folder, tmp_path, capsys):
    place, _ = folder
    (tmp_path / "prompts.txt").write_text("w1 w2 w3 w4 w5\nw4 w5 w6 w7 w8\n")
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 40))
    spoken = [str(tmp_path / name) for name in ("prompts.txt", "text.txt")]
    line = ["audit", str(place), spoken[0], "--text", spoken[1], "--lenses", "attention"]
    assert cli.main([*line, "--out", str(tmp_path / "r")]) == 0
    assert "Report: " in capsys.readouterr().out


def test_a_classifier_of_images_opens_with_what_reads_its_images(tmp_path, capsys):
    import numpy as np

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=10, downsample_in_first_stage=False
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "whole")
    reads = {"do_resize": False, "do_normalize": True, "image_mean": [0.3], "image_std": [0.4]}
    (tmp_path / "whole" / "preprocessor_config.json").write_text(json.dumps(reads))
    x = torch.rand(80, 1, 8, 8).numpy()
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(80) % 10)
    line = [
        "edit",
        "prune",
        str(tmp_path / "whole"),
        str(tmp_path / "data.npz"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.main(line) == 0
    place = tmp_path / "o" / "network"
    assert f"lineament audit {place}" in capsys.readouterr().err
    found = load_model(str(place))
    assert (found.mean, found.std, found.kind) == ((0.3,), (0.4,), "hugging face")
    torch.testing.assert_close(found.model(torch.tensor(x)).logits, load(place)(torch.tensor(x)).logits)


def test_a_damaged_folder_is_refused_in_one_line(folder, tmp_path):
    (tmp_path / BUILT_FROM).write_text("{")
    for opens in (load_model, lambda name: load_language_model(name)):
        with pytest.raises(InputError, match="is damaged"):
            opens(str(tmp_path))
    told = json.loads((folder[0] / BUILT_FROM).read_text())
    (tmp_path / BUILT_FROM).write_text(json.dumps({**told, "class": "NoSuchModel"}))
    (tmp_path / "surgery.json").write_text("{}")
    with pytest.raises(InputError, match="has no NoSuchModel"):
        load(tmp_path)
