"""A ResNet with heads on folders of photographs: classes and their sub-folders, groups, claims that fall, and a training that is killed and goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.photograph_folders import TINY, draw

from lineament.core.checks import InputError
from lineament.recipes.kit.picture_folders import ResNet
from lineament.recipes.projection_head import Config, full_scale, run
from lineament.recipes.projection_head.claims import on_folder
from lineament.recipes.projection_head.full_scale import TRAININGS, Worth
from lineament.recipes.projection_head.training import Groups, Pair, Probed, Read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("photographs"), 3, 8, 4, parts=2)


def tiny(folder, *kinds, **options):
    return replace(
        Config.preset("paper"), **TINY, data_folder=str(folder), kinds=kinds, epochs=2, seeds=1, batch_size=8, mlp_hidden=8, **options
    )  # fmt: skip


def test_the_paper_preset_is_a_resnet_50_with_the_released_numbers():
    config = Config.preset("paper")
    assert sum(config.depths) * 3 + 2 == 50 and set(config.kinds) <= set(TRAININGS)
    assert (config.rate, config.decay, config.batch_size, config.epochs) == (1e-3, 1e-3, 32, 100)


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    config = tiny(folder, "SL, identity head", "SimCLR, MLP head")
    outcome = run(config, out=tmp_path / "whole")
    first, worst = outcome.tables
    assert first.title.startswith("48 photographs of 3 classes, 24 held out")
    assert first.columns[2:5] == ["sub-folder, standardised", "sub-folder, as it is", "class, as it is"]
    assert len(first.rows) == 8 and all(0 <= v <= 1 for row in first.rows for v in row[2:5])
    # The standardised features of six groups of flat colours before any head.
    assert first.rows[0][2] > 0.5
    assert [row[:2] for row in worst.rows[:2]] == [["SL, identity head", "DFR"], ["SL, identity head", "DFR, standardised"]]  # fmt: skip
    assert len(outcome.claims) == 3 + 2 + 2
    steps, look = [0], full_scale.Seen.on_batch

    def killed(self, run, batch):
        steps[0] += 1
        if steps[0] == 6 + 6 + 8:  # amid the second training's second epoch
            raise KeyboardInterrupt
        look(self, run, batch)

    monkeypatch.setattr(full_scale.Seen, "on_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "killed")
    again = run(config, out=tmp_path / "killed")
    assert steps[0] == 20 + 6 and again.to_dict() == outcome.to_dict()


@pytest.mark.slow
def test_without_sub_folders_classes_are_read_out_and_weights_are_a_start(tmp_path):
    folder, kept = draw(tmp_path / "plain", 12, 2, 1), tmp_path / "weights"
    net = ResNet(Config(**TINY), 3)
    net.network.save_pretrained(kept)
    again = ResNet(Config(), 0, str(kept))
    assert again.width == 16
    for own, other in zip(net.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(own, other)
    kinds = ("SCL, no head", "SimCLR, linear head")
    outcome = run(tiny(folder, *kinds, weights=str(kept)), out=tmp_path / "out")
    assert len(outcome.tables) == 1 and outcome.tables[0].columns[2:4] == ["class, standardised", "class, as it is"]  # fmt: skip
    assert "of 12 classes" in outcome.tables[0].title and outcome.claims == []
    with pytest.raises(InputError, match=r"weights: '.*plain' is no folder with a ResNet"):
        ResNet(Config(), 0, str(folder))


def test_bad_folders_and_options_are_one_clear_line(folder, tmp_path):
    def said(config, words):
        with pytest.raises(InputError, match=words):
            run(config, out=tmp_path / "out")

    said(tiny(folder, "SL, MLP"), "kinds: got 'SL, MLP'")
    said(tiny(folder), "kinds: got none")
    said(tiny(folder, "SL, no head", crop=(0.9, 0.2)), "crop: got 0.9 to 0.2")
    said(tiny(folder, "SL, no head", rate=0.0), "rate: got 0.0")
    few = draw(tmp_path / "few", 2, 2, 1, parts=2)
    said(tiny(few, "SL, no head"), "fewer than two held-out pictures in 'c00/p0'")
    (few / "val" / "c01" / "p1").rename(few / "val" / "c01" / "p2")
    said(tiny(few, "SL, no head"), "have the sub-folder 'c01/p2', which those to train on have not")


def worth(before, after, untrained, plain, gain):
    """Numbers of two seeds: what a head keeps, and what training with one gains."""
    made = {}
    for name in TRAININGS:
        if name.endswith("fixed head"):
            read = Probed(
                Read(0.9, before + gain, 1), Read(0.9 - plain, before + gain, 1), *[Read(0, 0, 1)] * 2
            )
        else:
            up = gain if name.endswith("MLP head") else 0.0
            read = Probed(Read(0, before + up, 1), Read(0, after, 1), *[Read(0, untrained, 1)] * 2)
        made[name] = [Worth(read, Groups(*[Pair(before, after)] * 3))] * 2
    return made


def test_claims_rise_and_fall_with_the_numbers():
    hold, fall = (
        worth(0.9, 0.7, 0.8, plain=0.1, gain=0.02),
        worth(0.7, 0.9, 0.8, plain=0.0, gain=-0.02),
    )
    for divided, count in ((True, 3 * 3 + 2 * 2 + 3), (False, 3 + 2 + 1)):
        count += 2 * 3 * 6  # two read-outs of the worst group for each training with a head
        assert [c.holds for c in on_folder(hold, divided)] == [True] * count
        assert [c.holds for c in on_folder(fall, divided)] == [False] * count
