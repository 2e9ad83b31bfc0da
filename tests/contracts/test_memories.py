"""What every memory of frames keeps: a read is the plain formula over all that is held; streamed is batched, in chunks is whole, stored goes on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lineament.modules.colormnet import memory as module
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.features import FrameFeatures
from lineament.modules.colormnet.film import Colorizing, FilmState, padded
from lineament.modules.colormnet.memory import Memory, MemoryOptions
from lineament.modules.colormnet.network import ColorMNet


@dataclass(frozen=True)
class Kind:
    """How much is kept, and which frames for good."""

    options: MemoryOptions
    permanent: bool | int = False
    exemplars: tuple[int, ...] = (0,)


SMALL = {"top_k": 4, "max_frames": 4, "min_frames": 2, "prototypes": 3, "max_long": 8}
KINDS = {
    "working": Kind(MemoryOptions(top_k=4, long_term=False)),
    "all elements": Kind(MemoryOptions(**(SMALL | {"top_k": None}))),
    "long-term": Kind(MemoryOptions(**SMALL)),
    "long-term, the oldest go": Kind(MemoryOptions(**SMALL, count_long=False)),
    "permanent": Kind(MemoryOptions(**SMALL), True, (0, 5)),
    "the latest permanent": Kind(MemoryOptions(**SMALL), 1, (0, 3, 5)),
}
FRAMES = 12
members = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def frame(t: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Key, shrinkage, selection and value of a frame of 2 x 3 places."""
    generator = torch.Generator().manual_seed(t)
    key, shrinkage, selection, value = (
        torch.randn(*shape, 2, 3, generator=generator, dtype=dtype)
        for shape in ((1, 4), (1, 1), (1, 4), (1, 2, 5))
    )
    return [key, shrinkage**2 + 1, selection.sigmoid(), value]


def filled(kind: Kind, frames: int = FRAMES, *, parts: int = 1) -> tuple[Memory, list[Tensor]]:
    """A memory after a film, and what each frame read; ``parts`` of the places of a frame are read after one another."""
    memory, answers = Memory(kind.options), []
    for t in range(frames):
        if t:
            key, _, selection, _ = frame(100 + t)
            columns = range(0, 3, 3 // parts)
            read = [memory.read(*(x[..., c : c + 3 // parts] for x in (key, selection))) for c in columns]
            answers.append(torch.cat(read, -1))
        memory.add(*frame(t), permanent=bool(kind.permanent) and t in kind.exemplars)
    return memory, answers


def stores(memory: Memory) -> dict[str, Tensor]:
    """All that is held, by name."""
    held = {"working": memory.working, "long": memory.long}
    held |= {f"permanent {k}": store for k, store in enumerate(memory.permanent)}
    return {f"{a} {b}": x for a, store in held.items() for b, x in vars(store).items() if x is not None}


@members
def test_a_read_is_the_plain_formula_over_all_that_is_held(kind):
    memory, _ = filled(kind)
    held = [store for store in (*memory.permanent, memory.long, memory.working) if len(store)]
    k, s, v = (torch.cat([getattr(store, name) for store in held]) for name in ("key", "shrinkage", "value"))
    query, _, selection, _ = frame(99)
    q, e = query[0].flatten(1).T, selection[0].flatten(1).T
    S = -s / 2 * (e[None] * (k[:, None] - q[None]).square()).sum(2)
    border = S.topk(min(kind.options.top_k or len(S), len(S)), 0).values[-1]
    plain = S.masked_fill(border > S, -torch.inf).softmax(0).T @ v
    found = memory.read(query, selection)
    torch.testing.assert_close(found[0].flatten(0, 1).flatten(1).T, plain)
    torch.testing.assert_close(memory.confidence, S.amax(0).exp().mean())


@members
def test_in_chunks_is_whole(kind, monkeypatch):
    whole, answers = filled(kind)
    monkeypatch.setattr(module, "_CHUNK", 40)  # one query or two at once
    chunked, same = filled(kind)
    torch.testing.assert_close(same, answers)
    torch.testing.assert_close(stores(chunked), stores(whole))


@members
def test_a_frame_read_part_by_part_is_the_frame(kind):
    """Before the first consolidation: usage is a mean over reads, and each part is one."""
    _, answers = filled(kind, 4)
    _, same = filled(kind, 4, parts=3)
    torch.testing.assert_close(same, answers)


@members
def test_what_is_kept_is_bounded_and_exemplars_never_leave(kind):
    memory, _ = filled(kind, 30)
    working, long = memory.sizes
    if kind.options.long_term:
        assert working < kind.options.max_frames * 6 and long <= kind.options.max_long
    else:
        assert working == 30 * 6
    for store, t in zip(memory.permanent, kind.exemplars):
        assert store.value is not None
        assert torch.equal(store.value, frame(t)[3][0].flatten(0, 1).flatten(1).T)
    assert len(memory.permanent) == (len(kind.exemplars) if kind.permanent else 0)


@pytest.fixture(scope="module")
def model() -> ColorMNet:
    torch.manual_seed(0)
    return ColorMNet(ColorMNetConfig.tiny(encoder="resnet")).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def film() -> Tensor:
    return torch.rand(FRAMES, 1, 20, 32, generator=torch.Generator().manual_seed(0)) - 0.5


@members
def test_streamed_is_batched_and_stored_goes_on(kind, model, film):
    """Frame by frame, with the frames' features from one batch, and with the state stored and read after every frame."""
    published = {} if kind.permanent else {"local_source": "memory"}
    options = Colorizing(
        memory=kind.options, every=1, permanent=kind.permanent, padding="replicate", **published
    )
    colours = torch.rand(1, 2, 20, 32, generator=torch.Generator().manual_seed(1)) - 0.5
    batch = model.encode_frame(padded(film, model.config.multiple, "replicate").expand(-1, 3, -1, -1))
    streamed, batched, stored = [], [], []
    states = [FilmState(model, options) for _ in range(3)]
    for t in range(FRAMES):
        told = {"given": colours if t in kind.exemplars else None, "last": t == FRAMES - 1}
        features = FrameFeatures(*(x[t : t + 1] for x in batch))
        streamed.append(states[0].step(film[t : t + 1], **told))
        batched.append(states[1].step(film[t : t + 1], **told, features=features))
        again = FilmState(model, options)
        again.load_state_dict(states[2].state_dict())
        states[2] = again
        stored.append(again.step(film[t : t + 1], **told))
    assert all(torch.equal(a, b) for a, b in zip(stored, streamed))
    torch.testing.assert_close(batched, streamed, atol=1e-5, rtol=0)
    assert len(states[0].memory.permanent) == min(
        len(kind.exemplars) * bool(kind.permanent),
        kind.permanent if not isinstance(kind.permanent, bool) else 9,
    )
    assert bool(states[0].memory.sizes[1]) == kind.options.long_term
