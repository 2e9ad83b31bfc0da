"""Comparing two networks: its page and its numbers, other architectures, killed runs, and the command."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lineament import compare
from lineament.audit.compare import CompareOptions
from lineament.cli import main
from lineament.core.checks import InputError
from lineament.report.figures import undrawn

SOURCE = """
import torch
from torch import nn

def make():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
"""


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(80, 1, 6, 6, generator=generator), torch.arange(80) % 3


def test_the_page_holds_what_was_measured(data, tmp_path: Path) -> None:
    a, b = net(0), net(1)
    before = copy.deepcopy(a.state_dict())
    found = compare(a, b, data, out=tmp_path, groups=[f"site {k % 2}" for k in range(80)])
    assert [s.name for s in found.sections][:6] == ["answers", "units", "pairs", "missing", "spaces", "codes"]
    stored = json.loads((tmp_path / "compare.json").read_text())
    page = (tmp_path / "compare.html").read_text()
    answers = stored["sections"][0]["numbers"]
    said = [n(data[0]).argmax(1) for n in (a, b)]
    assert answers["accuracy_a"][0] == pytest.approx(float((said[0] == data[1]).double().mean()))
    assert answers["agreement"][0] == pytest.approx(float((said[0] == said[1]).double().mean()))
    assert answers["both_wrong"] == int(((said[0] != data[1]) & (said[1] != data[1])).sum())
    assert [t["title"] for t in stored["sections"][0]["tables"]][:2] == ["By class", "By group"]
    assert "batch norms" not in found["barrier"].sentence
    assert "have a partner (chance: " in page and "Lineament comparison" in page
    assert {p.name for p in tmp_path.iterdir()} == {"compare.html", "compare.json"}
    assert all(torch.equal(v, before[k]) for k, v in a.state_dict().items())
    with pytest.raises(InputError, match="overwrite=True"):
        compare(a, b, data, out=tmp_path)


def test_a_copy_is_the_same_in_every_respect(data, tmp_path: Path) -> None:
    with undrawn():
        found = compare(net(), net(), data, out=tmp_path)
    assert found["answers"].numbers["agreement"][0] == 1
    sites = found["units"].numbers["sites"]
    assert all(site["match_mean"] == pytest.approx(1, abs=1e-5) for site in sites.values())
    assert found["missing"].numbers["a_alone"] == 0
    assert min(row[k] for k, row in enumerate(found["spaces"].numbers["cka"])) == pytest.approx(1, abs=1e-6)


def test_dead_units_are_no_units_without_a_partner(data, tmp_path: Path) -> None:
    a, b = net(), net()
    with torch.no_grad():
        for n in (a, b):
            n[0].bias[:4] = -100.0  # behind the ReLU these hold 0 on every sample
    with undrawn():
        found = compare(a, b, data, out=tmp_path, sites="1")
    assert "2 of 2 units of 1 have a partner" in found["units"].sentence
    assert "(8 of both networks) are not counted" in found["units"].sentence
    assert found["pairs"].numbers["worst"] == pytest.approx(1, abs=1e-5)
    assert {row[1] for row in found["pairs"].tables[0].rows} == {4, 5}


def test_too_few_prompts_are_refused_before_the_pass(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one two three four\nfive\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(InputError, match="holds 1 prompts of 2 lines, expected at least 20"):
        compare(str(tmp_path), str(tmp_path), str(tmp_path / "few.txt"), out=tmp_path / "out")


def test_classes_in_another_order_are_the_same_answers(data, tmp_path: Path) -> None:
    a = net()
    other = copy.deepcopy(a)
    with undrawn():
        found = compare(a, other, (data[0].numpy(), ["c", "a", "b"] * 26 + ["c", "a"]), out=tmp_path)
    assert found["answers"].numbers["agreement"][0] == 1


def test_other_architectures(data, tmp_path: Path) -> None:
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3))
    with undrawn():
        found = compare(net(), mlp, data, out=tmp_path)
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert stored["sites"] == {"1": "3:in", "3:in": "3:in"} or "3:in" in stored["sites"].values()
    assert any("relative depth" in note for note in stored["notes"])
    assert found["units"].numbers["found"]


def test_values_instead_of_classes(data, tmp_path: Path) -> None:
    targets = data[0].flatten(1)[:, :3]
    with undrawn():
        found = compare(net(), net(1), (data[0], targets), out=tmp_path)
    assert "mean loss" in found["answers"].sentence


def test_a_run_that_was_cut_off_goes_on(data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lineament.audit import compared
    from lineament.measure.alignment import units

    passes = []
    read = units._read
    monkeypatch.setattr(units, "_read", lambda *args: passes.extend([1] * args[-1].answers) or read(*args))

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with undrawn(), monkeypatch.context() as patch:
        patch.setattr(compared, "sections", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(net(), net(1), data, out=tmp_path / "a")
    before = len(passes)
    with undrawn():
        again = compare(net(), net(1), data, out=tmp_path / "a")
        assert len(passes) == before  # the pass over the data was done
        whole = compare(net(), net(1), data, out=tmp_path / "b")
    for name in ("units", "spaces"):
        assert again[name].numbers == whole[name].numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 5}, "samples: got 5, expected an integer in"),
        ({"sites": "nowhere"}, "no site of Sequential"),
        ({"options": CompareOptions(task="words")}, "task: got 'words'"),
        ({"options": CompareOptions(weights_b="gone.pt")}, "weights_b: "),
    ],
)
def test_what_cannot_be_used_is_named(options: dict, message: str, data, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message), undrawn():
        compare(net(), net(1), data, out=tmp_path, **options)


def test_the_command(data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    from safetensors.torch import save_file

    (tmp_path / "net.py").write_text(SOURCE)
    np.savez(tmp_path / "data.npz", x=data[0].numpy(), y=data[1].numpy())
    save_file(net(5).state_dict(), tmp_path / "b.safetensors")
    make, out = f"{tmp_path / 'net.py'}:make", str(tmp_path / "out")
    words = [
        "compare",
        make,
        make,
        str(tmp_path / "data.npz"),
        "--weights-b",
        str(tmp_path / "b.safetensors"),
        "--out",
        out,
    ]
    with undrawn():
        assert main([*words, "--sites", "1=1"]) == 0
    said = capsys.readouterr()
    assert "have a partner" in said.out and "compare.html" in said.out
    # Weights that were forgotten are said, of the network that lacks them.
    assert "lineament: A: no weights given" in said.err and "B: no weights" not in said.err
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--sites", "1=1", "--sites", "3"]) == 2
    assert "--sites" in capsys.readouterr().err


def test_two_hugging_face_models_and_two_checkpoints_of_one_factory(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 3, 8, 8, generator=generator), torch.arange(60) % 3
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4, num_labels=3
        )  # fmt: skip
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / f"vit{seed}")
        save_file(net(seed).state_dict(), tmp_path / f"{seed}.safetensors")
    with undrawn():
        found = compare(str(tmp_path / "vit0"), str(tmp_path / "vit1"), images, out=tmp_path / "vits")
    assert found["units"].numbers["sites"] and found["barrier"].status == "good"

    (tmp_path / "net.py").write_text(SOURCE)
    make = f"{tmp_path / 'net.py'}:make"
    digits = images[0][:, :1, :6, :6].contiguous(), images[1]
    weights = CompareOptions(weights_a=tmp_path / "0.safetensors", weights_b=tmp_path / "1.safetensors")
    with undrawn():
        loaded = compare(make, make, digits, out=tmp_path / "loaded", options=weights)
        given = compare(net(0), net(1), digits, out=tmp_path / "given")
    assert loaded["units"].numbers == given["units"].numbers
    assert loaded["answers"].numbers == given["answers"].numbers


@pytest.mark.slow
def test_two_language_models(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "while",
        "another",
        "animal",
        "was",
        "looking",
        "at",
        "it",
        "from",
        "roof",
        "and",
        "then",
        "slept",
    ]
    lines = [" ".join(words[(k + j) % 17] for j in range(4 + k % 6)) for k in range(40)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    for number, kind in enumerate(("whole", "letters")):
        if kind == "whole":
            vocabulary = {word: k for k, word in enumerate(["<unk>", *dict.fromkeys(words)])}
            made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
            made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        else:
            vocabulary = {letter: k for k, letter in enumerate(["<unk>", *sorted(set("".join(words) + " "))])}
            made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
            made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
        torch.manual_seed(number)
        config = transformers.GPT2Config(
            vocab_size=len(vocabulary), n_layer=2, n_head=2, n_embd=8 * (1 + number), n_positions=64,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        folder = tmp_path / kind
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)
    with undrawn():
        found = compare(
            str(tmp_path / "whole"),
            str(tmp_path / "letters"),
            str(tmp_path / "texts.txt"),
            out=tmp_path / "out",
        )
    assert "bits a character" in found["answers"].sentence and found["units"].numbers["found"]
    # What was compared are texts, and the page calls them so or samples.
    assert not [section.sentence for section in found.sections if "image" in section.sentence]
    site = next(iter(found["units"].numbers["sites"].values()))
    assert site["samples"] == sum(len(line.split()) for line in lines)
