"""``lineament colorize --train``: from a folder of films to a network that colours one, also after it was killed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.films import made

from lineament.cli import main
from lineament.core.checks import InputError
from lineament.data import coloured_films
from lineament.load.colour_films import films_in, stored_frames
from lineament.modules.colormnet import training


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two folders of pictures."""
    at = tmp_path_factory.mktemp("films")
    for number, film in enumerate(coloured_films(2, frames=4, size=40)):
        (at / f"clip {number}").mkdir()
        for t, picture in enumerate(film):
            Image.fromarray(picture.numpy()).save(at / f"clip {number}" / f"{t}.png")
    return at


SMALL = ["--tiny", "--epochs", "2", "--clips", "1", "--frames", "2", "--size", "32", "--batch-size", "1"]


def test_a_network_is_trained_also_after_a_kill_and_colours_a_film(films, tmp_path, monkeypatch, capsys):
    command = ["colorize", "--train", str(films), *SMALL, "--recompute", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert "on 1 film held out" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"model.safetensors", "config.json", "training.json"} <= files and not {
        "frames",
        "unfinished.json",
    } & files
    report = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert report["validation"] == [str(films / "clip 1")] and len(report["history"]) == 2
    clips, calls = training.clip_losses, []

    def dies(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return clips(*args, **kwargs)

    monkeypatch.setattr(training, "clip_losses", dies)
    assert main([*command, str(tmp_path / "parts")]) == 130
    assert main([*command, str(tmp_path / "parts")]) == 0 and len(calls) == 3
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert main([*command, str(tmp_path / "whole")]) == 2
    assert "holds a finished training" in capsys.readouterr().err
    film = films / "clip 0"
    line = ["colorize", str(film), "--exemplar", str(film / "0.png"), "--weights", str(tmp_path / "whole")]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


def test_half_precision_is_mixed_and_leaves_float32_weights(films, tmp_path):
    """In bfloat16 alone, steps of the published size would be rounded away."""
    line = ["colorize", "--train", str(films), *SMALL, "--precision", "bfloat16", "--out"]
    assert main([*line, str(tmp_path / "new")]) == 0
    line[line.index("--tiny")] = "--lr=2e-5"
    assert main([*line, str(tmp_path / "on"), "--weights", str(tmp_path / "new")]) == 0
    first, then = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "on"))
    moved = [name for name in first if not torch.equal(first[name], then[name])]
    assert all(x.dtype != torch.bfloat16 for x in then.values()) and "decoder.pred.weight" in moved


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--train none", "--train: 'none' is no folder"),
        ("--train empty", "--train: 'empty' holds no video"),
        ("--train grey", "--train: 'grey' has no colours to learn from"),
        ("--train one", "--train: 'one' has 1 frames, expected at least two"),
        ("--train grey --size 40", "--size: got 40, expected a multiple of 16"),
        ("--train grey --frames 1", "--frames: got 1"),
        ("--train grey --weights net", "--tiny: is for a new network"),
        ("film.mkv --train grey", "--train: trains on 'grey'; colour a film with another command"),
        ("grey", "--epochs: is for --train"),
        ("--train grey --max-side 64", "--max-side: is for colouring a film"),
        ("--train grey --precision float16", "--precision: got 'float16'"),
    ],
)
def test_what_is_refused(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, count in {"empty": 0, "grey": 2, "one": 1}.items():
        (tmp_path / name).mkdir()
        for t in range(count):
            Image.new("L", (40, 32), 90).save(tmp_path / name / f"{t}.png")
    given = words.split()
    pairs = [["--tiny"], *(SMALL[k : k + 2] for k in range(1, len(SMALL), 2))]
    options = [word for pair in pairs if pair[0] not in given for word in pair]
    assert main(["colorize", *given, *options, "--out", "out"]) == 2
    assert capsys.readouterr().err.startswith(f"lineament: {says}")
    assert not (tmp_path / "out").exists()


def test_videos_are_read_in_colour_upright_and_small(tmp_path):
    av = pytest.importorskip("av", reason="the extra 'video' is not installed")
    made(av, tmp_path / "v10.mp4", codec="libx264", size=(96, 64), rotation=90)
    made(av, tmp_path / "v2.mkv", size=(96, 64))
    (tmp_path / "notes.txt").touch()
    found = films_in(tmp_path)
    assert [film.path.name for film in found] == ["v2.mkv", "v10.mp4"]
    with pytest.raises(InputError, match="has no colours"):
        stored_frames(found[0], tmp_path / "grey.npy", 32)
    # The same film with red in it.
    with av.open(str(tmp_path / "red.mkv"), "w") as out:
        video = out.add_stream("ffv1", rate=25)
        video.codec_context.width, video.codec_context.height, video.codec_context.pix_fmt = 96, 64, "yuv444p"
        red = np.zeros((64, 96, 3), np.uint8)
        red[..., 0] = 200
        for t in range(3):
            frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(format="yuv444p")
            frame.pts = t
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    frames = stored_frames(films_in(tmp_path)[0], tmp_path / "red.npy", 32)
    assert frames.shape == (3, 32, 48, 3) and frames.dtype == torch.uint8
    assert (frames[0, 0, 0].int() - torch.tensor([200, 0, 0])).abs().max() < 8
    assert next(found[1].frames()).grey.shape == (96, 64)
