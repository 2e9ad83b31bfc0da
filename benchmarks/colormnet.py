"""ColorMNet's parts against the published procedures, written plainly here: same weights, same results.

A memory read is bound by the similarities, one matrix product; the published one then scatters 30 of N weights into a dense matrix and multiplies it with all
values. The convolution of an up-sampled map needs factor² times fewer multiplications at the small size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.bench import Row, compare, quick
from lineament.modules.colormnet.configuration import ColorMNetConfig
from lineament.modules.colormnet.features import FusionBlock, conv_of_upsampled, upsampled
from lineament.modules.colormnet.film import Colorizing, FilmState
from lineament.modules.colormnet.memory import Memory, similarity
from lineament.modules.colormnet.network import ColorMNet

SLUG = "colormnet"


@torch.no_grad()
def published_read(key: Tensor, shrinkage: Tensor, value: Tensor, query: Tensor, selection: Tensor) -> Tensor:
    """Dense similarities, the 30 largest of each query scattered into zeros, one product with all values."""
    S = similarity(key, shrinkage, query, selection)
    top, index = S.topk(30, dim=0)
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
        memory.working.add(*(x[0].flatten(1).T for x in part), value := random(h * w, 1024))
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
        note="16 times fewer multiplications; the rest is nine maps up-sampled and added",
    )


def frame(config: ColorMNetConfig, h: int, w: int, repeats: int) -> Row:
    """A frame with 13 remembered ones, ours and with the plain order of the same operations."""
    torch.manual_seed(0)
    model = ColorMNet(config).eval().requires_grad_(False)
    state = FilmState(model, Colorizing.published(every=10**6))
    grey = torch.randn(1, 1, h, w).clamp(-1, 1)
    state.step(grey, given=torch.zeros(1, 2, h, w))

    def plainly() -> Any:
        with _plain():
            return state.step(grey)

    return compare(
        SLUG,
        f"a frame, {h} x {w}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
        lambda: state.step(grey),
        "published order of operations",
        plainly,
        target=1.2,
        repeats=repeats,
        note="what goes are multiplications of up-sampled maps and of frame parts, once more for each object",
    )


class _plain:
    """While it lasts, maps are up-sampled before they are convolved, and frame parts are computed for each object."""

    def __enter__(self) -> None:
        from lineament.modules.colormnet import blocks

        self.kept: list[tuple[Any, str, Callable[..., Any]]] = [
            (blocks.ResidualBlock, "joined", blocks.ResidualBlock.joined),
            (FusionBlock, "forward", FusionBlock.forward),
        ]

        def joined(block: Any, shared: Tensor, objects: Tensor) -> Tensor:
            shared = shared[:, None].expand(-1, objects.shape[1], -1, -1, -1)
            return block(torch.cat([shared, objects], 2))

        def forward(block: Any, semantics: Tensor, detail: Tensor, factor: int = 1) -> Tensor:
            encoded = block.encode_enc(upsampled(semantics, factor))
            return F.relu(block.norm3(block.attended(encoded, detail) + encoded))

        blocks.ResidualBlock.joined, FusionBlock.forward = joined, forward  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        for owner, name, function in self.kept:
            setattr(owner, name, function)


def rows(repeats: int = 5) -> Iterator[Row]:
    if quick():
        yield reads(3, 6, 8, 1)
        yield convolution(4, 6, 1)
        yield frame(ColorMNetConfig.tiny(), 64, 64, 1)
        return
    yield reads(24, 20, 29, repeats)
    yield convolution(14, 28, repeats)
    yield frame(ColorMNetConfig(), 224, 448, min(repeats, 3))


if __name__ == "__main__":
    for row in rows():
        print(row)
