"""The shortcut-learning recipe: every stage on a small scale, a killed run, and claims that judge planted numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lineament.core.checks import InputError
from lineament.measure.shortcuts.sweep import Trial
from lineament.recipes.shortcut_learning import Config, run
from lineament.recipes.shortcut_learning.claims import claims_of
from lineament.recipes.shortcut_learning.training import Found, KernelBias, setting

TINY = Config(
    shortcut=(0.85, 0.9), ratios=(1.0, 8.0), dims=8, samples=64, seeds=2, models=("linear", "relu x1", "relu x4"),
    epochs=2, short_epochs=1, kernel_samples=20, kernel_seeds=1, factors=(1.0, 4.0), footprint_size=25, footprint_samples=32,
    footprint_epochs=1, remedies=("adam", "sam", "useful"), remedy_seeds=1,
)  # fmt: skip


def test_every_stage_runs_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    from lineament.recipes import shortcut_learning as recipe

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "kernel_biases", killed)
        with pytest.raises(KeyboardInterrupt):
            run(TINY, out=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "sweep", killed)  # what is finished is not trained again
        outcome = run(TINY, out=tmp_path)
    assert len(outcome.claims) == 11 and len(outcome.figures) == 2
    titles = [table.title for table in outcome.tables]
    assert sum("Networks on vectors" in title for title in titles) == 3
    assert all((tmp_path / figure.file).exists() for figure in outcome.figures)
    (other,) = [t for t in outcome.tables if t.title.startswith("Other trainings")]
    assert [row[0].split(",")[0] for row in other.rows] == ["adam", "sam", "useful"]
    with pytest.raises(InputError, match="models: got 'relu'"):
        run(replace(TINY, models=("relu",)), out=tmp_path / "other")


def trial(name, bias):
    return Trial(name, 0, bias, 0.5, 0.5, 0.9, bias, 0.5, 0.5, 0.9, 0.3, -0.67, 0.907)


def found(**changes):
    """Numbers with which every claim holds."""
    cells = [(rho, ratio) for rho in TINY.shortcut for ratio in TINY.ratios]
    made = {
        "closed": {setting(*cell): [0.01, -0.02] for cell in cells},
        "trials": {
            "linear": [trial(setting(*cell), 0.01) for cell in cells],
            "relu x1": [trial(setting(rho, ratio), 0.1 * ratio) for rho, ratio in cells],
            "relu x4": [trial(setting(rho, ratio), 0.2 * ratio) for rho, ratio in cells],
        },
        "short": [trial(setting(rho, 8.0), 1.4) for rho in TINY.shortcut],
        "swapped": [trial(setting(rho, 8.0), -0.2) for rho in TINY.shortcut],
        "kernels": [KernelBias(k, r, setting(0.85, 8.0), b, 0.1) for k, b in (("linear", 0.2), ("relu_ntk", 0.4)) for r in (1e-2, 1.0)],
        "images": [trial("ρ_s 0.9, factor 1", 0.0), trial("ρ_s 0.9, factor 4", 0.7)],
        "remedies": [trial(f"{how}, at", b) for how, b in (("adam", 0.5), ("sam", 0.2), ("useful", 0.3))],
    }  # fmt: skip
    return Found(**{**made, **changes})


def test_all_claims_hold_on_the_papers_numbers():
    claims = claims_of(found(), TINY)
    assert len(claims) == 11 and all(claim.holds for claim in claims), [c.name for c in claims if not c.holds]


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        (
            {"closed": {setting(rho, ratio): [0.2] for rho in (0.85, 0.9) for ratio in (1.0, 8.0)}},
            "closed form",
        ),
        ({"images": [trial("ρ_s 0.9, factor 1", 0.2), trial("ρ_s 0.9, factor 4", 0.7)]}, "as large"),
        (
            {"images": [trial("ρ_s 0.9, factor 1", 0.0), trial("ρ_s 0.9, factor 4", 0.1)]},
            "prefers the larger",
        ),
        ({"short": [trial(setting(rho, 8.0), 0.2) for rho in (0.85, 0.9)]}, "Under-training"),
        ({"swapped": [trial(setting(rho, 8.0), 2.0) for rho in (0.85, 0.9)]}, "Amplifying the core"),
        (
            {
                "kernels": [
                    KernelBias(k, 0.01, setting(0.85, 8.0), b, 0.1)
                    for k, b in (("linear", 0.5), ("relu_ntk", 0.4))
                ]
            },
            "relative ridge",
        ),
        (
            {
                "remedies": [
                    trial(f"{how}, at", b) for how, b in (("adam", 0.1), ("sam", 0.2), ("useful", 0.0))
                ]
            },
            "Sharpness",
        ),
    ],
)
def test_each_predicate_can_fail(changes, fails):
    config = replace(TINY, ridges=(0.01,))
    failed = [claim for claim in claims_of(found(**changes), config) if not claim.holds]
    assert len(failed) == 1 and fails in failed[0].name and failed[0].reason
