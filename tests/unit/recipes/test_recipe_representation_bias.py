"""The representation-bias recipe: every condition on a small scale, a killed run, and claims that judge planted numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes import representation_bias as recipe
from lineament.recipes.representation_bias import Config, run
from lineament.recipes.representation_bias.claims import claims_of
from lineament.recipes.representation_bias.training import CONDITIONS, Fresh, Measured

TINY = Config(
    block=4,
    noise=0,
    conditions=tuple(CONDITIONS),
    widths=(8, 8),
    steps=3,
    batch_size=8,
    seeds=2,
    samples=64,
    patterns=12,
)


def test_every_condition_runs_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    real = recipe.condition

    def killed(config, name):
        if name == "two hard":
            raise KeyboardInterrupt
        return real(config, name)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "condition", killed)
        with pytest.raises(KeyboardInterrupt):
            run(TINY, out=tmp_path)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "condition", lambda config, name: (seen.append(name), real(config, name))[1])
        outcome = run(TINY, out=tmp_path)
    assert seen[0] == "two hard" and len(seen) == len(CONDITIONS) - 5
    assert len(outcome.claims) == 16 and len(outcome.tables[0].rows) == 2 * len(CONDITIONS)
    assert (tmp_path / "variance.svg").exists()
    with pytest.raises(InputError, match="conditions: got 'easy'"):
        run(replace(TINY, conditions=("easy",)), out=tmp_path / "other")


def test_targets_that_a_condition_leaves_out_are_not_given():
    config = replace(TINY, steps=200, batch_size=4)
    first = Fresh(config, CONDITIONS["parity-4 first"])
    early, late = (torch.cat([y for _, y in first], 1) for _ in range(2))
    assert (early[..., 0] == -1).all() and (early[..., 1] >= 0).all() and (late >= 0).all()
    alone = torch.cat([y for _, y in Fresh(config, CONDITIONS["parity-4, easy alone"])], 1)
    assert (alone[..., 1] == -1).all() and (alone[..., 0] >= 0).all()
    rare = torch.cat([y for _, y in Fresh(config, CONDITIONS["frequent and rare"])], 1)
    assert 0.05 < float((rare[..., 1] >= 0).double().mean()) < 0.15


def network(r2, *, accuracy=1.0, reliance=0.95, components=(2, 9), shuffled=0.0, patterns=None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(12, 6, generator=draw) if patterns is None else patterns
    return Measured(
        seed,
        ("linear", "parity4"),
        (accuracy, accuracy),
        r2,
        (0.5, 0.2),
        (1.0, 1.0),
        components,
        reliance,
        shuffled,
        patterns,
    )


def found(**changes):
    """Numbers with which every claim holds; each condition has three networks."""
    base, other = (torch.randn(12, 6, generator=torch.Generator().manual_seed(k)) for k in (10, 11))
    near = base + 0.01 * other

    def three(first, second, **options):
        return [network((first + 0.01 * k, second), seed=k, **options) for k in range(3)]

    made = {
        "easy and parity-4": three(0.6, 0.2, patterns=base), "easy and xor": [network((0.5 + d, 0.5)) for d in (-0.1, 0.0, 0.1)],
        "two easy": [network((0.5 + d, 0.5)) for d in (-0.1, 0.0, 0.1)], "parity-4 first": three(0.4, 0.3),
        "frequent and rare": three(0.5, 0.1), "parity-4, easy alone": three(0.8, 0.0, patterns=near),
        "parity-4, hard alone": three(0.0, 0.7, patterns=other), "untrained": three(0.1, 0.0),
    }  # fmt: skip
    return {**made, **changes}


def test_all_claims_hold_on_the_papers_numbers():
    claims = claims_of(found())
    assert len(claims) == 10 and all(c.holds for c in claims), [c.name for c in claims if not c.holds]


@pytest.mark.parametrize(
    ("name", "networks", "fails"),
    [
        ("easy and xor", [network((0.7 + d, 0.5)) for d in (0, 0.01, 0.02)], "xor: no gap"),
        ("two easy", [network((0.7 + d, 0.5)) for d in (0, 0.01, 0.02)], "two easy: no gap"),
        ("parity-4 first", [network((0.3, 0.3))] * 3, "Learning parity-4 first"),
        ("frequent and rare", [network((0.3 + d, 0.3)) for d in (-0.1, 0.1)], "given ten times as often"),
        ("untrained", [network((0.1, 0.0), shuffled=0.2)], "shuffled"),
    ],
)
def test_each_predicate_can_fail(name, networks, fails):
    failed = [claim for claim in claims_of(found(**{name: networks})) if not claim.holds]
    assert len(failed) == 1 and fails in failed[0].name and failed[0].reason
