"""What every way to make an embedding table small keeps: one row a value, the same for the same value, gradients where it was read, any batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.modules import UnifiedEmbedding, multiplex
from lineament.modules.unified_embedding import baselines as b
from lineament.modules.unified_embedding.hashing import bucket, mix64

ROWS, IDS = 40, torch.tensor([3, 0, 7, 3, 2**40, -5, 19])
Scheme = Callable[[Tensor], Tensor]


class Own(nn.Module):
    """A scheme whose numbers are one tensor, and how it is read."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], *shape: int, seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(self.weight, ids)


def rows(ids: Tensor, count: int, most: int = ROWS) -> Tensor:
    return torch.stack([bucket(mix64(ids, salt), most) for salt in range(count)], 1)


def signs(ids: Tensor, count: int, like: Tensor) -> Tensor:
    return (2 * rows(ids, count, 2) - 1).to(like)


class Table(nn.Module):
    def __init__(self, seed: int = 0, name: str = "a", **options):
        super().__init__()
        added = {k: options.pop(k) for k in ("lookups", "reserve", "collisionless_below") if k in options}
        self.table = UnifiedEmbedding(ROWS, 4, seed=seed, **options)
        self.table.add("other")
        self.table.add(name, **added)
        self.name = name

    def forward(self, ids: Tensor) -> Tensor:
        return self.table({self.name: ids})


def view(seed: int) -> nn.Module:
    net = nn.ModuleDict({"a": nn.Embedding(100, 8), "b": nn.EmbeddingBag(50, 16)})
    multiplex(net, rows=ROWS, seed=seed)
    return net["a"]


SCHEMES: dict[str, Callable[[int], nn.Module]] = {
    "unified": lambda seed: Table(seed),
    "unified, sub-tables": lambda seed: Table(seed, tables=3, lookups=3),
    "unified, siphash": lambda seed: Table(seed, hash="siphash"),
    "unified, by order": lambda seed: Table(seed, salt="order", assign="order", tables=2),
    "unified, rows of their own": lambda seed: Table(seed, collisionless_below=5, reserve=[2**40, -5]),
    "view": view,
    "hashing trick": lambda seed: Own(lambda w, i: b.multi_hash(w, rows(i, 1)), ROWS, 4, seed=seed),
    "hashes, joined": lambda seed: Own(lambda w, i: b.multi_hash(w, rows(i, 2)), ROWS, 4, seed=seed),
    "hashes, summed": lambda seed: Own(lambda w, i: b.multi_hash(w, rows(i, 2), "sum"), ROWS, 4, seed=seed),
    "hashes, a table each": lambda seed: Own(
        lambda w, i: b.multi_hash(w, rows(i, 2), "mean"), 2, ROWS, 4, seed=seed
    ),
    "hashes, signed": lambda seed: Own(
        lambda w, i: b.multi_hash(w, rows(i, 2), "sum", signs(i, 2, w)), ROWS, 4, seed=seed
    ),
    "hash embeddings": lambda seed: Own(
        lambda w, i: b.hash_embeddings(w, rows(i, 2), torch.ones(len(i), 2).to(w)), ROWS, 4, seed=seed
    ),
    "quotient and remainder": lambda seed: Own(
        lambda w, i: b.quotient_remainder(w[0], w[1], i % 400), 2, ROWS, 4, seed=seed
    ),
    "robe": lambda seed: Own(lambda w, i: b.robe(w, rows(i, 2), 2), ROWS, seed=seed),
    "hashed net": lambda seed: Own(lambda w, i: b.hashed_net(w, rows(i, 4), signs(i, 4, w)), ROWS, seed=seed),
    "product quantised": lambda seed: Own(lambda w, i: b.product_quantised(w, rows(i, 2, 8)), 2, 8, 2, seed=seed),
    "mixed dimension": lambda seed: Own(lambda w, i: b.mixed_dimension(w[:, :2], rows(i, 1)[:, 0], w[:4, 2:]), ROWS, 4, seed=seed),
}  # fmt: skip
each = pytest.mark.parametrize("make", SCHEMES.values(), ids=SCHEMES)


@each
def test_a_value_has_one_row_whatever_stands_beside_it(make):
    net = make(0)
    found = net(IDS)
    assert found.ndim == 2 and len(found) == len(IDS) and found.isfinite().all()
    assert found[0].equal(found[3]), "the same value twice"
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))
    assert net(IDS[order]).equal(found[order])
    assert net(IDS[2:3]).equal(found[2:3]), "a batch of one"
    assert net(IDS[:0]).shape == (0, found.shape[1])
    strided = torch.stack([IDS, IDS + 1], 1)[:, 0]
    assert not strided.is_contiguous() and net(strided).equal(found)


@each
def test_the_same_seed_gives_the_same_and_precision_follows(make):
    found = make(3)(IDS)
    assert make(3)(IDS).equal(found) and not make(4)(IDS).equal(found)
    wide = make(3).double()(IDS)
    assert wide.dtype == torch.float64 and torch.allclose(wide.float(), found, atol=1e-5)
    assert make(3).bfloat16()(IDS).dtype == torch.bfloat16
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.allclose(make(3)(IDS), found, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@each
def test_gradients_reach_what_was_read_and_nothing_else(make):
    net = make(0)
    weight = next(net.parameters())
    once = net(IDS[2:3])
    once.square().sum().backward()
    touched = weight.grad.abs() > 0
    assert touched.any() and not touched.all()
    with torch.no_grad():
        weight[~touched] += 1.0
    moved = net(IDS[2:3])
    assert torch.allclose(moved, once, atol=1e-5)
    with torch.no_grad():
        weight[touched] += 1.0
    assert not torch.allclose(net(IDS[2:3]), once, atol=1e-3)


@each
def test_weights_travel_through_a_state_dict(make):
    net, other = make(0), make(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    other.load_state_dict(net.state_dict())
    assert other(IDS).equal(net(IDS))


class Keyed:
    """What torchrec's ``KeyedJaggedTensor`` shows: keys, values of key after key, and as many lengths of each key as there are samples."""

    def __init__(self, keys: list[str], values: Tensor, lengths: Tensor, weights: Tensor | None = None):
        self.held = keys, values, lengths, weights

    def keys(self) -> list[str]:
        return self.held[0]

    def values(self) -> Tensor:
        return self.held[1]

    def lengths(self) -> Tensor:
        return self.held[2]

    def weights_or_none(self) -> Tensor | None:
        return self.held[3]


class Jagged(Keyed):
    """What torchrec's ``JaggedTensor`` of one feature shows."""

    keys = None  # pyright: ignore


BAGS = [[3, 2**40], [], [7, 7, -5], [19]]
FLAT = torch.tensor([value for bag in BAGS for value in bag])
LENGTHS = torch.tensor([len(bag) for bag in BAGS])
OFFSETS = torch.tensor([0, 2, 2, 5])
FORMS: dict[str, Callable[[], object]] = {
    "input and offsets": lambda: (FLAT, OFFSETS),
    "no weights": lambda: (FLAT, OFFSETS, None),
    "weights of one": lambda: (FLAT, OFFSETS, torch.ones(len(FLAT))),
    "int32 offsets": lambda: (FLAT, OFFSETS.int()),
    "nested, jagged": lambda: torch.nested.nested_tensor([torch.tensor(b).long() for b in BAGS], layout=torch.jagged),
    "nested, narrowed": lambda: torch.nested.narrow(
        torch.tensor([[*b, 0, 0, 0, 0][:4] for b in BAGS]), 1, torch.zeros(4).long(), LENGTHS, torch.jagged
    ),
    "nested, strided": lambda: torch.nested.nested_tensor([torch.tensor(b).long() for b in BAGS]),
    "lists": lambda: BAGS,
    "one jagged": lambda: Jagged([], FLAT, LENGTHS),
    "padded": lambda: torch.tensor([[*b, 1, 1, 1][:3] for b in BAGS]),
}  # fmt: skip


def bagged(combiner: str, **options) -> UnifiedEmbedding:
    table = UnifiedEmbedding(ROWS, 4, tables=2, **options)
    table.add("tags", 3, combiner=combiner, padding=1)  # pyright: ignore
    table.add("user")
    return table


def by_hand(table: UnifiedEmbedding, weights: list[list[float]], combiner: str) -> Tensor:
    """Each bag's rows, weighed and added one by one."""
    found = []
    for bag, own in zip(BAGS, weights):
        total = torch.zeros(table.features["tags"].lookups * table.chunk)
        for value, w in zip(bag, own):
            total += w * table.weight[table.places_of("tags", torch.tensor([value]))[0]].flatten()
        size = {"sum": 1.0, "mean": sum(own), "sqrtn": sum(w * w for w in own) ** 0.5}[combiner]
        found.append(total / size if bag else total)
    return torch.stack(found)


@pytest.mark.parametrize("combiner", ["mean", "sum", "sqrtn"])
@pytest.mark.parametrize("form", FORMS)
def test_a_bag_is_the_same_in_whatever_form_it_comes(form, combiner):
    for sparse in (False, True):
        table = bagged(combiner, sparse=sparse)
        expected = by_hand(table, [[1.0] * len(bag) for bag in BAGS], combiner)
        found = table({"tags": FORMS[form]()})
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert (found[1] == 0).all(), "an empty bag"
        goal = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        (wanted,) = torch.autograd.grad((expected * goal).sum(), table.weight)
        (got,) = torch.autograd.grad((found * goal).sum(), table.weight)
        assert got.is_sparse == sparse
        torch.testing.assert_close(got.to_dense(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("combiner", ["mean", "sum", "sqrtn"])
def test_weights_of_samples_count_and_have_gradients(combiner):
    table = bagged(combiner)
    own = [[0.5, 2.0], [], [1.0, 0.25, 3.0], [0.75]]
    weights = torch.tensor([w for bag in own for w in bag], requires_grad=True)
    expected = by_hand(table, own, combiner)
    user = torch.tensor([5, 6, 7, 8])
    both = torch.cat([LENGTHS, torch.ones(4).long()])
    joined = torch.cat([weights, torch.ones(4)])
    for given in (
        {"tags": (FLAT, OFFSETS, weights), "user": user},
        {"tags": Jagged([], FLAT, LENGTHS, weights), "user": user},
        Keyed(["tags", "user"], torch.cat([FLAT, user]), both, joined),
    ):
        found = table(given)
        torch.testing.assert_close(found[:, :12], expected, rtol=1e-5, atol=1e-7)
        assert found[:, 12:].equal(table({"user": user}))
        (gradient,) = torch.autograd.grad(found[:, :12].square().sum(), weights)
        # With one id in a bag the mean is its row, whatever it weighs.
        assert gradient.isfinite().all() and (gradient[:2] != 0).all()
        assert (gradient[-1].abs() > 1e-9) == (combiner == "sum")


def test_keys_values_and_lengths_are_features_in_any_order():
    table = bagged("sum")
    user = torch.tensor([5, 6, 7, 8])
    expected = table({"tags": (FLAT, OFFSETS), "user": user})
    lengths = torch.cat([torch.ones(4).long(), LENGTHS])
    keyed = Keyed(["user", "tags"], torch.cat([user, FLAT]), lengths.int())
    assert table(keyed).equal(expected)
    assert table(keyed, as_dict=True)["user"].equal(table({"user": user}))
    # One id of each sample is looked up at once, and is the same.
    single = Keyed(["user", "tags"], torch.cat([user, user + 2]), torch.ones(8).long())
    assert torch.allclose(table(single), table({"tags": user + 2, "user": user}))


def test_lists_of_whole_numbers_are_ids_and_strings_are_hashed():
    table = bagged("sum")
    user = torch.tensor([5, 6, 7, 8])
    assert table({"user": user.tolist()}).equal(table({"user": user}))
    words = [["a", "b"], [], ["c"]]
    flat = table({"tags": (["a", "b", "c"], torch.tensor([0, 2, 2]))})
    assert table({"tags": words}).equal(flat) and not flat[0].equal(flat[2]) and (flat[1] == 0).all()
    assert not table({"user": ["5"]}).equal(table({"user": [5]}))
    assert table({"tags": [[3, 1], [1]]}).equal(table({"tags": torch.tensor([[3, 1], [1, 1]])})), "padding"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.tensor([1]), r"inputs: got an int64 tensor of shape \(1,\), expected {feature: ids}, or keys"),
        (Keyed(["user", "user"], FLAT, torch.ones(6).long()), "a key comes twice"),
        (Keyed(["user", "tags"], FLAT, torch.ones(5).long()), "got 5 lengths for 2 keys"),
        (Keyed(["user", "tags"], FLAT, torch.ones(8).long()), "lengths of the keys make 8 ids, and there are 6"),
        (Keyed(["user"], FLAT, torch.tensor([7, -1])), "a length of the keys is below 0"),
        ({"tags": Jagged([], FLAT, torch.ones(2))}, "got a float32 tensor of shape .* as lengths of 'tags'"),
        ({"tags": (FLAT, OFFSETS, torch.ones(2))}, "as weights of 'tags', expected a float for each"),
        ({"tags": (FLAT, OFFSETS, torch.ones(6).long())}, "got an int64 tensor .* as weights of 'tags'"),
        ({"tags": (FLAT, None, torch.ones(6))}, "without offsets"),
        ({"tags": (FLAT.view(2, 3), OFFSETS)}, r"ids \[batch, values\] and offsets"),
        ({"tags": (FLAT, torch.tensor([], dtype=torch.int64))}, "6 ids and no offset"),
        ({"tags": (FLAT, OFFSETS, None, None)}, "expected ids"),
        ({"tags": torch.nested.nested_tensor([torch.rand(2)], layout=torch.jagged)}, "expected whole ids"),
        ({"tags": torch.nested.nested_tensor([torch.zeros(2, 1).long()])}, "nested tensor of 3 dimensions"),
        ({"tags": [2**64]}, "got the id 18446744073709551616, expected int64; pass it as a string"),
        ({"tags": FLAT.to("meta")}, "got ids on meta, and the table's rows are on cpu"),
    ],
)  # fmt: skip
def test_what_is_no_bag_is_told_in_one_line(given, told):
    with pytest.raises(InputError, match=told):
        bagged("mean")(given)
