"""Networks that answer for every token: token classifiers and masked language models, against what they say of each text alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.unit.audit.text_models import SMALL, tokenizer
from torch import nn

from lineament import cli
from lineament.audit.lenses.tags import phrases
from lineament.audit.run import AuditOptions, audit
from lineament.core.checks import InputError
from lineament.load.columns import in_order
from lineament.load.data import load_data
from lineament.load.model_and_data import bring_together
from lineament.load.models import load_model

transformers = pytest.importorskip("transformers")
NAMES = ("O", "B-X", "I-X")


def texts(count=16, seed=0):
    """Words of several lengths: a "zap" begins a phrase, and a "good" behind it goes on."""
    rng = np.random.default_rng(seed)
    words = [
        [str(w) for w in rng.choice(["zap", "good", "bad", "w1", "w2", "w3"], int(rng.integers(2, 8)))]
        for _ in range(count)
    ]
    words[0] = ["zap", "good", "bad"]
    tags = [
        [
            "B-X" if w == "zap" else "I-X" if w == "good" and k and row[k - 1] == "zap" else "O"
            for k, w in enumerate(row)
        ]
        for row in words
    ]
    return words, tags


WORDS, TAGS = texts()


def network(kind=transformers.BertForTokenClassification):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL)
    if kind is transformers.BertForTokenClassification:
        # Another order than that of the names.
        config.id2label, config.label2id = dict(enumerate(NAMES)), {name: k for k, name in enumerate(NAMES)}
    made = kind(config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope="module", params=["ForTokenClassification", "ForMaskedLM"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("tokens") / request.param
    network(getattr(transformers, f"Bert{request.param}")).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def as_lines(place):
    (place / "a.jsonl").write_text(
        "\n".join(json.dumps({"tokens": w, "ner_tags": t}) for w, t in zip(WORDS, TAGS))
    )
    return place / "a.jsonl"


def as_csv(place):
    rows = "\n".join(f"{k},{' '.join(w)},{' '.join(t)}" for k, (w, t) in enumerate(zip(WORDS, TAGS)))
    (place / "a.csv").write_text("id,sentence,tags\n" + rows)
    return place / "a.csv"


def as_conll(place):
    lines = ["-DOCSTART- -X- O", ""] + [
        line for w, t in zip(WORDS, TAGS) for line in (*(f"{a} NN {b}" for a, b in zip(w, t)), "")
    ]
    (place / "a.conll").write_text("\n".join(lines))
    return place / "a.conll"


def as_parquet(place):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.table({"tokens": WORDS, "labels": TAGS}), place / "a.parquet")
    return place / "a.parquet"


def as_data_set(place):
    datasets = pytest.importorskip("datasets")
    numbers = [[NAMES.index(tag) for tag in row] for row in TAGS]
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=list(NAMES))),
        }
    )
    datasets.Dataset.from_dict({"tokens": WORDS, "ner_tags": numbers}, features=features).save_to_disk(
        place / "hub"
    )
    return place / "hub"


def as_loader(place):
    """Tokenised and padded by the user, as a collator of transformers does."""
    batches = []
    for start in (0, 8):
        found = tokenizer()(
            [" ".join(w) for w in WORDS[start : start + 8]], padding=True, return_tensors="pt"
        )
        labels = torch.full_like(found["input_ids"], -100)
        for k, row in enumerate(TAGS[start : start + 8]):
            labels[k, 1 : 1 + len(row)] = torch.tensor([NAMES.index(tag) for tag in row])
        batches.append(
            {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": labels}
        )
    return torch.utils.data.DataLoader(Several(batches), batch_size=None)


class Several(torch.utils.data.IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


FORMS = {
    "jsonl": as_lines,
    "csv": as_csv,
    "conll": as_conll,
    "parquet": as_parquet,
    "hub": as_data_set,
    "pair": lambda _: (WORDS, TAGS),
}


@pytest.mark.parametrize("form", [*FORMS, "loader"])
def test_words_are_tagged_as_in_each_text_alone(form, tmp_path):
    """Whatever file they are in; the padding and what is no word's first token count nowhere."""
    loaded = load_model((network(), tokenizer()))
    given = as_loader(tmp_path) if form == "loader" else FORMS[form](tmp_path)
    data = load_data(given, tokenizer=loaded.tokenizer, text_task=loaded.text_task)
    with torch.no_grad():
        alone = [loaded.model(**tokenizer()(" ".join(w), return_tensors="pt")).logits[0, 1:-1] for w in WORDS]
    with bring_together(loaded, data, batch_size=8) as found:
        assert (found.task, found.unit, found.width, found.classes) == ("dense", "token", 3, NAMES)
        assert found.known.sum() == sum(map(len, WORDS))
        for k, row in enumerate(TAGS):
            n = len(row)
            assert found.outputs[k, 1 : n + 1].tolist() == alone[k].argmax(1).tolist()
            assert found.targets[k, 1 : n + 1].tolist() == [NAMES.index(tag) for tag in row]
        losses = found.answered(torch.arange(len(found)))[1]
        by_hand = [
            nn.functional.cross_entropy(a, torch.tensor([NAMES.index(t) for t in row]))
            for a, row in zip(alone, TAGS)
        ]
        assert torch.allclose(losses, torch.stack(by_hand), atol=1e-5)
        assert float(found.loss(*_batch(found))) == pytest.approx(
            float(losses[found.batches().parts[0]].mean()), abs=1e-5
        )


def _batch(found):
    from lineament.core.models import called, logits

    inputs, targets = found.batches()[0]
    with torch.no_grad():
        return logits(called(found.model, inputs)), targets


def test_a_word_of_several_tokens_is_tagged_at_its_first():
    from tokenizers import Tokenizer, models, pre_tokenizers

    from lineament.load.texts import TextReader
    from lineament.load.token_targets import tagged_samples

    made = Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##do": 2, "it": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    found = tagged_samples([["undo", "it"]], [[4, 5]], TextReader(words, "tokens"))
    assert found.inputs.tolist() == [[1, 2, 3]] and found.targets.tolist() == [[4, -100, 5]]


def test_class_names_of_dense_targets_are_put_in_order(tmp_path):
    """Numbers follow their names, and what is to be ignored stays so: for tokens, and for pixels."""
    from lineament.data.samples import Samples

    for shape in ((1, 4), (1, 2, 2)):
        y = torch.tensor([0, 1, -100, 0]).reshape(shape)
        found = in_order(Samples(torch.zeros(1, 1), y, ("cat", "dog")), ("dog", "cat"), dense=True)
        assert found.targets.flatten().tolist() == [1, 0, -100, 1]


def test_hidden_words_are_hidden_once_and_judged():
    net, words = network(transformers.BertForMaskedLM), tokenizer()
    loaded = load_model((net, words))
    lines = [" ".join(w) for w in WORDS]
    data = load_data(lines, tokenizer=words, text_task=loaded.text_task, seed=3)
    hidden = data.targets != -100
    assert bool((hidden.sum(1) == 1).all()) and bool((data.inputs[hidden] == words.mask_token_id).all())
    again = load_data(lines, tokenizer=words, text_task="masked", seed=3)
    assert torch.equal(again.inputs, data.inputs)
    assert not torch.equal(load_data(lines, tokenizer=words, text_task="masked", seed=4).inputs, data.inputs)
    for k, line in enumerate(lines):
        place = int(hidden[k].nonzero())
        assert int(data.targets[k, place]) == words(line)["input_ids"][place]


@pytest.mark.slow
def test_the_command_audits_networks_of_tokens(folder, tmp_path):
    given = as_lines(tmp_path)
    if "Masked" in folder.name:
        given = tmp_path / "lines.txt"
        given.write_text("\n".join(" ".join(w) for w in WORDS))
    assert cli.main(["audit", str(folder), str(given), "--out", str(tmp_path / "r")]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    status = {section["name"]: section["status"] for section in report["sections"]}
    assert {"tags", "spectrum", "landscape", "parts"} == {
        name for name, s in status.items() if s != "skipped"
    }
    assert "failed" not in status.values() and report["task"] == "dense"
    tags = next(s for s in report["sections"] if s["name"] == "tags")
    assert ("perplexity" in tags["sentence"]) == ("Masked" in folder.name)
    skipped = next(s for s in report["sections"] if s["name"] == "collapse")
    assert "answers for every token" in skipped["sentence"]


def test_tags_by_hand(tmp_path):
    net, words = network(), tokenizer()
    found = audit((net, words), (WORDS, TAGS), out=tmp_path / "r", lenses=["tags"])["tags"]
    with torch.no_grad():
        said = [
            [NAMES[int(k)] for k in net(**words(" ".join(w), return_tensors="pt")).logits[0, 1:-1].argmax(1)]
            for w in WORDS
        ]
    pairs = [(a, b) for row, other in zip(TAGS, said) for a, b in zip(row, other)]
    assert found.numbers["accuracy"][0] == pytest.approx(np.mean([a == b for a, b in pairs]))
    for tag in found.numbers["classes"]:
        both, true, named = (
            sum(f(a, b) for a, b in pairs)
            for f in (
                lambda a, b, n=tag["name"]: a == b == n,
                lambda a, b, n=tag["name"]: a == n,
                lambda a, b, n=tag["name"]: b == n,
            )
        )
        assert tag["f1"][0] == pytest.approx(2 * both / (true + named)) and tag["tokens"] == true
    whole = [(phrases(row), phrases(other)) for row, other in zip(TAGS, said)]
    f1 = 2 * sum(len(a & b) for a, b in whole) / sum(len(a) + len(b) for a, b in whole)
    assert found.numbers["phrase_f1"][0] == pytest.approx(f1)


class Tagger(nn.Module):
    """One of the user's own, with the classes behind the batch as PyTorch's loss wants them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(40, 8), nn.Conv1d(8, 3, 3, padding=1)

    def get_input_embeddings(self):
        return self.words

    def forward(self, ids):
        return self.head(self.words(ids).transpose(1, 2))


def test_a_tagger_of_ones_own(tmp_path):
    found = audit(
        (Tagger(), tokenizer()),
        (WORDS, TAGS),
        out=tmp_path / "r",
        lenses=["tags", "parts"],
        options=AuditOptions(task="dense"),
    )
    assert found["tags"].numbers["tokens"] == sum(map(len, WORDS)) and found["parts"].status != "failed"
    channels = {group["to"] for group in found["parts"].numbers["groups"]}
    assert channels <= set(range(8)), "channels are those of the convolution, not the steps"


def test_signals_have_channels_not_steps(tmp_path):
    """Of a signal's convolution the spectrum is that of its channels, averaged over steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 20, 2))
    x, y = torch.randn(24, 1, 20), torch.arange(24) % 2
    found = audit(net, (x, y), out=tmp_path / "r", lenses=["spectrum", "parts", "collapse"])
    first = found["spectrum"].numbers["sites"][0]
    assert (first["site"], first["units"]) == ("1", 6)
    groups = [group for group in found["parts"].numbers["groups"] if group["site"] == "1"]
    assert [(g["from"], g["to"]) for g in groups] == [(k, k) for k in range(6)]
    with torch.no_grad():
        acts = net[:2](x)
        features = acts.mean(2).double()
        means = torch.stack([features[y == k].mean(0) for k in (0, 1)])
        within = (features - means[y]).square().sum(1).mean()
        between = (means - means.mean(0)).square().sum(1).mean()
        layer = next(s for s in found["collapse"].numbers["sites"] if s["site"] == "1")
        assert layer["nc1_tilde"] == pytest.approx(float(within / between), rel=1e-4)
        held = acts.clone()
        held[:, 2] = acts[:, 2].mean()
        changed = (net[2:](held).argmax(1) != net(x).argmax(1)).double().mean()
    assert groups[2]["mean_changed"] == pytest.approx(float(changed))


REFUSED = {
    "another number": ('{"tokens": ["a", "b"], "tags": ["O"]}', "text 1 has 2 words and 1 tags"),
    "no tags": ('{"tokens": ["a", "b"]}', "targets: the data has no array called"),
    "no words": ('{"tokens": [], "tags": []}', "text 1 has 0 words"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_without_tags_are_refused(kind, tmp_path):
    (tmp_path / "a.jsonl").write_text(REFUSED[kind][0])
    with pytest.raises(InputError, match=REFUSED[kind][1]):
        load_data(tmp_path / "a.jsonl", tokenizer=tokenizer(), text_task="tokens")


def test_classes_of_a_model_decide_their_order():
    """Names in the file are sorted; the model's own come first."""
    loaded = load_model((network(), tokenizer()))
    with bring_together(
        loaded, load_data((WORDS, TAGS), tokenizer=loaded.tokenizer, text_task="tokens")
    ) as found:
        assert found.targets[0, 1:4].tolist() == [NAMES.index(tag) for tag in TAGS[0]]
    with (
        pytest.raises(InputError, match="'B-X' is not among"),
        bring_together(
            replace(loaded, classes=("O", "I-X", "Q")),
            load_data((WORDS, TAGS), tokenizer=loaded.tokenizer, text_task="tokens"),
        ),
    ):
        pass
