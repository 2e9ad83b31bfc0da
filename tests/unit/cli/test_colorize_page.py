"""Every command of docs/colorize.md runs, on a small film and with a small network of the same names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.films import made

from lineament.cli import main
from lineament.data import coloured_films
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.network import ColorMNet

PAGE = Path(__file__).parents[3] / "docs" / "colorize.md"
# The published training is not for a test.
LESS = {"--train": "--clips 1 --epochs 1 --frames 2 --size 32 --batch-size 2"}


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    av = pytest.importorskip("av", reason="the extra 'video' is not installed")
    monkeypatch.chdir(tmp_path)
    made(av, tmp_path / "film.mkv", times=range(0, 240, 40), size=(32, 32))
    rng = np.random.default_rng(0)
    for name in ("first.png", "later.png"):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(name)
    for number, film in enumerate(coloured_films(2, frames=3, size=32)):
        (tmp_path / "films" / str(number)).mkdir(parents=True)
        for t, picture in enumerate(film):
            Image.fromarray(picture.numpy()).save(tmp_path / "films" / str(number) / f"{t}.png")
    ColorMNet(ColorMNetConfig.tiny(encoder="resnet")).save_pretrained(tmp_path / "colormnet.pth")
    commands = re.findall(r"^lineament (colorize .*)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.replace("240=", "5="))
        words += [w for option, more in LESS.items() if option in words for w in more.split()]
        words += [] if "--out" not in words else ["--overwrite"]
        assert main(words) == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "colour.mkv").stat().st_size > 0 and (
        tmp_path / "my-colormnet" / "config.json"
    ).exists()
