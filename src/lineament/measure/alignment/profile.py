"""Would another training find the same units? Two networks, or several, aligned unit by unit in one pass over the data.

Li, Yosinski, Clune, Lipson, Hopcroft (2015, arXiv 1511.07543): match units by their correlations, one to one and greedily; say each unit of one
network by a few of the other; cluster the units of both. Correlations are inflated by what the images have in common, so each number stands beside
its nulls: other images at the same position ("shuffled"), the other network's units turned at random within the space that they span
("rotated"), and, on request, the same architectures untrained. Errors come from leaving out blocks of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require, show
from lineament.core.models import device_of, moved
from lineament.core.results import Readable
from lineament.core.sites.depth import default_sites
from lineament.core.sites.naming import resolve
from lineament.core.sites.naming import sites as site_names
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
from lineament.measure.alignment.matching import (
    Matching,
    core_units,
    matching,
    mean_activations,
    overlap,
    semi_matching,
)
from lineament.measure.alignment.similarity import (
    MEASURES,
    kernel_blocks,
    normalised_hsic,
    refused,
    ridge,
    similarity,
)
from lineament.measure.alignment.units import (
    Collected,
    Reading,
    Step,
    Transform,
    gather,
    steps_of,
    text_steps,
)

NULLS = ("shuffled", "rotated", "untrained")
Sites = str | Sequence[str] | Mapping[str, str] | None


@dataclass(frozen=True)
class Null(Readable):
    """What matching finds where units cannot be the same: the scores of :attr:`SiteAlignment.semi` and ``match``, found anew."""

    semi: Float[Tensor, " units"]
    match: Float[Tensor, " pairs"]

    @property
    def threshold(self) -> float:
        """The score that 95 % of the one-to-one pairs stay under."""
        return float(self.match.double().quantile(0.95))


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

    @cached_property
    def _moments(self) -> tuple[Tensor, ...]:
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
                  ((self._moments[0], self.dead_a), (self._moments[1], self.dead_b))]  # fmt: skip
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
                a, b, ab = _alive_parts(self._moments, living)
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
        a, b, _ = self._moments
        return similarity(name, *_alive_parts((a, b, cross if self.nets == pair else cross.T), living))


@dataclass(frozen=True)
class Alignment(Readable):
    """Two networks, site by site.

    Attributes:
        sites: {site of a: what was found there}.
        cka: debiased, of every site of a (rows) with every one of b, maps averaged over their positions; ``cka_errors`` beside it.
        top_a, top_b: {site: the samples that move each unit most (rank, unit)}, by their place in the data.
    """

    sites: dict[str, SiteAlignment]
    images: int
    cka: Float[Tensor, "sites_a sites_b"]
    cka_errors: Float[Tensor, "sites_a sites_b"] | None
    top_a: dict[str, Int[Tensor, "ranks units"]]
    top_b: dict[str, Int[Tensor, "ranks units"]]
    notes: tuple[str, ...] = ()

    def __getitem__(self, site: str) -> SiteAlignment:
        require(site in self.sites, f"site {site!r} was not aligned{checks.suggest(site, self.sites)}")
        return self.sites[site]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "sites": {name: site.to_dict() for name, site in self.sites.items()},
            "images": self.images,
            "cka": self.cka.tolist(),
            "cka_errors": None if self.cka_errors is None else self.cka_errors.tolist(),
            "notes": list(self.notes),
        }

    def plot(self, ax: Any = None) -> Any:
        """Mean correlations of the matched units by site, and of each null."""
        ax = results.axes(ax)
        names, values = list(self.sites), list(self.sites.values())
        bars = [site.mean_errors[1] if site.mean_errors else 0.0 for site in values]
        ax.errorbar(
            range(len(names)), [site.match_mean for site in values], yerr=bars, fmt="o-", label="one to one"
        )
        for name in dict.fromkeys(null for site in values for null in site.nulls):
            means = [float(site.nulls[name].match.mean()) for site in values]
            ax.plot(range(len(names)), means, ":", label=name)
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right", parse_math=False)
        ax.set_ylabel("mean correlation of matched units")
        ax.legend()
        return ax


@dataclass(frozen=True)
class Alignments(Readable):
    """Several networks, every pair of them; ``pairs[n, m]`` is the alignment of network n with m."""

    pairs: dict[tuple[int, int], Alignment]

    def core(self, site: str, threshold: float) -> dict[int, Tensor]:
        """The units of each network at a site (of the first network) whose match in every other network correlates above a threshold."""
        scores = {}
        for pair, found in self.pairs.items():
            at = list(self.pairs[0, 1].sites).index(self.pairs[0, 1][site].site_a)
            scores[pair] = list(found.sites.values())[at].correlations
        return core_units(scores, threshold)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {f"{n},{m}": found.to_dict() for (n, m), found in self.pairs.items()}


@dataclass(frozen=True)
class AlignmentOptions:
    """What an alignment rarely needs to be told.

    Attributes:
        resize: ``"pool"`` averages the larger of two maps down to the smaller where they differ.
        data_b: the same samples in the same order for the second network, where it takes them otherwise preprocessed.
        tokenizers: of two language models, for which ``data`` is a list of texts.
        keep: rows kept beside the moments, for mutual information.
        checkpoint: a pass that is cut off goes on from there with the same numbers.

    >>> AlignmentOptions().keep
    4096
    """

    resize: str | None = None
    data_b: Any = None
    tokenizers: Sequence[Any] | None = None
    keep: int = 4096
    checkpoint: Checkpoint | None = None


def alignment(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Any,
    *,
    sites: Sites = None,
    positions: int = 64,
    held_out: float = 0.5,
    nulls: Sequence[str] = ("shuffled", "rotated"),
    blocks: int = 10,
    transform: Transform | tuple[Transform, Transform] | None = None,
    seed: int = 0,
    options: AlignmentOptions = AlignmentOptions(),
) -> Alignment:
    """Match the units of two networks on the same data, in one pass; both networks are left as they were.

    Args:
        model_a, model_b: any modules, on any devices.
        data: pairs ``(inputs, targets)`` of tensors, a ``Dataset``, a ``DataLoader`` or other batches, inputs alone, or what
            :func:`lineament.load.data.load_data` reads; texts where ``options`` has tokenizers.
        sites: names or globs that both networks have; ``{site of a: site of b}``; ``"nearest"``, sites at the same relative depth; by default the blocks
            of a where b has them too, else nearest.
        positions: read at most so many places of a map or a text.
        held_out: the share of images on which maps are judged.
        nulls: of ``"shuffled"``, ``"rotated"`` and ``"untrained"`` (both networks drawn anew, another pass).
        blocks: of images, for errors and for holding out.
        transform: what is made of the rows of a site first, such as a dictionary's ``encode``; one for both, or one each.
        seed: of every random choice.

    Raises:
        InputError: no common site, positions that do not meet, other samples for the two networks, fewer images than twice the blocks.
        NotFiniteError: NaN or infinity, with the network, the site and the unit.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = alignment(net, net, torch.randn(200, 4), sites="1")["1"]
    >>> round(found.match_mean, 6), found.match.columns.tolist()
    (1.0, [0, 1, 2, 3, 4, 5, 6, 7])
    """
    changes = list(transform) if isinstance(transform, tuple) else [transform] * 2
    models = [model_a, model_b]
    found, groups, notes = _pass(models, data, sites, positions, nulls, blocks, changes, seed, options)
    pair = _pair(found, groups, (0, 1), nulls, held_out, seed, notes)
    if "untrained" not in nulls:
        return pair
    from lineament.train.stacked import refreshed

    fresh = [refreshed(model, seed + number) for number, model in enumerate(models)]
    names = {group[0]: group[1] for group in groups}
    bare = AlignmentOptions(options.resize, options.data_b, options.tokenizers, 0)
    collected, _, _ = _pass(fresh, data, names, positions, (), blocks, changes, seed, bare)
    for site, moments in zip(pair.sites.values(), collected.moments):
        scores = moments.correlations(0, 1).cpu()
        site.nulls["untrained"] = Null(semi_matching(scores).values, matching(scores).values)
    return pair


def alignments(
    models: Sequence[nn.Module],
    data: Any,
    *,
    sites: Sites = None,
    positions: int = 64,
    held_out: float = 0.5,
    nulls: Sequence[str] = ("shuffled", "rotated"),
    blocks: int = 10,
    seed: int = 0,
    options: AlignmentOptions = AlignmentOptions(),
) -> Alignments:
    """Every pair of several networks in one pass; the arguments are those of :func:`alignment`.

    >>> _ = torch.manual_seed(0)
    >>> nets = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(3)]
    >>> sorted(alignments(nets, torch.randn(100, 4), sites="1").pairs)
    [(0, 1), (0, 2), (1, 2)]
    """
    models = checks.listed("models", models, "networks")
    require(len(models) >= 2, f"models: got {len(models)}, expected at least two networks")
    require(
        "untrained" not in nulls,
        "nulls: 'untrained' is for two networks; align an untrained pair beside these",
    )
    changes: list[Transform | None] = [None] * len(models)
    found, groups, notes = _pass(models, data, sites, positions, nulls, blocks, changes, seed, options)
    pairs = [(n, m) for n in range(len(models)) for m in range(n + 1, len(models))]
    return Alignments({pair: _pair(found, groups, pair, nulls, held_out, seed, notes) for pair in pairs})


def aligned(
    models: Sequence[nn.Module],
    sites: Sites,
    steps: Sequence[Step],
    reading: Reading,
    checkpoint: Checkpoint | None = None,
    nulls: Sequence[str] = ("shuffled", "rotated"),
) -> tuple[Alignment, list[Tensor]]:
    """The alignment of two networks over steps that were made for them, and what each answered where ``reading`` asks for it, by the samples' numbers."""
    groups, notes = _groups(models, sites, steps[0])
    if sites == "nearest" or (sites is None and any(len(set(group)) > 1 for group in groups)):
        reading = replace(reading, resize="pool")
    found = gather(models, groups, steps, reading, checkpoint=checkpoint)
    _enough(found, reading.blocks)
    answers = [found.answered(net) for net in range(len(found.answers))]
    return _pair(found, groups, (0, 1), nulls, 0.5, reading.seed, notes), answers


def _enough(found: Collected, blocks: int) -> None:
    require(
        found.samples >= 2 * blocks,
        f"data: got {found.samples} samples in {blocks} blocks, expected at least {2 * blocks}, or fewer blocks",
    )


def _pass(
    models: Sequence[nn.Module],
    data: Any,
    sites: Sites,
    positions: int,
    nulls: Sequence[str],
    blocks: int,
    changes: Sequence[Transform | None],
    seed: int,
    options: AlignmentOptions,
) -> tuple[Collected, list[tuple[str, ...]], tuple[str, ...]]:
    for null in nulls:
        checks.one_of("nulls", null, NULLS)
    checks.number("positions", positions, low=1, integer=True)
    checks.number("blocks", blocks, low=2, integer=True)
    checks.seed("seed", seed)
    if options.resize is not None:
        checks.one_of("resize", options.resize, ("pool",))
    if options.tokenizers is not None:
        steps: Any = text_steps(data, options.tokenizers, positions=positions, seed=seed)
    else:
        steps = steps_of(models, data, options.data_b, seed=seed)
    first = next(iter(steps), None)
    if first is None:
        raise InputError("data: got no batches, expected at least one")
    groups, notes = _groups(models, sites, first)
    nearest = sites == "nearest" or (sites is None and any(len(set(group)) > 1 for group in groups))
    gathered = tuple(null for null in nulls if null == "shuffled")
    resize = "pool" if nearest else options.resize
    reading = Reading(positions, blocks, gathered, resize, seed, options.keep)
    found = gather(models, groups, steps, reading, transforms=changes, checkpoint=options.checkpoint)
    _enough(found, blocks)
    return found, groups, notes


def _groups(
    models: Sequence[nn.Module], sites: Sites, first: Step
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The sites that are aligned with each other, one of each network."""
    if isinstance(sites, Mapping):
        require(
            len(models) == 2, f"sites: got a mapping for {len(models)} networks, expected names that all have"
        )
        for model, names in zip(models, (list(sites), list(sites.values()))):
            resolve(model, names)
        return list(sites.items()), ()
    if sites is not None and sites != "nearest":
        patterns = [sites] if isinstance(sites, str) else list(sites)
        own = [
            list(dict.fromkeys(n for pattern in patterns for n in site_names(model, pattern)))
            for model in models
        ]
        common = [name for name in own[0] if all(name in names for names in own[1:])]
        require(
            bool(common),
            f"sites: {show(sites)} names {', '.join(own[0][:3])} in the one network and {', '.join(own[1][:3])} in the other, expected a common "
            "name, {site of a: site of b}, or 'nearest'",
        )
        return [(name,) * len(models) for name in common], ()
    blocks = [_blocks(model, inputs) for model, inputs in zip(models, first.inputs)]
    if sites is None:
        common = [name for name in blocks[0] if all(name in names for names in blocks[1:])]
        if 2 * len(common) > max(map(len, blocks)):
            return [(name,) * len(models) for name in common], ()
    groups = []
    for at, name in enumerate(blocks[0]):
        depth = at / max(len(blocks[0]) - 1, 1)
        groups.append((name, *(names[round(depth * (len(names) - 1))] for names in blocks[1:])))
    told = ", ".join(" with ".join(group) for group in groups)
    return groups, (f"sites at the same relative depth are compared: {told}",)


def _blocks(model: nn.Module, inputs: Any) -> tuple[str, ...]:
    if isinstance(inputs, Mapping):
        inputs = inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values()))
    elif isinstance(inputs, (tuple, list)):
        inputs = inputs[0]
    return default_sites(model, moved(inputs[:2], device_of(model)))


def _pair(
    found: Collected,
    groups: Sequence[Sequence[str]],
    nets: tuple[int, int],
    nulls: Sequence[str],
    held_out: float,
    seed: int,
    notes: tuple[str, ...],
) -> Alignment:
    sites = {}
    for group, moments in zip(groups, found.moments):
        made = _site(group, moments, nets, nulls, held_out, seed)
        name = made.site_a if made.site_a not in sites else f"{made.site_a} with {made.site_b}"
        sites[name] = made
    number = len(groups[0])
    rows, columns = ([number * k + net for k in range(len(groups))] for net in nets)
    whole, left = kernel_blocks(found.kernels)
    cka = normalised_hsic(whole)[rows][:, columns]
    errors = jackknife([normalised_hsic(each)[rows][:, columns] for each in left]) if left else None
    tops = [
        {group[net]: found.top_samples[number * k + net] for k, group in enumerate(groups)} for net in nets
    ]
    return Alignment(sites, found.samples, cka, errors, tops[0], tops[1], notes)


def _site(
    group: Sequence[str],
    moments: JointMoments,
    nets: tuple[int, int],
    nulls: Sequence[str],
    held_out: float,
    seed: int,
) -> SiteAlignment:
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
