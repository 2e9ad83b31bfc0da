"""``lineament leak``: the page, its numbers, resuming, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lineament.audit.leak import LeakOptions, leak
from lineament.audit.leak_section import section_of
from lineament.cli import main
from lineament.core.checks import InputError
from lineament.privacy import Search
from lineament.privacy.leakage import Attacked, Leakage, Price

QUICK = LeakOptions(attacks=("latent", "ig"), prior_steps=2, search=Search(steps=8, restarts=1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10))


def test_the_page_says_what_was_seen_and_what_was_known_without(net, tmp_path):
    found = leak(
        net,
        "digits",
        out=tmp_path,
        defences=["none", "noise=1"],
        pictures=4,
        batch_sizes=(1, 2),
        samples=60,
        options=QUICK,
    )
    told = json.loads(found.json.read_text())
    assert [s.name for s in found.sections] == ["batch-1", "batch-2"] and len(found.findings) == 4
    numbers = {(a["defence"], a["attack"]): a for a in found.sections[0].numbers["attacked"]}
    assert len(numbers) == 4 and all(len(a["psnr"]) == 4 for a in numbers.values())
    plain = sum(numbers["nothing", "ig"]["psnr"]) / 4
    assert f"{plain:.1f} dB" in found.findings[0].sentence or "latent" in found.findings[0].sentence
    page = found.html.read_text()
    assert "gradients of the mean loss" in page and told["sections"]
    assert not (tmp_path / ".stages").exists()


def test_a_run_that_was_cut_off_goes_on(net, tmp_path, monkeypatch):
    from lineament.audit import leak as module

    first, calls = module.leakage, []

    def once(*given, **how):
        calls.append(str(how["options"].defences[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return first(*given, **how)

    monkeypatch.setattr(module, "leakage", once)
    how = {"defences": ["none", "clip=1"], "pictures": 2, "samples": 40, "options": QUICK}
    with pytest.raises(KeyboardInterrupt):
        leak(net, "digits", out=tmp_path / "a", **how)
    assert not (tmp_path / "a" / "leak.html").exists()
    cut = leak(net, "digits", out=tmp_path / "a", **how)
    assert calls == ["nothing", "clip 1", "clip 1"]
    whole = leak(net, "digits", out=tmp_path / "b", **how)
    assert cut.sections[0].numbers == whole.sections[0].numbers


def test_the_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nmake = lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = [
        "leak",
        "net.py:make",
        "digits",
        "--pictures",
        "2",
        "--samples",
        "40",
        "--prior",
        "none",
        "--attack",
        "ig",
        "--steps",
        "2",
        "--defence",
        "none",
    ]
    assert main(words) == 0
    assert "Page:" in capsys.readouterr().out and (tmp_path / "lineament-leak" / "leak.html").is_file()
    for wrong, says in (
        (["--defence", "clap=3"], "clap"),
        (["--attack", "gift"], "gifd"),
        (["--batch-size", "3"], "divides"),
        (["--batch-size", "x"], "whole numbers"),
    ):
        assert main([*words, "--overwrite", *wrong]) != 0
        assert says in capsys.readouterr().err


def test_other_models_and_too_few_samples_are_refused(net, tmp_path):
    with pytest.raises(InputError, match="leave too few others"):
        leak(net, "digits", out=tmp_path, pictures=8, samples=20, options=QUICK)
    flat = nn.Linear(64, 10)
    rows = (torch.rand(60, 64).numpy(), (torch.arange(60) % 10).numpy())
    with pytest.raises(InputError, match="images"):
        leak(flat, rows, out=tmp_path, pictures=4, options=QUICK)


def attacked(defence, psnr, named, attack="ig"):
    told = torch.tensor(named, dtype=torch.bool)
    return Attacked(
        defence, attack, torch.tensor(psnr), 0.5, scores=torch.zeros(8), stage=torch.zeros(8), stage_psnr=torch.zeros(8), named=told, reciprocal_rank=1.0,
        field=8, rule="bias", labels_right=1.0, pictures=torch.rand(8, 1, 4, 4), steps=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("psnr", "named", "steps", "severity"),
    [
        ([20.0, 21.0] * 4, [False] * 8, 60, "warning"),  # nearer than what is known without
        ([9.0, 10.0] * 4, [True] * 8, 60, "warning"),  # no nearer, but every picture is told apart
        (
            [9.0, 10.0] * 4,
            [True] + [False] * 7,
            60,
            "note",
        ),  # one of eight: chance; undefended, nothing follows
        ([9.0, 10.0] * 4, [True] + [False] * 7, 12, "note"),  # and too short a search to tell
    ],
)
def test_what_counts_as_seen(psnr, named, steps, severity):
    told = Leakage(
        torch.rand(8, 1, 4, 4),
        1,
        (attacked("nothing", psnr, named),),
        {"the mean": torch.full((8,), 12.0)},
        (Price("nothing", 1.0, 1.0),),
    )
    section = section_of(told, steps, 1.0)
    assert [f.severity for f in section.findings] == [severity]
    assert f"{sum(named)} of 8 guesses" in section.sentence and section.tables[0].rows[-1][0] == "no message"


def test_a_defence_is_not_good_where_nothing_is_seen_undefended():
    nothing, clipped = (attacked(name, [9.0, 10.0] * 4, [False] * 8) for name in ("nothing", "clip 4"))
    told = Leakage(
        torch.rand(8, 1, 4, 4),
        1,
        (nothing, clipped),
        {"the mean": torch.full((8,), 12.0)},
        (Price("nothing", 1.0, 1.0), Price("clip 4", 1.0, 1.0)),
    )
    assert [f.severity for f in section_of(told, 60, 1.0).findings] == ["note", "note"]


@pytest.mark.parametrize(
    ("psnr", "others", "found"),
    [
        ([11.0, 12.0] * 4, True, ("good", "nothing seen")),
        ([11.0, 12.0] * 4, False, ("note", "nothing seen")),  # undefended was not searched
        ([6.0, 20.0] * 4, True, ("note", "not resolved")),  # 1 dB more, give or take 5
        ([11.0, 12.0], True, ("note", "not resolved")),  # two pictures show nothing
    ],
)
def test_a_defence_is_good_only_where_that_is_shown(psnr, others, found):
    count = len(psnr)
    plain = [attacked("nothing", [20.0, 21.0] * (count // 2), [False] * count)] if others else []
    told = Leakage(
        torch.rand(count, 1, 4, 4),
        1,
        (*plain, attacked("clip 4", psnr, [False] * count)),
        {"the mean": torch.full((count,), 12.0)},
        (*(Price(a.defence, 1.0, 1.0) for a in plain), Price("clip 4", 1.0, 1.0)),
    )
    last = section_of(told, 60, 1.0).findings[-1]
    assert (last.severity, last.key) == found
