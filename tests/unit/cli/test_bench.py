"""The benchmarks' command: each file in its own process, a crash ends only itself, the JSON is whole."""

from __future__ import annotations

import json
import textwrap

import pytest

from lineament import bench, cli
from lineament.core.checks import InputError

GOOD = """
from lineament.bench import Row
def rows(repeats: int = 5):
    print("chatter that must not reach the table")
    yield Row("good", "[b]fast[/b] thing", 0.5e-3, "peer", 1e-3, 2.0, 1.5, True, "half the limit")
    yield Row("good", f"repeats {repeats}", 2.0, "peer", 1.0, 0.5, 1.0, False)
    yield Row("good", "alone", 2.0, "absent", None, None, 1.0, None)
"""
CRASH = """
import os
from lineament.bench import Row
def rows(repeats: int = 5):
    yield Row("crash-hard", "before", 1.0, "peer", 1.0, 1.0, None, None)
    os._exit(9)
"""
RAISES = "def rows(repeats=1):\n    raise RuntimeError('no such peer')\n    yield\n"


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, source in (("good", GOOD), ("crash_hard", CRASH), ("raises", RAISES), ("_helper", "")):
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.setattr(bench, "folder", lambda: folder)
    return folder


def test_compare_runs_both_sides_equally_often():
    calls: list[str] = []
    row = bench.compare(
        "s", "w", lambda: calls.append("a"), "p", lambda: calls.append("b"), repeats=4, warmup=2, target=0
    )
    assert calls == ["a", "b"] * 2 + ["a", "b", "b", "a"] * 2
    assert row.met is True and row.ratio == pytest.approx((row.peer_s or 0) / row.ours_s)


def test_a_missing_peer_is_a_row():
    row = bench.compare("s", "w", lambda: None, "p", None, target=1.0, repeats=1)
    assert (row.peer_s, row.ratio, row.met) == (None, None, None) and row.ours_s >= 0


def test_scale_multiplies_the_peers_time():
    slow = bench.compare(
        "s", "w", lambda: sum(range(20_000)), "p", lambda: sum(range(20_000)), scale=100, repeats=5
    )
    assert slow.ratio is not None and slow.ratio > 10


def test_slugs_are_file_names(benchmarks):
    assert list(bench.files()) == ["crash-hard", "good", "raises"]
    assert list(bench.chosen(["good", "good"])) == ["good"]
    with pytest.raises(InputError, match=r"'goood'.*nearest: 'good'.*known: crash-hard, good, raises"):
        bench.chosen(["goood"])


def test_the_checkouts_benchmarks_are_found():
    folder = bench.folder()
    assert folder.name in ("benchmarks", "_benchmarks") and bench.files()


def measured(*slugs: str, **options) -> list:
    return list(bench.measure(bench.chosen(slugs), **options))


@pytest.mark.slow
def test_every_file_runs_in_its_own_process(benchmarks, tmp_path, capfd):
    target = tmp_path / "rows.json"
    assert cli.main(["bench", "--json", str(target)]) == 1
    shown = capfd.readouterr()
    rows = json.loads(target.read_text())
    assert [(row["slug"], row["what"]) for row in rows] == [
        ("crash-hard", "before"), ("good", "[b]fast[/b] thing"), ("good", "repeats 5"), ("good", "alone"),
    ]  # fmt: skip
    assert set(rows[0]) >= {"slug", "what", "ours_s", "peer", "peer_s", "ratio", "target", "met"}
    assert rows[3]["peer_s"] is None and rows[3]["met"] is None
    words = ("[b]fast[/b] thing", "half the limit", "missed", "not installed", "500 µs", "1 of 2 targets met")
    assert [word for word in words if word not in shown.out] == []
    assert "chatter" not in shown.out
    assert "crash-hard ended early: ended with status 9" in shown.err
    assert "raises ended early: RuntimeError: no such peer" in shown.err
    assert not list(tmp_path.glob(".*unfinished"))


@pytest.mark.slow
def test_a_killed_run_keeps_its_rows_and_goes_on(benchmarks, tmp_path):
    counted = tmp_path / "counted"
    (benchmarks / "long.py").write_text(
        "from lineament.bench import compare\ndef rows(repeats: int = 5):\n    for k in range(3):\n"
        f"        yield compare('long', f'row {{k}}', lambda: open({str(counted)!r}, 'a').write(str(k)), 'peer', lambda: None, repeats=1, warmup=0)\n"
    )
    target = tmp_path / "rows.json"
    run = bench.measure(bench.chosen(["long"]), json=target)
    next(run), next(run)
    run.close()  # killed behind its second row, or while it measures the third
    assert [row["what"] for row in json.loads(target.read_text())] == ["row 0", "row 1"]
    counted.unlink()
    assert [row.what for row in measured("long", json=target)] == ["row 0", "row 1", "row 2"]
    assert counted.read_text() == "2"
    assert len(json.loads(target.read_text())) == 3 and not list(tmp_path.glob(".*unfinished"))
    counted.unlink()
    measured("long", json=target)
    assert counted.read_text() == "012"  # finished: the next run is another one


@pytest.mark.slow
def test_repeats_and_quick_reach_the_file(benchmarks):
    (benchmarks / "asks.py").write_text(
        "from lineament import bench\ndef rows(repeats=5):\n    yield bench.Row('asks', str(bench.quick()), 1.0, 'p', None, None, None, None)\n"
    )
    assert "repeats 2" in [row.what for row in measured("good", repeats=2)]
    assert [row.what for row in measured("asks", quick=True)] == ["True"]


def test_a_json_file_that_cannot_be_written_is_said_before_any_work(benchmarks, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_rows", lambda *_: pytest.fail("work was begun"))
    for target, message in (
        (tmp_path, "json: .* is a folder"),
        ("", "empty name"),
        ("/proc/self/rows.json", "cannot be written"),
        (tmp_path / "none/rows.json", "no folder that exists"),
    ):
        with pytest.raises(InputError, match=message):
            measured(json=target)


def test_what_is_too_few_to_tell_counts_in_neither_and_what_has_no_target_is_said(capsys):
    from lineament.bench import Rate, decided
    from lineament.cli import console

    few = Rate("truth", "cue found where it is not", 0, 1, 0.0, 0.793, 0.05, True, None)
    missed = Rate("truth", "gap found", 0, 1, 0.0, 0.793, None, False, None)
    many = Rate("truth", "any warning", 0, 261, 0.0, 0.0145, 0.02, True, True)
    assert [decided(r.low, r.high, r.target, at_most=r.at_most) for r in (few, missed, many)] == [
        None,
        None,
        True,
    ]
    console.show_row(few)
    console.show_total([few, missed, many])
    said = capsys.readouterr().out
    assert "(target at most 5.0 %, too few to tell)" in said
    assert (
        "1 of 1 targets met; 1 with too few trials to tell; 1 without a target, of which 1 missed something; 3 rows."
        in said
    )


def test_help_says_what_there_is_to_run_and_what_audit_is(benchmarks, capsys):
    (benchmarks / "truth.py").write_text("")
    assert cli.main(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    assert "lineament bench audit --quick" in said and "SLUG: " in said and "truth" in said.split("SLUG: ")[1]
    assert "how often is the audit right" in said


TRIALS = """
from lineament.bench import Rate, Trial, earlier
def rows():
    for what in ("one", "two"):
        yield earlier("truth", what) or Trial("truth", what, "a cue", {"cue": 1.0}, {"cue": "warning"}, {"x": [1, 0, 2, 1.5]}, False, 0.1)
    yield Rate("truth", "cue found", 2, 2, 0.34, 1.0, 0.95, False, True)
"""


def test_trials_of_known_truth_and_rates_are_rows_too(benchmarks, tmp_path, capsys):
    (benchmarks / "truth.py").write_text(textwrap.dedent(TRIALS))
    target = tmp_path / "rows.json"
    assert cli.main(["bench", "truth", "--json", str(target)]) == 0
    said = capsys.readouterr().out
    assert (
        "one: cue (warning)" in said
        and "2 of 2, 100.0 % (34.0 % to 100.0 %) (target at least 95.0 %, met)" in said
    )
    stored = json.loads(target.read_text(encoding="utf-8"))
    assert [row["row"] for row in stored] == ["trial", "trial", "rate"]
    assert bench.row_of(stored[0]) == bench.Trial(
        "truth", "one", "a cue", {"cue": 1.0}, {"cue": "warning"}, {"x": [1, 0, 2, 1.5]}, False, 0.1
    )
    # An unfinished run goes on with the trials that are there.
    stored[0]["found"] = {"from before": "note"}
    target.write_text(json.dumps(stored[:1]), encoding="utf-8")
    request = {"slugs": ["truth"], "repeats": None, "quick": False}
    (tmp_path / ".rows.json.unfinished").write_text(json.dumps(request), encoding="utf-8")
    rows = measured("truth", json=target)
    assert [row.what for row in rows] == ["one", "two", "cue found"] and rows[0].found == {
        "from before": "note"
    }
