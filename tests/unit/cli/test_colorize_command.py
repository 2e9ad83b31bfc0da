"""``lineament colorize``: what it refuses, in one line that names the option."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lineament import cli
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.network import ColorMNet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two grey frames, an exemplar, a tiny network's weights and files that are none."""
    at = tmp_path_factory.mktemp("film")
    (at / "frames").mkdir()
    for index in range(2):
        Image.fromarray(np.full((32, 48), 90 + index, np.uint8)).save(at / "frames" / f"{index}.png")
    Image.fromarray(np.full((32, 48, 3), (200, 40, 40), np.uint8)).save(at / "first.png")
    ColorMNet(ColorMNetConfig.tiny()).save_pretrained(at / "net")
    torch.save({"key_proj.key_proj.weight": print}, at / "evil.pt")
    torch.save({"weight": torch.ones(1)}, at / "net.pt")
    for place in ("damaged", "twins"):
        (at / place).mkdir()
        Image.new("L", (48, 32)).save(at / place / "1.png")
    whole = (at / "first.png").read_bytes()
    (at / "damaged/2.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (48, 32)).save(at / "twins/1.jpg")
    for name in ("bad.png", "f.mkv/strange.txt", "corrupt/model.safetensors", "corrupt/config.json"):
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).write_text("{}")
    return at


REFUSED = {
    "no weights": ("--weights colormnet.pth", r"--weights: 'colormnet.pth' does not exist; .*github.com"),
    "a pickle": ("--weights evil.pt", r"--weights: 'evil.pt' holds 'print' beside tensors"),
    "another network": ("--weights net.pt", "--weights: 'net.pt' has no 'key_proj"),
    "an empty folder": ("--weights frames", "--weights: 'frames' has no model.safetensors"),
    "a corrupt folder": ("--weights corrupt", "--weights: 'corrupt/model.safetensors' is no safetensors"),
    "no picture": ("--exemplar 1=bad.png", "--exemplar: the picture 'bad.png' cannot be read"),
    "a frame past the end": ("--exemplar 99=first.png", "--exemplar: frame 99 does not exist; .* 2 frames"),
    "a scene past the end": ("--scenes 2", "--scenes: got '2', expected numbers of frames"),
    "no frame number": ("--exemplar a=first.png", "--exemplar: 'a' in 'a=first.png' is no frame number"),
    "a codec": ("--codec foo", "--codec: is for a video"),
    "whose luma": ("--luma lab", "--luma: is for a video"),
    "times of pictures": ("--fps 24", "--fps: is for a video from a folder"),
    "a device": ("--device cuda:99", "--device: 'cuda:99' cannot be used here"),
    "a precision": ("--precision half", "--precision: got 'half'"),
    "guided alone": ("--guided", "--guided: is for --max-side"),
    "a file for a folder": ("--out first.png/", "--out: 'first.png' is a file, expected a folder"),
    "what it reads": ("--out first.png --exemplar 1=first.png", "--out: would replace 'first.png', which"),
    "strangers' files": ("--out f.mkv --overwrite", "--out: 'f.mkv' holds files .*strange.txt"),
}


@pytest.mark.parametrize(("words", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(words, says, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    usual = {"--weights": "net", "--out": "out"}
    line = ["colorize", "frames", "--exemplar", "first.png", *words.split()]
    line += [word for pair in usual.items() if pair[0] not in line for word in pair]
    before = sorted(folder.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(line) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert said.startswith("lineament: --")
    assert re.search(says, said), said
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("film", "says"),
    [
        ("damaged", "FILM: the picture 'damaged/2.png' cannot be read: .*truncated"),
        ("twins", "FILM: two of its pictures would both become '1.png'; rename one"),
    ],
)
def test_a_folder_that_cannot_be_coloured_is_refused_before_the_first_frame(
    film, says, folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert cli.main(["colorize", film, "--exemplar", "first.png", "--weights", "net", "--out", "new"]) == 2
    assert re.fullmatch(f"lineament: {says}.*\n", capsys.readouterr().err)
    assert sorted(folder.rglob("*")) == before


def test_colours_of_its_own_are_said(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "gaudy").mkdir()
    for index, value in enumerate((40, (200, 40, 40))):
        Image.new("RGB", (48, 32), value if index else (value,) * 3).save(f"gaudy/{index}.png")
    told = []
    for film in ("frames", "gaudy"):
        line = ["colorize", film, "--exemplar", "first.png", "--weights", "net", "--out", f"own {film}"]
        assert cli.main(line) == 0
        told.append("note: the film has colours of its own, which are replaced" in capsys.readouterr().err)
    assert told == [False, True]


def test_as_many_frames_as_there_are_are_suggested(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["colorize", "frames", "--weights", "net", "--suggest", "300"]) == 0
    assert "(the film has only 2): 0, 1" in capsys.readouterr().out


def test_a_warning_is_one_line(folder, monkeypatch, capsys):
    """A grey exemplar warns; the line does not name the place in the source, and the run goes on."""
    monkeypatch.chdir(folder)
    shown = []
    monkeypatch.setattr(
        warnings, "showwarning", lambda m, c, f, n, *_: shown.append(warnings.formatwarning(m, c, f, n))
    )
    line = ["colorize", "frames", "--exemplar", "frames/0.png", "--weights", "net", "--out", "grey"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(line) == 0, capsys.readouterr().err
    assert [text for text in shown if "grey" in text] == [
        "lineament: exemplars: the exemplar of frame 0 is grey: there is no colour to take from it\n"
    ]
