"""BlockMNIST: images of which it is known, by construction, where the label is written and where nothing is.

Shah, Jain, Netrapalli, NeurIPS 2021, arXiv 2102.12781. Blocks stacked vertically; one, the signal block, is a digit and decides the label, the
others, the null blocks, carry no information. Where the signal stands is independent of the label, so that a gradient on a null block
is a gradient on something that this image does not use: what the paper calls feature leakage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.data.samples import Samples

PLACEMENTS = ("random", "top", "bottom")
NULLS = ("pattern", "blank", "noise", "digit")


def block_mnist(
    digits: Float[Tensor, "batch *image"],
    labels: Int[Tensor, "batch"],
    *,
    placement: str | float = "random",
    blocks: int = 2,
    null: str = "pattern",
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> Samples:
    """Put each image in one block and something without meaning in the others.

    ``extras["signal"]`` (sample,) is the block that holds the image, 0 on top; ``extras["null_mask"]`` (sample, 1, height, width) says where
    the other blocks are.

    Args:
        digits: (batch, height, width) or (batch, channels, height, width), in [0, 1]: MNIST, scikit-learn's digits, any images.
        labels: (batch,), from 0.
        placement: ``"random"`` (any block alike, as in the paper), ``"top"`` (BlockMNIST-Top), ``"bottom"``, or the probability of the
            top block, the rest shared alike.
        blocks: how many are stacked, at least 2.
        null: ``"pattern"`` (a square with its diagonals), ``"blank"`` (zeros), ``"noise"`` (uniform in [0, 1]), or ``"digit"`` (another image of
            ``digits``, whatever its class).
        classes: keep these labels only, renumbered from 0: ``(0, 1)`` is the two-class version.
        seed: of places and null blocks.

    Raises:
        InputError: images, labels or settings that cannot be used.

    >>> data = block_mnist(torch.ones(4, 8, 8), torch.tensor([0, 1, 0, 1]), placement="top")
    >>> tuple(data.inputs.shape), data.inputs[0, 0, :8].mean().item(), data.inputs[0, 0, 8:].sum().item()
    ((4, 1, 16, 8), 1.0, 16.0)
    """
    checks.tensor("digits", digits, floating=True)
    checks.require(
        digits.ndim in (3, 4),
        f"digits: got {checks.show(digits)}, expected shape (batch, height, width) or (batch, channels, height, width)",
    )
    low, high = float(digits.min()), float(digits.max())
    checks.require(
        low >= 0 and high <= 1,
        f"digits: values lie in [{low:g}, {high:g}], expected [0, 1]; divide bytes by 255",
    )
    labels = checks.labels("labels", labels, count=len(digits))
    checks.number("blocks", blocks, low=2, integer=True)
    checks.one_of("null", null, NULLS)
    images = digits[:, None] if digits.ndim == 3 else digits
    source = images
    if classes is not None:
        wanted = [checks.number("classes", c, low=0, integer=True) for c in classes]
        absent = [c for c in wanted if not bool((labels == c).any())]
        checks.require(
            len(wanted) > 1 and len(set(wanted)) == len(wanted) and not absent,
            f"classes: got {list(classes)}, expected at least two different labels of the data"
            + (f"; absent: {absent}" if absent else ""),
        )
        number = torch.full((int(labels.max()) + 1,), -1)
        number[torch.tensor(wanted)] = torch.arange(len(wanted))
        labels = number[labels]
        images, labels = images[labels >= 0], labels[labels >= 0]
    generator = torch.Generator().manual_seed(checks.number("seed", seed, integer=True))
    signal = _places(placement, blocks, len(images), generator)
    nulls = _nulls(null, source, len(images), blocks - 1, generator)
    height, width = images.shape[-2:]
    empty = torch.arange(blocks).repeat_interleave(height) != signal[:, None]
    return Samples(
        inputs=stacked(images, nulls, signal),
        targets=labels,
        extras={"signal": signal, "null_mask": empty[:, None, :, None].expand(-1, 1, -1, width)},
        source="BlockMNIST",
    )


def stacked(
    images: Float[Tensor, "batch channels h w"],
    nulls: Float[Tensor, "batch nulls channels h w"],
    signal: Int[Tensor, "batch"],
) -> Float[Tensor, "batch channels height w"]:
    """Images at block ``signal`` of a vertical stack, null blocks at the others, from the top.

    >>> stacked(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 2), torch.tensor([1])).tolist()
    [[[[0.0, 0.0], [1.0, 1.0]]]]
    """
    count, blocks = len(images), nulls.shape[1] + 1
    out = images.new_empty(count, blocks, *images.shape[1:])
    own = torch.arange(blocks) == signal[:, None]
    out[own] = images
    out[~own] = nulls.expand(count, *nulls.shape[1:]).flatten(0, 1).to(images)
    return out.movedim(1, 2).flatten(2, 3)


def null_pattern(height: int, width: int | None = None) -> Float[Tensor, "height width"]:
    """The null block: the frame from side // 4 to side - 1 - side // 4 and the diagonals of that square; ones on zeros.

    The paper shows the pattern and gives no measures; these are ours. In a rectangle the diagonals go to the nearest pixel.

    >>> null_pattern(8).int()[2:6, 2:6].tolist()
    [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    width = height if width is None else width
    for side in (height, width):
        checks.number("side", side, low=4, integer=True)
    out = torch.zeros(height, width)
    top, left = height // 4, width // 4
    bottom, right = height - 1 - top, width - 1 - left
    out[[top, bottom], left : right + 1] = 1
    out[top : bottom + 1, [left, right]] = 1
    steps = max(bottom - top, right - left) + 1
    rows = torch.linspace(top, bottom, steps).round().long()
    columns = torch.linspace(left, right, steps).round().long()
    out[rows, columns] = 1
    out[rows, columns.flip(0)] = 1
    return out


def _places(placement: Any, blocks: int, count: int, generator: torch.Generator) -> Tensor:
    if isinstance(placement, str):
        checks.one_of("placement", placement, PLACEMENTS)
        if placement == "random":
            return torch.randint(blocks, (count,), generator=generator)
        return torch.full((count,), 0 if placement == "top" else blocks - 1)
    share = float(checks.number("placement", placement, low=0, high=1))
    on_top = torch.rand(count, generator=generator) < share
    return torch.where(on_top, 0, torch.randint(1, blocks, (count,), generator=generator))


def _nulls(kind: str, source: Tensor, count: int, nulls: int, generator: torch.Generator) -> Tensor:
    shape = source.shape[1:]
    if kind == "pattern":
        return null_pattern(shape[1], shape[2]).to(source).expand(count, nulls, *shape)
    if kind == "blank":
        return source.new_zeros(()).expand(count, nulls, *shape)
    if kind == "noise":
        return torch.rand((count, nulls, *shape), generator=generator).to(source)
    return source[torch.randint(len(source), (count, nulls), generator=generator)]
