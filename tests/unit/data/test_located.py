"""VOC and COCO folders as users have them, in miniature; the scenes of digits; the recipe that uses both."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lineament.core.checks import InputError
from lineament.data.digit_scenes import digit_scenes
from lineament.data.located import coco, voc
from lineament.recipes import normgrad


def voc_folder(root):
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:20, 30:50] = 255
    for name, boxes in {
        "a": [("cat", (31, 11, 50, 20), 0), ("dog", (1, 1, 5, 5), 1)],
        "b": [("dog", (1, 1, 60, 40), 0), ("dog", (2, 2, 3, 3), 1)],
    }.items():
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><name>{label}</name><difficult>{hard}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, (x0, y0, x1, y1), hard in boxes
        )
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    (root / "ImageSets" / "Main" / "test.txt").write_text("a\nb\n")


def test_voc_boxes_become_masks(tmp_path):
    voc_folder(tmp_path)
    first, second = voc(tmp_path)
    assert first.pixels.shape == (3, 40, 60) and float(first.pixels[:, 12:18, 33:47].mean()) > 0.9
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[10:20, 30:50] = True
    assert torch.equal(first.masks["cat"], expected) and int(first.masks["dog"].sum()) == 25
    assert first.hard == {"dog"} and second.hard == frozenset() and bool(second.masks["dog"].all())
    assert len(list(voc(tmp_path, limit=1))) == 1
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation>")
    with pytest.raises(InputError, match=r"a\.xml: not an XML"):
        list(voc(tmp_path))
    with pytest.raises(InputError, match=r"train\.txt: cannot be read"):
        list(voc(tmp_path, "train"))


def test_coco_polygons_and_run_lengths_become_masks(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "val2014" / "x.jpg")
    runs = {"size": [6, 8], "counts": [6, 12, 30]}  # the second and third column
    raw = {
        "images": [{"id": 7, "file_name": "x.jpg"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]]},
            {"image_id": 7, "category_id": 2, "segmentation": runs},
        ],
    }
    path = tmp_path / "annotations" / "instances_val2014.json"
    path.write_text(json.dumps(raw))
    (found,) = coco(tmp_path)
    assert found.masks["cat"].nonzero().tolist() == [[r, c] for r in (1, 2, 3) for c in (1, 2, 3, 4)]
    assert torch.equal(found.masks["dog"].sum(0), torch.tensor([0, 6, 6, 0, 0, 0, 0, 0]))
    path.write_text("{")
    with pytest.raises(InputError, match="not a COCO annotation file"):
        list(coco(tmp_path))


def test_scenes_hold_two_digits_where_the_masks_say():
    scenes = digit_scenes(20, noise=0.0, fragments=0)
    masks = scenes.extras["masks"]
    assert bool((scenes.targets.sum(1) == 2).all())
    assert torch.equal(scenes.inputs[:, 0] > 0.3, masks.any(1))
    assert not bool((masks[:, 0] & masks[:, 1]).any())
    assert not torch.equal(scenes.inputs, digit_scenes(20, split="test", noise=0.0, fragments=0).inputs)
    with pytest.raises(InputError, match="side"):
        digit_scenes(1, side=40)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_outcome(tmp_path, monkeypatch):
    config = replace(normgrad.Config.preset("quick"), train_images=200, epochs=2, test_images=4)
    whole = normgrad.run(config, out=tmp_path / "whole")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(normgrad, "after_step", killed)
        with pytest.raises(KeyboardInterrupt):
            normgrad.run(config, out=tmp_path / "resumed")
    with monkeypatch.context() as patched:
        patched.setattr(normgrad, "trained", killed)
        resumed = normgrad.run(config, out=tmp_path / "resumed")
    assert resumed.claims == whole.claims and list(resumed.tables) == list(whole.tables)
    assert len(whole.claims) == 7 and all((tmp_path / "whole" / f.file).exists() for f in whole.figures)
    assert all(claim.holds or claim.reason for claim in whole.claims)
    json.dumps(whole.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_the_paper_preset_plays_on_the_users_photographs(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    voc_folder(tmp_path / "VOC2007")
    torch.manual_seed(0)
    labels = {0: "cat", 1: "dog"}
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", id2label=labels
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    paper = replace(normgrad.Config.preset("paper"), model_folder=str(tmp_path / "model"))
    with pytest.raises(InputError, match="LINEAMENT_DATA"):
        monkeypatch.delenv("LINEAMENT_DATA", raising=False)
        normgrad.run(paper, out=tmp_path / "out")
    monkeypatch.setenv("LINEAMENT_DATA", str(tmp_path))
    outcome = normgrad.run(paper, out=tmp_path / "out")
    assert outcome.preset == "paper" and len(outcome.claims) == 5
    values = [v for row in outcome.tables[0].rows for v in row[1:]]
    assert len(outcome.tables[0].rows) == 12, "ten methods, two of them also after the meta step"
    assert len([v for v in values if v is not None]) == 12 * 4 + 4 and all(
        v is None or 0 <= v <= 100 for v in values
    )
    json.dumps(outcome.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="is no folder"):
        normgrad.run(replace(paper, model_folder=str(tmp_path / "none")), out=tmp_path / "other")


@pytest.mark.slow
def test_the_paper_preset_plays_with_vgg16(tmp_path):
    from safetensors.torch import save_file

    from lineament.recipes.normgrad.networks import VGG16, VGG_LAYERS, photographs_model

    voc_folder(tmp_path / "VOC2007")
    torch.manual_seed(0)
    network = VGG16(2, widths=(4, 4, 4, 4, 8), hidden=8)
    # As classifiers are saved: linear layers, not kernels.
    state = {
        k: v.flatten(1) if "classifier" in k and v.ndim == 4 else v for k, v in network.state_dict().items()
    }
    path = tmp_path / "vgg16.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path, {"classes": "cat, dog"})
    model, names, layers = photographs_model(str(path))
    x = torch.rand(1, 3, 224, 240)
    assert names == ["cat", "dog"] and layers == VGG_LAYERS
    assert torch.equal(model(x), network.cpu().eval()(x))
    paper = replace(
        normgrad.Config.preset("paper"), model_folder=str(path), data_folder=str(tmp_path), test_images=1
    )
    outcome = normgrad.run(paper, out=tmp_path / "out")
    assert outcome.tables[0].columns == ["method", *VGG_LAYERS, "product"]
    assert outcome.claims[0].paper.startswith("VGG16: 59.1")
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    with pytest.raises(InputError, match="2 outputs and 20 class names"):
        photographs_model(str(path))
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"expected VGG16's features\.0"):
        photographs_model(str(path))
