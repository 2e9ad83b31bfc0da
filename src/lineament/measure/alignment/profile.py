"""Would another training find the same units? Two networks, or several, aligned unit by unit in one pass over the data.

Li, Yosinski, Clune, Lipson, Hopcroft (2015, arXiv 1511.07543): match units by their correlations, one to one and greedily; say each unit of one
network by a few of the other; cluster the units of both. Correlations are inflated by what the images have in common, so each number stands beside
its nulls: other images at the same position ("shuffled"), the other network's units turned at random within the space that they span
("rotated"), and, on request, the same architectures untrained. Errors come from leaving out blocks of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, require, show
from lineament.core.models import device_of, moved
from lineament.core.results import Readable
from lineament.core.sites.depth import default_sites
from lineament.core.sites.naming import resolve
from lineament.core.sites.naming import sites as site_names
from lineament.measure.alignment.joint import jackknife
from lineament.measure.alignment.matching import core_units, matching, semi_matching
from lineament.measure.alignment.similarity import kernel_blocks, normalised_hsic
from lineament.measure.alignment.site import Null, SiteAlignment, site_alignment
from lineament.measure.alignment.steps import Step, steps_of
from lineament.measure.alignment.units import Collected, Reading, Transform, gather
from lineament.measure.alignment.word_ends import text_steps

NULLS = ("shuffled", "rotated", "untrained")
Sites = str | Sequence[str] | Mapping[str, str] | None


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

    >>> import torch
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

    >>> import torch
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
        made = site_alignment(group, moments, nets, nulls, held_out, seed)
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
