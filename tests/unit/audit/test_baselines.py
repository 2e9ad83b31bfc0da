"""What must a network beat, and what do its features add? On data of known answers."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.audit.baseline import BaselineOptions, baseline
from lineament.audit.baseline_data import SiteRows, stratified_split
from lineament.audit.phrases import percent
from lineament.audit.run import audit
from lineament.cli import main
from lineament.core.checks import InputError
from lineament.handcrafted.table import described
from lineament.kernels.classifiers import InfiniteClassifier
from lineament.learn.boosting.estimators import GBNNClassifier
from lineament.load.data import load_data


def stripes(count=120, seed=0):
    """Stripes across or along under noise: HOG's own question. Labels 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    wave = (torch.arange(16) // 2 % 2).float()
    x = torch.where(y[:, None, None] == 0, wave[None, :, None], wave[None, None, :]).expand(-1, 16, 16)
    shift = torch.randint(0, 4, (count,), generator=generator)
    x = torch.stack([one.roll((int(s), int(s)), (0, 1)) for one, s in zip(x, shift)])
    return (x + 0.3 * torch.rand(count, 16, 16, generator=generator)).clamp(0, 1)[:, None], y


def test_the_table_finds_the_descriptor_that_sees_it_and_resumes(tmp_path):
    data = stripes()
    asked = {
        "features": ["pixels", "hog"],
        "classifiers": ["knn", "infinite"],
        "options": BaselineOptions(effort="none"),
    }
    lines = []

    def stop(line):
        lines.append(line)
        if "hog with infinite" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baseline(data, out=tmp_path / "a", note=stop, **asked)
    found = baseline(data, out=tmp_path / "a", note=lines.append, **asked)
    assert any("cut off" in line for line in lines)
    assert [
        sum(pair in line for line in lines) for pair in ("1: pixels with knn", "1: hog with infinite")
    ] == [
        1,
        2,
    ]
    whole = baseline(data, out=tmp_path / "b", **asked)
    keep = lambda report: [  # noqa: E731
        {k: v for k, v in pair.items() if not k.startswith("seconds")}
        for pair in report["table"].numbers["pairs"]
    ]
    assert keep(found) == keep(whole)
    by = {(p["descriptor"], p["classifier"]): p["accuracy"] for p in keep(found)}
    assert by["hog", "knn"] == 1.0 and found["mistakes"].number == "0"
    told = json.loads((tmp_path / "a" / "baseline.json").read_text())
    assert [s["name"] for s in told["sections"]] == ["table", "mistakes", "size"]
    assert json.loads((tmp_path / "a" / "baseline-settings.json").read_text())["hog"]["knn"] == {}
    with pytest.raises(InputError, match="finished"):
        baseline(data, out=tmp_path / "a", **asked)
    assert not list((tmp_path / "a").glob("*.pkl"))


def test_a_networks_site_is_a_descriptor_and_our_models_are_saved(tmp_path):
    net = tmp_path / "net.py"
    net.write_text(
        "import torch\nfrom torch import nn\ndef make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    x, y = stripes(80)
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    code = main(
        ["baseline", str(tmp_path / "data.npz"), "--features", f"{net}:make:2",
         "--classifiers", "infinite", "--splits", "2", "--effort", "none", "--out", str(tmp_path / "o")]
    )  # fmt: skip
    assert code == 0
    again = InfiniteClassifier.load(tmp_path / "o" / "baseline-best.safetensors")
    assert again.predict(np.zeros((1, 8))).shape == (1,)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"features": ["hgo"]}, "hog"),
        ({"classifiers": ["smv"]}, "svm"),
        ({"features": ["net"], "classifiers": ["svm"]}, "MODEL:SITE"),
        ({"options": BaselineOptions(effort="fulll")}, "full"),
    ],
)
def test_bad_words_are_named_before_any_work(options, word, tmp_path):
    with pytest.raises(InputError, match=word):
        baseline(stripes(20), out=tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ((torch.rand(6, 3), torch.zeros(6, dtype=torch.long)), "one class"),
        ((torch.rand(6, 3), torch.rand(6)), "class label"),
        ((torch.rand(5, 3), torch.tensor([0, 0, 1, 1, 2])), "class 2 has a single sample"),
    ],
)
def test_data_without_classes_to_learn_are_refused(data, word, tmp_path):
    with pytest.raises(InputError, match=word):
        baseline(data, out=tmp_path / "o")


def test_the_lens_says_whether_the_network_adds_anything(tmp_path):
    """A network that adds nothing to what HOG sees, and one that knows what no descriptor can."""
    x, y = stripes(160)
    torch.manual_seed(0)
    blind = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    found = audit(blind, (x, y), out=tmp_path / "blind", lenses=["baselines"])
    section = found["baselines"]
    assert section.numbers["best_accuracy"] > 0.95 and section.numbers["gain"] < -0.2
    assert [f.key for f in found.findings if f.section == "baselines"] == ["features add nothing"]
    assert section.status == "warning"
    noise = torch.rand(160, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    # The sign of a product of two pixels: no descriptor or simple reader has it.
    hidden = ((noise[:, 0, 3, 3] > 0.5) ^ (noise[:, 0, 12, 12] > 0.5)).long()

    class Knows(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.head = nn.Flatten(), nn.Linear(2, 2)

        def forward(self, x):
            side = ((x[:, 0, 3, 3] > 0.5) ^ (x[:, 0, 12, 12] > 0.5)).float()[:, None]
            return self.head(self.flat(torch.cat([1 - side, side], 1)))

    knows = Knows().eval()
    with torch.no_grad():
        knows.head.weight.copy_(torch.eye(2))
        knows.head.bias.zero_()
    found = audit(knows, (noise, hidden), out=tmp_path / "knows", lenses=["baselines"])
    section = found["baselines"]
    assert section.numbers["network"] == 1.0 and section.numbers["gain_low"] > 0.1
    assert [f.key for f in found.findings if f.section == "baselines"] == ["features add"]
    assert section.numbers["samples"] == 160 and section.numbers["training"] == 128


def test_a_model_that_is_not_written_and_a_baseline_without_a_mistake_are_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skops", None)
    monkeypatch.setitem(sys.modules, "skops.io", None)
    lines, options = [], BaselineOptions(effort="none")
    asked = {"features": ["hog"], "classifiers": ["knn"], "options": options}
    found = baseline(stripes(), out=tmp_path / "a", note=lines.append, **asked)
    told = "The best model, hog with knn, is not written: that needs skops"
    assert [line for line in lines if line.startswith(told)]
    assert told in (tmp_path / "a" / "baseline.html").read_text(encoding="utf-8")
    [finding] = found.findings
    assert "hog read by knn was never wrong on these 24 test samples" in finding.sentence
    assert "must beat" not in finding.sentence and "86.2" in finding.sentence


def test_a_network_takes_bytes_and_another_network_is_no_resumption(tmp_path):
    """Grey bytes without a channel, as most stored sets are; the rows are those of the network by hand."""
    x, y = stripes(60)
    grey = (x[:, 0] * 255).round().to(torch.uint8)
    code = (
        "import torch\nfrom torch import nn\ndef make():\n    torch.manual_seed({})\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 2))\n"
    )
    (tmp_path / "net.py").write_text(code.format(0))
    name = f"{tmp_path / 'net.py'}:make:1"
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    by_hand = first(grey[:, None].float() / 255).mean((2, 3)).detach().double().numpy()
    held = load_data((grey, y))
    np.testing.assert_allclose(SiteRows(name, held).rows(held), by_hand, rtol=1e-5)

    def stop(line):
        if "with svm" in line:
            raise KeyboardInterrupt

    asked = {
        "features": [name],
        "classifiers": ["knn", "svm"],
        "out": tmp_path / "o",
        "options": BaselineOptions(effort="none"),
    }
    with pytest.raises(KeyboardInterrupt):
        baseline((grey, y), note=stop, **asked)
    (tmp_path / "net.py").write_text(code.format(1))
    with pytest.warns(UserWarning, match="belongs to another"):
        baseline((grey, y), **asked)
    with pytest.raises(InputError, match="'7' is no site"):
        baseline((grey, y), **{**asked, "features": [name[:-1] + "7"], "out": tmp_path / "p"})
    assert not (tmp_path / "p").exists()


def test_a_network_that_tells_its_size_gets_images_of_that_size(tmp_path):
    x, y = stripes(40)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nfrom types import SimpleNamespace\ndef make(size=24):\n    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 22 * 22, 5))\n"
        "    net.config = SimpleNamespace(image_size=size)\n    return net\ndef silent():\n    return make(None)\n"
    )
    held = load_data((x, y))
    found = SiteRows(f"{tmp_path / 'net.py'}:make:3", held)
    assert "images are brought to the 24 x 24 pixels that it expects" in found.note
    larger = F.interpolate(held.inputs, (24, 24), mode="bilinear", antialias=True)
    by_hand = found.reader.model(found.layout.apply(larger)).detach().double().numpy()
    np.testing.assert_allclose(found.rows(held), by_hand, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="do not fit the model"):
        SiteRows(f"{tmp_path / 'net.py'}:silent:3", held)


@pytest.mark.parametrize("kind", ["svm", "forest"])
def test_the_best_model_of_scikit_learn_is_read_again(kind, tmp_path):
    io = pytest.importorskip("skops.io", reason="skops (the extra 'estimators')")
    x, y = stripes()
    options = BaselineOptions(effort="none", ink=True)
    baseline((x, y), out=tmp_path, features=["pixels", "hog"], classifiers=[kind], options=options)
    told = json.loads((tmp_path / "baseline-best.json").read_text())
    path = tmp_path / "baseline-best.skops"
    unknown = io.get_untrusted_types(file=path)
    assert all(name.startswith("sklearn.") for name in unknown) and told["ink"]
    rows = described(told["features"], load_data((x, y)).inputs, prepare=told["ink"])
    assert (io.load(path, trusted=unknown).predict(rows) == np.asarray(y)).mean() > 0.9


def test_images_with_their_channels_last_are_images(tmp_path):
    x, y = stripes(60)
    colour = (x.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
    asked = {"features": ["hog"], "classifiers": ["knn"], "options": BaselineOptions(effort="none")}
    first = baseline((colour, y), out=tmp_path / "a", **asked)
    last = baseline((colour.movedim(1, -1), y), out=tmp_path / "b", **asked)
    accuracy = [report["table"].numbers["pairs"][0]["accuracy"] for report in (first, last)]
    assert accuracy[0] == accuracy[1] and first["table"].numbers["pairs"][0]["features"] == 324
    assert "channels come last" in (tmp_path / "b" / "baseline.html").read_text(encoding="utf-8")


def test_the_written_boosted_network_is_the_one_that_was_judged(tmp_path):
    x, y = stripes(60)
    asked = {"features": ["pixels"], "classifiers": ["gbnn"], "options": BaselineOptions(effort="none")}
    baseline((x, y), out=tmp_path, **asked)
    written = GBNNClassifier.load(tmp_path / "baseline-best.safetensors")
    settings = {k: written.get_params()[k] for k in ("solver", "max_iter", "units_per_step")}
    assert settings == {"solver": "lbfgs", "max_iter": 30, "units_per_step": 10}
    train, test = stratified_split(y.numpy(), 0.2, 0)
    scale = json.loads((tmp_path / "baseline-best.json").read_text())
    rows = (x.flatten(1).double().numpy() - scale["mean"]) / scale["scale"]
    told = json.loads((tmp_path / "baseline.json").read_text())
    [pair] = told["sections"][0]["numbers"]["pairs"]
    assert (written.predict(rows[test]) == y.numpy()[test]).mean() == pair["accuracy"]
    assert len(train) == 48


@pytest.mark.parametrize("counts", [(8, 2), (9, 2, 2)])
def test_a_class_with_one_training_sample_has_no_smaller_training_sets(counts, tmp_path):
    y = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    x = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(0))
    options = BaselineOptions(test=0.2, effort="none")
    found = baseline((x, y), out=tmp_path, classifiers=["knn"], options=options)
    assert [n for n, _ in found["size"].numbers["sizes"]] == [len(y) - max(len(counts), 2)]
    with pytest.raises(InputError, match=r"test: got 0\.95, which leaves"):
        baseline((x, y), out=tmp_path / "o", options=BaselineOptions(test=0.95))


def test_the_interval_is_said_to_be_the_first_splits(tmp_path):
    y = torch.arange(60) % 2
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + y[:, None]
    asked = {"classifiers": ["knn"], "options": BaselineOptions(effort="none")}
    found = baseline((x, y), out=tmp_path, splits=2, **asked)
    first = found["table"].numbers["pairs"][0]["accuracy"]
    assert f"(on the first {percent(first)}, 95 % interval" in found.findings[0].sentence
    assert all("on the first of 2 splits" in found[key].sentence for key in ("mistakes", "size"))


def test_columns_of_images_are_refused_for_what_they_are(tmp_path):
    with pytest.raises(InputError, match=r"'columns', which is for data that are no images.*'pixels'"):
        baseline(stripes(8), out=tmp_path / "a", features=["columns"])
    with pytest.raises(InputError, match="'hog', which is for images of 8 pixels"):
        baseline((torch.rand(8, 3), torch.arange(8) % 2), out=tmp_path / "a", features=["hog"])
