"""The older schemes as modules: budgets, splits, and what each equals."""

from __future__ import annotations

import pytest
import torch

from lineament.core.checks import InputError
from lineament.modules import CompressedEmbedding, UnifiedEmbedding, split_rows
from lineament.modules.unified_embedding.compressed import SCHEMES

VALUES = {"user": 900, "film": 95, "age": 5}
IDS = {"user": torch.arange(0, 900, 9), "film": torch.arange(100) % 95, "age": torch.arange(100) % 5}


@pytest.mark.parametrize(
    "split", ["proportional", "equal", {"age": 20, "user": 300, "film": 80}, [300, 80, 20]]
)
def test_all_rows_are_given_out(split):
    found = split_rows(VALUES, 400, split)
    assert list(found) == list(VALUES) and sum(found.values()) == 400 and min(found.values()) >= 1
    if split == "proportional":
        assert all(abs(found[n] - 1 - 397 * VALUES[n] / 1000) < 1 for n in VALUES)
    elif split == "equal":
        assert max(found.values()) - min(found.values()) <= 1
    else:
        assert found == {"user": 300, "film": 80, "age": 20}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_keeps_its_budget_and_learns(scheme, shared):
    rows = None if scheme == "collisionless" else 200
    # Quotients and remainders need about two roots of a vocabulary, which a small one does not get in proportion.
    options = {"scheme": scheme, "shared": shared, "split": "equal" if scheme == "quotient-remainder" else "proportional"}  # fmt: skip
    layer = CompressedEmbedding(VALUES, rows, 8, **options)
    count = sum(p.numel() for p in layer.parameters())
    beside = 1000 * 2 if scheme == "hash-embeddings" else 0
    least = {"mixed-dimension": 0.5, "quotient-remainder": 0.9}.get(scheme, 1.0)
    budget = 8 * (1000 if rows is None else rows)
    assert least * budget <= count - beside <= budget
    # Each value can take a number of its own only as far as the scheme tells values apart; all of them lower the error.
    goal = torch.randn(100, 24, generator=torch.Generator().manual_seed(0))
    optimizer, errors = torch.optim.Adam(layer.parameters(), 0.02), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(IDS) - goal).square().mean()
        loss.backward()
        optimizer.step()
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.98 * errors[0]
    again = CompressedEmbedding(VALUES, rows, 8, **options)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(IDS), layer(IDS))


def test_a_shared_store_of_one_row_a_value_is_the_unified_table():
    layer = CompressedEmbedding(VALUES, 50, 8, scheme="hash", shared=True, seed=3)
    table = UnifiedEmbedding(50, 8, seed=3)
    for name in VALUES:
        table.add(name, 1)
    table.load_state_dict(table.state_dict() | {"weight": layer.stores[0]["table"].detach()})
    assert torch.equal(layer(IDS), table(IDS))


def test_robe_of_single_numbers_is_hashed_net_without_signs():
    nets = [
        CompressedEmbedding(VALUES, 50, 8, scheme=s, shared=True, lookups=8) for s in ("robe", "hashed-net")
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[0](IDS).abs(), nets[1](IDS).abs()) and not torch.equal(nets[0](IDS), nets[1](IDS))


def test_what_is_numbered_is_told_apart_and_what_is_hashed_takes_any_id():
    for scheme, rows in (("collisionless", None), ("quotient-remainder", 200)):
        for shared in (False, True):
            layer = CompressedEmbedding(VALUES, rows, 8, scheme=scheme, shared=shared, split="equal")
            assert len(layer.embedded("user", torch.arange(900)).unique(dim=0)) == 900
            with pytest.raises(InputError, match="'age' reach from 0 to 5, expected 0 to 4"):
                layer(IDS | {"age": torch.arange(100) % 6})
    layer = CompressedEmbedding(VALUES, 30, 8)
    assert layer.embedded("age", torch.tensor([-(2**62), 2**62, 7])).shape == (3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "hsh"}, "scheme: got 'hsh', which is not a choice; nearest: 'hash'"),
        ({"rows": 2}, "rows: got 2"),
        ({"rows": None}, "rows: got None, expected how many hash has"),
        ({"scheme": "collisionless"}, "rows: got 200, expected None"),
        ({"scheme": "robe", "lookups": 3}, "lookups: got 3, expected a divisor of the width 8"),
        ({"scheme": "quotient-remainder", "rows": 20}, "too few for quotients and remainders"),
        ({"scheme": "mixed-dimension", "rows": 20}, "leave no number for each"),
        ({"split": {"user": 200}}, "split: got rows of 1 features"),
        ({"split": [100, 50, 10]}, "split: its rows make 160, expected 200"),
        ({"split": "even"}, "split: got 'even'"),
    ],
)  # fmt: skip
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        CompressedEmbedding(VALUES, **({"rows": 200, "width": 8} | options))
    layer = CompressedEmbedding(VALUES, 200, 8)
    with pytest.raises(InputError, match="'age' is missing"):
        layer({"user": IDS["user"], "film": IDS["film"]})
    with pytest.raises(InputError, match="expected whole ids"):
        layer(IDS | {"age": torch.rand(100)})
    with pytest.raises(InputError, match=r"no feature 'ages'.*nearest: 'age'"):
        layer(IDS | {"ages": IDS["age"]})
