"""The memory's oracles: similarity, reads, consolidation, what is forgotten."""

import pytest
import torch

from lineament.core.checks import InputError
from lineament.modules.colormnet.memory import (
    Memory,
    MemoryOptions,
    Store,
    _memory_side,
    _query_side,
    joined,
    read_all,
    similarity,
    top_weights,
    usage_of,
    weighted_rows,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def parts():
    """key, shrinkage, query, selection, value of 12 elements and 5 queries."""
    return (
        random(4, 12),
        random(1, 12, seed=1) ** 2 + 1,
        random(4, 5, seed=2),
        random(4, 5, seed=3).sigmoid(),
        random(3, 12, seed=4),
    )


def frame(seed: int, h: int = 2, w: int = 3, *, value: float | None = None) -> list[torch.Tensor]:
    key, shrinkage, selection = (
        random(1, 4, h, w, seed=seed),
        random(1, 1, h, w, seed=seed + 1) ** 2 + 1,
        random(1, 4, h, w, seed=seed + 2).sigmoid(),
    )
    content = (
        random(1, 2, 3, h, w, seed=seed + 3)
        if value is None
        else torch.full((1, 2, 3, h, w), value, dtype=torch.float64)
    )
    return [key, shrinkage, selection, content]


def test_similarity_is_the_weighted_distance(parts):
    k, s, q, e, _ = parts
    explicit = -(e[:, None] * (k[:, :, None] - q[:, None]).square()).sum(0) * s.T / 2
    torch.testing.assert_close(similarity(k, s, q, e), explicit)
    plain = similarity(k, torch.ones_like(s), q, torch.ones_like(e))
    torch.testing.assert_close(plain, -torch.cdist(k.T, q.T).square() / 2)


def test_all_elements_are_the_full_softmax_in_any_order(parts):
    k, s, q, e, v = parts
    full = read_all(k, s, q, e, v)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(read_all(k[:, order], s[:, order], q, e, v[:, order]), full)
    twice = [torch.cat([x, x], 1) for x in (k, s, v)]
    torch.testing.assert_close(read_all(twice[0], twice[1], q, e, twice[2]), full)
    found = top_weights(_memory_side(k, s), _query_side(q, e), 12)
    torch.testing.assert_close(found.weight.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(weighted_rows([v.T.contiguous()], found).T, full)
    torch.testing.assert_close(usage_of(found, 12).sum(), torch.tensor(5.0, dtype=torch.float64))


def test_chunked_queries_are_whole_ones(parts, monkeypatch):
    k, s, q, e, _ = parts
    whole = top_weights(_memory_side(k, s), _query_side(q, e), 3)
    monkeypatch.setattr("lineament.modules.colormnet.memory._CHUNK", 24)
    chunked = top_weights(_memory_side(k, s), _query_side(q, e), 3)
    for a, b in zip(whole, chunked):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_far_memories_are_no_nan(dtype):
    memory = Memory()
    key, one = torch.full((1, 4, 1, 2), 30.0, dtype=dtype), torch.ones(1, 4, 1, 2, dtype=dtype)
    memory.add(key, one[:, :1], one, torch.ones(1, 2, 3, 1, 2, dtype=dtype))
    assert torch.equal(memory.read(-key, one), torch.ones(1, 2, 3, 1, 2, dtype=dtype))


def test_a_sharp_memory_of_the_query_itself_returns_its_values():
    memory = Memory(MemoryOptions(top_k=1))
    key, _, selection, value = frame(0)
    memory.add(key, torch.full_like(key[:, :1], 1e6), selection + 1, value)
    torch.testing.assert_close(memory.read(key, selection + 1), value)
    assert abs(float(memory.confidence) - 1) < 1e-6


def test_working_memory_swings_between_its_bounds_and_keeps_the_first_frame():
    memory = Memory(MemoryOptions(top_k=4, max_frames=6, min_frames=3, prototypes=5, max_long=17))
    first = frame(0)
    sizes = []
    for t in range(60):
        memory.add(*(first if t == 0 else frame(7 * t)))
        memory.read(frame(7 * t + 5)[0], first[2])
        sizes.append(memory.sizes)
    frames = [working // 6 for working, _ in sizes]
    assert frames[:8] == [1, 2, 3, 4, 5, 3, 4, 5] and max(frames) == 5 and min(frames[6:]) == 3
    assert max(long for _, long in sizes) <= 17 and sizes[5][1] == 5 and sizes[-1][1] >= 12
    assert torch.equal(joined([memory.working], "key")[:6], first[0][0].flatten(1).T)


def test_nothing_is_pruned_at_the_very_limit():
    memory = Memory(MemoryOptions(top_k=2, max_frames=3, min_frames=1, prototypes=4, max_long=8))
    longs = []
    for t in range(6):
        memory.add(*frame(5 * t))
        memory.read(frame(5 * t + 3)[0], frame(1)[2])
        longs.append(memory.sizes[1])
    # 4 elements are exactly max_long - prototypes when the next four come.
    assert longs == [0, 0, 4, 4, 8, 8]


def test_a_prototype_whose_affinity_is_one_hot_keeps_its_value():
    memory = Memory(MemoryOptions(max_frames=3, min_frames=1, prototypes=2))
    for t in range(3):
        key, shrinkage, selection, value = frame(9 * t)
        memory.add(key, shrinkage * 1e6, selection, value)
        if t == 1:
            kept = {
                tuple(k.tolist()): v for k, v in zip(key[0].flatten(1).T, value[0].flatten(0, 1).flatten(1).T)
            }
        if t < 2:
            memory.read(key, selection)
    for key, value in zip(*(joined([memory.long], name) for name in ("key", "value"))):
        if tuple(key.tolist()) in kept:
            torch.testing.assert_close(value, kept[tuple(key.tolist())])


def test_permanent_elements_never_leave():
    memory = Memory(MemoryOptions(max_frames=3, min_frames=1, prototypes=2, max_long=4))
    memory.add(*frame(0, value=9.0), permanent=True)
    for t in range(1, 20):
        memory.add(*frame(4 * t, value=0.0))
        memory.read(*(frame(4 * t)[i] for i in (0, 2)))
    memory.clear_working()
    memory.long = Store()
    torch.testing.assert_close(memory.read(frame(2)[0], frame(2)[2]), frame(0, value=9.0)[3])


def test_without_counts_the_oldest_go():
    memory = Memory(MemoryOptions(max_frames=2, min_frames=1, prototypes=2, max_long=4, count_long=False))
    for t in range(8):
        memory.add(*frame(4 * t))
        memory.read(frame(4 * t + 1)[0], frame(0)[2])
    assert memory.sizes[1] == 4 and not joined([memory.long], "use").any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_frames": 10}, "min_frames: got 10, expected fewer than max_frames = 10"),
        ({"prototypes": 20, "max_long": 10}, "max_long: got 10, expected at least prototypes = 20"),
        ({"top_k": 0}, "top_k: got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        MemoryOptions(**options)


def test_an_empty_memory_says_so():
    with pytest.raises(InputError, match="is empty"):
        Memory().read(*(frame(0)[i] for i in (0, 2)))
