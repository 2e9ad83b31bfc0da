"""Independent jobs run in other processes, on the engine that was chosen, in their order; what is not there is said."""

from __future__ import annotations

import os

import pytest

from lineament import cli
from lineament.core.checks import InputError
from lineament.core.engines import available, engine, side_by_side, workers
from lineament.load.user_code import named_in


def test_one_job_at_a_time_runs_here_as_it_is_asked_for():
    seen = []
    results = side_by_side(lambda k: seen.append(k) or os.getpid(), [(1,), (2,)])
    assert next(results) == os.getpid() and seen == [1]
    assert workers(1) == 1 and workers(3) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loky", "ray", "dask"])
def test_jobs_run_in_other_processes_in_their_order_and_know_the_users_file(name, tmp_path):
    try:
        available(name)
    except InputError:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "mine.py").write_text(
        "import os\nclass Job:\n    def __call__(self, k):\n        return k * k, os.getpid()\n"
    )
    job = named_in("model", str(tmp_path / "mine.py"), "Job")()
    with engine(name):
        assert workers(1) >= 1
        found = list(side_by_side(job, [(k,) for k in range(4)], jobs=2))
    assert [square for square, _ in found] == [0, 1, 4, 9]
    assert os.getpid() not in {process for _, process in found}
    assert workers(1) == 1


def test_a_job_that_fails_elsewhere_fails_here():
    with engine("loky"), pytest.raises(ZeroDivisionError):
        list(side_by_side(divmod, [(1, 1), (1, 0)], jobs=2))


@pytest.mark.parametrize(
    ("name", "said"), [("rai", "nearest: 'ray'"), ("spark", "'loky', 'ray', 'dask'")], ids=["near", "far"]
)
def test_an_unknown_engine_is_refused(name, said):
    with pytest.raises(InputError, match=said), engine(name):
        pass


def test_an_engine_that_is_not_installed_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.util.joblib", None)
    with pytest.raises(InputError, match=r"install lineament\[ray\], or choose 'loky'"), engine("ray"):
        pass


@pytest.mark.parametrize(
    "command",
    ["reproduce gns --out OUT", "audit --out OUT", "bench audit --json OUT"],
    ids=lambda c: c.split()[0],
)
def test_the_commands_refuse_an_engine_before_any_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "out")
    assert cli.main([*command.replace("OUT", out).split(), "--engine", "rai"]) == 2
    assert "--engine: got 'rai'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
