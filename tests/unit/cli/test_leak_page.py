"""Every command of docs/leak.md runs, and so does its example of an own defence."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lineament.audit.leak_section import prior_of
from lineament.cli import main
from lineament.data.digits import digit_images

PAGE = (Path(__file__).parents[3] / "docs" / "leak.md").read_text(encoding="utf-8")
NETWORK = """import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = lambda x, kind, *, steps, seed: prior_of(x, kind, steps=2, seed=seed, width=8)  # noqa: E731
    monkeypatch.setattr(
        import_module("lineament.audit.leak"), "prior_of", small
    )  # the usual training is not for a test
    (tmp_path / "my_model.py").write_text(NETWORK)
    exec(NETWORK, made := {})
    digits = digit_images(count=84)
    x, y = digits.inputs.numpy(), digits.targets.numpy()
    np.savez("photos.npz", inputs=x[:80], targets=y[:80], person=np.arange(80) // 4)
    np.savez("mine.npz", inputs=x[80:], targets=y[80:])
    np.savez("others.npz", inputs=x[:80], targets=y[:80])
    net = made["build"]().eval()
    np.savez("global.npz", *[v.numpy().copy() for v in net.state_dict().values()])
    nn.functional.cross_entropy(net(digits.inputs[80:]), digits.targets[80:]).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.01 * p.grad
    np.savez("after.npz", *[v.numpy() for v in net.state_dict().values()])
    commands = re.findall(r"^lineament (leak .*)$", PAGE, re.M)
    assert len(commands) == 5
    less = ["--pictures", "8", "--attack", "ig", "--overwrite"]
    for command in commands:
        words = [*shlex.split(command.replace("--minutes 2", "--minutes 0.05")), *less]
        words += [] if "--minutes" in words else ["--steps", "1"]
        assert main(words) == 0, (command, capsys.readouterr().err)
        assert (tmp_path / "leaked" / "leak.html").stat().st_size > 0
    assert "of other pictures" not in capsys.readouterr().out


def test_the_own_defences_of_the_page(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    torch.manual_seed(0)
    exec(example.replace("steps=100", "steps=20"), told := {})
    found = told["found"]
    plain, censored, moved = found.prices
    assert plain.cosine == pytest.approx(1, abs=1e-5) and abs(censored.cosine) < 1e-4 < moved.cosine < 0.999
    assert [len(a.psnr) for a in found.attacked] == [2, 2, 2] and "Censor" in capsys.readouterr().out
    # The attacker sees the transformed picture, not the true one.
    own = found.attacked[2].pictures
    guess = told["mine"].roll((1, 2), (2, 3)).flip(3)
    assert float((own - guess).square().mean()) < float((own - told["mine"]).square().mean())
