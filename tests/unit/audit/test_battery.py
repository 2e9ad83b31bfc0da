"""How often the audit is right: the battery's quick part, and that its rates count what they say."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from lineament import bench
from lineament.bench import Rate, Trial


@pytest.fixture(scope="module")
def battery():
    path = bench.files()["audit"]
    spec = importlib.util.spec_from_file_location("audit_battery", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def trial(what: str, truth: dict[str, float], found: dict[str, str], numbers=None, chooses=False) -> Trial:
    return Trial("audit", what, "planted", truth, found, numbers or {}, chooses, 1.0)


def test_rates_count_what_was_found_where_it_is_and_where_it_is_not(battery):
    trials = [
        trial("a", {"place": 1.0}, {"place": "warning"}),
        trial("b", {"place": 0.7}, {"no place": "good"}),
        trial("c", {"place": 0.1}, {"place": "warning"}),
        trial("d", {"place": 0.0, "class behind": 0.0}, {"place": "warning"}),
        trial("e", {"place": 0.0}, {"place": "good"}, {"accuracy": (0.5, 0.4, 0.6, 0.61)}),
        trial("f", {"place": 0.0}, {"place": "warning"}, {"accuracy": (0.5, 0.4, 0.6, 0.6)}, chooses=True),
    ]
    rates = {rate.what: rate for rate in battery.rates(trials)}
    strong = rates["“place” found: planted, measured strength from 0.6"]
    assert (strong.hits, strong.count, strong.target, strong.met) == (1, 2, 0.95, False)
    assert rates["“place” found: planted, measured strength below 0.3"].target is None
    false = rates["“place” found where it is not (warning)"]
    assert (false.hits, false.count, false.target, false.at_most, false.met) == (1, 2, 0.02, True, False)
    assert false.note == "on the half that chose: 1 of 1"
    assert rates["“class behind” found where it is not (note)"].met is None, (
        "none of one network is too few to tell"
    )
    inside = rates["accuracy: the true value lies within the interval"]
    assert (inside.hits, inside.count) == (0, 1)


def test_at_least_120_networks_each_with_its_own_name_and_either_half_with_all_kinds(battery):
    cases = battery.cases()
    names = [case.what for case in cases]
    assert len(cases) >= 120 and len(set(names)) == len(names)
    halves = [{case.planted for case in cases[part::2]} for part in (0, 1)]
    assert halves[0] == halves[1]


@pytest.mark.slow
def test_the_quick_part_finds_what_is_there_and_nothing_else(battery, monkeypatch):
    monkeypatch.setattr(battery, "quick", lambda: True)
    rows = list(battery.rows())
    trials = [row for row in rows if isinstance(row, Trial)]
    assert len(trials) == 12
    for made in trials:
        missed = [name for name, strength in made.truth.items() if strength >= 0.6 and name not in made.found]
        false = [
            name
            for name, strength in made.truth.items()
            if strength == 0 and made.found.get(name) in ("warning", "note")
        ]
        assert not missed and not false, made
    assert [row for row in rows if isinstance(row, Rate)]
