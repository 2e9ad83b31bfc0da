"""The command line: one line and status 2 for bad input, 130 for Ctrl-C, tracebacks only when asked for."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from lineament import __version__, cli
from lineament.cli.reproduce import split_fields


def run(*words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "lineament", *words], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def refused(capsys, *words: str) -> str:
    """The one line on standard error of a command line that ends with status 2."""
    assert cli.main(list(words)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("lineament: ")
    return shown.err


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    words = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command in words
    assert cli.main([]) == 0
    assert capsys.readouterr().out == words
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lineament {__version__}\n"
    for command in ("papers", "reproduce", "gallery", "bench"):
        assert cli.main([command, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out


def test_help_of_a_recipe_lists_its_fields(capsys):
    assert cli.main(["reproduce", "normgrad", "--help"]) == 0
    words = capsys.readouterr().out
    line = next(line for line in words.splitlines() if line.strip().startswith("--train-images"))
    assert "an integer" in line and "1500" in line and "3000" in line and "--overwrite" in words
    assert cli.main(["reproduce", "normgard", "--help"]) == 2
    assert "nearest: 'normgrad'" in capsys.readouterr().err


def test_help_and_papers_import_no_torch():
    for words in (["--help"], ["papers", "--json"], ["papers", "--search", "collapse"]):
        code = f"import sys; from lineament.cli import main; main({words!r}); print('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stderr.strip() == "False"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["paper"], "nearest: 'papers'"),
        (["gallrey", "x"], "nearest: 'gallery'"),
        (["--vers"], "nearest: '--version'"),
        (["papers", "--serch", "x"], "nearest: '--search'"),
        (["papers", "extra"], "'extra'"),
        (["papers", "--search"], "expected one argument"),
        (["reproduce"], "SLUG"),
        (["reproduce", "normgard"], "nearest: 'normgrad'"),
        (["reproduce", "normgrad", "--seed"], "--seed stands without a value"),
        (["reproduce", "normgrad", "--seed", "1", "--seed", "2"], "given twice"),
        (["reproduce", "normgrad", "--train-images", "0"], "lineament: --train-images: got '0'"),
        (["reproduce", "normgrad", "--preset", "tiny"], "lineament: --preset: got 'tiny'"),
        (["reproduce", "normgrad", "other", "--seed", "1"], "'other'"),
        (["gallery", "runs"], "--out"),
        (["gallery", "no-such-folder", "--out", "x"], "is no folder"),
        (["bench", "no-such"], "known: "),
        (["bench", "--repeats", "x"], "--repeats"),
        (["bench", "--repeats", "0"], "expected an integer in [1"),
    ],
)
def test_bad_lines_end_with_one_line(capsys, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_debug_shows_the_traceback():
    status, _, err = run("reproduce", "normgard", "--debug")
    assert status == 1 and "Traceback" in err and "InputError" in err


def test_hostile_words_reach_the_terminal_harmlessly(capsys):
    line = refused(capsys, "reproduce", "\x1b[31mred\u202e\n\udcff")
    assert "\x1b" not in line and "\u202e" not in line


def test_an_unforeseen_error_is_one_line(capsys, monkeypatch):
    def fails(text):
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr("lineament.papers.search", fails)
    assert cli.main(["papers"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "ZeroDivisionError: by nothing" in err and "--debug" in err
    with pytest.raises(ZeroDivisionError):
        cli.main(["papers", "--debug"])


def test_papers_as_json(capsys):
    assert cli.main(["papers", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == 29
    assert set(entries[0]) >= {"slug", "title", "year", "arxiv", "purpose", "homes", "status", "runs"}
    years = [entry["year"] for entry in entries]
    assert years == sorted(years, reverse=True)


@pytest.mark.parametrize("columns", ["40", "80", "160"])
def test_papers_fit_any_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(["papers"]) == 0
    import re

    words = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, words.splitlines())) <= int(columns)
    assert "normgrad" in words and "29 of 29 papers" in " ".join(words.split())


def test_papers_in_a_pipe_are_whole_lines(capsys):
    assert cli.main(["papers", "--search", "modhifi"]) == 0
    out = capsys.readouterr().out
    assert "  ModHiFi: Identifying High Fidelity predictive components for Model Modification\n" in out
    assert "\x1b" not in out and "1 of 29 papers" in out
    assert cli.main(["papers", "--search", "no such words"]) == 0
    assert "0 of 29" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "rest", "fields"),
    [
        ("reproduce a --seed 3", "reproduce a", {"seed": "3"}),
        ("reproduce --seed=3 a --preset small", "reproduce a --preset small", {"seed": "3"}),
        ("reproduce --rate -1 a", "reproduce a", {"rate": "-1"}),
        ("reproduce a --out --x 1", "reproduce a --out --x 1", {}),
        ("reproduce a --out=x --overwrite --n 1", "reproduce a --out=x --overwrite", {"n": "1"}),
        ("reproduce a --path=x=y", "reproduce a", {"path": "x=y"}),
        ("reproduce a --empty=", "reproduce a", {"empty": ""}),
    ],
)
def test_fields_are_taken_out_of_the_line(line, rest, fields):
    assert split_fields(line.split()) == (rest.split(), fields)


@pytest.mark.parametrize("holds", [True, False])
def test_reproduce_shows_the_claims_and_ends_with_zero(capsys, monkeypatch, tmp_path, holds):
    from lineament.recipes.kit import run
    from lineament.report.outcome import Claim, Outcome

    seen = {}

    def reproduce(slug, preset, values, *, out, overwrite, note):
        seen.update(slug=slug, preset=preset, values=values, out=out, overwrite=overwrite)
        claim = Claim("[bold]the claim", "> 1", "0.5", holds, "" if holds else "too small")
        return run.Run(Outcome(slug, "A title", preset, {}, [claim], seconds=2.0), tmp_path, "found")

    monkeypatch.setattr(run, "reproduce", reproduce)
    assert (
        cli.main(
            ["reproduce", "toy", "--preset", "small", "--seed", "3", "--out", str(tmp_path), "--overwrite"]
        )
        == 0
    )
    assert seen == {
        "slug": "toy",
        "preset": "small",
        "values": {"seed": "3"},
        "out": str(tmp_path),
        "overwrite": True,
    }
    out = capsys.readouterr().out
    assert "[bold]the claim" in out and "already holds" in out and str(tmp_path / "outcome.json") in out
    assert ("does not hold" in out and "too small" in out) is not holds
    assert f"{int(holds)} of 1 claims hold" in out


def test_a_run_that_settles_no_claim_shows_its_tables(capsys, tmp_path):
    from lineament.cli.console import show_run
    from lineament.recipes.kit.run import Run
    from lineament.report.outcome import Outcome, Table

    table = Table("Read out", ["training", "accuracy"], [("MoCo [v2]", 0.12341), ("none", None)])
    show_run(Run(Outcome("toy", "A title", "paper", {}, [], [table]), tmp_path, "made"))
    out = capsys.readouterr().out
    assert "MoCo [v2]" in out and "0.1234" in out and "What was run settles no claim at preset paper" in out


def test_gallery_from_the_command_line(capsys, tmp_path):
    (tmp_path / "runs/bad").mkdir(parents=True)
    (tmp_path / "runs/bad/outcome.json").write_text("{")
    assert cli.main(["gallery", str(tmp_path / "runs"), "--out", str(tmp_path / "site")]) == 0
    shown = capsys.readouterr()
    assert (
        "lineament: bad: not an outcome.json" in shown.err and str(tmp_path / "site/index.html") in shown.out
    )
    assert (tmp_path / "site/index.html").exists()


@pytest.mark.slow
def test_ctrl_c_is_a_line_and_130(tmp_path):
    code = (
        "import sys, time; from lineament import cli, papers\n"
        "def search(text):\n    print('ready', flush=True); time.sleep(60)\n"
        "papers.search = search\nsys.exit(cli.main(['papers']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip().count("\n") == 0 and "the same command" in err and "Traceback" not in err


def test_a_reader_who_leaves_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m lineament papers --json | head -n 1", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "[\n" and done.stderr == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("audit", "goes on where it stopped"),
        ("edit prune", "goes on where it stopped"),
        ("edit unlearn", "begins anew"),
        ("gallery", "begins anew"),
    ],
)
def test_after_an_interruption_it_is_said_what_the_same_command_does(command, said, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert cli.main(command.split()) == 130
    assert said in capsys.readouterr().err


def test_a_disk_without_room_is_named(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_dispatch", full)
    assert cli.main(["train"]) == 1
    said = capsys.readouterr().err
    assert "could not be written (No space left on device)" in said and "goes on where it stopped" in said


def test_a_reader_that_leaves_early_is_no_error(monkeypatch):
    """`lineament papers | head -1` did its work; rich would end with status 1."""

    class Gone:
        encoding = "utf-8"

        def write(self, _text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

        def isatty(self):
            return False

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Gone())
    assert cli.main(["papers"]) == 0
