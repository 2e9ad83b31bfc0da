"""Where a network is near chance, the usual preprocessings are tried and the finding says what they would give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit.preprocessing import better_preprocessing
from lineament.audit.run import audit
from lineament.load.data import load_data
from lineament.load.loaded import Loaded
from lineament.load.model_and_data import bring_together

MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406])[:, None, None],
    torch.tensor([0.229, 0.224, 0.225])[:, None, None],
)
TRAINED = {
    "ImageNet normalisation": lambda x: x * STD + MEAN,
    "values from -1 to 1": lambda x: x / 2 + 0.5,
    "values from 0 to 255": lambda x: x / 255,
    "values from 0 to 1 and channels in the order blue, green, red": lambda x: x.flip(1),
    "as it is": lambda x: x,
}


class ByHand(nn.Module):
    """Right where the input, brought back to pixels as its training had them, is one of two flat colours within a tenth; else always class 0."""

    def __init__(self, back):
        super().__init__()
        self.back, self.weight = back, nn.Conv2d(3, 1, 1)

    def forward(self, x):
        mean = self.back(x).mean((2, 3))
        second = (mean - torch.tensor([0.2, 0.5, 0.8])).abs().amax(1) < 0.1
        return torch.stack([1 - second.float(), second.float()], 1) * 4 + 0 * self.weight(x).mean()


def colours():
    first, second = torch.tensor([0.8, 0.2, 0.3]), torch.tensor([0.2, 0.5, 0.8])
    labels = torch.arange(60) % 2
    flat = torch.stack([first, second])[labels][:, :, None, None].expand(-1, 3, 5, 6)
    return (flat * 255).round().to(torch.uint8), labels


@pytest.mark.parametrize("trained", TRAINED)
def test_the_preprocessing_of_its_training_is_found(trained):
    model = Loaded(ByHand(TRAINED[trained]), "by hand", "module")
    with bring_together(model, load_data(colours())) as fitted:
        found = better_preprocessing(fitted)
    if trained == "as it is":
        assert found is None
    else:
        assert found.name == trained and (found.accuracy, found.now, found.count) == (1.0, 0.5, 60)


class Proportional(nn.Module):
    """Without biases: 255 times the input gives 255 times the logits, and the same answers, some of them wrong."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.1]]))

    def forward(self, x):
        return 6 * x.mean((2, 3)) @ self.weight.T


def test_inputs_scaled_by_255_are_found_where_answers_do_not_change(tmp_path):
    images, labels = colours()
    wrong = torch.where(torch.arange(60) % 10 == 0, 1 - labels, labels)
    found = audit(Proportional(), (images.float(), wrong), out=tmp_path / "huge", lenses=["accuracy"])
    (said,) = [f.sentence.replace("\xa0", " ") for f in found.findings if f.key == "preprocessing"]
    assert said.startswith("With values from 0 to 1 its loss would be 0.") and "instead of" in said
    assert "right for 90 % instead of 90 % of 60 samples" in said
    fits = audit(Proportional(), (images.float() / 255, wrong), out=tmp_path / "fits", lenses=["accuracy"])
    assert not [f for f in fits.findings if f.key == "preprocessing"]


def test_the_report_says_what_it_would_give(tmp_path):
    found = audit(ByHand(TRAINED["ImageNet normalisation"]), colours(), out=tmp_path, lenses=["accuracy"])
    said = [finding.sentence.replace("\xa0", " ") for finding in found.findings]
    assert any(
        s.startswith("With ImageNet normalisation it would be right for 100 % instead of 50 % of 60 samples")
        for s in said
    )
