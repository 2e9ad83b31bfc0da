"""What a report says at the ends: everything right, nothing learned, hardly any samples, curvature that is rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit.run import audit
from lineament.core.checks import InputError


def answering(logits, **options):
    """An audit of a linear network that answers with its inputs, ``logits`` (sample, class)."""
    model = nn.Sequential(nn.Linear(logits.shape[1], logits.shape[1]))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(logits.shape[1]))
        model[0].bias.zero_()
    return lambda targets, out: audit(model, (logits, targets), out=out, **options)


def test_who_is_always_right_has_no_hardest_class_and_no_mistakes(tmp_path):
    targets = torch.arange(60) % 3
    groups = ["north" if i % 2 else "south" for i in range(60)]
    found = answering(20 * torch.eye(3)[targets], lenses=["accuracy"], groups=groups)(targets, tmp_path / "r")
    sentence = found["accuracy"].sentence
    assert "It is right equally often in all 2 groups" in sentence
    assert "differ" not in sentence and "hardest" not in sentence
    assert "Most frequent mistakes" not in [table.title for table in found["accuracy"].tables]
    assert found["accuracy"].status == "good"


@pytest.mark.parametrize(
    ("right", "said"), [(90, "no better than always naming"), (92, "may be no better than always naming")]
)
def test_naming_the_most_frequent_class_is_no_merit(tmp_path, right, said):
    """Nine in ten samples are of one class, so that an accuracy of 90 % takes no network."""
    targets = (torch.arange(100) >= 90).long()
    answers = torch.where(torch.arange(100) < right, targets, torch.zeros(100, dtype=torch.long))
    found = answering(3 * torch.eye(2)[answers], lenses=["accuracy"])(targets, tmp_path / "r")
    (finding,) = (f for f in found.findings if "of 100 samples" in f.sentence)
    assert finding.severity == "warning" and said in finding.sentence and "90\xa0%" in finding.sentence
    assert found["accuracy"].status == "warning"


def test_maps_of_answers_that_no_pixel_moves_are_not_called_true(tmp_path):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(40) % 2
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-4)
        model[3].bias.copy_(torch.tensor([30.0, 0.0]))
    found = audit(model, (images, targets), out=tmp_path / "r", lenses=["gaze", "parts"])
    assert "cannot be told: the answers stay as sure" in found["gaze"].sentence
    assert "truer than chance" not in found["gaze"].sentence and found["gaze"].status == "note"
    assert "silencing any one of" in found["parts"].sentence
    assert "changes no answer" in found["parts"].sentence
    assert {row[1] for row in found["parts"].tables[0].rows if row[0] == "1"} == {"0", "1"}


def test_where_nothing_is_left_of_the_loss_its_curvature_is_not_read(tmp_path):
    """Rounding has a sign; a saddle of 1e-8 is none."""
    targets = torch.arange(60) % 3
    found = answering(30 * torch.eye(3)[targets], lenses=["landscape"])(targets, tmp_path / "r")
    (finding,) = found.findings
    assert finding.severity == found["landscape"].status == "note"
    assert "zero within rounding" in finding.sentence and "minimum:" not in finding.sentence
    assert "curves steeply" not in found["landscape"].sentence


def test_a_loss_that_does_not_hang_on_the_weights_is_flat(tmp_path):
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            return x + 0 * self.unused(x)

    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    found = audit(Passing(), (x, torch.arange(60) % 3), out=tmp_path / "r", lenses=["landscape"])
    assert "no curvature at all" in found.findings[0].sentence
    assert (
        "Nothing curves either way" in found["landscape"].sentence
        and "nan" not in found["landscape"].sentence
    )


def test_the_verdict_and_the_section_of_a_minimum_agree(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(200, generator=generator)
    weights = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1), y[:, None]).solution[:, 0]
    model = nn.Sequential(nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(weights[None, :3])
        model[0].bias.copy_(weights[3:])
    found = audit(model, (x, y), out=tmp_path / "r", lenses=["landscape"])
    assert found.findings[0].severity == found["landscape"].status == "good"


def test_few_samples_a_class_do_not_tell_how_tightly_classes_are_held(tmp_path):
    """An untrained network on noise has the nearest of its own few samples' means nearly always."""
    x = torch.randn(60, 30, generator=torch.Generator().manual_seed(0))
    found = answering(x, lenses=["collapse"])(torch.arange(60) % 30, tmp_path / "r")
    assert found["collapse"].numbers["sites"][-1]["nearest_mean_accuracy"] > 0.9
    assert found.findings[0].severity == found["collapse"].status == "note"
    assert (
        "too few samples" in found.findings[0].sentence
        and "With 2 samples a class" in found["collapse"].sentence
    )


def test_the_report_says_how_samples_go_in_and_how_places_are_named(tmp_path):
    told = []
    images = torch.randint(0, 255, (40, 8, 8, 3), dtype=torch.uint8)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    found = audit(
        model, (images, torch.arange(40) % 2), out=tmp_path / "r", lenses=["accuracy"], note=told.append
    )
    page = found.html.read_text(encoding="utf-8")
    assert ": colour as grey" in page and "&#39;3:in&#39; what goes into &#39;3&#39;" in page
    assert any(": colour as grey" in line for line in told)


def test_no_class_is_called_the_hardest_where_several_are(tmp_path):
    targets = torch.arange(60) % 3
    found = answering(20 * torch.eye(3)[torch.full_like(targets, 2)], lenses=["accuracy"])(
        targets, tmp_path / "r"
    )
    assert "Of 3 classes, 2 are hardest alike (0\xa0%)" in found["accuracy"].sentence


def test_the_greatest_seed_is_as_good_as_any(tmp_path):
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    look = answering(x, lenses=["spectrum", "landscape"], seed=2**63 - 1)
    assert all(section.status != "failed" for section in look(torch.arange(60) % 3, tmp_path / "r").sections)
    with pytest.raises(InputError, match="seed: got 9223372036854775808"):
        answering(x, seed=2**63)(torch.arange(60) % 3, tmp_path / "other")


@pytest.mark.parametrize("kind", ["detached", "rounded"])
def test_gradients_that_cannot_pass_are_not_a_loss_without_curvature(tmp_path, kind):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            z = 8 * self.fc(x)
            return z.detach() if kind == "detached" else z.round() / 8

    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    found = audit(Cut(), (x, torch.arange(60) % 3), out=tmp_path / "r", lenses=["landscape"])
    assert found["landscape"].status == "note" and "Gradients cannot pass" in found.findings[0].sentence
    assert "linear function" not in found["landscape"].sentence
