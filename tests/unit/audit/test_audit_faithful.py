"""The gaze lens judges its own maps; retraining on request, and the reason where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.audit.run import AuditOptions, audit
from lineament.core.checks import InputError


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )  # fmt: skip


def looked(tmp_path, model, **options):
    options = AuditOptions(**options)
    return audit(model, "digits", out=tmp_path / "out", lenses=["gaze"], samples=300, options=options)["gaze"]


@pytest.mark.slow
def test_maps_stand_beside_the_plain_gradient_and_a_random_map(tmp_path):
    section = looked(tmp_path, network())
    table = next(t for t in section.tables if "without retraining" in t.title)
    assert [row[0] for row in table.rows] == ["norm_grad (chosen)", "plain gradient", "random"]
    assert all(isinstance(value, float) for row in table.rows for value in row[1:])
    assert set(section.numbers["scores"]) == {"norm_grad (chosen)", "plain gradient", "random"}
    assert "diffroar" not in section.numbers


@pytest.mark.slow
def test_retraining_on_request(tmp_path):
    section = looked(tmp_path, network(), faithfulness="diffroar")
    found = section.numbers["diffroar"]
    assert "(DiffROAR; random maps" in section.sentence
    assert set(found) == {"sentence", "norm_grad (chosen)", "plain gradient", "random"}
    assert found["random"]["mean"][0] == 0.0 and found["random"]["unmasked"] > 0.5
    assert any("Retrained" in t.title for t in section.tables)


@pytest.mark.slow
def test_an_exported_program_cannot_be_drawn_anew_and_the_section_says_so(tmp_path):
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(network().eval(), (torch.rand(4, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    where = {"gaze_site": ":in", "method": "gradient"}
    section = looked(tmp_path, str(tmp_path / "net.pt2"), faithfulness="diffroar", **where)
    assert "DiffROAR does not apply" in section.sentence
    assert not any("Retrained" in t.title for t in section.tables)


@pytest.mark.slow
def test_a_module_that_cannot_be_drawn_anew_is_named(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.net = network()

        def forward(self, x):
            return self.scale * self.net(x)

    section = looked(tmp_path, Scaled(), faithfulness="diffroar")
    assert "DiffROAR could not be measured: model: parameter scale cannot be drawn anew" in section.sentence


def test_another_word_is_refused(tmp_path):
    with pytest.raises(InputError, match="faithfulness: got 'roar'"):
        looked(tmp_path, network(), faithfulness="roar")
