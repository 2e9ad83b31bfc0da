"""Two networks' units at one site: what is found from their joint moments, without another pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable
from lineament.measure.alignment import information, sparse
from lineament.measure.alignment.clusters import UnitClusters, unit_clusters
from lineament.measure.alignment.joint import (
    JointMoments,
    Second,
    alive,
    correlations_of,
    jackknife,
    rotated_correlations,
)
from lineament.measure.alignment.matching import Matching, matching, mean_activations, overlap, semi_matching
from lineament.measure.alignment.similarity import MEASURES, refused, ridge, similarity


@dataclass(frozen=True)
class Null(Readable):
    """What matching finds where units cannot be the same: the scores of :attr:`SiteAlignment.semi` and ``match``, found anew."""

    semi: Float[Tensor, " units"]
    match: Float[Tensor, " pairs"]

    @property
    def threshold(self) -> float:
        """The score that 95 % of the one-to-one pairs of living units stay under; beside a dead one it is exactly 0."""
        living = self.match[self.match != 0]
        return float(living.double().quantile(0.95)) if len(living) else 0.0


@dataclass(frozen=True)
class SimilarityRow(Readable):
    """One measure of similarity at one site; ``value`` is ``None`` where it was ``refused``, for the reason given."""

    name: str
    value: float | None
    error: float | None
    shuffled: float | None
    kind: str
    range: tuple[float, float]
    invariant: str
    refused: str = ""


@dataclass(frozen=True)
class SiteAlignment(Readable):
    """Two networks' units at one site.

    Attributes:
        site_a, site_b: where; ``images`` images at ``samples`` places in all.
        correlations: between the units of a (rows) and of b; 0 beside a dead unit.
        semi, back: each unit of a with its best of b, and each of b with its best of a.
        match: the one-to-one matching with the largest sum.
        errors: of the correlations of ``match``'s pairs, by leaving out blocks of images.
        semi_mean, match_mean, overlap: over the units that are not dead, each with its error in ``mean_errors``.
        nulls: what each null gives.
        dead_a, dead_b: units that hold one value on every sample.
    """

    site_a: str
    site_b: str
    images: int
    samples: int
    correlations: Float[Tensor, "units_a units_b"]
    semi: Matching
    back: Matching
    match: Matching
    errors: Float[Tensor, " pairs"] | None
    semi_mean: float
    match_mean: float
    overlap: float
    mean_errors: tuple[float, float] | None
    nulls: dict[str, Null]
    dead_a: tuple[int, ...]
    dead_b: tuple[int, ...]
    moments: JointMoments = field(repr=False)
    nets: tuple[int, int] = field(default=(0, 1), repr=False)
    held_out: float = field(default=0.5, repr=False)

    @property
    def found(self) -> Bool[Tensor, " pairs"]:
        """Which pairs correlate more than 95 % of those between shuffled images."""
        require("shuffled" in self.nulls, "nulls: got none of 'shuffled', which says what chance gives")
        return self.match.values > self.nulls["shuffled"].threshold

    @property
    def living(self) -> Bool[Tensor, " pairs"]:
        """Which pairs of ``match`` are of two units that are not dead."""
        rows, columns = (torch.tensor(dead, dtype=torch.long) for dead in (self.dead_a, self.dead_b))
        return ~(torch.isin(self.match.rows, rows) | torch.isin(self.match.columns, columns))

    @property
    def most(self) -> int:
        """How many units could have a partner: the living ones of the network that has fewer."""
        return min(len(self.semi.values) - len(self.dead_a), len(self.back.values) - len(self.dead_b))

    @cached_property
    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the units of a, of those of b, and between them."""
        return _parts(self.moments.total(), self.moments, self.nets)

    def sparse_maps(
        self,
        penalties: Sequence[float] = sparse.PENALTIES,
        *,
        reverse: bool = False,
        most: int | None = None,
        tolerance: float = 1e-6,
        seed: int = 0,
    ) -> sparse.SparseMaps:
        """Each unit of b from a few units of a (``reverse``: of a from b's), fitted on some images and judged on the others.

        Units are brought to variance 1 over all images and to mean 0 over those of the fit. ``most``: map so many units, drawn from ``seed``.
        """
        halves, sources, targets = self._halves(reverse)
        if most is not None and len(targets) > most:
            order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
            chosen = order[:most].sort().values
            halves, targets = [(g, q[:, chosen], v[chosen]) for g, q, v in halves], targets[chosen]
        fit, judge = halves
        weights = sparse.lasso_path(*fit[:2], penalties, tolerance=tolerance, polish=False)
        own = fit[0].diagonal()
        best = (fit[1].abs() / own.sqrt()[:, None]).argmax(0)
        each = torch.arange(len(best))
        single = torch.zeros_like(fit[1].T)
        single[each, best] = fit[1][best, each] / own[best]
        return sparse.SparseMaps(
            tuple(map(float, penalties)),
            weights,
            sparse.half_mse(weights, *judge),
            sparse.half_mse(weights, *fit),
            (weights != 0).sum(-1),
            sparse.half_mse(single, *judge),
            sparse.dense_half_mse(fit, judge),
            targets,
            sources,
        )

    def unpredicted(self, *, reverse: bool = False, above: float = 0.4) -> tuple[Tensor, Tensor]:
        """The units of b that no combination of a's predicts (``reverse``: of a, from b's), and the held-out half-MSE of all.

        A unit is among them where the best dense map of all leaves more than ``above``; 0.5 is what its mean alone leaves, and a dead unit is left out.
        """
        (fit, judge), _, targets = self._halves(reverse)
        errors = torch.full(
            (self.moments.sizes[self.nets[0 if reverse else 1]],), torch.nan, dtype=torch.float64
        )
        errors[targets] = sparse.dense_half_mse(fit, judge)
        return (errors > above).nonzero().flatten(), errors

    def _halves(self, reverse: bool) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor, Tensor]:
        """For the images of the fit and the others: E[x xᵀ], E[x y], E[y²] of the live units; and which units these are."""
        source, target = self.nets[::-1] if reverse else self.nets
        fit, judge = self.moments.halves(self.held_out)
        living = alive(fit, self.moments.resolution) & alive(judge, self.moments.resolution)
        # By all images: a unit that only one of the halves sees active would be divided by nearly nothing.
        whole = Second.of([fit, judge])
        variance = whole.scatter.diagonal() / whole.count
        scale = torch.where(living, variance.clamp_min(1e-300).sqrt(), torch.ones_like(variance))
        at = [torch.arange(len(living))[self.moments.slice(net)] for net in (source, target)]
        x, y = (rows[living.cpu()[rows]] for rows in at)
        require(
            len(x) > 0 and len(y) > 0,
            f"site {self.site_a!r}: every unit of one network is dead, so that there is nothing to map",
        )
        away = (judge.mean - fit.mean) / scale
        found = []
        for moments, shift in ((fit, torch.zeros_like(away)), (judge, away)):
            table = (moments.covariance / torch.outer(scale, scale) + torch.outer(shift, shift)).cpu()
            found.append((table[x][:, x], table[x][:, y], table.diagonal()[y]))
        return found, x - int(at[0][0]), y - int(at[1][0])

    def clusters(self, clusters: int, *, method: str = "spectral", seed: int = 0) -> UnitClusters:
        """Groups of the units of both networks, see :func:`~lineament.measure.alignment.clusters.unit_clusters`."""
        a, b, ab = self._correlations()
        joint = torch.cat([torch.cat([a, ab], 1), torch.cat([ab.T, b], 1)])
        return unit_clusters(joint, [len(a), len(b)], clusters, method=method, seed=seed)

    def information(
        self, *, bins: information.Bins = 10, bias: str = "miller_madow"
    ) -> Float[Tensor, "units_a units_b"]:
        """Mutual information between the units, on a seeded sample of the rows, see :func:`~lineament.measure.alignment.information.mutual_information`."""
        require(len(self.moments.rows) > 0, "information: no rows were kept beside the moments")
        a, b = (self.moments.rows[:, self.moments.slice(net)] for net in self.nets)
        return information.mutual_information(a, b, bins=bins, bias=bias)

    def mean_activations(self) -> dict[str, Tensor]:
        """See :func:`~lineament.measure.alignment.matching.mean_activations`."""
        a, b = (self.moments.means(net).cpu() for net in self.nets)
        return mean_activations(a, b, self.match)

    def similarities(self, names: Sequence[str] | None = None, *, errors: bool = True) -> list[SimilarityRow]:
        """Measures of the two representations as wholes, each beside its value between shuffled images.

        A measure that says little on so few samples is refused, with the reason. The ridge maps are judged on held-out images.
        """
        found = []
        living = [~torch.isin(torch.arange(len(m)), torch.tensor(d, dtype=torch.long)) for m, d in
                  ((self.covariances[0], self.dead_a), (self.covariances[1], self.dead_b))]  # fmt: skip
        wholes = self.moments.left_out() if errors else ()
        left = [_alive_parts(_parts(whole, self.moments, self.nets), living) for whole in wholes]
        for name in list(MEASURES) if names is None else names:
            measure = MEASURES[checks.one_of("names", name, MEASURES)]
            told = (measure.kind, measure.range, measure.invariant)
            reason = refused(name, self.samples, int(living[0].sum() + living[1].sum()))
            if not (bool(living[0].any()) and bool(living[1].any())):
                reason = "every unit of one network is dead"
            if reason:
                found.append(SimilarityRow(name, None, None, None, *told, reason))
                continue
            if name.startswith("ridge"):
                value, spread, null = self._ridge(name, living), None, None
            else:
                a, b, ab = _alive_parts(self.covariances, living)
                value = similarity(name, a, b, ab)
                spread = float(jackknife([similarity(name, *parts) for parts in left])) if left else None
                null = self._shuffled(name, living)
            found.append(SimilarityRow(name, value, spread, null, *told))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, without the moments and the matrix of correlations."""
        left_out = ("moments", "nets", "correlations")
        return {
            **{
                name: results.plain(getattr(self, name))
                for name in self.__dataclass_fields__
                if name not in left_out
            },
        }

    def plot(self, ax: Any = None) -> Any:
        """The correlations sorted by semi-matching, one-to-one beside them, and the bands of the nulls."""
        ax = results.axes(ax)
        order = self.semi.values.argsort(descending=True)
        ax.plot(self.semi.values[order].numpy(), color="C0", label="best unit")
        matched = torch.full((len(order),), torch.nan, dtype=self.match.values.dtype)
        matched[self.match.rows] = self.match.values
        ax.plot(matched[order].numpy(), ".", color="C1", label="one to one")
        for number, (name, null) in enumerate(self.nulls.items()):
            values = null.match.sort(descending=True).values
            ax.plot(
                torch.linspace(0, len(order) - 1, len(values)).numpy(),
                values.numpy(),
                ":",
                color=f"C{number + 2}",
                label=name,
            )
        ax.set(xlabel=f"units of {self.site_a}", ylabel="correlation")
        ax.legend()
        return ax

    def plot_matrix(self, ax: Any = None) -> Any:
        """The correlations with the pairs on the diagonal, the best first."""
        ax = results.axes(ax)
        order = self.match.values.argsort(descending=True)
        shown = self.correlations[self.match.rows[order]][:, self.match.columns[order]]
        image = ax.imshow(shown.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        ax.figure.colorbar(image, ax=ax, label="correlation")
        ax.set(xlabel=f"units of b, {self.site_b}", ylabel=f"units of a, {self.site_a}")
        return ax

    def _correlations(self) -> tuple[Tensor, Tensor, Tensor]:
        n, m = self.nets
        whole = self.moments.correlations().cpu()
        one, two = self.moments.slice(n), self.moments.slice(m)
        return whole[one, one], whole[two, two], whole[one, two]

    def _ridge(self, name: str, living: list[Tensor]) -> float:
        fit, judge = (
            _alive_parts(_parts(half, self.moments, self.nets), living)
            for half in self.moments.halves(self.held_out)
        )
        if name == "ridge_a_from_b":
            fit, judge = ((b, a, ab.T) for a, b, ab in (fit, judge))
        return ridge(fit, judge)

    def _shuffled(self, name: str, living: list[Tensor]) -> float | None:
        pair = min(self.nets), max(self.nets)
        if pair not in self.moments.shuffled:
            return None
        cross = self.moments.shuffled[pair].covariance.cpu()
        a, b, _ = self.covariances
        return similarity(name, *_alive_parts((a, b, cross if self.nets == pair else cross.T), living))


def site_alignment(
    group: Sequence[str],
    moments: JointMoments,
    nets: tuple[int, int],
    nulls: Sequence[str],
    held_out: float,
    seed: int,
) -> SiteAlignment:
    """What the moments of one site say of the pair ``nets`` of its networks; ``group`` names the site in each."""
    n, m = nets
    one, two = moments.slice(n), moments.slice(m)
    whole = moments.correlations().cpu()
    scores = whole[one, two]
    semi, back, match = semi_matching(scores), semi_matching(scores.T), matching(scores)
    living = [~torch.isin(torch.arange(moments.sizes[net]), moments.dead(net).cpu()) for net in nets]

    def means(table: Tensor) -> Tensor:
        best, pairs = semi_matching(table), matching(table)
        both = living[0][pairs.rows] & living[1][pairs.columns]
        return torch.stack([_mean(best.values[living[0]]), _mean(pairs.values[both])])

    left = [correlations_of(each, moments.resolution).cpu()[one, two] for each in moments.left_out()]
    semi_mean, match_mean = means(scores).tolist()
    made: dict[str, Null] = {}
    for null in nulls:
        if null == "shuffled":
            table = moments.shuffled_correlations(n, m).cpu()
        elif null == "rotated":
            table = rotated_correlations(scores, whole[two, two], seed)
        else:
            continue
        made[null] = Null(semi_matching(table).values, matching(table).values)
    errors = jackknife([table[match.rows, match.columns] for table in left]) if left else None
    spread = jackknife([means(table) for table in left]).tolist() if left else None
    both = living[0][match.rows] & living[1][match.columns]
    living_scores = scores[living[0]][:, living[1]]
    return SiteAlignment(
        group[n],
        group[m],
        moments.images,
        moments.count,
        scores,
        semi,
        back,
        match,
        errors,
        semi_mean,
        match_mean,
        overlap(living_scores) if bool(both.any()) else 0.0,
        None if spread is None else (spread[0], spread[1]),
        made,
        tuple((~living[0]).nonzero().flatten().tolist()),
        tuple((~living[1]).nonzero().flatten().tolist()),
        moments,
        nets,
        held_out,
    )


def _mean(values: Tensor) -> Tensor:
    return values.double().mean() if len(values) else torch.zeros((), dtype=torch.float64)


def _parts(whole: Second, moments: JointMoments, nets: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    covariance = whole.covariance.cpu()
    one, two = moments.slice(nets[0]), moments.slice(nets[1])
    return covariance[one, one], covariance[two, two], covariance[one, two]


def _alive_parts(parts: Sequence[Tensor], living: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    a, b, ab = parts
    return a[living[0]][:, living[0]], b[living[1]][:, living[1]], ab[living[0]][:, living[1]]
