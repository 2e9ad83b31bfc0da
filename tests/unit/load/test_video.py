"""Films read and written: frames, timestamps, luma, other streams."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lineament.cli import main
from lineament.core.checks import InputError
from lineament.load.video import Film, chroma_of, luma_of, picture_folder

TIMES = [0, 33, 90, 100, 141]


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="the extra 'video' is not installed")


def made(av, path: Path, layout: str = "yuv420p", codec: str = "ffv1", times=TIMES, size=(64, 48)) -> Path:
    """A film with sound, whose frames come at these milliseconds."""
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "a film"
        video = out.add_stream(codec, rate=25)
        video.codec_context.width, video.codec_context.height = size
        video.codec_context.pix_fmt, video.codec_context.time_base = layout, Fraction(1, 1000)
        sound = out.add_stream("aac", rate=16000)
        rng = np.random.default_rng(0)
        base = rng.integers(30, 220, (size[1], size[0] + len(times)), dtype=np.uint8)
        for index, time in enumerate(times):
            grey = np.ascontiguousarray(base[:, index : index + size[0]])
            frame = av.VideoFrame.from_ndarray(np.dstack([grey] * 3), format="rgb24").reformat(format=layout)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for index in range(4):
            part = (rng.random((1, 1024)) - 0.5).astype(np.float32)
            tone = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            tone.sample_rate, tone.pts, tone.time_base = 16000, 1024 * index, Fraction(1, 16000)
            out.mux(sound.encode(tone))
        out.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("layout", ["yuv420p", "yuv420p10le", "gray", "yuv444p"])
def test_luma_times_and_sound_stay(av, tmp_path, layout):
    film = Film(made(av, tmp_path / "in.mkv", layout))
    before = list(film.frames())
    assert not film.gaps and before[0].depth == (10 if "10" in layout else 8) and film.length == len(TIMES)
    grey = np.full(before[0].luma.shape, 0.5)
    assert film.written(tmp_path / "out.mkv", lambda frame: (grey, grey), codec="ffv1") == []
    after = list(Film(tmp_path / "out.mkv").frames())
    assert [frame.pts for frame in after] == TIMES
    assert all(np.array_equal(a.luma, b.luma) for a, b in zip(before, after))
    with av.open(str(tmp_path / "out.mkv")) as out, av.open(str(tmp_path / "in.mkv")) as source:
        assert out.metadata["title"] == "a film" and out.streams[0].type == "video"
        packets = [
            [bytes(packet) for packet in one.demux(one.streams.audio[0]) if packet.size]
            for one in (source, out)
        ]
        assert packets[0] and packets[0] == packets[1]


def test_odd_sizes_and_times_in_other_containers(av, tmp_path):
    film = Film(made(av, tmp_path / "in.mkv", "yuv444p", size=(63, 47)))
    grey = np.full((47, 63), 0.5)
    film.written(tmp_path / "out.mp4", lambda frame: (grey, grey), codec="libx264")
    with av.open(str(tmp_path / "out.mp4")) as out:
        video = out.streams.video[0]
        times = [round(1000 * float(frame.pts * video.time_base)) for frame in out.decode(video)]
    assert times == TIMES


def test_what_is_no_film_says_so(av, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no film" * 50)
    with pytest.raises(InputError, match="cannot be read as a video"):
        list(Film(tmp_path / "bad.mp4").frames())
    with pytest.raises(InputError, match="is no file"):
        list(Film(tmp_path / "none.mp4").frames())
    film = Film(made(av, tmp_path / "in.mkv"))
    with pytest.raises(InputError, match="'ffv1'"):
        film.written(tmp_path / "out.mkv", lambda frame: (), codec="no_such_codec")
    assert not (tmp_path / "out.mkv").exists()


def test_chroma_and_luma_of_grey_and_primaries():
    grey = torch.full((1, 1, 3), 0.3, dtype=torch.float64)
    for matrix in (1, 6, 9):
        assert [round(float(x), 12) for x in chroma_of(grey, matrix)] == [0.5, 0.5]
        assert float(luma_of(grey, matrix)) == pytest.approx(0.3)
        red = torch.tensor([[[1.0, 0.0, 0.0]]])
        assert float(chroma_of(red, matrix)[1]) == pytest.approx(1)


def test_pictures_come_in_natural_order(tmp_path):
    for name in ("f10.png", "f2.png", "f1.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in picture_folder(tmp_path)] == ["f1.png", "f2.png", "f10.png"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    from lineament.modules.colormnet.configuration import ColorMNetConfig
    from lineament.modules.colormnet.network import ColorMNet

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net")
    ColorMNet(ColorMNetConfig.tiny()).save_pretrained(folder)
    return str(folder)


def exemplar(path: Path, size=(64, 48)) -> str:
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return str(path)


def test_a_video_is_coloured_and_a_killed_run_gives_the_same(av, tmp_path, weights, monkeypatch, capsys):
    film = made(av, tmp_path / "in.mkv", times=[33 * t for t in range(30)])
    shown = exemplar(tmp_path / "first.png")
    command = ["colorize", str(film), "--exemplar", shown, "--weights", weights, "--codec", "ffv1", "--out"]
    assert main([*command, str(tmp_path / "whole.mkv")]) == 0
    from lineament.modules.colormnet import colorize

    frame, calls = colorize.Colorizer.frame, []

    def dies(self, *args, **kwargs):
        calls.append(self.done)
        if self.done == 27:
            raise KeyboardInterrupt
        return frame(self, *args, **kwargs)

    monkeypatch.setattr(colorize.Colorizer, "frame", dies)
    assert main([*command, str(tmp_path / "parts.mkv")]) == 130
    assert not (tmp_path / "parts.mkv").exists()
    monkeypatch.setattr(colorize.Colorizer, "frame", frame)
    assert main([*command, str(tmp_path / "parts.mkv")]) == 0
    decoded = []
    for name in ("whole.mkv", "parts.mkv"):
        with av.open(str(tmp_path / name)) as out:
            decoded.append([f.to_ndarray(format="yuv420p") for f in out.decode(out.streams.video[0])])
    assert len(decoded[0]) == 30 and all(np.array_equal(a, b) for a, b in zip(*decoded))
    assert decoded[0][1][48:].std() > 0  # it has colour
    report = json.loads((tmp_path / "parts.colorize.json").read_text())
    assert report["frames"] == 30 and report["confidence"][0] < 1 and not list(tmp_path.glob("*.parts"))
    assert "30 frames coloured" in capsys.readouterr().out


def test_a_folder_is_coloured(tmp_path, weights, capsys):
    pictures = tmp_path / "in"
    pictures.mkdir()
    for index in (1, 2, 10):
        Image.new("L", (40, 30), 20 * index).save(pictures / f"{index}.png")
    shown = exemplar(tmp_path / "first.png", (40, 30))
    out = tmp_path / "out"
    assert main(["colorize", str(pictures), "--suggest", "2", "--weights", weights]) == 0
    assert capsys.readouterr().out == "colour these frames by hand: 0, 2\n"
    assert (
        main(["colorize", str(pictures), "--exemplar", shown, "--weights", weights, "--out", str(out)]) == 0
    )
    assert sorted(path.name for path in out.iterdir()) == ["1.png", "10.png", "2.png", "colorize.json"]
    assert Image.open(out / "10.png").size == (40, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--weights": None}, "CC BY-NC-SA 4.0"),
        ({"--exemplar": "5={shown}"}, "frame 5 does not exist"),
        ({"--exemplar": "no.png"}, "'no.png' is no file"),
        ({"--out": "{film}"}, "is the film itself"),
        ({"--luma": "own"}, "nearest|there are"),
        ({"--out": None}, "none given"),
    ],
)
def test_bad_commands_end_with_one_line(tmp_path, weights, capsys, change, message):
    pictures = tmp_path / "in"
    pictures.mkdir()
    Image.new("L", (40, 30)).save(pictures / "1.png")
    names = {"film": str(pictures), "shown": exemplar(tmp_path / "first.png", (40, 30))}
    options = {"--exemplar": names["shown"], "--weights": weights, "--out": str(tmp_path / "out")} | change
    words = [word for key, value in options.items() if value for word in (key, value.format(**names))]
    assert main(["colorize", str(pictures), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    import re

    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()
