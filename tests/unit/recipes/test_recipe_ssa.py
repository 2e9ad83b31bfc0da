"""The recipe ssa: every part on a small scale, and that its claims can fall."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes.ssa import Config, run
from lineament.recipes.ssa.claims import Found, claims_of
from lineament.recipes.ssa.network import ByteModel
from lineament.recipes.ssa.training import MODELS, Measured, Sharpened, Trained, flops, sparsely

TINY = Config(
    letters=20_000, width=32, mlp=32, models=tuple(MODELS), length=64, batch_size=2, steps=4, windows=2, budgets=(2, 4, 8),
    controls=True,
)  # fmt: skip


@pytest.mark.slow
def test_every_part_runs_and_goes_on(tmp_path):
    outcome = run(TINY, out=tmp_path)
    assert len(outcome.claims) == 16 and len(outcome.tables) == 3 and len(outcome.figures) == 4
    assert outcome.to_dict() == run(TINY, out=tmp_path).to_dict()
    theorem = next(c for c in outcome.claims if c.name.startswith("Theorem 1"))
    assert theorem.holds and theorem.observed.startswith("0 of")
    with pytest.raises(InputError, match="models: got 'SAA'"):
        run(replace(TINY, models=("SAA",)), out=tmp_path / "other")
    with pytest.raises(InputError, match="expected blocks=4 among them"):
        run(replace(TINY, budgets=(2, 8)), out=tmp_path / "other")


def test_training_passes_on_what_the_coin_says_and_all_blocks_are_full_attention():
    config = replace(TINY, blocks=2)
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    model = ByteModel(config, p_full=1.0, alpha=0.0, seed=0).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)
        full, aligned = model(ids), ByteModel(config, p_full=1.0, alpha=10.0, seed=0).double()
        aligned.load_state_dict(model.state_dict())
        torch.testing.assert_close(aligned(ids), full)
        assert aligned.alignment > 0 and model.alignment == 0
        model.p_full = 0.0
        sparse = model(ids)
        assert (sparse - full).abs().max() > 1e-3
        torch.testing.assert_close(model.eval()(ids), full)
        torch.testing.assert_close(model(ids, sparsely(config, 2)), sparse)
        torch.testing.assert_close(model(ids, sparsely(config, 5)), full)
    assert flops(TINY, full=True, sparse=True) > flops(TINY, full=True, sparse=False)


def test_claims_stand_and_fall_with_the_numbers():
    base = Measured(1.35, {2: 1.41, 4: 1.37, 8: 1.36}, 0.74, 2.3, 0.002, 0.02, 0, 10, [1.0], [(0.0, 1.0)], 1.36, 1.4,
                    {"last": 1.5, "random": 1.6, "oracle": 1.36, "exact": 1.36, "released": 1.37})  # fmt: skip
    ours = replace(
        base,
        full=1.34,
        sparse={2: 1.345, 4: 1.341, 8: 1.341},
        kept=0.93,
        first=0.001,
        long_full=1.35,
        chosen=base.chosen | {"oracle": 1.34},
    )
    good = {
        "FullAttn": base,
        "MoBA": replace(base, kept=0.72, sparse={2: 1.44, 4: 1.4, 8: 1.4}),
        "SSA": ours,
        "SSA, coin alone": replace(base, kept=0.78),
        "FullAttn, SSA's FLOPs": base,
    }
    parts = [Trained({}, [3e-3] * 9 + [1e-4])]

    def claims(measured: dict[str, Measured], alignment: list[Trained], sharp: float) -> list[bool]:
        found = Found({"SSA": alignment}, {n: [m] for n, m in measured.items()}, [Sharpened(3.0, 0.93, sharp, {})])  # fmt: skip
        return [claim.holds for claim in claims_of(found, TINY)]

    assert all(claims(good, parts, 1.4))
    bad = replace(base, kept=0.76, first=0.01, full=1.4, sparse={2: 1.6, 4: 1.5, 8: 1.51}, violations=1, long_full=1.5,
                  chosen={"last": 1.3, "random": 1.3, "oracle": 1.6, "exact": 1.4, "released": 1.3})  # fmt: skip
    worse = {n: bad if n == "SSA" else m for n, m in good.items()}
    worse |= {"MoBA": replace(base, kept=0.8), "FullAttn": replace(base, chosen=bad.chosen)}
    assert not any(claims(worse, [Trained({}, [3e-3] * 10)], 1.3))
