"""What every backend of sparse attention keeps: the numbers and gradients of a dense mask, for all shapes, paddings and documents."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lineament.core.checks import InputError
from lineament.modules import attend, attend_both, full_attention, select
from lineament.modules.sparse_attention.backends import block_major, flex, gather
from lineament.modules.sparse_attention.selection import Selection

BACKENDS = ("dense", "gather", "block_major")
# batch, key heads, group, queries, keys, size; block size, blocks.
SHAPES = {
    "one head a group": (2, 3, 1, 37, 37, 4, 5, 3),
    "four": (1, 2, 4, 33, 33, 8, 8, 2),
    "seven": (2, 1, 7, 21, 21, 4, 4, 3),
    "twelve": (1, 1, 12, 19, 19, 4, 4, 2),
    "blocks of one": (1, 2, 2, 13, 13, 4, 1, 4),
    "more blocks than there are": (1, 2, 2, 13, 13, 4, 4, 9),
    "own block only": (1, 2, 2, 13, 13, 4, 4, 1),
    "one block": (1, 1, 2, 5, 5, 4, 8, 2),
    "later queries": (2, 2, 2, 6, 23, 4, 4, 3),
    "one query": (2, 2, 2, 1, 18, 4, 4, 3),
}
PASTS = ("plain", "left", "right", "documents", "both")


def tensors(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict]:
    batch, heads, group, queries, keys, size, block_size, blocks = SHAPES[name]
    torch.manual_seed(0)
    q = torch.randn(batch, queries, heads * group, size, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(batch, heads, keys, size, dtype=dtype) for _ in range(2))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()], {
        "block_size": block_size,
        "blocks": blocks,
    }


def past(kind: str, q: Tensor, k: Tensor) -> dict:
    batch, keys, found = k.shape[0], k.shape[2], {}
    position = torch.arange(keys)
    if kind in ("left", "both"):
        found["padding"] = (position >= 2 * torch.arange(batch)[:, None] + 1).long()
    if kind == "right":
        found["padding"] = (position < keys - torch.arange(batch)[:, None] - 1).long()
    if kind in ("documents", "both"):
        found["documents"] = ((position + torch.arange(batch)[:, None]) // 7).long()
    return found


@pytest.mark.parametrize("kind", PASTS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scoring", ["group_softmax", "dot"])
def test_backends_agree(name: str, kind: str, scoring: str):
    given, options = tensors(name)
    q, k, v = given
    selection = select(q, k, scoring=scoring, **options, **past(kind, q, k))
    known = None
    for backend in BACKENDS:
        found = attend(q, k, v, selection, scale=0.7, backend=backend)
        visible = torch.where(found.lse.isinf(), 0, found.lse)
        goal = (found.output * torch.linspace(0, 1, 4).repeat(found.output.shape[3] // 4)).sum()
        numbers = [found.output, visible, *torch.autograd.grad(goal + visible.square().sum(), given)]
        known = known or numbers
        for one, two in zip(numbers, known):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", SHAPES)
def test_flex_attention_agrees(name: str):
    (q, k, v), options = tensors(name)
    for kind, scoring in (("left", "dot"), ("both", "group_softmax")):
        selection = select(q, k, scoring=scoring, **options, **past(kind, q, k))
        with torch.no_grad():
            known, found = (attend(q, k, v, selection, scale=0.7, backend=x) for x in ("gather", "flex"))
        torch.testing.assert_close((found.output, found.lse), (known.output, known.lse))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_over_several_tiles():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 520, 4), torch.randn(1, 2, 520, 4)
    # Sinks and neighbours alone, so that tiles between them are read by nobody.
    options = {"block_size": 40, "blocks": 2, "sinks": 1, "padding": torch.arange(520)[None] >= 17}
    selection = select(q, k, **options)
    found = attend(q, k, k, selection, backend="flex").output
    torch.testing.assert_close(found, attend(q, k, k, selection, backend="gather").output)
    counts, tiles = flex._tiles(selection)
    read = [[set(x[:n].tolist()) for n, x in zip(*rows)] for rows in zip(counts[0], tiles[0])]
    # By 128 keys: the first block and the own ones, of which those from key 97, 217, 377 and 497 on lie in two tiles.
    assert read == [[{0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 2, 3, 4}, {0, 3, 4}]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_padded_row_is_the_row_alone(name: str, backend: str):
    (q, k, v), options = tensors(name)
    padded = past("left", q, k)
    found = attend(q, k, v, **options, **padded, backend=backend).output
    for row, left in enumerate((1 - padded["padding"]).sum(1).tolist()):
        skipped = max(0, left - (k.shape[2] - q.shape[2]))
        part = slice(row, row + 1)
        alone = attend(
            q[part, :, skipped:], k[part, :, left:], v[part, :, left:], **options, backend=backend
        ).output
        torch.testing.assert_close(found[part, :, skipped:], alone)
        assert not found[row, :, :skipped].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [(0, 8, 11, 33), (0, 1, 33), (0, 32, 33)])
def test_packed_documents_are_the_documents_alone(cut: tuple[int, ...], backend: str):
    (q, k, v), options = tensors("four")
    both = attend_both(q, k, v, **options, documents=torch.tensor(cut), backend=backend)
    for start, stop in pairwise(cut):
        part = [x[:, :, start:stop] for x in (q, k, v)]
        torch.testing.assert_close(
            both.sparse[:, :, start:stop], attend(*part, **options, backend=backend).output
        )
        torch.testing.assert_close(both.full[:, :, start:stop], full_attention(*part))


@pytest.mark.parametrize("kind", PASTS)
@pytest.mark.parametrize("name", SHAPES)
def test_full_attention_is_sparse_attention_over_everything(name: str, kind: str):
    (q, k, v), _ = tensors(name)
    q, k, v = (x.repeat_interleave(5, 2) for x in (q, k, v))
    found = attend(q, k, v, block_size=3, blocks=99, **past(kind, q, k), backend="dense").output
    torch.testing.assert_close(full_attention(q, k, v, **past(kind, q, k)), found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["four", "one query", "blocks of one"])
def test_gradients_with_a_fixed_selection(name: str, backend: str):
    given, options = tensors(name)
    given = [x[:, :, -9:].detach().requires_grad_() for x in given]
    selection = select(*given[:2], **options)

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        found = attend(*x, selection, backend=backend)
        return found.output, found.lse

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_output_sees_what_follows(backend: str):
    (q, k, v), options = tensors("four")
    known = attend(q, k, v, **options, backend=backend)
    for end in (7, 8, 9, 16, 31):
        moved = [torch.cat([x[:, :, :end], 5 + 3 * x[:, :, end:]], 2) for x in (q, k, v)]
        found = attend(*moved, **options, backend=backend)
        torch.testing.assert_close(found.output[:, :, :end], known.output[:, :, :end], rtol=0, atol=1e-12)
        assert torch.equal(found.selection.indices[:, :, :end], known.selection.indices[:, :, :end])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(backend: str, dtype: torch.dtype):
    given, options = tensors("four")
    selection = select(given[0], given[1], **options)
    known = attend(*given, selection, backend="dense").output
    low = [x.detach().to(dtype).requires_grad_() for x in given]
    found = attend(*low, selection, backend=backend)
    found.output.float().square().sum().backward()
    assert found.output.dtype == dtype and found.lse.dtype == torch.float32
    assert all(x.grad is not None and x.grad.dtype == dtype for x in low)
    torch.testing.assert_close(found.output.double(), known, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)  # fmt: skip


@pytest.mark.parametrize("module", [gather, block_major])
@pytest.mark.parametrize("backend", ["gather", "block_major"])
def test_small_tiles_change_nothing(module, backend: str, monkeypatch: pytest.MonkeyPatch):
    given, options = tensors("seven")
    known = attend(*given, **options, backend=backend)
    gradients = torch.autograd.grad(known.output.square().sum(), given)
    for name in ("COPIED", "SHARES", "LOGITS", "ROWS"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, 150)
    monkeypatch.setattr("lineament.modules.sparse_attention.selection.SCORES", 60)
    found = attend(*given, **options, backend=backend)
    torch.testing.assert_close(found.output, known.output)
    for one, two in zip(torch.autograd.grad(found.output.square().sum(), given), gradients):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", ["gather", "block_major"])
def test_out_of_memory_halves_the_tile(backend: str, monkeypatch: pytest.MonkeyPatch):
    given, options = tensors("seven")
    known = attend(*given, **options, backend=backend)
    gradients = torch.autograd.grad(known.output.square().sum(), given)
    # Each of the products of a tile may be the one that memory does not do for.
    products, refused = torch.bmm, []

    def some(x: Tensor, y: Tensor, **kept) -> Tensor:
        if len(x) > 3:
            refused.append(len(refused) % 5)
            if refused[-1] == 0 or len(x) > 6:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return products(x, y, **kept)

    monkeypatch.setattr(torch, "bmm", some)
    found = attend(*given, **options, backend=backend)
    torch.testing.assert_close(found.output, known.output)
    for one, two in zip(torch.autograd.grad(found.output.square().sum(), given), gradients):
        torch.testing.assert_close(one, two)
    assert refused


@pytest.mark.parametrize("how", [{"sinks": 1}, {"recent": 1}, {"sinks": 1, "recent": 1}])
def test_forced_blocks_are_read_and_count(how: dict):
    (q, k, _), _ = tensors("one head a group")
    documents = torch.tensor([0, 12, 37])
    found = select(q, k, block_size=3, blocks=3, documents=documents, **how)
    mask, layout = found.mask(), found.layout
    assert int(mask.sum(-1).max()) == 3
    for query, own in enumerate(layout.own[0].tolist()):
        first = int(layout.first[0, query])
        if how.get("sinks"):
            assert mask[:, :, query, first].all()
        if how.get("recent") and own > first:
            assert mask[:, :, query, own - 1].all()


REFUSED = {
    "q: 3 query heads cannot share 2": lambda q, k, v: attend(q[:, :3], k, v),
    "block_size: got 0": lambda q, k, v: attend(q, k, v, block_size=0),
    "blocks: got 0": lambda q, k, v: attend(q, k, v, blocks=0),
    "queries are more than the 9 keys": lambda q, k, v: attend(q, k[:, :, :9], v[:, :, :9]),
    "offset: 1 places the last": lambda q, k, v: attend(q, k, v, offset=1),
    "the mask has holes": lambda q, k, v: attend(q, k, v, padding=torch.arange(33)[None] != 9),
    "padding: got a float32 tensor": lambda q, k, v: attend(q, k, v, padding=torch.ones(33)),
    "documents: got an int64 tensor": lambda q, k, v: attend(q, k, v, documents=torch.tensor([0, 9])),
    "sinks, recent: 1 + 1 forced": lambda q, k, v: attend(q, k, v, blocks=2, sinks=1, recent=1),
    "scoring: got 'dots'": lambda q, k, v: attend(q, k, v, scoring="dots"),
    "backend: got 'blockmajor'": lambda q, k, v: attend(q, k, v, backend="blockmajor"),
    "selection: got 'inexact'": lambda q, k, v: attend(q, k, v, "inexact"),
    "backend: 'flex' gives no gradients on cpu": lambda q, k, v: attend(q, k, v, backend="flex"),
    "'released' wants block_size": lambda q, k, v: attend(q, k, v, "released", block_size=4, blocks=5),
    "blocks: the blocks are chosen already": lambda q, k, v: attend(q, k, v, select(q, k), blocks=2),
    "v: got": lambda q, k, v: attend(q, k, v[:, :, 1:]),
    "are of other queries": lambda q, k, v: attend(q, k, v, select(q[:, :, 1:], k)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_in_one_line(message: str):
    (q, k, v), _ = tensors("four")
    with pytest.raises(InputError) as told:
        REFUSED[message](q, k, v)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_a_selection_is_a_result_that_prints():
    (q, k, _), options = tensors("four")
    found = select(q, k, **options)
    assert isinstance(found, Selection) and "indices" in repr(found)
