"""The recipe unified-embedding at full scale, on generated files in the publishers' form: DCN-V2 by hand, splits, budgets, and claims that fall."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lineament.core.checks import InputError
from lineament.data.samples import Samples
from lineament.recipes.unified_embedding import Config, run
from lineament.recipes.unified_embedding.full_scale import (
    DCN,
    SETTINGS,
    Cross,
    Looks,
    claims_of,
    parts_of,
)
from lineament.recipes.unified_embedding.training import Score


def test_cross_layers_and_tables_are_what_they_say():
    layer = Cross(3).requires_grad_(False)
    x, first = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 0.0, -1.0]])
    by_hand = first * (x @ layer.linear.weight.T + layer.linear.bias) + x
    assert torch.allclose(layer(x, first), by_hand)
    sizes, setting = [4, 100, 60], SETTINGS["criteo"]
    counts = {}
    for scheme in ("collisionless", "separate", "unified"):
        net = DCN(scheme, sizes, 16, setting, dense=13)
        counts[scheme] = sum(table.weight.shape[0] for table in net.tables)  # pyright: ignore
        ids = torch.tensor([[3, 99, 59], [0, 0, 0]], dtype=torch.int32)
        assert net(ids, torch.ones(2, 13)).shape == (2,)
        assert net.cross[0].linear.in_features == 3 * 39 + 13 and len(net.cross) == 2  # pyright: ignore
    # One unused row of what is empty: the collisionless table, and the small feature's table of its own.
    assert counts == {"collisionless": 164 + 1, "separate": 16 + 4 + 1, "unified": 16 + 4}


def test_parts_do_not_overlap_and_criteos_last_day_is_held_out():
    for name, sizes in (("movielens-1m", (56, 7, 7)), ("avazu", (63, 0, 7)), ("criteo", (60, 5, 5))):
        parts = parts_of(name, 70)
        assert tuple(map(len, parts)) == sizes and torch.cat(parts).unique().numel() == 70
    assert parts_of("criteo", 70)[0].max() == 59


def test_passes_follow_one_another_without_a_break_and_each_look_ends_at_its_step():
    data = Samples(torch.zeros(40, 2), torch.arange(40) % 2)
    parts = (torch.arange(30), torch.arange(30, 35), torch.arange(35, 40))
    looks, walked = Looks(data, parts, 25, 4, seed=0), []
    for epoch in range(len(looks.ends) - 1):
        told = SimpleNamespace(epoch=epoch, rows=None, shuffle=True)
        looks.on_epoch(told)  # pyright: ignore[reportArgumentType]
        assert not told.shuffle and len(told.rows) == 4 * (looks.ends[epoch + 1] - looks.ends[epoch])  # pyright: ignore
        walked += told.rows.tolist()  # pyright: ignore
    assert len(walked) == 100 and looks.ends[-1] == 25
    assert all(sorted(walked[k : k + 30]) == list(range(30)) for k in (0, 30, 60)) and walked[:30] != walked[30:60]  # fmt: skip


@pytest.mark.parametrize("name", list(SETTINGS))
def test_it_runs_on_the_publishers_files(tmp_path, name):
    draw = random.Random(0)
    values = [[f"{draw.randrange(20 + k):x}" for k in range(26)] for _ in range(300)]
    if name == "criteo":
        rows = ["\t".join([str(draw.randrange(2)), *["3"] * 13, *each]) for each in values]
        (tmp_path / "train.txt").write_text("\n".join(rows))
    elif name == "avazu":
        from lineament.data.click_logs import AVAZU

        rows = [",".join(["1", str(draw.randrange(2)), "14102107", *each[:21]]) for each in values]
        (tmp_path / "train.csv").write_text("\n".join([",".join(["id", "click", *AVAZU]), *rows]))
    else:
        (tmp_path / "users.dat").write_text("".join(f"{k}::F::25::{k % 12}::{k}\n" for k in range(15)))
        (tmp_path / "movies.dat").write_text("".join(f"{k}::Film::Drama\n" for k in range(20)))
        rows = [f"{draw.randrange(15)}::{draw.randrange(20)}::{draw.randint(1, 5)}::{k}" for k in range(300)]
        (tmp_path / "ratings.dat").write_text("\n".join(rows))
    config = replace(
        Config.preset("paper"), data=name, data_folder=str(tmp_path), seeds=2, steps=3, fractions=(0.5,)
    )  # pyright: ignore
    outcome = run(config, out=tmp_path / "out")
    assert [row[0] for row in outcome.tables[0].rows] == ["collisionless", "separate", "unified"]
    assert len(outcome.claims) == 1 and "Welch's t-test p = " in outcome.claims[0].observed
    assert outcome.to_dict() == run(config, out=tmp_path / "out").to_dict()


def test_missing_data_and_unknown_schemes_are_refused(tmp_path):
    config = replace(Config.preset("paper"), data_folder=str(tmp_path))  # pyright: ignore
    with pytest.raises(InputError, match=r"expected ml-1m's users\.dat"):
        run(config, out=tmp_path)
    with pytest.raises(InputError, match="schemes: got 'unified 2x8'"):
        run(replace(config, schemes=("unified 2x8",)), out=tmp_path)


def test_claims_need_both_tests():
    def claims(ours, theirs):
        made = {
            ("unified", 0.1): [Score(v, 0) for v in ours],
            ("separate", 0.1): [Score(v, 0) for v in theirs],
        }
        return claims_of(made, SETTINGS["criteo"])

    clear = claims([0.80, 0.801, 0.802], [0.79, 0.7905, 0.792])[0]
    assert clear.holds and clear.paper == "0.8049 against 0.7944"
    # Seeds move both alike: the pairs differ surely, the two groups do not.
    pairs_only = claims([0.71, 0.81, 0.911], [0.70, 0.80, 0.90])[0]
    assert not pairs_only.holds and "not resolved" in pairs_only.reason
    assert claims([0.7, 0.701], [0.8, 0.802])[0].reason == "it is lower"
