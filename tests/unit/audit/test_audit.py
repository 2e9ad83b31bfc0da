"""The audit as a whole: it finds the planted shortcut, takes networks of every kind, and says what does not apply."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.audit import curvature_budget, stages
from lineament.audit.catalogue import all_lenses
from lineament.audit.patch_exchange import needed
from lineament.audit.run import AuditOptions, audit
from lineament.core.checks import InputError
from lineament.data.digits import digit_images
from lineament.report.figures import undrawn

_ALWAYS = [
    lens.name for lens in all_lenses(language=False).values() if not lens.optional and not lens.on_request
]


@pytest.fixture(scope="module", autouse=True)
def hurried():
    """Three seconds for the curvature in place of thirty: fewer samples and steps, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curvature_budget, "_SECONDS", 3.0)
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The report of the embedded default."""
    return audit(out=tmp_path_factory.mktemp("planted") / "report")


@pytest.mark.slow
def test_the_default_finds_the_planted_mark(planted):
    first = planted.findings[0]
    assert first.severity == "warning" and first.sentence.startswith("The network relies on the mark")
    place = planted["gaze"].numbers["place"]
    assert place["decides"] and place["followed"] > 0.3 > 10 * place["others_followed"]
    window = place["window"]
    assert window["top"] <= 1 and window["left"] <= 1, "the mark is in the top left corner"
    first = planted["shortcuts"].numbers["suspects"]["tried"][0]
    assert (first["name"], first["decides"]) == ("corners", True), "where the mark is"
    simple = planted["complexity"].numbers
    assert simple["suspects"], "the mark is simple and decides"
    (window, share) = simple["places"][str(simple["suspects"][0])]
    assert window["top"] <= 1 and window["left"] <= 1 and share > 0.5, "its read-out looks at the mark"
    assert ("complexity", True) in [(a[1:], "simple" in words) for words, a in planted["shortcuts"].links]
    groups = {group["name"]: group for group in planted["accuracy"].numbers["groups"]}
    assert groups["mark agrees"]["low"] > groups["mark misleads"]["high"]


@pytest.mark.slow
def test_every_section_has_a_picture_a_number_and_a_sentence(planted):
    lenses = all_lenses(language=False)
    assert [section.name for section in planted.sections if not lenses[section.name].optional] == _ALWAYS
    for section in planted.sections:
        assert section.status in ("good", "note", "warning"), section.sentence
        assert section.number and section.sentence and section.pictures and section.numbers
        assert all(picture.alt for picture in section.pictures)
    page = planted.html.read_text(encoding="utf-8")
    # The landscape can be turned: the drawing library, what uses it and its data, and no other script.
    opened = re.findall(r"<script[^>]*>", page)
    assert sorted(opened) == [
        '<script type="application/json">',
        '<script type="text/plain" id="plotly">',
        "<script>",
    ]
    assert "default-src 'none'" in page and "script-src 'sha256-" in page
    stored = json.loads(planted.json.read_text(encoding="utf-8"))
    assert [section["name"] for section in stored["sections"]] == [s.name for s in planted.sections]
    assert {path.name for path in planted.html.parent.iterdir()} == {"report.html", "report.json"}


@pytest.mark.slow
def test_a_network_without_the_shortcut_is_not_accused(tmp_path):
    """The same network and test, taught without the mark."""
    from lineament.audit.default import small_cnn
    from lineament.data.shortcut_digits import shortcut_digits

    data = shortcut_digits("train", seed=0)
    torch.manual_seed(0)
    order = torch.randperm(len(data.targets))
    images = data.inputs.clone()
    images[..., :4, :4] = images[order, :, :4, :4]  # every image has a mark, of no class in particular
    model = small_cnn().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(8):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), data.targets[rows]).backward()
            optimizer.step()
    found = audit(
        model.eval(),
        (images[:400], data.targets[:400]),
        out=tmp_path / "report",
        lenses=["gaze", "complexity"],
    )
    assert not found["gaze"].numbers["place"]["decides"]
    assert found["complexity"].numbers["suspects"] == []
    assert all(finding.severity != "warning" for finding in found.findings)


def test_few_answers_ask_for_more_that_follow():
    assert [needed(n) for n in (1, 2, 4, 10, 100)] == [0.35, 0.35, 0.225, 0.15, 0.105]


def digits(classes=10, count=300):
    data = digit_images()
    data = data[data.targets < classes][:count]
    return data.inputs[:, 0], data.targets


def convolutional(outputs, side=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, outputs),
    )


def fit(model, images, targets, loss_fn, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(images), targets).backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model.eval()


@pytest.mark.slow
def test_two_classes_from_one_output(tmp_path):
    images, targets = digits(2)
    model = fit(
        convolutional(1),
        images[:, None],
        targets[:, None].float(),
        nn.functional.binary_cross_entropy_with_logits,
    )
    with unchanged(model):
        found = audit(model, (images, targets), out=tmp_path / "r", classes=["zero", "one"])
    assert {s.name: s.status for s in found.sections if s.status in ("failed", "skipped")} == {}
    assert found["accuracy"].numbers["overall"]["accuracy"] > 0.9
    assert [c["name"] for c in found["accuracy"].numbers["classes"]] and "(0, z)" in found.json.read_text()


@pytest.mark.slow
def test_a_hundred_classes(tmp_path):
    images, targets = digits()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    pairs, labels = torch.cat([images, images[order]], 2), 10 * targets + targets[order]
    model = convolutional(100)
    found = audit(model, (pairs, labels), out=tmp_path / "r")
    assert {s.name for s in found.sections if s.status == "failed"} == set()
    assert len(found["accuracy"].numbers["classes"]) == len(labels.unique())


@pytest.mark.slow
def test_a_regression_network_is_told_what_does_not_apply(tmp_path):
    images, _ = digits()
    ink = images.mean((1, 2))[:, None]
    model = fit(convolutional(1), images[:, None], ink, nn.functional.mse_loss)
    found = audit(model, (images, ink[:, 0]), out=tmp_path / "r")
    skipped = {s.name: s.sentence for s in found.sections if s.status == "skipped"}
    assert "decide between classes" in skipped.pop("complexity")
    assert set(skipped) == {"gaze", "collapse", "shortcuts"} and all(
        "real values" in text for text in skipped.values()
    )
    assert {s.name for s in found.sections if s.status == "failed"} == set()
    assert found["accuracy"].numbers["overall"]["r2"] > 0.5
    assert found["accuracy"].method == "", "calibration is about classes"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_transformers_saved_to_disk(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    images, targets = digits()
    if kind == "resnet":
        config = transformers.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
        )  # fmt: skip
        model = transformers.ResNetForImageClassification(config)
    else:
        config = transformers.ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=32, num_labels=10,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "digits.npz", images=images.numpy(), labels=targets.numpy())
    found = audit(str(tmp_path / "model"), str(tmp_path / "digits.npz"), out=tmp_path / "r", samples=200)
    assert {s.name: s.sentence for s in found.sections if s.status in ("failed", "skipped")} == {}
    assert found["gaze"].numbers["place"]["windows"] > 9


def test_the_landscape_goes_by_its_earlier_name_too(tmp_path):
    images, targets = digits()
    found = audit(convolutional(10), (images, targets), out=tmp_path / "r", lenses=["sharpness"], samples=60)
    (section,) = found.sections
    assert section.name == "landscape" and len(section.pictures) == 2 and section.status == "note"
    around = section.numbers["plane"]
    assert len(around["loss"]) == len(around["loss"][0]) == 21 and around["a"][10] == 0
    assert section.numbers["criteria"]["verdict"] in ("untrained", "unsettled", "mainly negative")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for p in flat.parameters():
        p.data.zero_()
    assert audit(flat, (images, targets), out=tmp_path / "f", lenses=["landscape"]).sections[0].status in (
        "good",
        "note",
    )


def test_a_lens_that_fails_says_so_and_the_rest_goes_on(tmp_path, monkeypatch):
    from lineament.audit.lenses import spectrum

    def look(subject):
        raise ZeroDivisionError("<b>by nothing</b>")

    monkeypatch.setattr(spectrum, "look", look)
    images, targets = digits()
    found = audit(
        convolutional(10), (images, targets), out=tmp_path / "r", lenses=["accuracy", "spectrum", "collapse"]
    )
    assert {s.name for s in found.sections if s.status == "failed"} == {"spectrum"}
    page = found.html.read_text(encoding="utf-8")
    assert "ZeroDivisionError" in page and "<b>by nothing" not in page


def test_nothing_is_made_where_the_input_cannot_be_used(tmp_path):
    images, targets = digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for data, options, message in (
        ((images, targets + 90), {}, "expected labels from 0 to 9"),
        ((images[:, :3], targets), {}, "do not fit the model"),
        ((images, targets[:9]), {}, "expected as many"),
        ((images[targets == 3], targets[targets == 3]), {}, "at least two classes"),
        ((images * float("nan"), targets), {}, "NaN"),
        ((images, targets), {"options": AuditOptions(sites=["layer9"])}, "layer9"),
        ((images, targets), {"lenses": ["gaz"]}, "nearest: 'gaze'"),
    ):
        with pytest.raises(InputError, match=message):
            audit(model, data, out=tmp_path / "r", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_report_is_not_replaced_unasked(tmp_path):
    images, targets = digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    audit(model, (images, targets), out=tmp_path / "r", lenses=["accuracy"])
    with pytest.raises(InputError, match="overwrite=True"):
        audit(model, (images, targets), out=tmp_path / "r", lenses=["accuracy"])
    audit(model, (images, targets), out=tmp_path / "r", lenses=["accuracy"], overwrite=True)
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="thesis"):
        audit(model, (images, targets), out=tmp_path / "r", lenses=["accuracy"], overwrite=True)


@pytest.mark.slow
def test_an_interrupted_audit_goes_on_with_the_same_result(tmp_path, monkeypatch):
    images, targets = digits()
    model, lenses = convolutional(10), ["accuracy", "collapse", "spectrum"]
    whole = audit(model, (images, targets), out=tmp_path / "whole", lenses=lenses)
    seen = []

    def look(lens, subject, original=stages.look):
        seen.append(lens.name)
        if lens.name == "spectrum" and seen.count("spectrum") == 1:
            raise KeyboardInterrupt
        return original(lens, subject)

    monkeypatch.setattr(stages, "look", look)
    with pytest.raises(KeyboardInterrupt):
        audit(model, (images, targets), out=tmp_path / "cut", lenses=lenses)
    assert not (tmp_path / "cut" / "report.html").exists()
    again = audit(model, (images, targets), out=tmp_path / "cut", lenses=lenses)
    assert seen == ["accuracy", "collapse", "spectrum", "spectrum"], "finished lenses are not run again"
    for ours, theirs in zip(whole.sections, again.sections):
        assert (ours.numbers, ours.sentence, ours.status) == (theirs.numbers, theirs.sentence, theirs.status)
    assert [f.sentence for f in whole.findings] == [f.sentence for f in again.findings]


def sampled(accuracies, each, seed=0):
    """Answers of which so many are right, by group, and the labels."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(each * len(accuracies)) % 5
    right = torch.rand(len(labels), generator=draw) < torch.tensor(accuracies).repeat_interleave(each)
    said = torch.where(right, labels, (labels + 1) % 5)
    return torch.eye(5)[said] * 4, labels, [f"g{k // each}" for k in range(len(labels))]


def same(temperature=1.0):
    layer = nn.Linear(5, 5, bias=False)
    layer.weight.data = torch.eye(5) / temperature
    return nn.Sequential(layer)


@pytest.mark.parametrize(("accuracies", "differ"), [([0.9] * 8, False), ([0.9] * 7 + [0.6], True)])
def test_the_worst_of_many_equal_groups_is_not_accused(tmp_path, accuracies, differ):
    """By chance the worst of eight groups lies far below the best: of twenty draws none may be told of, where the eighth is as good as the others."""
    keys = []
    for seed in range(20 if not differ else 3):
        x, y, groups = sampled(accuracies, 60, seed)
        with undrawn():
            found = audit(same(), (x, y), out=tmp_path / str(seed), lenses=["accuracy"], groups=groups)
        keys += [
            finding.key for finding in found.findings if finding.key in ("groups differ", "class behind")
        ]
    assert keys == (["groups differ"] * 3 if differ else [])


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, set()), (0.4, {"overconfident"}), (4.0, {"underconfident"})]
)
def test_a_calibrated_network_is_not_called_sure_by_chance(tmp_path, temperature, expected):
    """Labels drawn with the probabilities that the outputs stand for."""
    found = set()
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        x = 2 * torch.randn(150, 5, generator=draw)
        y = torch.multinomial(x.softmax(1), 1, generator=draw)[:, 0]
        with undrawn():
            report = audit(same(temperature), (x, y), out=tmp_path / str(seed), lenses=["accuracy"])
        found |= {finding.key for finding in report.findings if finding.key.endswith("confident")}
    assert found == expected


def test_a_minimum_with_noisy_labels_is_a_minimum(tmp_path):
    """Logistic regression is convex: where its gradient is zero it sits in its minimum, however much of the loss is noise."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(300, 4, generator=draw)
    y = (2 * x[:, :3] + 1.5 * torch.randn(300, 3, generator=draw)).argmax(1)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with undrawn():
        found = audit(model, (x, y), out=tmp_path / "r", lenses=["landscape"])
    assert [finding.key for finding in found.findings] == ["minimum"]


def test_processes_that_cannot_find_each_other_are_told_how_to_start(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="start them by torchrun"):
        audit(nn.Linear(2, 2), (torch.randn(8, 2), torch.arange(8) % 2), out=tmp_path / "report")
    assert not (tmp_path / "report").exists()
