"""What a report says at the ends: everything right, nothing learned, hardly any samples, curvature that is rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit.run import audit


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
