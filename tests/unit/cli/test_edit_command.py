"""``lineament edit``: networks, pages and records that are written, and what is refused in one line."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lineament import cli, edit
from lineament.audit.edit_doubts import harm, pays
from lineament.edit.forgetting import Forgotten, Knowledge
from lineament.load.models import load_model

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16), nn.ReLU(),
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10),
    )
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:make"


def test_prune_writes_a_smaller_network_that_opens_again(net, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        cli.main(["edit", "prune", net, "digits", "--out", str(out), "--params", "2", "--samples", "120"])
        == 0
    )
    assert "Page: " in capsys.readouterr().out
    told = json.loads((out / "edit.json").read_text())
    before, after = told["edit"]["parameters"]
    assert before / after >= 2 and {s["name"] for s in told["sections"]} == {"network", "classes"}
    assert set(told["sections"][0]["numbers"]["scores"]) == {
        "as it was",
        "pruned",
        "norms alone, no repair",
        "by chance, the same repairs",
    }
    assert "Which classes pay?" in (out / "edit.html").read_text() and not (out / ".stages").exists()
    again = load_model(net, weights=out / "network").model
    assert sum(p.numel() for p in again.parameters()) == after
    assert again(torch.ones(1, 1, 8, 8)).shape == (1, 10)
    assert cli.main(["edit", "prune", net, "digits", "--out", str(out)]) == 2
    assert "overwrite" in capsys.readouterr().err


def test_unlearn_says_what_is_left(net, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["edit", "unlearn", net, "digits", "--out", str(out), "--samples", "300", "--class"]
    assert cli.main([*words, "14"]) == 2
    assert "class '14'" in capsys.readouterr().err
    assert cli.main([*words, "3"]) == 0
    told = json.loads((out / "edit.json").read_text())
    assert told["sections"][0]["numbers"]["verdict"] in ("kept", "muted")
    asked, tried = told["edit"]["target"], told["edit"]["tried"]
    assert asked == 0.05 and tried[0]["share"] == 0 and told["edit"]["share"] in [t["share"] for t in tried]
    assert "Shares that were tried" in (out / "edit.html").read_text()
    assert told["edit"]["reached"] == any(t["forget"] <= asked for t in tried[1:])
    assert [row[0] for row in told["sections"][0]["tables"][0]["rows"]][-1].startswith("head alone")
    assert edit.load(out / "network", lambda: load_model(net).model)


def test_unlearn_measures_the_others_on_other_samples(net, tmp_path, capsys):
    one, rest, poor = (tmp_path / f"{name}.npz" for name in ("one", "rest", "poor"))
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 1, 8, 8).astype("float32") / 16
    np.savez(one, x=x[:200], y=y[:200])
    np.savez(rest, x=x[200:300], y=y[200:300])
    np.savez(poor, x=x[y == 3], y=y[y == 3])
    words = ["edit", "unlearn", net, str(one), "--class", "3", "--out", str(tmp_path / "o"), "--retain"]
    assert cli.main([*words, str(poor)]) == 2
    assert "--retain" in capsys.readouterr().err
    assert cli.main([*words, str(rest)]) == 0
    told = json.loads((tmp_path / "o" / "edit.json").read_text())
    count = int((y[200:300] != 3).sum())
    assert f"{count} others" in told["sections"][0]["tables"][0]["title"]


BAD = [
    (["--keep", "1.5"], "--keep"),
    (["--params", "1000000"], "the nearest is"),
    (["--keep", "0.5", "--flops", "2"], "--keep and flops"),
    (["--keep", "0"], "--keep"),
    (["--params", "0.5"], "--params"),
    (["--remove", "5"], "--remove"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=lambda v: str(v))
def test_bad_targets_are_one_line(net, tmp_path, capsys, words, said):
    assert (
        cli.main(["edit", "prune", net, "digits", "--samples", "40", "--out", str(tmp_path / "o"), *words])
        == 2
    )
    shown = capsys.readouterr().err
    told = shown.splitlines()[-1]
    assert told.startswith("lineament: ") and said.split(" and ")[0] in told
    # Only what the network itself decides is refused after it was read; nothing is left behind either way.
    assert ("reading" in shown) == (words[1] == "1000000") and not (tmp_path / "o").exists()


@pytest.mark.parametrize("share", ["0", "2"])
def test_a_share_is_refused_before_any_work(net, tmp_path, capsys, share):
    words = ["edit", "unlearn", net, "digits", "--class", "3", "--out", str(tmp_path / "o"), "--share", share]
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("lineament: --share: got") and not (tmp_path / "o").exists()


def test_the_audit_of_an_edited_network_can_be_pasted(net, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "edit",
        "prune",
        "net.py:make",
        "digits",
        "--samples",
        "60",
        "--out",
        "a b",
        "--normalize",
        "0,1",
    ]
    assert cli.main(words) == 0
    told = json.loads((tmp_path / "a b" / "edit.json").read_text())
    (line,) = [note for note in told["notes"] if "lineament audit" in note]
    pasted = line.split("To audit it: ")[1].split(" ; ")[0]
    assert pasted == "lineament audit net.py:make digits --weights 'a b/network' --normalize 0,1"
    assert pasted in capsys.readouterr().err and not any(".." in note for note in told["notes"])
    capsys.readouterr()
    assert cli.main([*shlex.split(pasted)[1:], "--lenses", "accuracy", "--samples", "60", "--out", "r"]) == 0


@pytest.mark.parametrize("action", ["prune", "unlearn"])
def test_help_describes_and_shows_an_example(action, capsys):
    assert cli.main(["edit", action, "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"lineament edit {action} net.py:make" in told
    assert {"prune": "Takes channels out", "unlearn": "how much of the class"}[action] in told
    assert ("--length" in told) == (action == "prune")


def test_what_is_not_there_names_what_is(net, tmp_path, capsys):
    assert cli.main(["edit", "prune", net, "digits"]) == 2
    assert "--out: got none, and lineament edit prune needs it" in capsys.readouterr().err
    words = ["digits", "--class", "11", "--samples", "40", "--out", str(tmp_path / "o")]
    assert cli.main(["edit", "unlearn", net, *words]) == 2
    assert "no class '11'; there are: '0', '1'" in capsys.readouterr().err


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SMALL = """
import torch
from torch import nn

def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

def lucky():
    return make(79)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that knows the digits (a read-out of random features), and digits whose labels are names."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "net.py").write_text(SMALL)
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x / 16, dtype=torch.float32)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    with torch.no_grad():
        features = net[:3](images)
        wanted = torch.linalg.lstsq(features, torch.eye(10)[torch.tensor(y)]).solution
        net[3].weight.copy_(wanted.T)
        net[3].bias.zero_()
    torch.save(net.state_dict(), folder / "net.pt")
    np.savez(folder / "names.npz", x=images.view(-1, 1, 8, 8).numpy()[:400], y=np.array(DIGITS)[y[:400]])
    return folder


ACTIONS = [["prune"], ["unlearn", "--class", "three"]]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda words: words[0])
def test_names_in_another_order_than_the_outputs_are_refused(trained, tmp_path, capsys, action):
    out = tmp_path / "out"
    words = [
        "edit",
        action[0],
        f"{trained}/net.py:make",
        f"{trained}/names.npz",
        *action[1:],
        "--out",
        str(out),
    ]
    words += ["--weights", f"{trained}/net.pt"]
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert "--classes: got none, and the data's names are numbered 'eight', 'five', 'four'" in told
    assert "no weights given" not in told and not out.exists()
    assert cli.main([*words, "--classes", ",".join(DIGITS)]) == 0
    (section, *_) = json.loads((out / "edit.json").read_text())["sections"]
    assert "most frequent class" not in section["sentence"] and "order" not in section["sentence"]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda words: words[0])
def test_nothing_is_good_near_chance(trained, tmp_path, capsys, action):
    words = ["edit", action[0], f"{trained}/net.py:make", f"{trained}/names.npz", *action[1:]]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "no weights given: the network is as the factory makes it" in capsys.readouterr().err
    told = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert "No weights given: the network is as the factory makes it." in told["notes"]
    (finding,) = told["findings"]
    assert finding["severity"] == told["sections"][0]["status"] == "warning"
    assert "no better than always naming the most frequent class" in finding["sentence"]
    assert "`weights`" in finding["advice"]


def test_an_untrained_network_above_chance_is_not_called_good(trained, tmp_path, capsys):
    words = [
        "edit",
        "prune",
        f"{trained}/net.py:lucky",
        f"{trained}/names.npz",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 0
    (finding,) = json.loads((tmp_path / "out" / "edit.json").read_text())["findings"]
    assert "most frequent class" not in finding["sentence"] and finding["severity"] != "good"


PICTURES = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.Linear(1536, 10))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A convolutional network with a batch norm that knows the digits as they are stored, from 0 to 1."""
    folder = tmp_path_factory.mktemp("seen")
    (folder / "net.py").write_text(PICTURES)
    net = load_model(f"{folder}/net.py:make").model
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    with torch.no_grad():
        net.train()
        net[1].momentum = None
        net(images)
        net.eval()
        features = net[:4](images).double()
        inner = features.T @ features + 10 * torch.eye(features.shape[1])
        net[4].weight.copy_(torch.linalg.solve(inner, features.T @ torch.eye(10).double()[y]).T)
        net[4].bias.zero_()
    torch.save(net.state_dict(), folder / "net.pt")
    np.savez(folder / "digits.npz", x=images.numpy()[:600], y=y[:600])
    return folder


def test_accuracies_stand_with_their_intervals(seen, tmp_path):
    words = ["edit", "prune", f"{seen}/net.py:make", f"{seen}/digits.npz", "--weights", f"{seen}/net.pt"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "edit.json").read_text())
    network, classes = told["sections"]
    numbers = network["numbers"]
    for name, value in numbers["scores"].items():
        low, high = numbers["intervals"][name]
        assert low <= value <= high and high - low > 0.005
    change, low, high = numbers["changes"]["pruned"]
    assert change == pytest.approx(numbers["scores"]["pruned"] - numbers["scores"]["as it was"])
    assert low < change < high and f"a change of {100 * change:+.1f} points" in network["sentence"]
    assert network["status"] == "good" and "training" not in network["sentence"]
    assert " to " in network["tables"][0]["rows"][1][1] and network["tables"][0]["rows"][0][2] is None
    assert sum(row[1] for row in classes["numbers"]["classes"]) == 300 and " to " in classes["tables"][0]["rows"][0][2]  # fmt: skip


def test_a_wrong_normalisation_does_not_flatter_the_smaller_network(seen, tmp_path, capsys):
    words = ["edit", "prune", f"{seen}/net.py:make", f"{seen}/digits.npz", "--weights", f"{seen}/net.pt"]
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--normalize", "0,5", "--keep", "0.95"]) == 0
    told = json.loads((tmp_path / "out" / "edit.json").read_text())
    (network, _), (finding, *_) = told["sections"], told["findings"]
    scores = network["numbers"]["scores"]
    assert scores["pruned"] > scores["as it was"] + 0.05  # batch norms measured again make up for it
    assert network["status"] == "warning" and "do not reach it as they did in training" in finding["sentence"]
    assert "With values from 0 to 1" in finding["sentence"].replace("\u00a0", " ")
    assert "`normalize`" in finding["advice"] and "`normalize`" in capsys.readouterr().out


def knowledge(forget, retain):
    return Knowledge(forget, retain, {"0": 0.9}, 16, 1, torch.ones(2), None)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ((0.86, 0.55), "more harm than it removed: the class is answered less often by 14 points, and the others are right less often by 43 points"),
        ((1.0, 0.9), "more harm than it removed"),
        ((0.05, 0.8), "costs the other classes 18 points"),
        ((0.05, 0.97), ""),
        ((0.995, 0.979), ""),
    ],
)  # fmt: skip
def test_an_edit_that_harms_more_than_it_removes_is_called_so(after, said):
    told = Forgotten(knowledge(1.0, 0.98), knowledge(*after), None, "kept")
    sentence, advice = harm(told, knowledge(0.0, 0.98))
    assert said in sentence.replace("\u00a0", " ") and bool(sentence) == bool(said)
    assert ("the head alone never answers the class" in sentence) == ("edit.mute" in advice) == bool(said)
    assert (
        "training again on 16 samples of it brought it back (relearning). The class was kept."
        in told.sentence
    )


def test_a_class_pays_where_more_samples_fall_than_chance_explains():
    was = torch.ones(81, dtype=torch.bool)
    assert pays(was, torch.arange(81) >= 12, 10)
    assert not pays(was, torch.arange(81) >= 5, 10)  # 5 of 81 fell: a thirtieth, over ten classes a third
    now = torch.arange(81) >= 12
    assert not pays(~now, now, 10)  # better, not worse, in most


@pytest.fixture
def hugging(tmp_path):
    """A residual network of transformers for images of 8 x 8, saved with the file that says how its images are normalised."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10
    )  # fmt: skip
    folder = tmp_path / "hugging"
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    told = {"size": {"height": 8, "width": 8}, "image_mean": [0.25], "image_std": [0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return str(folder)


def test_an_edited_hugging_face_model_is_fed_as_it_was(hugging, tmp_path, capsys):
    out = tmp_path / "out"
    # The calibrating half is two batches, of 64 and of 36.
    words = [hugging, "digits", "--samples", "200", "--out", str(out)]
    assert cli.main(["edit", "prune", *words, "--keep", "0.5"]) == 0
    assert f"lineament audit {out / 'network'} digits" in capsys.readouterr().err
    assert not (out / "network" / "config.json").exists()
    # The command line takes the folder though from_pretrained cannot open it.
    loaded = load_model(str(out / "network"))
    assert (loaded.mean, loaded.std, loaded.size) == ((0.25,), (0.5,), (8, 8))
    same = edit.load(out / "network")
    image = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(image).logits, same(image).logits, rtol=0, atol=0)
    assert sum(p.numel() for p in same.parameters()) < sum(
        p.numel() for p in load_model(hugging).model.parameters()
    )
    # Another edit in its place leaves nothing of it.
    assert cli.main(["edit", "unlearn", *words, "--class", "3", "--share", "0.1", "--overwrite"]) == 0
    assert not (out / "network" / "surgery.json").exists()
    again = load_model(str(out / "network"))
    assert (again.mean, again.std, again.size) == ((0.25,), (0.5,), (8, 8))


def test_an_edited_classifier_of_texts_keeps_its_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "good", "bad", "film", "play", "plot"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    config = transformers.DistilBertConfig(
        vocab_size=7, dim=8, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=16,
        id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    folder, table = tmp_path / "texts", tmp_path / "texts.csv"
    transformers.DistilBertForSequenceClassification(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    lines = [
        f"{word} {thing} {other},{word}"
        for word in ("good", "bad")
        for thing in words[4:]
        for other in words[4:]
    ]
    table.write_text("\n".join(["text,label", *lines * 3]))
    out = tmp_path / "out"
    words = ["edit", "unlearn", str(folder), str(table), "--classes", "bad,good", "--class", "bad"]
    assert cli.main([*words, "--share", "0.1", "--out", str(out)]) == 0
    assert load_model(str(out / "network")).tokenizer("good plot")["input_ids"] == [2, 6]
