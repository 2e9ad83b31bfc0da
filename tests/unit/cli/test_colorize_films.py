"""``lineament colorize`` on whole films: what it writes, and what is left when it is killed."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.films import made

from lineament.cli import main


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The last bits of a frame depend on the number of threads, and the forked run that is killed has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="the extra 'video' is not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    from lineament.modules.colormnet.configuration import ColorMNetConfig
    from lineament.modules.colormnet.network import ColorMNet

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net")
    ColorMNet(ColorMNetConfig.tiny(encoder="resnet")).save_pretrained(folder)
    return str(folder)


def exemplar(path: Path, size=(64, 48)) -> str:
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return str(path)


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
    again = ["--scenes", "2", "--exemplar", "2=" + shown, "--overwrite"]
    words = ["colorize", str(pictures), "--exemplar", shown, "--weights", weights, "--out", str(out)]
    assert main([*words, *again]) == 0
    assert json.loads((out / "colorize.json").read_text())["cuts"] == [2]


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
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def command(film: Path, tmp_path: Path, weights: str, *more: str, size=(64, 48)) -> list[str]:
    shown = exemplar(tmp_path / "shown.png", size)
    return ["colorize", str(film), "--exemplar", shown, "--weights", weights, *more, "--out"]


def test_a_coloured_video_has_colour_and_a_report(av, whole, capsys):
    with av.open(str(whole / "f.mkv")) as out:
        frames = [f.to_ndarray(format="yuv420p") for f in out.decode(out.streams.video[0])]
    assert frames[1][48:].std() > 0
    report = json.loads((whole / "f.mkv.colorize.json").read_text())
    assert report["frames"] == 28 and report["confidence"][0] < 1 and not list(whole.glob("*.parts"))


def test_a_video_becomes_pictures_and_they_a_video(av, tmp_path, weights, capsys):
    film = made(av, tmp_path / "in.mkv")
    assert main([*command(film, tmp_path, weights), str(tmp_path / "pictures")]) == 0
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [*(f"{t:06d}.png" for t in range(5)), "colorize.json"]
    assert np.asarray(Image.open(tmp_path / "pictures" / names[1])).std((0, 1)).min() > 0
    (tmp_path / "pictures" / "colorize.json").unlink()
    again = [*command(tmp_path / "pictures", tmp_path, weights, "--fps", "24000/1001", "--codec", "ffv1")]
    assert main([*again, str(tmp_path / "out.mkv")]) == 0
    with av.open(str(tmp_path / "out.mkv")) as out:
        assert out.streams.video[0].average_rate == pytest.approx(24000 / 1001, rel=1e-3)
        assert len(list(out.decode(out.streams.video[0]))) == 5
    capsys.readouterr()
    assert main([*command(film, tmp_path, weights, "--fps", "24"), str(tmp_path / "b.mkv")]) == 2
    assert capsys.readouterr().err.startswith("lineament: --fps: is for a video from a folder")
    for rate in ("1e9", "1e400", "0.001", "-1"):
        out = [*command(tmp_path / "pictures", tmp_path, weights, "--fps", rate), str(tmp_path / "b.mkv")]
        assert main(out) == 2 and f"got {rate!r}, expected from 0.01 to 1000" in capsys.readouterr().err


def test_alpha_of_pictures_stays(tmp_path, weights):
    grey = np.random.default_rng(0).integers(0, 255, (48, 64), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(np.dstack([grey] * 4), "RGBA").save(tmp_path / "in" / "1.png")
    assert main([*command(tmp_path / "in", tmp_path, weights), str(tmp_path / "out")]) == 0
    found = Image.open(tmp_path / "out" / "1.png")
    assert found.mode == "RGBA" and np.array_equal(np.asarray(found.getchannel("A")), grey)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near(tmp_path, weights, precision):
    (tmp_path / "in").mkdir()
    for t in range(3):
        Image.new("L", (64, 48), 90 + 20 * t).save(tmp_path / "in" / f"{t}.png")
    found = []
    for more in ((), ("--precision", precision)):
        out = tmp_path / f"out{len(more)}"
        assert main([*command(tmp_path / "in", tmp_path, weights, *more), str(out)]) == 0
        found.append(np.asarray(Image.open(out / "2.png")).astype(int))
    assert 0 < np.abs(found[0] - found[1]).mean() < 4


def test_exemplars_of_every_kind(tmp_path, weights, capfd):
    """CMYK, 16 bits, of another aspect; a grey one is said."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 64), dtype=np.uint8)).save(tmp_path / "in" / "1.png")
    rgb = Image.fromarray(rng.integers(0, 255, (30, 64, 3), dtype=np.uint8))
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65535, (48, 64), dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, says in {"cmyk.jpg": "is stretched", "deep.png": "is grey"}.items():
        line = ["colorize", str(tmp_path / "in"), "--exemplar", str(tmp_path / name), "--weights", weights]
        with pytest.warns(UserWarning, match=says):
            assert main([*line, "--overwrite", "--out", str(tmp_path / "out")]) == 0


def test_what_decodes_is_finished_and_the_gap_is_named(av, tmp_path, weights, capsys):
    whole = made(av, tmp_path / "in.mkv", times=range(0, 1200, 40), sound=None)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert main([*command(cut, tmp_path, weights, "--codec", "ffv1"), str(tmp_path / "out.mkv")]) == 1
    report = json.loads((tmp_path / "out.mkv.colorize.json").read_text())
    assert 10 < report["frames"] < 30 and "after frame" in report["notes"][0]
    assert f"note: {report['notes'][0]}" in capsys.readouterr().err
    assert main([*command(cut, tmp_path, weights), str(tmp_path / "pictures")]) == 1
    assert len(list((tmp_path / "pictures").glob("*.png"))) == report["frames"]


@pytest.mark.parametrize("separate", [False, True])
def test_a_film_of_one_frame(av, tmp_path, weights, separate):
    film = made(av, tmp_path / "in.mkv", times=[0], sound=None)
    size = (20, 15) if separate else (64, 48)
    assert main([*command(film, tmp_path, weights, size=size), str(tmp_path / "out.mp4")]) == 0
    with av.open(str(tmp_path / "out.mp4")) as out:
        assert len(list(out.decode(out.streams.video[0]))) == 1


def forked(line: list[str], prepare) -> int:
    """The status of a command in a process of its own, after ``prepare()``; minus the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            signal.alarm(60)
            prepare()
            os._exit(main(line))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


POINTS = {
    "decoding": "lineament.load.video._film_frame",
    "predicting": "lineament.modules.colormnet.colorize.Colorizer.frame",
    "joining": "lineament.load.video_writing.VideoOutput._picture",
    "pictures": "PIL.Image.Image.save",
}


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """A film, and what comes of it without a break: a video and pictures."""
    av = pytest.importorskip("av", reason="the extra 'video' is not installed")
    at = tmp_path_factory.mktemp("whole")
    film = made(av, at / "in.mkv", times=range(0, 1120, 40), sound=None)
    assert main([*command(film, at, weights, "--codec", "ffv1"), str(at / "f.mkv")]) == 0
    assert main([*command(film, at, weights), str(at / "pictures")]) == 0
    return at


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_was_killed_goes_on_to_the_same_frames(av, tmp_path, weights, whole, point):
    pictures = point == "pictures"
    line = command(whole / "in.mkv", whole, weights, *([] if pictures else ["--codec", "ffv1"]))
    out = tmp_path / ("pictures" if pictures else "f.mkv")

    def prepare() -> None:
        import importlib

        place, _, name = POINTS[point].rpartition(".")
        try:
            owner = importlib.import_module(place)
        except ImportError:
            owner = getattr(importlib.import_module(place.rpartition(".")[0]), place.rpartition(".")[2])
        function, calls = getattr(owner, name), []

        def dies(*args, **kwargs):
            calls.append(0)
            if len(calls) == (55 if point == "decoding" else 26):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(owner, name, dies)

    assert forked([*line, str(out)], prepare) == -signal.SIGKILL
    assert main([*line, str(out)]) == 0
    if pictures:
        names = sorted(path.name for path in out.iterdir())
        assert names == sorted(path.name for path in (whole / "pictures").iterdir()) and len(names) == 29
        assert all((out / n).read_bytes() == (whole / "pictures" / n).read_bytes() for n in names[:-1])
        assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
        return
    decoded = []
    for each in (out, whole / "f.mkv"):
        with av.open(str(each)) as film:
            decoded.append([f.to_ndarray(format="yuv420p") for f in film.decode(film.streams.video[0])])
    assert len(decoded[0]) == 28 and all(np.array_equal(a, b) for a, b in zip(*decoded))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.mkv", "f.mkv.colorize.json"]


def test_a_full_disk_and_a_second_process_are_one_line(av, tmp_path, weights, capfd):
    film = made(av, tmp_path / "in.mkv", times=range(0, 1120, 40), sound=None)
    line = [*command(film, tmp_path, weights, "--codec", "ffv1"), str(tmp_path / "out.mkv")]

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    assert forked(line, full) == 1
    assert re.search(
        r"^lineament: a file could not be written \(File too large\); the same command goes on",
        capfd.readouterr().err,
    )
    assert not (tmp_path / "out.mkv").exists()
    from lineament.core.checkpoint import Checkpoint

    held = Checkpoint(tmp_path / "out.mkv.parts" / "state", {"of": "this process"})
    assert forked(line, lambda: None) == 2
    assert "another process is running" in capfd.readouterr().err
    held.finish()
    assert main(line) == 0
