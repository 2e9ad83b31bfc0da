"""Rows of activations and gradients: the same whatever batch, padding or order they come in, and the gradient that finite differences give."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from tests.contracts.unchanged import unchanged
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lineament.core.checks import InputError
from lineament.core.sites.hooks import replace
from lineament.dictionaries.harvest import Harvest, harvest
from lineament.dictionaries.sequences import Sequences

SITE = "transformer.h.1"


@pytest.fixture(scope="module")
def gpt() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3, n_embd=8, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    found = torch.randint(1, 50, (12, 9), generator=torch.Generator().manual_seed(1))
    found[:, 0] = 0
    return found


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 9, 3))
    return nn.Sequential(*layers).double().eval()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(10, 1, 5, 5, generator=generator).double(), torch.arange(10) % 3


@pytest.mark.parametrize("gradient", [None, "labels", "sampled", "max_logit"])
def test_rows_do_not_hang_on_their_batch_or_padding(gpt: Any, ids: Tensor, gradient: Any) -> None:
    whole = harvest(gpt, ids, site=SITE, gradient=gradient).rows_of(torch.arange(12))
    assert len(whole) == 12 * 8 and not (whole.tokens == 0).any()  # BOS is in the context, not in the rows
    one = harvest(gpt, ids, site=SITE, gradient=gradient).rows_of(torch.tensor([7]))
    seven = whole.take(whole.sequences == 7)
    assert torch.equal(seven.positions, one.positions) and torch.allclose(seven.x, one.x, atol=1e-12)
    for at in (slice(0, 9), slice(4, 13)):
        padded, mask = torch.full((12, 13), 3), torch.zeros(12, 13, dtype=torch.long)
        padded[:, at], mask[:, at] = ids, 1
        data = {"input_ids": padded, "attention_mask": mask}
        other = harvest(gpt, data, site=SITE, gradient=gradient).rows_of(torch.arange(12))
        assert torch.equal(other.tokens, whole.tokens) and torch.allclose(other.x, whole.x, atol=1e-10)
        if gradient is not None:
            assert torch.allclose(other.gradient, whole.gradient, atol=1e-10)
            assert torch.allclose(seven.gradient, one.gradient, atol=1e-10)


def test_the_gradient_is_that_of_finite_differences(gpt: Any, ids: Tensor) -> None:
    """Of the loss summed over all tokens."""
    row = harvest(gpt, ids, site=SITE, gradient="labels", exclude=None).rows_of(torch.tensor([4]))

    def loss(shift: float) -> Tensor:
        def moved(x: Tensor) -> Tensor:
            x = x.clone()
            x[0, 3, 2] += shift
            return x

        with torch.no_grad(), replace(gpt, {SITE: moved}):
            scores = gpt(ids[4:5]).logits[0, :-1]
        return nn.functional.cross_entropy(scores, ids[4, 1:], reduction="sum")

    assert torch.allclose(row.gradient[3, 2], (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-6)


def test_a_stream_goes_on_from_two_numbers(gpt: Any, ids: Tensor) -> None:
    def stream(**after: Any) -> Any:
        return harvest(gpt, ids, site=SITE, gradient="sampled", buffer=3000).batches(13, passes=None, **after)

    rows = [part for part, _ in zip(stream(), range(20))]
    assert {len(part) for part in rows} == {13} and rows[-1].after[0] > 5
    for part, then in pairwise(rows):
        again = next(stream(after=part.after))
        assert (
            torch.equal(again.x, then.x)
            and torch.equal(again.gradient, then.gradient)
            and again.after == then.after
        )


@pytest.mark.parametrize("buffer", ["1GB", 3000])
def test_a_pass_gives_every_row_once(gpt: Any, ids: Tensor, buffer: Any) -> None:
    parts = list(harvest(gpt, ids, site=SITE, buffer=buffer).batches(10))
    pairs = [pair for part in parts for pair in zip(part.sequences.tolist(), part.positions.tolist())]
    assert sorted(pairs) == [(i, j) for i in range(12) for j in range(1, 9)]
    assert pairs != sorted(pairs)


def test_processes_share_the_sequences(gpt: Any, ids: Tensor) -> None:
    seen = [Harvest(gpt, ids, site=SITE, share=(rank, 2)).batches(None) for rank in range(2)]
    sequences = [set(next(part).sequences.tolist()) for part in seen]
    assert not sequences[0] & sequences[1] and sequences[0] | sequences[1] == set(range(12))


@pytest.mark.parametrize("form", ["pair", "arrays", "data set", "loader", "batches", "samples"])
def test_every_form_of_data(net: nn.Module, images: Any, form: str) -> None:
    x, y = images
    data: Any = {
        "pair": lambda: (x, y),
        "arrays": lambda: (x.numpy(), y.numpy()),
        "data set": lambda: TensorDataset(x, y),
        "loader": lambda: DataLoader(TensorDataset(x, y), batch_size=3),
        "batches": lambda: [(x[:4], y[:4]), (x[4:], y[4:])],
        "samples": lambda: type("Samples", (), {"inputs": x, "targets": y})(),
    }[form]()
    found = list(harvest(net, data, site="0", gradient="labels").batches(1000))
    assert sum(map(len, found)) == 10 * 9 and found[0].x.shape[1] == 4  # a row a position of the map
    with torch.no_grad():
        expected = net[0](x)
    for row, sequence, position in zip(found[0].x, found[0].sequences.tolist(), found[0].positions.tolist()):
        assert torch.allclose(row, expected[sequence].flatten(1)[:, position])


def test_several_sites_and_heads(gpt: Any, ids: Tensor) -> None:
    found = harvest(gpt, ids, site=[SITE, "transformer.h.0.attn:z"], gradient="labels").rows_of(
        torch.arange(12)
    )
    for site in (SITE, "transformer.h.0.attn:z"):
        alone = harvest(gpt, ids, site=site, gradient="labels").rows_of(torch.arange(12))
        assert torch.equal(found.at(site).x, alone.x) and torch.allclose(
            found.at(site).gradient, alone.gradient, atol=1e-12
        )
        assert alone.x.shape == (96, 8)


def test_without_gradient_the_forward_ends_at_the_site(gpt: Any, ids: Tensor) -> None:
    def never(_: Tensor) -> None:
        raise AssertionError("a layer above the site ran")

    with replace(gpt, {"transformer.h.2": never}):
        assert len(harvest(gpt, ids, site=SITE).rows_of(torch.arange(3))) == 24


def test_the_model_is_left_as_it_was(gpt: Any, ids: Tensor) -> None:
    with unchanged(gpt):
        list(harvest(gpt, ids, site=SITE, gradient="labels").batches(10))
    with unchanged(gpt), pytest.raises(InputError, match="expected a scalar"):
        list(harvest(gpt, ids, site=SITE, gradient=lambda logits, batch: logits).batches(10))


def test_zero_rows_are_counted(gpt: Any, ids: Tensor) -> None:
    found = harvest(gpt, ids, site=SITE, gradient="labels")
    list(found)
    assert (found.rows, found.zero_rows) == (96, 12)  # nothing follows the last token


class TestRefused:
    def test_arguments(self, gpt: Any, ids: Tensor) -> None:
        for options, match in (
            ({"site": "transformer.h.7"}, r"transformer\.h\.[012]"),
            ({"site": SITE, "gradient": "label"}, "nearest: 'labels'"),
            ({"site": SITE, "gradient": "kl"}, "KL divergence to the clean output is at its minimum"),
            ({"site": SITE, "buffer": "much"}, "buffer: got 'much'"),
            ({"site": SITE, "exclude": "all"}, "exclude"),
        ):
            with pytest.raises(InputError, match=match):
                harvest(gpt, ids, **options)

    def test_data(self, net: nn.Module, images: Any) -> None:
        with pytest.raises(InputError, match="needs targets"):
            list(harvest(net, images[0], site="0", gradient="labels"))
        with pytest.raises(InputError, match="data: it is empty"):
            harvest(net, (images[0][:0], images[1][:0]), site="0")
        with pytest.raises(InputError, match="data: got"):
            harvest(net, iter([images]), site="0")
        bad = images[0].clone()
        bad[3] = torch.nan
        with pytest.raises(InputError, match="activations of 9 rows are NaN or infinite, in sequences 3;"):
            list(harvest(net, (bad, images[1]), site="0"))

    def test_a_site_of_integers(self) -> None:
        class Codes(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.long()

        with pytest.raises(InputError, match="expected floating-point"):
            list(harvest(nn.Sequential(Codes(), nn.Identity()), torch.ones(3, 2), site="0"))


def test_ids_of_several_lengths_are_padded() -> None:
    items: Any = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    batch = Sequences(nn.Embedding(9, 2), items).take(torch.arange(2))
    assert batch.ids is not None and batch.mask is not None and batch.labels is not None
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.labels.tolist() == [[2, 3, -1], [-1, -1, -1]]
