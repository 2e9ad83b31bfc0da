"""MoCo v2 on folders of photographs: the folder, the network, batch norm by groups, the rate's course, and a training that is killed and goes on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.photograph_folders import TINY, draw
from torch import nn
from torch.nn import functional as F

from lineament.core.checks import InputError
from lineament.losses import InfoNCE, Queue
from lineament.recipes.contrastive_ft import Config, run
from lineament.recipes.contrastive_ft.full_scale import course
from lineament.recipes.contrastive_ft.training import MoCo, from_few, neighbours
from lineament.recipes.kit.configuration import configure
from lineament.recipes.kit.picture_folders import ResNet, WholeBatches, features, folders_of
from lineament.train.loop import fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("photographs"), 3, 12, 4)


def tiny(folder, **options):
    return replace(
        Config.preset("paper"), **TINY, data_folder=str(folder), variants=("MoCo", "both"), queue=40, batch_size=8, norm_groups=2, epochs=3,
        probe_epochs=2, seeds=1, **options,
    )  # fmt: skip


def test_the_paper_preset_is_moco_v2():
    config = Config.preset("paper")
    assert sum(config.depths) * 3 + 2 == 50 and config.widths == (256, 512, 1024, 2048)
    chosen = configure(config, {"variants": "both, by dimension; MoCo;"})
    assert chosen.variants == ("both, by dimension", "MoCo")
    lowest, rate = 0.03 * 1e-3, course(200).factor
    for epoch in (1, 57, 200):  # counted from 1
        expected = lowest + (0.03 - lowest) * (1 + math.cos(math.pi * epoch / 200)) / 2
        assert 0.03 * rate((epoch - 1) / 200) == pytest.approx(expected)
        assert rate((epoch - 0.01) / 200) == rate((epoch - 1) / 200)


def test_pictures_are_cut_out_of_the_middle_and_opened_when_asked_for(folder):
    train, test = folders_of(str(folder), 14)
    assert (len(train), len(test), train.classes) == (36, 12, ("c00", "c01", "c02"))
    assert train.labels.tolist() == sorted(train.labels.tolist()) and set(train.parts) == {"c00", "c01", "c02"}  # fmt: skip
    picture, label = train[0]
    assert picture.shape == (3, 16, 16) and picture.dtype == torch.uint8 and label == 0
    wide = next(k for k, file in enumerate(train.files) if int(file.stem) % 2 == 0)
    whole = train[wide][0].float().mean(0)
    # Two patches of 10 pixels, of which 8 each are left.
    assert abs(float(whole[:, :7].mean() - whole[:, 9:].mean())) > 3 * float(whole[:, :7].mean(1).std() / 8)
    net = ResNet(Config(**TINY), 1)
    found = features(net, test, Config(**TINY), 5)
    one = torch.stack([test[k][0][:, 1:15, 1:15] for k in range(12)])
    torch.testing.assert_close(found, net.eval()(one).detach())
    assert torch.equal(net.network.embedder.embedder.convolution.weight, ResNet(Config(**TINY), 1).network.embedder.embedder.convolution.weight)  # fmt: skip


def test_bad_folders_are_one_clear_line(folder, tmp_path, monkeypatch):
    def said(path, words):
        with pytest.raises(InputError, match=words):
            run(replace(tiny(folder), data_folder=path), out=tmp_path / "out")

    said(str(tmp_path / "none"), "none' is no folder: expected a folder with train/CLASS/")
    said(str(folder / "train"), "holds c00, c01, c02: expected")
    monkeypatch.setenv("LINEAMENT_DATA", str(folder))  # of named data sets, not of pictures
    said(None, "data_folder: got none: expected a folder with")
    other = draw(tmp_path / "other", 2, 1, 1)
    (other / "val" / "c00").rename(other / "val" / "c0")
    said(str(other), "holds the class 'c0', which is not in .*nearest: 'c0")
    (other / "val" / "c0").rename(other / "elsewhere")
    said(str(other), "val' has no picture of 'c00', expected some of each class")
    (other / "elsewhere").rename(other / "val" / "c00")
    (other / "train" / "c00" / "broken.png").write_bytes(b"no picture")
    said(str(other), r"1 of 3 files are no pictures, say '.*broken.png'")
    (other / "train" / "c00" / "broken.png").unlink()
    for part in ("train", "val"):
        for file in (other / part / "c01").iterdir():
            file.unlink()
        (other / part / "c01").rmdir()
    said(str(other), "holds one class, expected two or more")
    for field, value, words in (
        ("widths", (8, 18), r"widths: got \[18\], expected multiples of 4"),
        ("depths", (1,), "depths: got 1 beside 2 widths"),
        ("norm_groups", 5, "norm_groups: got 5, expected at most half of the batch size, 8"),
        ("data", "photos", "data: got 'photos'"),
        ("queue", 1, "queue: got 1"),
        ("variants", ("both",) * 2, "variants: got 'both' twice"),
        (
            "variants",
            ("both", "by dimension"),
            "got 'by dimension'.*nearest: 'both, by dimension'; a value with a comma is followed by a semicolon",
        ),
    ):
        with pytest.raises(InputError, match=words):
            run(replace(tiny(folder), **{field: value}), out=tmp_path / "out")


def test_batch_norm_sees_groups_and_keys_are_shuffled_among_theirs():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    net = MoCo(body, nn.Linear(6, 3), InfoNCE(0.2, queue=Queue(8, 3)), 0.9, groups=2)
    x = torch.randn(16, 4)
    torch.manual_seed(5)
    queries = net(x)
    by_hand = torch.cat([net.head(body(part)) for part in (x[:4], x[4:8])])
    torch.testing.assert_close(queries, F.normalize(by_hand, dim=1))
    torch.manual_seed(5)
    order = torch.randperm(8)
    shuffled = x[8:][order]
    keys = F.normalize(torch.cat([net.follower(part) for part in (shuffled[:4], shuffled[4:])]), dim=1)
    torch.testing.assert_close(net.key[order], keys)
    together = F.normalize(net.follower(x[8:]), dim=1)
    assert float((net.key - together).abs().max()) > 1e-3
    before = [p.clone() for p in net.follower.parameters()]
    with torch.no_grad():
        body[0].weight.add_(1.0)
    net.on_step(None)
    torch.testing.assert_close(next(iter(net.follower.parameters())), before[0] + 0.1)


def test_incomplete_batches_are_left_out():
    seen = []

    class Look:
        def on_batch(self, run, batch):
            seen.append(batch.rows)

    net = nn.Linear(2, 2)
    sgd = lambda net: torch.optim.SGD(net.parameters(), 0.1)  # noqa: E731
    data = torch.randn(11, 2), torch.arange(11) % 2
    fit(net, data, optimizer=sgd, epochs=6, batch_size=4, callbacks=[WholeBatches(), Look()])
    assert all(len(rows) == 4 for rows in seen) and len(seen) == 12
    assert torch.cat(seen).unique().tolist() == list(range(11)) and len(torch.cat(seen[:2]).unique()) == 8


def test_read_outs_take_the_datas_own_number_of_classes():
    y = torch.arange(36) % 12
    x = torch.eye(12)[y] + 0.01 * torch.randn(36, 12, generator=torch.Generator().manual_seed(0))
    assert from_few(x, y, x, y, 0, each=2) == 1.0 and neighbours(x[:24], y[:24], x[:2], y[:2]) <= 1.0
    three = x.repeat(4, 1), y.repeat(4)
    assert neighbours(*three, x, y) == 1.0
    few = x[:, :3][y < 3], y[y < 3]
    assert neighbours(*few, *few) >= 0 and from_few(*few, *few, 0) == 1.0


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    config = tiny(folder)
    outcome = run(config, out=tmp_path / "whole")
    table = outcome.tables[0]
    assert table.title.startswith("36 photographs of 3 classes, 12 held out") and table.columns[1] == "linear probe"  # fmt: skip
    assert [row[0] for row in table.rows] == ["MoCo", "both"] and all(0 <= row[1] <= 1 for row in table.rows)
    assert len(outcome.claims) == 2 and outcome.claims[-1].holds
    steps, follow = [0], MoCo.on_step

    def killed(self, run):
        follow(self, run)
        steps[0] += 1
        if steps[0] == 10:  # amid the third epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(MoCo, "on_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "killed")
    again = run(config, out=tmp_path / "killed")
    assert steps[0] == 10 + 4 + 12 and again.to_dict() == outcome.to_dict()
