"""The recipes elasticface and unpg on folders of pictures: the network, the lists, the official courses, and that a training learns people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lineament.core.checks import InputError
from lineament.measure.embeddings.verification import verification
from lineament.recipes import elasticface, unpg
from lineament.recipes.kit import face_folders
from lineament.recipes.kit.face_folders import FaceFolders, comparisons_of, judged_by
from lineament.recipes.kit.face_pictures import people_of
from lineament.recipes.kit.iresnet import BLOCKS, IBlock, iresnet

PEOPLE = 6


def draw(folder: Path, people: range, pictures: int, noise_level: float) -> None:
    """People as coarse patterns of their own (two mirrored halves, as a face has), with noise."""
    for person in people:
        (folder / f"p{person:02}").mkdir(parents=True)
        half = np.random.default_rng(person).uniform(40, 215, (4, 2, 3))
        face = np.concatenate([half, half[:, ::-1]], 1).repeat(4, 0).repeat(4, 1)
        for k in range(pictures):
            noise = np.random.default_rng(1000 * person + k).normal(0, noise_level, face.shape)
            picture = Image.fromarray((face + noise).clip(0, 255).astype(np.uint8))
            picture.save(folder / f"p{person:02}" / f"{k}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six people to train on; two pictures each of twelve others in pairs, templates and as probes; distractors."""
    root = tmp_path_factory.mktemp("faces")
    draw(root / "train", range(PEOPLE), 8, 8)
    draw(root / "probes", range(20, 32), 2, 90)
    draw(root / "others", range(40, 50), 1, 90)
    names = [f"p{person}" for person in range(20, 32)]
    pairs = [
        line
        for k, a in enumerate(names)
        for line in (f"{a}/0.png {a}/1.png 1", f"{a}/0.png {names[k - 1]}/1.png 0")
    ]
    (root / "pairs.txt").write_text("\n".join(pairs) + "\n")
    (root / "media.txt").write_text("".join(f"{a}/{k}.png\t{a}-{k}\t{k}\n" for a in names for k in (0, 1)))
    templates = [line.replace("/", "-").replace(".png", "") for line in pairs]
    (root / "templates.txt").write_text("\n".join(templates))
    return root


def options(folder: Path) -> dict:
    return {
        "people_folder": str(folder / "train"), "pair_lists": (str(folder / "pairs.txt"),), "picture_folder": str(folder / "probes"),
        "template_list": str(folder / "media.txt"), "template_pairs": str(folder / "templates.txt"),
        "probe_folder": str(folder / "probes"), "distractor_folder": str(folder / "others"), "fars": (0.1, 1e-3),
        "depth": 18, "channels": 4, "image_size": 16, "face_batch": 16, "face_scale": 16.0, "epochs": 2, "seeds": 2,
    }  # fmt: skip


def test_an_iresnet_has_the_parts_of_the_papers():
    net = iresnet(50, 32, seed=1, channels=4, dropout=0.4)
    blocks = [module for module in net if isinstance(module, IBlock)]
    assert len(blocks) == sum(BLOCKS[50]) and sum(isinstance(b.skip, nn.Sequential) for b in blocks) == 4
    assert [type(layer) for layer in blocks[1].body] == [
        nn.BatchNorm2d,
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.PReLU,
        nn.Conv2d,
        nn.BatchNorm2d,
    ]
    last = net[-1]
    assert (
        isinstance(last, nn.BatchNorm1d) and not last.weight.requires_grad and bool((last.weight == 1).all())
    )
    assert net.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    grey = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(net(grey), net(torch.ones(1, 3, 32, 32)))
    again = iresnet(50, 32, seed=1, channels=4).state_dict()
    assert all(
        torch.equal(value, again[name])
        for name, value in iresnet(50, 32, seed=1, channels=4).state_dict().items()
    )
    with pytest.raises(InputError, match="image_size: got 100, expected a multiple of 16; nearest: 96"):
        iresnet(18, 100, seed=0)


def test_the_courses_are_the_released_ones():
    elastic, cosine = elasticface.OFFICIAL.rate().factor, unpg.OFFICIAL.rate().factor
    factors = [round(elastic(epoch / 26), 6) for epoch in range(26)]
    assert factors == [1.0] * 7 + [0.1] * 6 + [0.01] * 6 + [0.001] * 5 + [0.0001] * 2
    assert (
        cosine(0.0) == 0 and cosine(0.075) == pytest.approx(0.5, abs=0.01) and cosine(1.0) == pytest.approx(0)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ours", "theirs"),
    [(elasticface, "Elastic-Arc", "ArcFace"), (unpg, "CosFace + UNPG", "CosFace")],
)
def test_a_recipe_runs_on_folders_and_goes_on(folder, tmp_path, monkeypatch, recipe, ours, theirs):
    names = {"heads" if recipe is elasticface else "losses": (theirs, ours)}
    config = recipe.Config(**options(folder), **names)
    outcome = recipe.run(config, out=tmp_path)
    kinds = ("accuracy", "TAR at 0.1")
    numbers = [f"{folder}/pairs.txt: {kind}" for kind in kinds] + ["templates: TAR at 0.1"]
    numbers += ["among distractors: rank 1", "among distractors: TAR at 0.1"]
    assert [row[1] for row in outcome.tables[0].rows] == 2 * numbers
    assert [claim.name for claim in outcome.claims] == [f"{ours} beats {theirs}: {name}" for name in numbers]
    assert all(0 <= row[2] <= 1 for row in outcome.tables[0].rows)
    # All trainings are stored.
    monkeypatch.setattr(face_folders, "fit", None)
    assert recipe.run(config, out=tmp_path).tables == outcome.tables


@pytest.mark.slow
def test_a_training_learns_people_and_both_protocols_judge_as_measured(folder, tmp_path, monkeypatch):
    kept = []
    original = face_folders.judged_by
    monkeypatch.setattr(
        face_folders, "judged_by", lambda net, *rest: kept.append(net) or original(net, *rest)
    )
    config = elasticface.Config(**{**options(folder), "epochs": 12, "seeds": 1}, heads=("ArcFace",))
    elasticface.run(config, out=tmp_path)
    people = people_of("people_folder", str(folder / "train"), 16)
    with torch.no_grad():
        logits = kept[0].loss.logits(kept[0](torch.cat(list(people.batches(16)))))
    # By chance one in six.
    assert float((logits.argmax(1) == people.labels).double().mean()) > 0.7
    given = comparisons_of(config)
    listed = given.pairs[str(folder / "pairs.txt")]
    x = torch.stack([given.pictures[row][0] for row in listed.pairs.flatten().tolist()])
    with torch.no_grad():
        plain, mirrored = kept[0](x), kept[0](x.flip(-1))
    for protocol in ("insightface", "unpg"):
        expected = verification(plain, listed.same, flipped=mirrored, protocol=protocol, fars=(0.1,))
        made = judged_by(kept[0], given, replace(config, protocol=protocol))
        assert made[f"{folder}/pairs.txt: accuracy"] == pytest.approx(expected.accuracy)
        assert made[f"{folder}/pairs.txt: TAR at 0.1"] == pytest.approx(expected.tar[0])
        if protocol == "insightface":
            # Each template here is one picture.
            assert made["templates: TAR at 0.1"] == pytest.approx(expected.tar[0])


def test_half_of_a_batch_is_mirrored():
    x = torch.arange(3.0).expand(1000, 1, 1, 3)
    made = face_folders.flipped(x, torch.Generator().manual_seed(0))
    mirrored = made[:, 0, 0, 0] == 2
    assert 400 < int(mirrored.sum()) < 600 and torch.equal(made[~mirrored], x[~mirrored])
    assert torch.equal(made[mirrored], x[mirrored].flip(-1))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"people_folder": None}, r"people_folder: got none beside pair_lists, .*expected a folder to train on"),
        ({"people_folder": "nowhere"}, r"people_folder: 'nowhere' is no folder"),
        ({"pair_lists": (), "template_list": None, "template_pairs": None, "probe_folder": None, "distractor_folder": None}, r"pair_lists: got none, .*to judge by"),
        ({"template_pairs": None}, r"template_pairs: got none beside template_list, expected both"),
        ({"picture_folder": None}, r"pair_lists: line 1 of .* names 'p20/0.png', which is not in .*picture_folder"),
        ({"image_size": 20}, r"image_size: got 20, expected a multiple of 16; nearest: 16"),
        ({"depth": 19}, r"depth: got 19, expected 18, 34, 50 or 100"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_a_training(folder, tmp_path, changed, said):
    with pytest.raises(InputError, match=said):
        elasticface.run(elasticface.Config(**{**options(folder), **changed}), out=tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p20/0.png p20/1.png", r"line 1 of .* has 2 entries, expected 'picture picture 0\|1'"),
        ("\np20/0.png p20/1.png yes", r"line 2 of .* ends with 'yes', expected 0 or 1"),
        ("p20/0.png p20/1.png 1", r"has pairs of one kind, expected some of both"),
        (
            "p20/0.png p20/1.png 1\n" * 10 + "p20/0.png p21/1.png 0\n" * 10,
            r"tenth 1 of .* are of one kind.*shuffle",
        ),
        ("", r"is empty"),
    ],
)
def test_a_bad_list_is_said_by_its_line(folder, tmp_path, text, said):
    (tmp_path / "bad.txt").write_text(text)
    config = FaceFolders(
        pair_lists=(str(tmp_path / "bad.txt"),), picture_folder=str(folder / "probes"), image_size=16
    )
    with pytest.raises(InputError, match=f"pair_lists: .*{said}"):
        comparisons_of(config)
