"""Rows of their own for small vocabularies and frequent ids: nothing else is hashed to them, and a table says which they are."""

from __future__ import annotations

import pytest
import torch

from lineament import cli
from lineament.core.checks import InputError
from lineament.modules import UnifiedEmbedding


def table(**options) -> UnifiedEmbedding:
    made = UnifiedEmbedding(20, 4)
    made.add("user", **options)
    made.add("item", lookups=3)
    return made


def test_own_rows_are_read_by_one_value_each():
    made = table(collisionless_below=6, reserve=[1000, -3, 2])
    own = made.places_of("user", torch.tensor([0, 1, 2, 3, 4, 5, 1000, -3]))
    assert made.weight.shape == (20 + 16, 4) and own.min() >= 20 and len(own.unique()) == 16
    every = torch.arange(6, 900)
    assert made.places_of("user", every).max() < 20 and made.places_of("item", every).max() < 20
    # Values without rows of their own are where they were without them.
    plain = table()
    assert made.places_of("user", every).equal(plain.places_of("user", every))
    assert made.weight[:20].equal(plain.weight)


def test_bags_padding_and_strings_read_them_too():
    made = table(reserve=["anna", "ben"])
    rows = made.places_of("user", ["anna", "zoe", "ben"])
    assert (rows[[0, 2]] >= 20).all() and (rows[1] < 20).all()
    made = table(collisionless_below=3, padding=0)
    found = made({"user": torch.tensor([[1, 2], [0, 0]])})
    assert torch.allclose(found[0], made({"user": torch.tensor([1, 2])}).mean(0)) and (found[1] == 0).all()


def test_a_state_of_other_own_rows_is_refused():
    with pytest.raises(InputError, match="own rows"):
        table(collisionless_below=6).load_state_dict(table(reserve=range(100, 106)).state_dict())
    with pytest.raises(InputError, match="collisionless_below: got -1"):
        table(collisionless_below=-1)


def test_the_command_plans_a_table_from_columns(tmp_path, monkeypatch, capsys):
    import json

    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(300, (2000,), generator=generator)
    users[:700] = 1234
    lines = [f"u{u},{'ab'[k % 2]},{k / 7:.2f}," for k, u in enumerate(users.tolist())]
    (tmp_path / "clicks.csv").write_text(
        "user,side,seconds,note\n" + "\n".join([*lines[:-1], lines[-1] + "x"])
    )
    assert cli.main(["tables", "clicks.csv", "--json", "--budget", "0.01", "--chunk", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    user, side, note = told["columns"]
    assert told["left_out"] == ["seconds"] and (side["distinct"], note["count"]) == (2, 1)
    assert (
        user["distinct"] == len(users.unique()) and user["reserve"][0] == "u1234" and user["hottest"] == 0.35
    )
    assert told["plan"]["bytes"] <= 0.01 * 2**20 and told["plan"]["lookups"]["side"] == 1
    # n (n - 1) / 2 pairs of the users, over a quarter of all values' rows.
    n = user["distinct"]
    rows = round(0.25 * (n + 3))
    assert told["collisions"]["0.25"]["intra"] == pytest.approx((n * (n - 1) / 2 + 1) / rows)
    assert cli.main(["tables", "clicks.csv"]) == 0
    shown = capsys.readouterr()
    assert "u1234" in shown.out and "'seconds' holds fractions" in shown.err
    assert "--budget" not in shown.err
    assert cli.main(["tables", "clicks.csv", "--budget", "100"]) == 0
    told = capsys.readouterr().err
    assert "100 MiB are 1,638,400 rows, more than a row for each of" in told
    assert f"{(n + 3) * 64 / 2**20:.3g} MiB are enough for that" in told
    for line, said in (
        (["clicks.csv", "--columns", "usr"], "'usr' is not in the data"),
        (["clicks.csv", "--columns", "user,user"], "'user' is named twice"),
        (["clicks.csv", "--columns", ""], "expected some of 'user', 'side'"),
        (["none.csv"], "does not exist"),
        (["clicks.csv", "--columns", "seconds", "--chunk", "0"], "--chunk: got 0"),
        (["clicks.csv", "--budget", "-1"], "--budget: got -1"),
    ):
        assert cli.main(["tables", *line]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "holes.csv").write_text("film,side\n7,a\nNaN,b\n8,a\n")
    assert cli.main(["tables", "holes.csv", "--json"]) == 0
    film = json.loads(capsys.readouterr().out)["columns"][0]
    assert (film["name"], film["distinct"], film["empty"]) == ("film", 2, 1), "a missing number is no value"


def test_a_list_of_ids_is_a_bag_of_them(tmp_path, monkeypatch, capsys):
    import json

    monkeypatch.chdir(tmp_path)
    rows = [{"user": k, "tags": ["a", "b", "a"][: k % 4], "ages": [k / 2, 3]} for k in range(8)]
    rows.append({"user": 8, "tags": [None, " c "], "ages": None})
    rows.append({"user": 9, "tags": "[not a list", "ages": []})
    (tmp_path / "seen.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["tables", "seen.jsonl", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["left_out"] == ["ages"]
    user, tags = told["columns"]
    assert (user["count"], user["distinct"]) == (10, 10)
    # Twice of a; a, b; a, b, a; then c, and a text that only begins as a list; empty are two lists and a null.
    assert (tags["count"], tags["distinct"], tags["empty"]) == (14, 4, 3)
