"""How much of a layer's variance does each feature explain? The representation regressed on the feature, never the feature decoded.

Lampinen, Chan, Hermann (TMLR 2024, arXiv 2405.05847): features that a network computes equally well take very unequal shares of its representations. With W fitted on
samples V and judged on others T, both centred by V's mean,

    R²_f = 1 - Σ_T ‖φ - μ - W f‖² / Σ_T ‖φ - μ‖²         (``reduction="ratio"``),   E_T[1 - ‖φ - μ - W f‖² / ‖φ - μ‖²]   (``"per_sample"``).

All features and sites come from sums over one pass of V and one of T: no N x d matrix is kept. Decoding f from φ gives about 1 for every feature that is computed, and hides
the difference; it stands beside R² as ``decodable``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.batching import progress
from lineament.core.checks import require
from lineament.core.models import called, frozen
from lineament.core.results import Readable
from lineament.core.sites.activations import capture
from lineament.core.sites.depth import tokens_of
from lineament.core.sites.naming import sites as site_names
from lineament.data.samples import Samples
from lineament.load.data import load_data
from lineament.load.input_layout import taken
from lineament.measure.bias.density import density, participation
from lineament.measure.bias.sums import decoded, gathered, inverse, left_over, per_sample
from lineament.measure.collapse.profile import Pool, find_head, pooled

REDUCTIONS = ("ratio", "per_sample")
_DEPENDENT = 0.1


@dataclass(frozen=True)
class FeatureVariance(Readable):
    """One feature at one site.

    Attributes:
        r2: the share of the variance that it explains on samples not fitted to; it may be slightly below 0.
        unique: what the joint R² of all features loses without it.
        units: R² of each unit; 0 for dead ones.
        density: the share of units above ``threshold``; participation: (Σu)² / (d Σu²).
        decodable: how well a linear read-out of the representation gives it: accuracy of classes, R² of values; ``None`` where nothing was kept.
    """

    name: str
    r2: float
    unique: float
    units: Float[Tensor, " units"]
    density: float
    participation: float
    decodable: float | None = None


@dataclass(frozen=True)
class SiteVariance(Readable):
    """All features at one site; ``joint`` is their R² together, ``total`` the representation's variance per sample on T, ``dead`` units that never vary there."""

    site: str
    features: tuple[FeatureVariance, ...]
    joint: float
    total: float
    dead: int

    def __getitem__(self, name: str) -> FeatureVariance:
        checks.one_of("features", name, [f.name for f in self.features])
        return next(f for f in self.features if f.name == name)


@dataclass(frozen=True)
class VarianceExplained(Readable):
    """Variance explained by feature and site; ``correlations`` are the largest |r| between columns of each pair of features, on T."""

    sites: tuple[SiteVariance, ...]
    reduction: str
    fitted: int
    judged: int
    correlations: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def __getitem__(self, site: str) -> SiteVariance:
        checks.one_of("sites", site, [s.site for s in self.sites])
        return next(s for s in self.sites if s.site == site)

    def relative_to(self, final: VarianceExplained) -> dict[str, dict[str, float]]:
        """R² of each site and feature in units of another (the final) checkpoint's total variance, so that growth is seen on one scale."""
        return {
            s.site: {f.name: f.r2 * s.total / final[s.site].total for f in s.features} for s in self.sites
        }

    def to_dict(self) -> dict[str, Any]:
        return results.plain(self)

    def plot(self, ax: Any = None) -> Any:
        """R² of each feature by site."""
        ax = results.axes(ax)
        for feature in self.sites[0].features:
            ax.plot(
                [s.site for s in self.sites],
                [s[feature.name].r2 for s in self.sites],
                "o-",
                label=feature.name,
            )
        ax.set_ylabel("variance explained")
        ax.tick_params(axis="x", rotation=30)
        ax.legend()
        return ax


Features = Mapping[str, Any]


def variance_explained(
    model: nn.Module,
    data: Any,
    features: Features | Sequence[str],
    *,
    sites: str | Iterable[str] | None = None,
    reduction: str = "ratio",
    interactions: bool = False,
    held_out: float = 0.5,
    pool: Pool = "mean",
    seed: int = 0,
    batch_size: int = 256,
) -> VarianceExplained:
    """How much of each site's variance each feature explains.

    Args:
        model: any network of images, tokens or vectors; it is left as it was.
        data: samples as any call here takes them; sequences of several lengths are pooled over their own positions.
        features: ``{name: one value (or row) a sample}``: binary, categories (numbers of an integer type, or words), real values, vectors; or names among the samples' ``extras``.
        sites: sites or globs; by default the input of the head, the penultimate layer.
        reduction: ``"ratio"`` (the share of the total variance), or ``"per_sample"``, the paper's mean of ratios.
        interactions: also the product of each pair of single-column features, beyond the two themselves.
        held_out: the share of samples that are judged and not fitted to.
        pool: how maps and sequences become vectors, see :func:`~lineament.measure.collapse.profile.pooled`.
        seed: of the choice of samples.

    Raises:
        InputError: a feature with NaN, of another length or constant (named), a representation that never varies, too few samples.

    >>> x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)); f = x > 0
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1)); net[0].weight.data = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> found = variance_explained(net, (x, f[:, 0].long()), {"first": f[:, 0], "second": f[:, 1]}, sites="0")
    >>> [round(v.r2, 1) for v in found["0"].features]  # 4/5 and 1/5 of the variance, of which a sign explains 2/π
    [0.5, 0.1]
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.number("held_out", held_out, low=0, high=1, open_low=True, open_high=True)
    samples = data if isinstance(data, Samples) else load_data(data, samples=10**9)
    if not isinstance(features, Mapping):
        named = checks.listed("features", features, "names among the samples' extras")
        for name in named:
            checks.one_of("features", name, samples.extras)
        features = {name: samples.extras[name] for name in named}
    if sites is None:
        head = find_head(model)
        require(
            head is not None,
            "sites: the model has no linear layer whose input could be taken; name the sites",
        )
        sites = f"{head}:in"
    patterns = [sites] if isinstance(sites, str) else list(sites)
    names = list(dict.fromkeys(site for pattern in patterns for site in site_names(model, pattern)))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(checks.seed("seed", seed)))
    test = torch.zeros(len(samples), dtype=torch.bool)
    test[order[: round(held_out * len(samples))]] = True
    inputs, lengths = taken(model, samples), samples.lengths

    def walk(rows: Tensor) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        # Sequences of one length go together, so that no padding is averaged over.
        alike = [rows] if lengths is None else [rows[lengths[rows] == n] for n in lengths[rows].unique()]
        parts = [part for some in alike for part in some.split(batch_size)]
        with capture(model, names, stop_early=True) as acts:
            for part in progress(parts, "variance explained"):
                called(model, inputs(part))
                yield part, {name: _vectors(model, name, acts[name], pool) for name in names}

    with frozen(model), torch.no_grad():
        return _measured(walk, features, test, names, reduction, interactions, lengths=lengths)


def _vectors(model: nn.Module, site: str, tensor: Tensor, pool: Pool) -> Float[Tensor, "samples units"]:
    found = pooled(tokens_of(model, site, tensor), pool)
    return found.float() if found.dtype.itemsize < 4 else found


def representation_variance(
    representations: Tensor | Mapping[str, Tensor],
    features: Features,
    *,
    test: Bool[Tensor, " samples"] | None = None,
    reduction: str = "ratio",
    interactions: bool = False,
    threshold: float = 0.1,
    dead: float = 1e-12,
) -> VarianceExplained:
    """The same for representations that are there: one matrix (sample, unit), or several by name.

    Args:
        test: which samples are judged and not fitted to; ``None`` fits and judges on all.
        threshold: of a unit's R², for the density.
        dead: units whose sum of squares on the judged samples is at most this explain nothing.

    >>> s = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> found = representation_variance(s * torch.tensor([2.0, 1.0]), {"a": s[:, 0], "b": s[:, 1]})
    >>> [round(f.r2, 6) for f in found["representation"].features]
    [0.8, 0.2]
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    given = (
        {"representation": representations} if isinstance(representations, Tensor) else dict(representations)
    )
    require(bool(given), "representations: got none, expected at least one (sample, unit) matrix")
    count = {len(checks.tensor(name, phi, shape=("sample", "unit"))) for name, phi in given.items()}
    require(len(count) == 1, f"representations: got {sorted(count)} samples, expected as many of each")
    n = count.pop()
    mask = torch.ones(n, dtype=torch.bool) if test is None else checks.tensor("test", test, shape=(n,)).bool()

    def walk(rows: Tensor) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        for part in rows.split(4096):
            yield part, {name: phi[part] for name, phi in given.items()}

    return _measured(
        walk, features, mask, list(given), reduction, interactions, threshold, dead, everything=test is None
    )


def columns_of(name: str, values: Any, count: int) -> Float[Tensor, "samples columns"]:
    """A feature as columns: one of a binary or real feature, one a category (in order), those of a vector.

    >>> columns_of("colour", ["red", "blue", "red", "green"], 4).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    require(
        found.ndim in (1, 2) and len(found) == count,
        f"features: {name!r} has the shape {found.shape}, expected one value or row for each of {count} samples",
    )
    if found.dtype.kind == "f":
        bad = int((~np.isfinite(found)).sum())
        require(not bad, f"features: {bad} values of {name!r} are NaN or infinite")
    if found.ndim == 1 and found.dtype.kind not in "fb" and len(kinds := np.unique(found)) > 2:
        found = (found[:, None] == kinds).astype(float)
    elif found.ndim == 1 and found.dtype.kind not in "fbiu":
        found = (found == np.unique(found)[-1]).astype(float)
    columns = torch.from_numpy(found.astype(float)).view(count, -1)
    require(
        bool((columns != columns[0]).any()), f"features: {name!r} is constant, so that it explains nothing"
    )
    return columns


def _measured(
    walk: Any,
    features: Features,
    test: Tensor,
    names: Sequence[str],
    reduction: str,
    interactions: bool,
    threshold: float = 0.1,
    dead: float = 1e-12,
    *,
    everything: bool = False,
    lengths: Tensor | None = None,
) -> VarianceExplained:
    require(bool(features), "features: got none, expected {name: one value a sample}")
    columns = {str(name): columns_of(str(name), values, len(test)) for name, values in features.items()}
    mains = list(columns)
    if interactions:
        single = [name for name in mains if columns[name].shape[1] == 1]
        columns |= {
            f"{a} x {b}": (columns[a] - columns[a].mean()) * (columns[b] - columns[b].mean())
            for a, b in combinations(single, 2)
        }
    widths = [c.shape[1] for c in columns.values()]
    F = torch.cat(list(columns.values()), 1)
    starts = np.cumsum([0, *widths])
    places = {name: torch.arange(starts[k], starts[k + 1]) for k, name in enumerate(columns)}
    fit_rows = torch.arange(len(test)) if everything else (~test).nonzero().flatten()
    judge_rows = fit_rows if everything else test.nonzero().flatten()
    if lengths is not None:  # the order in which they are walked
        fit_rows, judge_rows = (rows[lengths[rows].argsort(stable=True)] for rows in (fit_rows, judge_rows))
    for what, rows in (("fitted", fit_rows), ("judged", judge_rows)):
        require(len(rows) >= 2, f"samples: {len(rows)} to be {what}, expected at least 2")
        for name, place in places.items():
            part = F[rows][:, place]
            require(
                bool((part != part[0]).any()),
                f"features: {name!r} is constant on the {len(rows)} samples that are {what}",
            )

    kept: dict[str, list[list[Tensor]]] = {name: [[], []] for name in names}
    fit, F_fit = gathered(walk, F, fit_rows, names, [k[0] for k in kept.values()])
    every = torch.arange(F.shape[1])
    subsets = {
        **places,
        "": every,
        **{
            f"without {name}": torch.cat([p for other, p in places.items() if other != name])
            for name in mains
            if len(places) > 1
        },
    }
    weights: dict[str, dict[str, Tensor]] = {site: {} for site in names}
    for key, place in subsets.items():
        solve = inverse(F_fit, place)
        for site in names:
            weights[site][key] = solve @ fit[site].scatter[place]
    ratios: dict[str, dict[str, float]] = {}
    if reduction == "per_sample":
        judge, F_judge, ratios = per_sample(
            walk, F, judge_rows, names, fit, weights, [k[1] for k in kept.values()]
        )
    else:
        judge, F_judge = gathered(walk, F, judge_rows, names, [k[1] for k in kept.values()])
    found = []
    for site in names:
        left = {
            key: left_over(weights[site][key], place, fit[site], judge[site], F_judge)
            for key, place in subsets.items()
        }
        total = left[""][1]
        alive = total > dead
        require(float(total.sum()) > dead, f"sites: {site!r} never varies on the samples that are judged")
        units = {
            name: torch.where(alive, 1 - left[name][0] / torch.where(alive, total, 1.0), 0.0)
            for name in columns
        }
        r2 = (
            ratios[site]
            if ratios
            else {key: 1 - float(rest.sum() / total.sum()) for key, (rest, _) in left.items()}
        )
        decode = decoded(kept[site], F, fit_rows, judge_rows, places)
        rows = tuple(
            FeatureVariance(
                name, r2[name], r2[""] - r2.get(f"without {name}", 0.0) if name in mains else r2[name], units[name],
                density(units[name], threshold), participation(units[name]), decode.get(name),
            )
            for name in columns
        )  # fmt: skip
        dead_units = int((total <= dead).sum())
        found.append(SiteVariance(site, rows, r2[""], float(total.sum()) / len(judge_rows), dead_units))
    correlation = F_judge.correlation.abs()
    pairs = {
        f"{a}, {b}": float(correlation[places[a]][:, places[b]].max()) for a, b in combinations(mains, 2)
    }
    close = [pair for pair, r in pairs.items() if r > _DEPENDENT]
    notes = (
        [
            f"features depend on each other (|r| above {_DEPENDENT}): {'; '.join(close)}; their R² overlap, see `unique`"
        ]
        if close
        else []
    )
    return VarianceExplained(tuple(found), reduction, len(fit_rows), len(judge_rows), pairs, tuple(notes))
