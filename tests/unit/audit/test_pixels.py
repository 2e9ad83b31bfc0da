"""Networks that answer for every pixel: intersection over union and edges by hand, and what other lenses say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit.run import AuditOptions, audit
from lineament.core.checks import InputError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(12, 1, 16, 16, generator=GENERATOR)
MASKS = (
    (torch.arange(16)[None, :, None] + torch.arange(12)[:, None, None] > 14).long().expand(12, 16, 16).clone()
)


class Named(nn.Module):
    """Says the classes that it was given, whatever it sees; a convolution makes it a network."""

    def __init__(self, said, width=2):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 1)
        self.said, self.width = said, width
        self.seen = {row.sum().item(): k for k, row in enumerate(IMAGES)}

    def forward(self, x):
        rows = torch.tensor([self.seen[row.sum().item()] for row in x])
        wanted = nn.functional.one_hot(self.said[rows], self.width).movedim(-1, 1).float()
        return 0 * self.conv(x) + 9 * wanted


def section(said, masks=MASKS, tmp_path=None, **more):
    return audit(Named(said, **more), (IMAGES, masks), out=tmp_path / "r", lenses=["pixels"])["pixels"]


def test_intersection_over_union_by_hand(tmp_path):
    said = MASKS.clone()
    said[:, :, :4] = 0
    numbers = section(said, tmp_path=tmp_path).numbers
    for k in (0, 1):
        both = ((said == k) & (k == MASKS)).sum().item()
        either = ((said == k) | (k == MASKS)).sum().item()
        assert numbers["classes"][k]["iou"][0] == pytest.approx(both / either)
    assert numbers["miou"][0] == pytest.approx(sum(c["iou"][0] for c in numbers["classes"]) / 2)
    assert numbers["accuracy"][0] == pytest.approx((said == MASKS).double().mean().item())
    low, high = numbers["miou"][1:]
    assert low < numbers["miou"][0] < high


def test_edges_are_told_apart(tmp_path):
    """Wrong exactly in the row behind each edge."""
    said = MASKS.clone()
    first = (MASKS == 1) & (MASKS.roll(1, 1) == 0)
    first[:, 0] = False
    said[first] = 0
    numbers = section(said, tmp_path=tmp_path).numbers
    assert numbers["inside"][0] == 1 and numbers["edges"][0] < 0.8


def test_labels_outside_the_classes_count_nowhere(tmp_path):
    masks = MASKS.clone()
    masks[:, :, :8] = 255
    numbers = section(MASKS, masks, tmp_path).numbers
    assert numbers["miou"][0] == 1 and numbers["ignored"] == pytest.approx(0.5)


def test_what_decides_the_pixels_of_the_hardest_class(tmp_path):
    """A network whose answer for a pixel is made of that pixel, and one that reads the pixel opposite."""

    class Here(nn.Module):
        def __init__(self, opposite):
            super().__init__()
            self.conv, self.opposite = nn.Conv2d(1, 2, 1), opposite
            self.conv.bias.data.copy_(torch.tensor([9.0, -9.0]))  # it names the first class everywhere

        def forward(self, x):
            return self.conv(x.flip(2, 3) if self.opposite else x)

    masks = torch.zeros(12, 16, 16, dtype=torch.long)
    masks[:, :4, :4] = 1
    for opposite, share in ((False, 1.0), (True, 0.0)):
        found = audit(Here(opposite), (IMAGES, masks), out=tmp_path / str(opposite), lenses=["pixels"])
        reach = found["pixels"].numbers["reach"]
        assert (reach["images"], reach["inside"][0]) == (12, pytest.approx(share))
        assert reach["area"] == pytest.approx(1 / 16)
        assert len(found["pixels"].pictures) == 2


class Net(nn.Module):
    """Two convolutions and a class for each pixel, or one logit."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, width, 1, bias=False)
        nn.init.normal_(self.two.weight, std=3.0)

    def forward(self, x):
        return self.two(self.one(x).relu())


def test_the_loss_of_each_image_is_the_mean_over_its_labelled_pixels():
    from lineament.load.data import load_data
    from lineament.load.model_and_data import bring_together
    from lineament.load.models import load_model

    net, masks = Net(3), MASKS.clone()
    masks[:, :8] = 255
    with bring_together(load_model(net), load_data((IMAGES, masks)), batch_size=5) as found, torch.no_grad():
        said, losses = found.answered(torch.arange(12))
        z = net(IMAGES)
        assert torch.equal(said.long(), z.argmax(1)) and torch.equal(found.outputs, said)
        each = nn.functional.cross_entropy(z[:, :, 8:], MASKS[:, 8:], reduction="none").flatten(1).mean(1)
        assert torch.allclose(losses, each, atol=1e-6)
        assert float(found.loss(z, masks)) == pytest.approx(float(each.mean()), abs=1e-6)


@pytest.mark.parametrize("masks", [MASKS[:, None], MASKS.float(), MASKS[:, None].float()])
def test_one_logit_and_binary_masks_in_every_form(masks, tmp_path):
    """Two classes (0, z), whatever axis and type the masks are stored with."""
    net = Net(1)
    found = audit(net, (IMAGES, masks), out=tmp_path / "r", lenses=["pixels"])["pixels"]
    with torch.no_grad():
        right = ((net(IMAGES)[:, 0] > 0).long() == MASKS).double().mean()
    assert found.numbers["accuracy"][0] == pytest.approx(float(right))


@pytest.mark.slow
def test_parts_and_landscape_of_pixels_by_hand(tmp_path):
    net = Net(2)
    found = audit(net, (IMAGES, MASKS), out=tmp_path / "r", lenses=["parts", "landscape"])
    group = found["parts"].numbers["groups"][1]
    with torch.no_grad():
        before, hidden = net(IMAGES), net.one(IMAGES).relu()
        site = net.one(IMAGES) if group["site"] == "one" else hidden
        held = site.clone()
        held[:, group["from"]] = site[:, group["from"]].mean()
        after = net.two(held.relu() if group["site"] == "one" else held)
        loss = nn.functional.cross_entropy(before, MASKS)
    assert group["mean_changed"] == pytest.approx(
        float((before.argmax(1) != after.argmax(1)).double().mean())
    )
    assert group["mean_cost"] == pytest.approx(
        float(nn.functional.cross_entropy(after, MASKS) - loss), abs=1e-6
    )
    assert "pixels' answers" in found["parts"].sentence
    numbers = found["landscape"].numbers
    assert numbers["loss"] == pytest.approx(float(loss), abs=1e-5) and numbers["top"] > 0
    assert numbers["chance"] == pytest.approx(
        max(float(MASKS.double().mean()), 1 - float(MASKS.double().mean()))
    )


def test_other_lenses_say_that_they_do_not_serve_it(tmp_path):
    found = audit(Named(MASKS), (IMAGES, MASKS), out=tmp_path / "r")
    status = {s.name: s.status for s in found.sections}
    assert status["pixels"] == "good" and status["accuracy"] == "skipped" and "failed" not in status.values()
    assert "answers for every pixel" in found["collapse"].sentence
    with pytest.raises(InputError, match="expected 'dense'"):
        audit(Named(MASKS), (IMAGES, MASKS), out=tmp_path / "s", options=AuditOptions(task="regression"))
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    with pytest.raises(InputError, match="task: 'dense' was asked for"):
        audit(net, (IMAGES, torch.arange(12) % 2), out=tmp_path / "t", options=AuditOptions(task="dense"))
