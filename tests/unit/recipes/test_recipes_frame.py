"""The frame around recipes: fields from text, and runs that begin, resume, are found again or are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

from lineament import recipes
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError
from lineament.recipes.kit import configuration
from lineament.recipes.kit import run as runs
from lineament.recipes.kit.configuration import PRESETS, configure
from lineament.recipes.kit.presets import presets
from lineament.report.outcome import Claim, Figure, Outcome, Table


@dataclass(frozen=True)
class Config:
    preset: str = "quick"
    seed: int = 0
    epochs: int = 8
    rate: float = 0.1
    name: str = "net"
    flag: bool = False
    folder: Path | None = None
    limit: int | None = None
    label: str | None = None
    widths: tuple[int, ...] = (8, 16)
    pair: tuple[int, str] = (1, "a")
    names: tuple[str, ...] = ()
    kind: Literal["svg", "png"] = "svg"
    table: dict[str, int] | None = None


@pytest.mark.parametrize(
    ("field", "words", "value"),
    [
        ("seed", "-3", -3),
        ("rate", "1e-3", 1e-3),
        ("rate", "2", 2.0),
        ("name", "none", "none"),
        ("flag", "true", True),
        ("flag", "NO", False),
        ("folder", "data/x", Path("data/x")),
        ("limit", "none", None),
        ("limit", "7", 7),
        ("label", "none", None),
        ("label", "x", "x"),
        ("widths", "4, 8,12", (4, 8, 12)),
        ("widths", "", ()),
        ("names", "MoCo;both, by dimension", ("MoCo", "both, by dimension")),
        ("names", "both, by dimension;", ("both, by dimension",)),
        ("pair", "2,b", (2, "b")),
        ("kind", "png", "png"),
    ],
)
def test_fields_from_text(field, words, value):
    made = getattr(configure(Config(), {field: words}), field)
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    ("field", "words", "message"),
    [
        ("seed", "1.5", "seed: got '1.5', expected an integer"),
        ("rate", "fast", "expected a number"),
        ("flag", "maybe", "expected true or false"),
        ("limit", "x", "expected an integer or none"),
        ("widths", "4,x", "separated by commas, each an integer"),
        ("pair", "1", "2 values separated by commas"),
        ("kind", "gif", "one of 'svg', 'png'"),
        ("table", "{}", "not for the command line"),
        ("epochs", "0", "epochs: got '0', expected an integer of at least 1"),
        ("widths", "4,-1", "expected an integer of at least 1"),
        ("rate", "nan", "expected a finite number of at least 0"),
        ("rate", "-0.1", "expected a finite number of at least 0"),
        ("sed", "1", "sed.*nearest: 'seed'"),
        ("preset", "small", "no such field"),
    ],
)
def test_bad_fields_are_refused(field, words, message):
    with pytest.raises(InputError, match=message):
        configure(Config(), {field: words})


def test_dashes_are_underscores_and_once_is_enough():
    @dataclass(frozen=True)
    class Dashed:
        step_size: float = 0.1

    assert configure(Dashed(), {"step-size": "0.5"}).step_size == 0.5
    with pytest.raises(InputError, match="twice"):
        configure(Dashed(), {"step-size": "0.5", "step_size": "1"})


def test_registry_finds_files_and_names_the_nearest(monkeypatch):
    for slug in recipes.available():
        module = recipes.load(slug)
        assert slug == module.SLUG
        for preset in PRESETS:
            assert module.Config.preset(preset).preset == preset
    with pytest.raises(InputError, match="nearest: 'neural-collapse'"):
        recipes.load("neural-colapse")
    monkeypatch.setattr(configuration, "available", lambda: ["normgrad"])
    with pytest.raises(InputError, match="not there yet; there are: normgrad"):
        recipes.load("colormnet")


@pytest.fixture
def recipe(monkeypatch):
    """A recipe of two stages that counts its calls and can be told to die after the first."""
    calls: list[str] = []
    module = types.ModuleType("lineament.recipes.toy")

    @dataclass(frozen=True)
    class ToyConfig:
        preset: str = presets(quick={}, small={})
        seed: int = 0

    def run(config, *, out):
        store = Checkpoint(out / ".stages", key=asdict(config))

        def stage(name):
            def compute():
                calls.append(name)
                return {"value": config.seed + 0.5}

            return store.stage(name, compute)

        one = stage("one")
        if module.dies:
            raise KeyboardInterrupt
        two = stage("two")
        (out / "curve.svg").write_text("<svg/>")
        (out / "weights.npz").write_text("extra")
        store.finish()
        total = one["value"] + two["value"]
        return Outcome(
            "toy", "Toy", config.preset, asdict(config), [Claim("c", "1", str(total), total > 0)],
            [Table("t", ["x"], [[float("nan")]])], [Figure("curve.svg", "c", "a")],
        )  # fmt: skip

    module.__dict__.update(SLUG="toy", TITLE="Toy", Config=ToyConfig, run=run, dies=False, calls=calls)
    monkeypatch.setattr(runs, "load", lambda slug: module)
    return module


def test_a_run_writes_its_outcome_last_and_only_once(recipe, tmp_path):
    found = runs.reproduce("toy", "quick", {"seed": "3"}, out=tmp_path / "r")
    assert found.how == "run" and found.outcome.claims[0].observed == "7.0"
    raw = json.loads((tmp_path / "r/outcome.json").read_text())
    assert list(raw) == [
        "slug",
        "title",
        "preset",
        "config",
        "claims",
        "tables",
        "figures",
        "seconds",
        "versions",
    ]
    assert raw["config"] == {"preset": "quick", "seed": 3} and raw["seconds"] > 0 and raw["versions"]["torch"]
    assert raw["tables"][0]["rows"] == [[None]]
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["curve.svg", "outcome.json", "weights.npz"]
    before = (tmp_path / "r/outcome.json").stat().st_mtime_ns
    again = runs.reproduce("toy", "quick", {"seed": "3"}, out=tmp_path / "r")
    assert again.how == "found" and recipe.calls == ["one", "two"]
    assert (tmp_path / "r/outcome.json").stat().st_mtime_ns == before


def test_a_killed_run_goes_on(recipe, tmp_path):
    recipe.dies = True
    with pytest.raises(KeyboardInterrupt):
        runs.reproduce("toy", out=tmp_path)
    assert not (tmp_path / "outcome.json").exists()
    recipe.dies = False
    notes: list[str] = []
    found = runs.reproduce("toy", out=tmp_path, note=notes.append)
    assert found.how == "resumed" and recipe.calls == ["one", "two"] and len(notes) == 1
    fresh = runs.reproduce("toy", out=tmp_path / "other")
    assert found.outcome.claims == fresh.outcome.claims


def test_an_unfinished_run_of_another_configuration_is_refused(recipe, tmp_path):
    recipe.dies = True
    with pytest.raises(KeyboardInterrupt):
        runs.reproduce("toy", out=tmp_path)
    recipe.dies = False
    with pytest.raises(InputError, match=r"another configuration.*overwrite=True"):
        runs.reproduce("toy", values={"seed": "1"}, out=tmp_path)
    assert runs.reproduce("toy", values={"seed": "1"}, out=tmp_path, overwrite=True).how == "run"


def test_a_finished_run_of_another_configuration_is_refused(recipe, tmp_path):
    runs.reproduce("toy", out=tmp_path)
    with pytest.raises(InputError, match="other seed"):
        runs.reproduce("toy", values={"seed": "1"}, out=tmp_path)
    assert (
        runs.reproduce("toy", values={"seed": "1"}, out=tmp_path, overwrite=True).outcome.config["seed"] == 1
    )


def test_overwrite_runs_the_same_again(recipe, tmp_path):
    runs.reproduce("toy", out=tmp_path)
    assert runs.reproduce("toy", out=tmp_path, overwrite=True).how == "run"
    assert recipe.calls == ["one", "two"] * 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_folder_is_left_alone(recipe, tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"other files.*thesis"):
        runs.reproduce("toy", out=tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"] and recipe.calls == []


def test_an_out_that_is_a_file_or_a_corrupt_outcome(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        runs.reproduce("toy", out=tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/outcome.json").write_text("{")
    with pytest.raises(InputError, match="not an outcome"):
        runs.reproduce("toy", out=tmp_path / "run")
    assert runs.reproduce("toy", out=tmp_path / "run", overwrite=True).how == "run"


def test_overwrite_follows_no_path_out_of_the_folder(recipe, tmp_path):
    (tmp_path / "keep.svg").write_text("mine")
    run = tmp_path / "run"
    runs.reproduce("toy", out=run)
    raw = json.loads((run / "outcome.json").read_text())
    raw["figures"] = [{"file": "../keep.svg", "caption": "", "alt": ""}]
    (run / "outcome.json").write_text(json.dumps(raw))
    runs.reproduce("toy", out=run, overwrite=True)
    assert (tmp_path / "keep.svg").read_text() == "mine"


def test_the_default_folder_is_below_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.reproduce("toy", "small").folder == Path("runs/toy-small")
    with pytest.raises(InputError, match="preset: got 'tiny'"):
        runs.reproduce("toy", "tiny")
    assert "lineament.recipes.toy" not in sys.modules


SCRIPT = """
import dataclasses, sys, time, types
from pathlib import Path
import torch
from lineament.core.checkpoint import Checkpoint
from lineament.recipes.kit import run as runs
from lineament.recipes.kit.presets import presets
from lineament.report.outcome import Claim, Outcome

@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = presets(quick={})
    seed: int = 0

def run(config, *, out):
    store = Checkpoint(out / ".stages", key=dataclasses.asdict(config))
    def stage(seed):
        def compute():
            print("computing", seed, flush=True)
            return {"x": torch.randn(5, generator=torch.Generator().manual_seed(seed))}
        return compute
    one = store.stage("one", stage(1))
    if sys.argv[2] == "slow":
        print("hang", flush=True)
        time.sleep(60)
    two = store.stage("two", stage(2))
    store.finish()
    total = repr((one["x"] + two["x"]).tolist())
    return Outcome("toy", "Toy", "quick", {}, [Claim("sum", "", total, True)], seconds=1.0)

runs.load = lambda slug: types.SimpleNamespace(Config=Config, run=run)
runs.reproduce("toy", out=sys.argv[1])
"""


@pytest.mark.slow
def test_a_run_killed_outright_ends_as_an_uninterrupted_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(folder: str, speed: str) -> subprocess.Popen[str]:
        words = [sys.executable, str(script), str(tmp_path / folder), speed]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    with start("killed", "slow") as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["computing 1\n", "hang\n"]
        process.kill()
    assert not (tmp_path / "killed/outcome.json").exists()
    again, whole = start("killed", "fast"), start("whole", "fast")
    assert (
        again.communicate()[0] == "computing 2\n" and whole.communicate()[0] == "computing 1\ncomputing 2\n"
    )
    assert (tmp_path / "killed/outcome.json").read_text() == (tmp_path / "whole/outcome.json").read_text()
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["outcome.json"]


def test_stages_that_write_to_the_checkpoint_stay_in_this_process(tmp_path):
    from lineament.core.engines import engine
    from lineament.recipes.kit.stages import Stages

    stages = Stages(tmp_path, Config())
    with engine("loky"):
        here = stages.each("here {}", (0, 1), lambda k: os.getpid(), int, jobs=None)
        there = stages.each("there {}", (0, 1), lambda k: os.getpid(), int)
    assert set(here.values()) == {os.getpid()} and os.getpid() not in there.values()
