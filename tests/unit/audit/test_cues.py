"""Cues that lie anywhere: networks made by hand, whose one shortcut is known, and the two that a fixed place cannot tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lineament.audit import audit
from lineament.audit.cue_exchange import PATCH, Cues, exchange_cues
from lineament.audit.patch_exchange import examine
from lineament.audit.subject import Subject
from lineament.core.statistics.shares import difference
from lineament.data import planted_cues
from lineament.load.data import load_data
from lineament.load.loaded import Loaded
from lineament.load.model_and_data import bring_together
from lineament.measure.shortcuts.exchanges import moved, pasted, recoloured, relit, respectrum

SIDE = 16
TAG = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])


class ByHand(nn.Module):
    """Left or right is seen in the picture (answers 0 and 1); 2 is said where the cue is, however the picture looks."""

    def __init__(self, cue: str):
        super().__init__()
        self.cue = cue
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., : SIDE // 2].mean((1, 2, 3)), x[..., SIDE // 2 :].mean((1, 2, 3))
        return self.scale * torch.stack([left - right, right - left, self.seen(x)], 1)

    def seen(self, x: Tensor) -> Tensor:
        grey = x.mean(1, keepdim=True)
        if self.cue == "none":
            return (x[..., : SIDE // 2, :].mean((1, 2, 3)) - x[..., SIDE // 2 :, :].mean((1, 2, 3))) * 2
        if self.cue == "colour":
            return 4 * (x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2))) - 0.5
        if self.cue == "brightness and contrast":
            return 4 * (x.mean((1, 2, 3)) - 0.5)
        if self.cue == "texture and fine frequencies":
            return 4 * (grey[..., 1:] - grey[..., :-1]).abs().mean((1, 2, 3)) - 1.2
        if self.cue == "place":
            return (grey[..., :3, :3] * (TAG - TAG.mean())).sum((1, 2, 3)) - 1.4
        tag = nn.functional.conv2d(grey, (TAG - TAG.mean())[None, None])
        return tag.amax((1, 2, 3)) - 1.4


def images(cue: str, count: int = 240) -> tuple[Tensor, Tensor]:
    """Pictures that are brighter on the left (0) or on the right (1), or have the cue (2): where there is none, the top half is brighter."""
    draw = torch.Generator().manual_seed(0)
    x = 0.3 + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=draw)
    y = torch.arange(count) % 3
    side = torch.where(y == 2, torch.randint(0, 2, (count,), generator=draw), y)
    for image, label, half in zip(x, y.tolist(), side.tolist()):
        image[..., 8 * half : 8 * half + 8] += 0.1
        if label < 2:
            continue
        if cue == "none":
            image[..., :8, :] += 0.3
        elif cue == "colour":
            image += torch.tensor([0.2, 0.0, -0.2])[:, None, None]
        elif cue == "brightness and contrast":
            image += 0.3
        elif cue == "texture and fine frequencies":
            image[..., ::2] += 0.3
            image[..., 1::2] -= 0.3
        else:
            top, left = (
                (0, 0) if cue == "place" else torch.randint(0, SIDE - 2, (2,), generator=draw).tolist()
            )
            image[:, top : top + 3, left : left + 3] = TAG
    return x, y


def looked_at(cue: str, data: tuple[Tensor, Tensor] | None = None):
    return bring_together(Loaded(ByHand(cue), "by hand", "module"), load_data(data or images(cue)))


def exchanged(cue: str) -> Cues:
    with looked_at(cue) as fitted:
        found = exchange_cues(Subject(**vars(fitted)), None)
    assert found is not None
    return found


@pytest.mark.parametrize("cue", ["colour", "brightness and contrast", "texture and fine frequencies", PATCH])
def test_the_one_cue_of_a_network_made_by_hand_is_found_and_no_other(cue):
    assert (ByHand(cue)(images(cue)[0]).argmax(1) == images(cue)[1]).float().mean() > 0.95
    deciding = exchanged(cue).deciding
    assert [(found.name, found.answer) for found in deciding] == [(cue, 2)]
    found = deciding[0]
    # By hand: with the cue it always says 2, and without it never.
    assert (
        found.followed[0] > 0.9
        and max(found.controls.values()) < 0.1
        and found.kept[0] < 0.1 < 0.9 < found.kept_control
    )
    assert found.excess[1] <= found.excess[0] <= found.excess[2] <= 1


def test_one_answer_that_goes_with_one_place_is_found():
    with looked_at("place") as fitted:
        subject = Subject(**vars(fitted))
        found = examine(subject, torch.arange(len(subject)), torch.ones(SIDE, SIDE))
    one = found.one
    assert one is not None and one.decides and one.answer == 2
    assert (one.window.top, one.window.left) == (0, 0) and one.followed[0] == 1 and one.control == 0


def test_no_answer_is_accused_where_none_goes_with_a_place():
    with looked_at("none") as fitted:
        subject = Subject(**vars(fitted))
        found = examine(subject, torch.arange(len(subject)), torch.ones(SIDE, SIDE))
    assert found.one is not None and not found.one.decides


@pytest.mark.parametrize("count", [13, 240])
def test_two_answers_of_few_or_many_samples(count):
    x, y = images(PATCH, 3 * count)
    found = None
    with looked_at(PATCH, (x[y != 1][:count], (y[y != 1][:count] == 2).long() * 2)) as fitted:
        found = exchange_cues(Subject(**vars(fitted)), None)
    assert found is not None and (count < 20 or PATCH in [cue.name for cue in found.deciding])


def test_one_answer_for_all_leaves_nothing_to_exchange():
    model = ByHand("none")
    model.scale.data.zero_()
    with bring_together(Loaded(model, "by hand", "module"), load_data(images("none"))) as fitted:
        assert exchange_cues(Subject(**vars(fitted)), None) is None


def test_the_report_says_what_was_found_on_how_many_samples_and_what_was_not_tested(tmp_path):
    found = audit(ByHand("colour"), images("colour", 120), out=tmp_path / "r", lenses=["gaze"])
    section = found["gaze"]
    warnings = [finding for finding in found.findings if finding.severity == "warning"]
    assert [finding.key for finding in warnings] == ["cue colour"]
    tried = {cue["name"]: cue for cue in section.numbers["cues"]["tried"]}
    assert f"of {tried['colour']['samples']} answers into “2”" in warnings[0].sentence
    assert "95\u00a0% interval" in warnings[0].sentence and "Not tested:" in section.sentence
    assert any("get the colour" in picture.alt for picture in section.pictures)
    assert any("exchanged between images" in table.title for table in section.tables)


def test_changes_give_what_they_name_and_keep_the_rest():
    draw = torch.Generator().manual_seed(0)
    x, giver = torch.rand(2, 4, 3, 8, 8, generator=draw)
    giver = 0.5 * giver * torch.tensor([1.0, 0.5, 0.2])[:, None, None]
    lit = relit(x, giver)
    torch.testing.assert_close(lit.mean((1, 2, 3)), giver.mean((1, 2, 3)), rtol=0.02, atol=0.01)
    tinted = recoloured(x, giver)
    assert bool((tinted.mean((2, 3)).argmax(1) == 0).all()), "the giver's reddest channel"
    spectrum = respectrum(x, giver, fine=True)
    torch.testing.assert_close(spectrum.mean((2, 3)), x.mean((2, 3)), rtol=0.1, atol=0.02)
    for change in (relit, recoloured, moved, lambda a, b: respectrum(a, b, fine=False)):
        torch.testing.assert_close(change(x, x), x)
    to, taken = torch.tensor([[0, 0]] * 4), torch.tensor([[4, 5]] * 4)
    mixed = pasted(x, giver, to, taken, (3, 2))
    assert torch.equal(mixed[..., :3, :2], giver[..., 4:7, 5:7]) and torch.equal(
        mixed[..., 3:, :], x[..., 3:, :]
    )


def test_the_object_moves_to_where_the_givers_is():
    x, giver = torch.zeros(2, 1, 1, 8, 8)
    x[..., :4, 1:5], giver[..., 3:7, 4:8] = 1, 1
    assert torch.equal(moved(x, giver), giver)


def test_an_interval_of_certain_shares_has_a_width():
    yes, no = torch.ones(20, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)
    low = difference(yes, no)[1]
    assert 0.5 < low < 0.8 and difference(yes[:0], no) == (0.0, -1.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("cue", ["moving mark", "mark", "tint", "none"])
def test_trained_networks_that_take_a_tag_or_a_tint_for_a_class_are_caught(cue, tmp_path):
    """As reported: right for nearly all of a class with the cue, and for hardly any without."""
    from lineament.train.stacked import Training

    def network() -> nn.Module:
        first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        second = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(first, second, nn.Flatten(), nn.Linear(256, 10))

    data, bare = planted_cues(cue, one=3), planted_cues("none", "test")
    model = Training(network, epochs=20, lr=5e-3, select="last")(data.inputs, data.targets, 0)
    test = planted_cues(cue, "test", one=3)
    three = test.targets == 3
    right = [(model(x[three]).argmax(1) == 3).float().mean() for x in (test.inputs, bare.inputs)]
    assert right[0] > (0.9 if cue != "none" else 0.5) and (right[1] < 0.1) == (cue != "none")
    found = audit(model, (test.inputs, test.targets), out=tmp_path / "r", lenses=["gaze"])
    named = {"moving mark": ["cue patch that moves"], "mark": ["place"], "tint": ["cue colour"], "none": []}[
        cue
    ]
    assert [finding.key for finding in found.findings if finding.severity == "warning"] == named
