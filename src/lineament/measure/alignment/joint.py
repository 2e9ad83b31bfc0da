"""What several networks' units have in common, in one pass: the moments of all units together, by blocks of images.

A sample is an image at a position (a token of a text); both networks see the same one. Everything linear follows from these moments
without another pass: correlations, matchings, sparse and ridge maps, canonical correlations, clusters. Images are dealt to ``blocks``
at random, whole images only, because positions of one image are no independent samples: errors come from leaving a block out, and maps are
judged on the blocks that they were not fitted to. Beside them stands a null: the images of one network exchanged among themselves, each
position kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import NotFiniteError, require
from lineament.core.statistics.accumulation import Stream, working
from lineament.core.statistics.moments import Covariance, CrossCovariance

_MIX = 1_000_003  # spreads small seeds and counters over the generators' seeds


@dataclass(frozen=True)
class Second:
    """Count, means and scatter of some blocks together, or of all but one."""

    count: int
    mean: Float[Tensor, " units"]
    scatter: Float[Tensor, "units units"]

    @classmethod
    def of(cls, blocks: Sequence[Covariance | Second]) -> Second:
        """The blocks together: S = Σ S_b + Σ n_b (μ_b - μ)(μ_b - μ)ᵀ."""
        counts = torch.tensor([float(block.count) for block in blocks], dtype=torch.float64)
        means = torch.stack([block.mean for block in blocks])
        counts = counts.to(means.device)
        mean = (counts[:, None] * means).sum(0) / counts.sum()
        away = (means - mean) * counts.sqrt()[:, None]
        scatter = away.T @ away
        for block in blocks:
            scatter += block.scatter
        return cls(int(counts.sum()), mean, scatter)

    def without(self, block: Covariance | Second) -> Second:
        """What is left when a block is taken out again."""
        count = self.count - block.count
        mean = (self.count * self.mean - block.count * block.mean) / count
        away = block.mean - mean
        scatter = self.scatter - block.scatter
        return Second(count, mean, scatter.addr_(away, away, alpha=-count * block.count / self.count))

    @property
    def covariance(self) -> Float[Tensor, "units units"]:
        return self.scatter / self.count


class JointMoments(Stream):
    """Means and covariances of the units of several networks on the same samples; joins with another by ``a + b``.

    Args:
        sizes: how many units each network has.
        blocks: how many blocks the images are dealt to, at least 1.
        nulls: ``("shuffled",)`` also gathers the moments with the images of the second network of each pair exchanged.
        keep: so many rows are kept as they are, a seeded sample of all, for what moments do not give (mutual information).
        seed: of the dealing, the exchange and the sample.

    >>> moments = JointMoments([1, 1], blocks=2)
    >>> x = torch.arange(8.0).reshape(4, 2, 1)  # four images, two positions, one unit
    >>> moments.update([x, -x])
    >>> moments.correlations(0, 1).tolist(), moments.images, moments.count
    ([[-1.0]], 4, 8)
    """

    _saved = ("sizes", "nulls", "keep", "seed", "images", "resolution", "blocks", "shuffled", "rows", "ranks")

    def __init__(
        self,
        sizes: Sequence[int] = (),
        *,
        blocks: int = 10,
        nulls: Sequence[str] = ("shuffled",),
        keep: int = 0,
        seed: int = 0,
    ) -> None:
        checks.number("blocks", blocks, low=1, integer=True)
        self.sizes = list(sizes)
        self.nulls = list(nulls)
        self.keep = keep
        self.seed = seed
        self.images = 0
        self.resolution = 0.0
        self.blocks = [Covariance(correction=0) for _ in range(blocks)]
        pairs = [(n, m) for n in range(len(self.sizes)) for m in range(n + 1, len(self.sizes))]
        self.shuffled = {pair: CrossCovariance(correction=0) for pair in pairs if "shuffled" in self.nulls}
        self.rows = torch.zeros(0, sum(self.sizes))
        self.ranks = torch.zeros(0, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Samples seen: images times positions."""
        return sum(block.count for block in self.blocks)

    def update(
        self,
        units: Sequence[Float[Tensor, "images positions units"]],
        present: Bool[Tensor, "images positions"] | None = None,
        *,
        before: int | None = None,
    ) -> None:
        """Take in a batch: of each network, what its units hold for the same images at the same positions.

        Args:
            present: which positions there are, where texts differ in length.
            before: how many images of the data come before these; those taken in so far by default. Where parts of the data are gathered
                on their own and joined, it makes the draws of the parts those of the whole.

        Raises:
            InputError: other images or positions in one of the networks, other units than before. NotFiniteError: NaN or infinity.
        """
        require(
            len(units) == len(self.sizes),
            f"units: got {len(units)} networks, expected {len(self.sizes)} as before",
        )
        shape = units[0].shape[:2]
        for net, (part, size) in enumerate(zip(units, self.sizes)):
            checks.tensor(f"units[{net}]", part, shape=("images", "positions", size), finite=False)
            require(
                part.shape[:2] == shape,
                f"units[{net}]: got {checks.show(part)}, expected {shape[0]} images and {shape[1]} positions as in the first network",
            )
        wide = [working(part) for part in units]
        common = max((part.dtype for part in wide), key=lambda dtype: dtype.itemsize)
        self.resolution = max(self.resolution, torch.finfo(common).eps)
        device = wide[0].device
        wide = [part.to(device, common) for part in wide]
        for net, part in enumerate(wide):
            if not bool(torch.isfinite(part.sum())):
                bad = (~torch.isfinite(part)).flatten(0, 1).any(0).nonzero().flatten()
                if len(bad):
                    raise NotFiniteError(
                        f"network {net}: unit {int(bad[0])} is NaN or infinite ({len(bad)} of {part.shape[2]} units are)"
                    )
        stacked = torch.cat(wide, dim=2)
        before = self.images if before is None else before
        dealt = self.dealt(shape[0], before).to(device)
        for number, block in enumerate(self.blocks):
            inside = stacked[dealt == number] if len(self.blocks) > 1 else stacked
            inside = inside.flatten(0, 1) if present is None else inside[present[dealt == number]]
            if len(inside):
                block.update(inside)
        everywhere = stacked.flatten(0, 1) if present is None else stacked[present]
        if self.shuffled and shape[0] > 1:
            generator = torch.Generator().manual_seed((self.seed * _MIX + before + 1) % 2**63)
            for (n, m), cross in self.shuffled.items():
                first, second = self._exchanged(wide[n], wide[m], present, generator)
                cross.update(first, second)
        self._sample(everywhere, before)
        self.images += shape[0]

    def dealt(self, images: int, before: int) -> Int[Tensor, " images"]:
        """The block of each image after so many others: every run of as many images as there are blocks has one of each."""
        number = len(self.blocks)
        if number == 1:
            return torch.zeros(images, dtype=torch.long)
        first, last = before // number, (before + images - 1) // number
        rounds = []
        for turn in range(first, last + 1):
            generator = torch.Generator().manual_seed((self.seed * _MIX + turn) % 2**63)
            rounds.append(torch.randperm(number, generator=generator))
        start = before - first * number
        return torch.cat(rounds)[start : start + images]

    def _exchanged(
        self, a: Tensor, b: Tensor, present: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The rows of a, and those of b for another image at the same position; none stays with itself."""
        count = len(a)
        order = torch.randperm(count, generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)  # a cycle through all images
        turned = b[other.to(b.device)]
        if present is None:
            return a.flatten(0, 1), turned.flatten(0, 1)
        both = present & present[other.to(present.device)]
        return a[both], turned[both]

    def _sample(self, rows: Tensor, before: int) -> None:
        if not self.keep:
            return
        generator = torch.Generator().manual_seed((self.seed * _MIX + before + 2) % 2**63)
        ranks = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        if len(self.ranks) == self.keep:
            chosen = (ranks < self.ranks.max()).nonzero().flatten()
            rows, ranks = rows[chosen.to(rows.device)], ranks[chosen]
        self.rows = torch.cat([self.rows.to(rows.dtype), rows.cpu()])
        self.ranks = torch.cat([self.ranks, ranks])
        if len(self.ranks) > self.keep:
            kept = self.ranks.argsort(stable=True)[: self.keep].sort().values
            self.rows, self.ranks = self.rows[kept], self.ranks[kept]

    def __add__(self, other: JointMoments) -> JointMoments:
        self._same(other)
        same = (self.sizes, len(self.blocks), self.nulls, self.keep) == (
            other.sizes,
            len(other.blocks),
            other.nulls,
            other.keep,
        )
        require(
            same,
            f"+: {self.sizes} units in {len(self.blocks)} blocks and {other.sizes} in {len(other.blocks)} do not match",
        )
        joined = JointMoments.from_state_dict(self.state_dict())
        joined.images += other.images
        joined.resolution = max(self.resolution, other.resolution)
        joined.blocks = [a + b for a, b in zip(self.blocks, other.blocks)]
        joined.shuffled = {pair: a + other.shuffled[pair] for pair, a in self.shuffled.items()}
        joined.rows = torch.cat([self.rows, other.rows])
        joined.ranks = torch.cat([self.ranks, other.ranks])
        if len(joined.ranks) > self.keep:
            kept = joined.ranks.argsort(stable=True)[: self.keep].sort().values
            joined.rows, joined.ranks = joined.rows[kept], joined.ranks[kept]
        return joined

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self._saved},
            "blocks": [block.state_dict() for block in self.blocks],
            "shuffled": [[list(pair), cross.state_dict()] for pair, cross in self.shuffled.items()],
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.sizes, self.nulls = list(state["sizes"]), list(state["nulls"])
        self.blocks = [Covariance.from_state_dict(block) for block in state["blocks"]]
        self.shuffled = {
            (pair[0], pair[1]): CrossCovariance.from_state_dict(cross) for pair, cross in state["shuffled"]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state_dict` described."""
        self._load(state)

    def slice(self, net: int) -> slice:
        """Where the units of a network stand among all."""
        start = sum(self.sizes[:net])
        return slice(start, start + self.sizes[net])

    def total(self, chosen: Callable[[int], bool] = lambda block: True) -> Second:
        """The moments of some blocks, all by default."""
        found = [block for number, block in enumerate(self.blocks) if block.count and chosen(number)]
        require(bool(found), "JointMoments: 0 samples seen, expected at least one in each half")
        return Second.of(found)

    def halves(self, held_out: float = 0.5) -> tuple[Second, Second]:
        """The moments for fitting, and those of a share of the images for judging."""
        checks.number("held_out", held_out, low=0, high=1, open_low=True, open_high=True)
        number = len(self.blocks)
        require(number > 1, "blocks: got 1, expected at least 2, so that one can be held out")
        judged = min(max(round(number * held_out), 1), number - 1)
        return self.total(lambda block: block >= judged), self.total(lambda block: block < judged)

    def left_out(self) -> Iterator[Second]:
        """The moments without each block in turn, for the errors of what is computed from them; none where there is one block."""
        seen = [block for block in self.blocks if block.count]
        if len(seen) > 1:
            whole = Second.of(seen)
            yield from (whole.without(block) for block in seen)

    def means(self, net: int) -> Float[Tensor, " units"]:
        return self.total().mean[self.slice(net)]

    def deviations(self, correction: int = 0) -> list[Float[Tensor, " units"]]:
        """The standard deviation of each unit, of each network."""
        total = self.total()
        std = (total.scatter.diagonal() / (total.count - correction)).sqrt()
        return [std[self.slice(net)] for net in range(len(self.sizes))]

    def dead(self, net: int) -> Int[Tensor, " units"]:
        """The units of a network that hold the same value on every sample."""
        return (~alive(self.total(), self.resolution))[self.slice(net)].nonzero().flatten()

    def correlations(self, n: int | None = None, m: int | None = None) -> Float[Tensor, "units_a units_b"]:
        """Pearson's correlations between the units of two networks, or of all; 0 beside a dead unit (also with itself)."""
        found = correlations_of(self.total(), self.resolution)
        return found if n is None or m is None else found[self.slice(n), self.slice(m)]

    def shuffled_correlations(self, n: int, m: int) -> Float[Tensor, "units_a units_b"]:
        """The same between two networks that do not look at the same image: what matching finds where nothing is shared but the data's marginals."""
        require(
            bool(self.shuffled),
            "nulls: the shuffled null was not gathered; expected 'shuffled' among the nulls",
        )
        found = self.shuffled[min(n, m), max(n, m)]
        require(
            found.count > 1,
            "nulls: batches of one image have no other to exchange with; expected larger batches",
        )
        x, y = (_alive(s / found.count, mean, self.resolution) for s, mean in
                ((found.squares_x, found.mean_x), (found.squares_y, found.mean_y)))  # fmt: skip
        matrix = found.correlation * (x[:, None] & y[None])
        return matrix if n < m else matrix.T


def alive(moments: Second, resolution: float) -> Bool[Tensor, " units"]:
    """Which units vary by more than the rounding of what they were computed in."""
    return _alive(moments.scatter.diagonal() / moments.count, moments.mean, resolution)


def _alive(variance: Tensor, mean: Tensor, resolution: float) -> Tensor:
    return variance > (4 * resolution * mean.abs()).square()


def correlations_of(moments: Second, resolution: float = 0.0) -> Float[Tensor, "units units"]:
    """Correlations of all units, 0 beside a dead one."""
    living = alive(moments, resolution)
    scale = torch.where(
        living, moments.scatter.diagonal().clamp_min(1e-300).rsqrt(), torch.zeros_like(moments.mean)
    )
    return (moments.scatter * scale * scale[:, None]).clamp_(-1, 1)


def rotated_correlations(
    correlations_ab: Float[Tensor, "units_a units_b"],
    correlations_bb: Float[Tensor, "units_b units_b"],
    seed: int = 0,
) -> Float[Tensor, "units_a units_b"]:
    """The correlations if b held its units in another basis: standardised units turned by a random rotation, in closed form.

    With R uniform over the orthogonal matrices, the turned units Rᵀy have the correlations C_ab R / sqrt(diag(Rᵀ C_bb R)) with a's. Matching that is
    as good as before says that the networks share a subspace and no units in it.
    """
    living = correlations_bb.diagonal() > 0
    size = int(living.sum())
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    turn = (q * r.diagonal().sign()).to(correlations_bb.device)
    inside = correlations_bb[living][:, living]
    variance = (turn * (inside @ turn)).sum(0)
    found = torch.zeros_like(correlations_ab)
    found[:, living] = correlations_ab[:, living] @ turn / variance.clamp_min(1e-300).sqrt()
    return found.clamp(-1, 1)


def jackknife(values: Sequence[Tensor] | Sequence[float]) -> Tensor:
    """The standard error of a quantity from its values without each block in turn: sqrt((g-1)/g Σ (θ_b - mean)²)."""
    found = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
    return ((len(found) - 1) * found.var(0, correction=0)).sqrt()
