"""ColorMNet's parts against the published procedures, written plainly here: same weights, same results.

A memory read is bound by the similarities, one matrix product; the published one then scatters 30 of N weights into a dense matrix and multiplies it with all
values. The convolution of an up-sampled map needs factor² times fewer multiplications at the small size.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.bench import Row, compare, quick, resident_mib
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.features import (
    CrossChannelAttention,
    FusionBlock,
    conv_of_upsampled,
    upsampled,
)
from lineament.modules.colormnet.film import Colorizing, FilmState
from lineament.modules.colormnet.memory import Memory, similarity
from lineament.modules.colormnet.memory import joined as in_one
from lineament.modules.colormnet.network import ColorMNet

SLUG = "colormnet"


@torch.no_grad()
def published_read(key: Tensor, shrinkage: Tensor, value: Tensor, query: Tensor, selection: Tensor) -> Tensor:
    """Dense similarities, the 30 largest of each query scattered into zeros, one product with all values."""
    S = similarity(key, shrinkage, query, selection)
    top, index = S.topk(min(30, len(S)), dim=0)
    weights = top.exp()
    dense = torch.zeros_like(S).scatter_(0, index, weights / weights.sum(0))
    return value @ dense


def reads(frames: int, h: int, w: int, repeats: int) -> Row:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    memory, kept = Memory(), []
    for _ in range(frames):
        part = random(1, 64, h, w) * 0.3, random(1, 1, h, w) ** 2 + 1, random(1, 64, h, w).sigmoid()
        value = random(h * w, 1024)
        flat_key, flat_shrinkage, flat_selection = (x[0].flatten(1).T for x in part)
        memory.working.add(flat_key, flat_shrinkage, flat_selection, value)
        kept.append((part[0][0].flatten(1), part[1][0].flatten(1), value.T))
    key, shrinkage, value = (torch.cat(list(x), 1) for x in zip(*kept))
    query, selection = random(1, 64, h, w) * 0.3, random(1, 64, h, w).sigmoid()
    flat = query[0].flatten(1), selection[0].flatten(1)
    found = memory.read(query, selection)[0].flatten(0, 1).flatten(1)
    assert (found - published_read(key, shrinkage, value, *flat)).abs().max() < 1e-4
    return compare(
        SLUG,
        f"memory read, {frames * h * w:,} elements, {h * w} places",
        lambda: memory.read(query, selection),
        "scatter and dense product",
        lambda: published_read(key, shrinkage, value, *flat),
        target=4.0,
        repeats=repeats,
        note="the floor is the similarities, one product of 129 channels",
    )


@torch.no_grad()
def convolution(h: int, w: int, repeats: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    conv, x = torch.nn.Conv2d(1536, 256, 3, padding=1), torch.randn(1, 1536, h, w, generator=generator)
    conv.requires_grad_(False)
    plain = lambda: conv(upsampled(x, 4))  # noqa: E731
    assert (plain() - conv_of_upsampled(conv, x, 4)).abs().max() < 1e-4
    return compare(
        SLUG,
        f"3x3 of the semantics map up-sampled 4x, {4 * h} x {4 * w}",
        lambda: conv_of_upsampled(conv, x, 4),
        "up-sample, then convolve",
        plain,
        target=2.5,
        repeats=repeats,
        note="16 times fewer multiplications; the rest is up-sampling and shifting, two products with matrices of a side",
    )


def film_of(model: ColorMNet, h: int, w: int) -> tuple[FilmState, Tensor]:
    """A film after its first frame, and its second."""
    state = FilmState(model, Colorizing.published(every=10**6))
    grey = torch.randn(1, 1, h, w).clamp(-1, 1).to(next(model.parameters()).dtype)
    state.step(grey, given=torch.zeros_like(grey).expand(-1, 2, -1, -1))
    return state, grey


def frames(config: ColorMNetConfig, h: int, w: int, repeats: int) -> Iterator[Row]:
    """A frame, ours against the plain order of the same operations in float32."""
    torch.manual_seed(0)
    model = ColorMNet(config).eval().requires_grad_(False)
    weights = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    plain, plain_grey = film_of(model, h, w)

    def plainly() -> Any:
        with _plain():
            return plain.step(plain_grey)

    kinds = [(torch.float32, 1.2), *([(torch.bfloat16, 1.9)] if quick() or has_bfloat16() else [])]
    for dtype, target in kinds:
        state, grey = film_of(copy.deepcopy(model).to(dtype), h, w)
        yield compare(
            SLUG,
            f"a frame, {h} x {w}, {weights}, {str(dtype).removeprefix('torch.')}",
            lambda state=state, grey=grey: state.step(grey),
            "published order of operations, float32",
            plainly,
            target=target,
            repeats=repeats,
            note="what goes are multiplications of up-sampled maps and of frame parts, once more for each object"
            + ("" if dtype != torch.float32 or quick() else f"; {_peaks()}"),
        )


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16; one that does not takes 20 times as long as in float32."""
    cpus = Path("/proc/cpuinfo")
    return cpus.exists() and any(name in cpus.read_text() for name in ("avx512_bf16", "amx_bf16", "bf16mm"))


def peak_mib(side: str) -> float:
    """What a frame adds to this process's peak beyond the weights, in MiB, what memory holds included. A peak never falls: one process, one side.

    At 480 x 864 with 29,600 elements in working memory, "ours" and "published"; or with as many in long-term memory as after 100 frames and after 2,000.
    """
    torch.manual_seed(0)
    config = ColorMNetConfig()
    model = ColorMNet(config).eval().requires_grad_(False)
    before = resident_mib()
    state, width = FilmState(model, Colorizing.published(every=10**6)), 2 * config.value_width
    counts = {"ours": (29_600, 0), "published": (29_600, 0), "100": (15_680, 512), "2000": (15_680, 10_000)}[
        side
    ]
    for store, count in zip((state.memory.working, state.memory.long), counts):
        for part in torch.zeros(count, 1).split(4000):
            n, key = len(part), config.key_width
            store.add(torch.randn(n, key), torch.ones(n, 1), torch.rand(n, key), torch.randn(n, width))
    grey = torch.randn(1, 1, 480, 864).clamp(-1, 1)
    with _plain() if side == "published" else nullcontext():
        state.step(grey)
    return resident_mib() - before


def _peaks() -> str:
    found = {}
    for side in ("ours", "published", "100", "2000"):
        command = [sys.executable, "-W", "ignore", __file__, "--peak", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side] = float(done.stdout)
    return (
        f"peak of a frame beyond the weights at 480 x 864, float32: {found['ours']:.0f} MiB against {found['published']:.0f} "
        f"({found['ours'] / found['published']:.2f}, target 0.6); after 2,000 frames against 100: {found['2000'] / found['100']:.2f} (target 1.05)"
    )


class _plain:
    """While it lasts, maps are up-sampled before they are convolved, frame parts are computed for each object, all heads and both objects at once, and memory is read by a
    dense affinity."""

    def __enter__(self) -> None:
        from lineament.modules.colormnet import blocks

        self.kept: list[tuple[Any, str, Callable[..., Any]]] = [
            (blocks.ResidualBlock, "joined", blocks.ResidualBlock.joined),
            (FusionBlock, "forward", FusionBlock.forward),
            (CrossChannelAttention, "forward", CrossChannelAttention.forward),
            (ColorMNet, "decode", ColorMNet.decode),
            (Memory, "read", Memory.read),
        ]

        def joined(block: Any, shared: Tensor, objects: Tensor) -> Tensor:
            shared = shared[:, None].expand(-1, objects.shape[1], -1, -1, -1)
            return block(torch.cat([shared, objects], 2))

        def forward(block: Any, semantics: Tensor, detail: Tensor, factor: int = 1) -> Tensor:
            encoded = block.encode_enc(upsampled(semantics, factor))
            return F.relu(block.norm3(block.attended(encoded, detail) + encoded))

        def attention(block: Any, asks: Tensor, answers: Tensor) -> Tensor:
            q, k, v = (
                depthwise(pointwise(x)).flatten(2).unflatten(1, (block.heads, -1))
                for pointwise, depthwise, x in (
                    (block.to_q, block.to_q_dw, asks),
                    (block.to_k, block.to_k_dw, answers),
                    (block.to_v, block.to_v_dw, answers),
                )
            )
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * block.temperature
            return block.to_out((scores.softmax(-1) @ v).flatten(1, 2).unflatten(2, asks.shape[2:]))

        def decode(model: Any, *given: Any, update: bool = True) -> Any:
            # With gradients, both objects are decoded at once; no weight asks for one here.
            with torch.enable_grad():
                return model.decoder(*given[:1], given[2], given[1], update=update)

        def read(memory: Any, key: Tensor, selection: Tensor) -> Tensor:
            stores = [store for store in (memory.long, memory.working) if len(store)]
            k, s, v = (in_one(stores, name).T for name in ("key", "shrinkage", "value"))
            answer = published_read(k, s, v, key[0].flatten(1), selection[0].flatten(1))
            memory.confidence = torch.ones(())
            return answer.unflatten(0, (memory.objects, -1)).unflatten(2, key.shape[2:])[None]

        for (owner, name, _), plain in zip(self.kept, (joined, forward, attention, decode, read)):
            setattr(owner, name, plain)

    def __exit__(self, *error: object) -> None:
        for owner, name, function in self.kept:
            setattr(owner, name, function)


def rows(repeats: int = 5) -> Iterator[Row]:
    if quick():
        yield reads(3, 6, 8, 1)
        yield convolution(4, 6, 1)
        yield from frames(ColorMNetConfig.tiny(), 64, 64, 1)
        return
    yield reads(24, 20, 29, repeats)
    yield convolution(14, 28, repeats)
    yield from frames(ColorMNetConfig(), 224, 448, min(repeats, 3))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak_mib(sys.argv[2]))
    else:
        for row in rows():
            print(row)
