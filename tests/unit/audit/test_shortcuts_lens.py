"""The shortcuts lens: networks made by hand that decide by one attribute, and what it says of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit import audit
from lineament.measure.shortcuts.suspects import IMAGE_ATTRIBUTES, TEXT_ATTRIBUTES, suspects_of

DRAW = torch.Generator().manual_seed(0)


def pictures(count=240, side=16):
    """Blobs of random colour, place and softness on random grounds, with noise."""
    at = torch.linspace(-1, 1, side)
    centre = torch.rand(count, 2, generator=DRAW) - 0.5
    width = 0.15 + 0.4 * torch.rand(count, 1, 1, generator=DRAW)
    away = (at[:, None] - centre[:, 0, None, None]).square() + (at - centre[:, 1, None, None]).square()
    colour = torch.rand(count, 3, 1, 1, generator=DRAW)
    ground = torch.rand(count, 3, 1, 1, generator=DRAW)
    x = ground + (colour - ground) * (-away / width.square()).exp()[:, None]
    return (
        x + 0.08 * torch.rand(count, 1, 1, 1, generator=DRAW) * torch.randn(x.shape, generator=DRAW)
    ).clamp(0, 1)


X = pictures()


@pytest.mark.parametrize("name", [n for n, (_, change) in IMAGE_ATTRIBUTES.items() if change])
def test_a_network_that_decides_by_an_attribute_is_found_out_and_the_attribute_is_what_was_exchanged(name):
    measure, change = IMAGE_ATTRIBUTES[name]
    assert change is not None
    direction = (measure(X) - measure(X).mean(0)).std(0).argmax()

    def answers(x):
        values = measure(x)[:, direction]
        return (values > measure(X)[:, direction].median()).long()

    labels = answers(X)
    found = suspects_of(answers, X, labels, pairs=120)
    suspect = found[name]
    assert suspect.decides and suspect.followed[0] > 0.7 > 0.4 > suspect.control[0]
    assert suspect.predicts[0] > 0.8 and suspect.predictive
    giver = X.roll(1, 0)
    moved, own, lent = measure(change(X, giver)), measure(X), measure(giver)
    if name == "hue":
        moved, own, lent = ((torch.cos(v), torch.sin(v)) for v in (moved, own, lent))
        moved, own, lent = (torch.cat(v, 1) for v in (moved, own, lent))
    assert (moved - lent).abs().mean() < 0.5 * (own - lent).abs().mean()
    assert change(X, X).sub(X).abs().max() < 1e-3, "an exchange with oneself changes nothing"
    alone = change(X[:1], giver[:1])
    assert torch.allclose(alone, change(X, giver)[:1], atol=1e-5), "whoever shares the batch"


@pytest.mark.parametrize("name", TEXT_ATTRIBUTES)
def test_texts_have_attributes_too(name):
    ids = torch.randint(1, 50, (200, 12), generator=DRAW)
    lengths = torch.randint(3, 12, (200, 1), generator=DRAW)
    ids = torch.where(torch.arange(12) < lengths, ids, 0)
    measure, _ = TEXT_ATTRIBUTES[name]

    def answers(x):
        return (measure(x)[:, 0] > (7 if name == "length" else 25)).long()

    found = suspects_of(answers, ids, answers(ids), pairs=100)
    # A text can only be cut, so that half of the exchanges of a length change nothing.
    assert found.tried[0].name == name and found[name].decides


def test_numbers_beside_the_samples_are_suspects_that_cannot_be_exchanged():
    y = torch.arange(240) % 2
    found = suspects_of(
        lambda x: torch.arange(len(x)) % 2, X, y, attributes=["hue"], numbers={"file_size": y * 10.0}
    )
    assert found["file size"].predicts[0] == 1.0 and found["file size"].followed is None
    assert not found["file size"].decides and found.tried[-1].name == "file size"


class Bright(nn.Module):
    def forward(self, x):
        value = 20 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-value, value], 1)


class Left(nn.Module):
    """Whether the picture is redder on the left: no attribute of the whole."""

    def forward(self, x):
        value = 50 * (x[:, 0, :, :8].mean((1, 2)) - x[:, 0, :, 8:].mean((1, 2)))
        return torch.stack([-value, value], 1)


def test_the_lens_names_brightness_and_the_group_that_is_followed(tmp_path):
    y = torch.arange(len(X)) % 2
    bright = (X.mean((1, 2, 3)) > 0.5).long()
    keep = (bright == y) | (
        torch.arange(len(X)) % 3 == 0
    )  # mostly they agree, which makes the brightness predictive
    walls = ["dark", "bright"]
    groups = [walls[int(k)] for k in bright[keep]]
    found = audit(Bright(), (X[keep], y[keep]), groups=groups, out=tmp_path / "r", lenses=["shortcuts"])
    section = found["shortcuts"]
    assert section.status == "warning" and {f.key for f in found.findings} == {
        "group decides",
        "attribute decides",
    }
    assert "reliance of +1" in section.sentence and "Answers follow brightness" in section.sentence
    numbers = section.numbers
    assert (
        numbers["groups"]["conflicts"][0]["reliance"][0] == 1.0 and numbers["suspects"]["tried"][0]["decides"]
    )
    assert "brightness" in found.html.read_text(encoding="utf-8")


def test_a_network_that_takes_no_simple_attribute_is_accused_of_none(tmp_path):
    net = Left()
    found = audit(net, (X, net(X).argmax(1)), out=tmp_path / "r", lenses=["shortcuts"])
    assert found["shortcuts"].status == "good" and [f.key for f in found.findings] == ["no attribute"]


def test_what_it_does_not_apply_to_it_says(tmp_path):
    found = audit(
        nn.Linear(3, 2),
        (torch.randn(40, 3, generator=DRAW), torch.arange(40) % 2),
        out=tmp_path / "r",
        lenses=["accuracy", "shortcuts"],
    )
    assert found["shortcuts"].status == "skipped" and "name some by groups" in found["shortcuts"].sentence


def test_groups_that_say_nothing_of_the_class_leave_nothing_to_answer(tmp_path):
    found = audit(
        nn.Linear(3, 2),
        (torch.randn(40, 3, generator=DRAW), torch.arange(40) % 2),
        out=tmp_path / "r",
        groups=[f"site {k // 2 % 2}" for k in range(40)],
        lenses=["accuracy", "shortcuts"],
    )
    section = found["shortcuts"]
    assert section.status == "skipped" and not section.findings
    assert "says no more of the class" in section.sentence and "no simple attributes" in section.sentence
