"""Two embeddings compared: the change and its paired interval, and the page's first section."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lineament
from lineament.audit.compare import CompareOptions
from lineament.core.checks import InputError
from lineament.measure import recognition, recognition_change, recognition_spread


def people(noise: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(20).repeat_interleave(6)
    centres = torch.randn(20, 8, generator=generator)
    return centres[labels] + noise * torch.randn(120, 8, generator=generator), labels


def test_a_change_is_the_difference_and_its_interval_is_narrower_than_both():
    x, labels = people(0.6)
    y = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = recognition_change(x, y, labels, [0.01])
    one, two = (recognition(each, labels, [0.01]) for each in (x, y))
    assert found.tar[0] == pytest.approx(two.tar[0] - one.tar[0]) and found.recall == pytest.approx(
        two.recall - one.recall
    )
    (low, high), (_, _) = found.tar_interval[0], found.recall_interval
    assert high < 0 and low <= found.tar[0] <= high
    own = [recognition_spread(each, labels, [0.01]).tar[0] for each in (x, y)]
    assert high - low < sum((b - a) for a, b in own)
    same = recognition_change(x, 3 * x, labels, [0.01])
    assert same.tar == (0.0,) and same.tar_interval == ((0.0, 0.0),) and same.recall_interval == (0.0, 0.0)
    with pytest.raises(InputError, match="second: got"):
        recognition_change(x, y[:-1], labels)


@pytest.mark.slow
def test_the_page_says_which_recognises_more(tmp_path):
    x, labels = people(0.4)
    blind = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    keen = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with torch.no_grad():
        for layer in (keen[0], keen[2]):
            layer.weight.copy_(torch.eye(8))
            layer.bias.zero_()
        blind[2].weight[1:] = 0
    found = lineament.compare(
        blind, keen, (x, labels), out=tmp_path / "page", options=CompareOptions(task="embedding")
    )
    first = found.sections[0]
    assert (
        first.name == "answers"
        and first.findings[0].key == "embeddings part"
        and "B recognises more" in first.sentence
    )
    assert "barrier" not in [section.name for section in found.sections]
    assert first.numbers["change"]["tar_interval"][-1][0] > 0
