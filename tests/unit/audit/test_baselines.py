"""What must a network beat, and what do its features add? On data of known answers."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lineament.audit.baseline import BaselineOptions, baseline
from lineament.audit.run import audit
from lineament.cli import main
from lineament.core.checks import InputError
from lineament.kernels.classifiers import InfiniteClassifier


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
        ((torch.rand(5, 3), torch.tensor([0, 0, 1, 1, 2])), "single sample"),
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


def test_columns_of_images_are_refused_for_what_they_are(tmp_path):
    with pytest.raises(InputError, match=r"'columns', which is for data that are no images.*'pixels'"):
        baseline(stripes(8), out=tmp_path / "a", features=["columns"])
    with pytest.raises(InputError, match="'hog', which is for images of 8 pixels"):
        baseline((torch.rand(8, 3), torch.arange(8) % 2), out=tmp_path / "a", features=["hog"])
