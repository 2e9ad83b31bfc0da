"""The recipe projection-head: every part on a small scale, and that its claims can fall."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lineament.core.checks import InputError
from lineament.recipes.projection_head import Config, run
from lineament.recipes.projection_head.claims import Found, claims_of
from lineament.recipes.projection_head.training import (
    KINDS,
    Groups,
    Pair,
    Probed,
    Read,
    Weights,
    linear_weights,
)

TINY = Config(linear_steps=50, kinds=("SL, MLP head", "SCL, fixed head"), epochs=1, drops=(0.5,), view_epochs=1, group_epochs=1, mlp_hidden=16, seeds=1)  # fmt: skip


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    outcome = run(TINY, out=tmp_path)
    assert len(outcome.claims) == 9 and len(outcome.tables) == 3 and len(outcome.figures) == 2
    assert outcome.to_dict() == run(TINY, out=tmp_path).to_dict()
    with pytest.raises(InputError, match="kinds: got 'SL'"):
        run(replace(TINY, kinds=("SL",)), out=tmp_path / "other")


def test_the_trained_linear_network_is_the_closed_form():
    found = linear_weights(5000)
    assert found.before == pytest.approx(found.before_theory, abs=0.01)
    assert found.after == pytest.approx(found.after_theory, abs=0.01)


def found(before, after, untrained, head, plain, best):
    """Numbers of two seeds each; ``best``: how much the kinds with a head gain."""
    kinds = {}
    for name in KINDS:
        if name.endswith("fixed head"):
            made = [
                Probed(
                    Read(0.9, before + best, 1),
                    Read(0.9 - plain, before + best, 1),
                    Read(0, 0, 1),
                    Read(0, 0, 1),
                )
            ] * 2
        else:
            gain = best if name.endswith("MLP head") else 0.0
            made = [
                Probed(
                    Read(0, before + gain, 1), Read(0, after, 1), Read(0, untrained, 1), Read(0, untrained, 1)
                )
            ] * 2
        kinds[name] = made
    drops = {0.0: [Pair(0.9, 0.8)] * 2, 1.0: [Pair(0.9, 0.9 - head)] * 2}
    right = [0.5, 0.25]
    weights = Weights([1, 2], right, [0.25, 0.0625], right, [0.25, 0.0625])
    if head < 0:
        weights = Weights([1, 2], [0.5, 0.3], [0.2, 0.0625], right, [0.25, 0.0625])
    return Found(weights, kinds, drops, [Groups(*[Pair(0.7, 0.7 - head)] * 3)] * 2)


def test_claims_rise_and_fall_with_the_numbers():
    claims = claims_of(found(0.9, 0.7, 0.8, 0.3, 0.1, 0.02))
    assert len(claims) == 16 and all(c.holds for c in claims), [c.name for c in claims if not c.holds]
    fallen = claims_of(found(0.7, 0.9, 0.8, -0.1, 0.0, -0.02))
    assert len(fallen) == 16 and not any(c.holds for c in fallen), [c.name for c in fallen if c.holds]
