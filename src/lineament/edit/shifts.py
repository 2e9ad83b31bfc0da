"""The second moment of a convolution's patches without unfolding them, for kernels that move by one pixel.

The product of tap a of one channel and tap b of another, summed over a map, hangs on their distance b - a alone, up to the border: the 81 pairs of taps of a
3 x 3 kernel are 13 distances and their transposes. One product of matrices a distance is summed over the whole map, and from it go the few rows and columns
that a tap never meets. With channels last and the samples inside the columns, a map moved by a distance is a view of the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core.statistics.accumulation import ROWS, finite, working

Pair = tuple[int, int]


class PatchMoments:
    """Mean and covariance of the patches of a convolution of stride 1, map by map.

    Args:
        kernel, dilation: (high, wide). padding: zeros before and after, ((above, below), (left, right)).

    >>> stream = PatchMoments((1, 2), (1, 1), ((0, 0), (0, 0)))
    >>> stream.update(torch.tensor([[[[0.0, 1.0, 3.0]]]]))
    >>> stream.count, stream.mean.tolist(), stream.covariance.double().round(decimals=4).tolist()
    (2, [0.5, 2.0], [[0.25, 0.5], [0.5, 1.0]])
    """

    def __init__(self, kernel: Pair, dilation: Pair, padding: tuple[Pair, Pair]) -> None:
        self.kernel, self.dilation, self.padding = kernel, dilation, padding
        self.taps = list(product(range(kernel[0]), range(kernel[1])))
        self.count = 0
        self._centre: Tensor | None = None  # of each channel, from the first maps: nothing cancels later
        self._whole: dict[Pair, Tensor] = {}  # of each distance, over all places where both taps meet the map
        self._lines: dict[tuple[Pair, int | None, int | None], Tensor] = {}
        self._sums = torch.zeros(0)  # [taps, taps, channels]: what b meets where a meets the map
        self._places = torch.zeros(0)  # [taps, taps]: where both meet the map
        self._known_boxes: dict[Pair, Tensor] = {}

    def update(self, x: Float[Tensor, "batch channels height width"]) -> None:
        """Take in maps; their height and width may change from call to call, and are at least the kernel's reach."""
        x = finite("x", working(x))
        samples, channels, high, wide = x.shape
        if self._centre is None:
            self._centre = x.mean((0, 2, 3))
            taps = len(self.taps)
            self._sums = torch.zeros(taps, taps, channels, dtype=torch.float64, device=x.device)
            self._places = torch.zeros(taps, taps, dtype=torch.float64, device=x.device)
        gap = self.dilation[1] * (self.kernel[1] - 1)
        z = x.new_zeros(high, wide + gap, samples, channels)
        z[:, :wide] = (x - self._centre[:, None, None].to(x)).permute(2, 3, 0, 1)
        for shift in self._shifts():
            _add(self._whole, shift, _moved(z.flatten(0, 2), z.flatten(0, 2), *self._offset(shift, z)))
            self._add_lines(shift, z, wide)
        self._add_sums(z[:, :wide].sum(2, dtype=torch.float64), samples)
        sides = zip((high, wide), self.padding, self.dilation, self.kernel)
        self.count += samples * prod(n + sum(p) - d * (k - 1) for n, p, d, k in sides)

    @property
    def mean(self) -> Float[Tensor, " columns"]:
        """Of what each tap of each channel meets, float64, [channels * taps]."""
        centre = self._known().double()
        met = torch.outer(centre, self._places.diagonal()) + self._sums.diagonal(dim1=0, dim2=1)
        return met.flatten() / self.count

    @property
    def covariance(self) -> Float[Tensor, "columns columns"]:
        """About the mean, over ``count``, float64."""
        centre = self._known().double()
        channels, taps = len(centre), len(self.taps)
        # The channels' means were taken out of the maps, not of the zeros around them: their products with the rest come back here.
        rest = self._sums + 0.5 * self._places[:, :, None] * centre
        total = (centre[:, None, None] * rest[:, None]).view(taps * channels, taps * channels)
        total += total.T.clone()
        blocks = total.view(taps, channels, taps, channels)
        for (i, a), (j, b) in product(enumerate(self.taps), repeat=2):
            if i <= j:
                found = self._pair(a, b)
                blocks[i, :, j] += found
                if i < j:
                    blocks[j, :, i] += found.T
        columns = blocks.permute(1, 0, 3, 2).reshape(channels * taps, channels * taps)
        return columns.div_(self.count).addr_(self.mean, self.mean, alpha=-1)

    def _known(self) -> Tensor:
        assert self._centre is not None
        return self._centre

    def _shifts(self) -> Iterator[Pair]:
        """Distances of two taps, of each and its opposite one."""
        high, wide = self.kernel
        for down, right in product(range(high), range(1 - wide, wide)):
            if down > 0 or right >= 0:
                yield down, right

    def _offset(self, shift: Pair, z: Tensor) -> Pair:
        """How many rows of the flat map lie between two taps, and how many rows the first one has."""
        line = z.shape[1] * z.shape[2]
        down, right = self._pixels(shift)
        return down * line + right * z.shape[2], (z.shape[0] - down) * line

    def _pixels(self, shift: Pair) -> Pair:
        return shift[0] * self.dilation[0], shift[1] * self.dilation[1]

    def _cuts(self, axis: int, a: int, b: int) -> Pair:
        """How many rows (columns) where both taps could meet the map are left out, before and after."""
        (before, after), d, k = self.padding[axis], self.dilation[axis], self.kernel[axis]
        return max(0, d * min(a, b) - before), max(0, d * (k - 1 - max(a, b)) - after)

    def _edges(self, axis: int, shift: int) -> list[int]:
        """The rows (columns) that any pair of taps at a distance leaves out, from the first one on or, negative, from the last."""
        pairs = [(a, a + shift) for a in range(self.kernel[axis]) if 0 <= a + shift < self.kernel[axis]]
        cuts = [self._cuts(axis, a, b) for a, b in pairs]
        return [*range(max(c[0] for c in cuts)), *range(-max(c[1] for c in cuts), 0)]

    def _add_lines(self, shift: Pair, z: Tensor, wide: int) -> None:
        """The products on single rows, columns and their crossings that some pairs at this distance must leave out."""
        down, right = self._pixels(shift)
        first = z[: z.shape[0] - down, max(0, -right) : wide - max(0, right)]
        second = z[down:, max(0, right) : wide - max(0, -right)]
        rows, columns = self._edges(0, shift[0]), self._edges(1, shift[1])
        for row, column in [*product(rows, [None]), *product([None], columns), *product(rows, columns)]:
            low = slice(None) if row is None else row
            side = slice(None) if column is None else column
            flat = [m[low][..., side, :, :].reshape(-1, z.shape[-1]) for m in (first, second)]
            _add(self._lines, (shift, row, column), _moved(flat[0], flat[1], 0, len(flat[0])))

    def _pair(self, a: Pair, b: Pair) -> Tensor:
        """Sum of what tap a meets times what tap b meets, [channels of a, channels of b], a before b."""
        shift = b[0] - a[0], b[1] - a[1]
        cuts = [self._cuts(axis, a[axis], b[axis]) for axis in range(2)]
        rows, columns = ([*range(before), *range(-after, 0)] for before, after in cuts)
        found = self._whole[shift]
        for row in rows:
            found = found - self._lines[shift, row, None]
        for column in columns:
            found = found - self._lines[shift, None, column]
        for row, column in product(rows, columns):
            found = found + self._lines[shift, row, column]
        return found

    def _add_sums(self, z: Float[Tensor, "height width channels"], samples: int) -> None:
        """What b meets where a meets the map, for all pairs, from the map's running sums along both axes."""
        high, wide = z.shape[:2]
        total = z.new_zeros(high + 1, wide + 1, z.shape[2])
        total[1:, 1:] = z.cumsum(0).cumsum(1)
        top, bottom, left, right = self._boxes(high, wide).to(z.device)
        flat, line = total.flatten(0, 1), wide + 1
        box = flat[bottom * line + right] - flat[top * line + right]
        box -= flat[bottom * line + left] - flat[top * line + left]
        self._sums += box.view_as(self._sums)
        self._places += samples * ((bottom - top) * (right - left)).view_as(self._places)

    def _boxes(self, high: int, wide: int) -> Tensor:
        """Where tap b is while both taps of a pair meet the map: top, bottom, left, right, each of all pairs."""
        if (high, wide) not in self._known_boxes:
            rows, columns = self._spans(0, high), self._spans(1, wide)
            pairs = product(self.taps, repeat=2)
            boxes = [(*rows[a[0], b[0]], *columns[a[1], b[1]]) for a, b in pairs]
            self._known_boxes[high, wide] = torch.tensor(boxes).T
        return self._known_boxes[high, wide]

    def _spans(self, axis: int, size: int) -> dict[Pair, Pair]:
        d, found = self.dilation[axis], {}
        for a, b in product(range(self.kernel[axis]), repeat=2):
            before, after = self._cuts(axis, a, b)
            found[a, b] = max(0, d * (b - a)) + before, size - max(0, d * (a - b)) - after
        return found


def worth_it(kernel: Pair, dilation: Pair, padding: tuple[Pair, Pair], size: Pair) -> bool:
    """Whether distances ask for fewer products than unfolding, on maps of one size.

    >>> zeros = (1, 1), (1, 1)
    >>> worth_it((3, 3), (1, 1), zeros, (8, 8)), worth_it((3, 3), (1, 1), zeros, (1, 1))
    (True, False)
    """
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    if any(n < r for n, r in zip(size, reach)) or max(kernel) == 1:
        return False
    out = [n + sum(p) - r for n, p, r in zip(size, padding, reach)]
    distances = (2 * kernel[0] - 1) * (2 * kernel[1] - 1) / 2
    edges = 2 * kernel[0] * kernel[1] * sum(size)
    return distances * size[0] * (size[1] + reach[1]) + edges < (kernel[0] * kernel[1]) ** 2 * out[0] * out[1]


def _add(sums: dict, key: object, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _moved(first: Tensor, second: Tensor, offset: int, rows: int) -> Tensor:
    """Σ first[r] second[r + offset]ᵀ over the given number of rows, in float64 from products in the tensors' own dtype."""
    low, high = max(0, -offset), min(rows, len(second) - offset)
    total = first.new_zeros(first.shape[1], second.shape[1], dtype=torch.float64)
    for at in range(low, high, ROWS):
        end = min(at + ROWS, high)
        total += first[at:end].T @ second[at + offset : end + offset]
    return total
