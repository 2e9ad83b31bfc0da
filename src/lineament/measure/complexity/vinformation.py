"""How hard is a feature to read linearly from each depth of a network?

Fel, Bethune, Lampinen, Serre, Hermann (NeurIPS 2024, arXiv 2407.06076): with linear read-outs of fixed variance, the V-information of
Xu et al. (2020, arXiv 2002.10689) that activations x hold about a feature z of unit variance is the R² of least squares, and the complexity is

    K(z) = 1 - (1/n) Σ_l I_V(f_l(x) -> z)

Read-outs are fitted on one split (one solve a site for all features) and judged on the other by the sum of their residuals, so that
nothing cancels near R² = 1. What is gathered merges across processes, and memory is free of the number of samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable
from lineament.measure.complexity.readouts import Activations, ReadoutMoments, Readouts, finite_rows

_FLOOR = (
    1e-12  # of a feature's unit variance: the smallest error that variance="learned" takes the logarithm of
)
_ELEMENTS = 2**22  # of the residuals that are held at once


@dataclass(frozen=True)
class Complexity(Readable):
    """Complexity of features and the layer curves that it averages; NaN for constant features.

    Attributes:
        sites: where it was read, in depth order.
        information: V-information by site and feature, not clipped.
        information_errors: its standard error, over the held-out samples (what another training split would give is not in it).
        complexity: 1 minus the mean over sites of ``information`` clipped to [0, 1] (``form="difference"``: at 0; ``variance="learned"``: not).
        unclipped: the same without clipping.
        errors: the standard error of ``unclipped``, over the held-out samples.
        variance: of each feature, over the held-out samples.
        active: in how many held-out samples the feature is not 0 (rows of each sample are counted apart where rows are positions).
        samples: of the training and of the held-out split.
        ridge: the penalty.
        rows: what one row was: ``"samples"``, ``"positions"`` or ``"max"``.
        pool: the grid to which maps were averaged.
        others: the same for the other penalties.
    """

    sites: tuple[str, ...]
    information: Float[Tensor, "sites features"]
    information_errors: Float[Tensor, "sites features"]
    complexity: Float[Tensor, " features"]
    unclipped: Float[Tensor, " features"]
    errors: Float[Tensor, " features"]
    variance: Float[Tensor, " features"]
    active: Int[Tensor, " features"]
    samples: tuple[int, int]
    ridge: float
    rows: str = "samples"
    pool: int | str = 1
    others: tuple[Complexity, ...] = ()

    @property
    def constant(self) -> Bool[Tensor, " features"]:
        """Features that do not vary in one of the splits, so that nothing can be said of them."""
        return self.complexity.isnan()

    @property
    def mean(self) -> float:
        """The mean complexity of the features that vary."""
        return float(self.complexity.nanmean())

    @property
    def order(self) -> Int[Tensor, " varying"]:
        """The features that vary, simplest first."""
        return self.complexity.nan_to_num(torch.inf).argsort()[: int((~self.constant).sum())]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {name: results.plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """The layer curves, coloured by complexity."""
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        ax = results.axes(ax)
        colours, spread = colormaps["viridis"], self.complexity[~self.constant]
        low, high = (float(spread.min()), float(spread.max())) if len(spread) else (0.0, 1.0)
        for index in self.order.tolist():
            at = (float(self.complexity[index]) - low) / max(high - low, 1e-12)
            ax.plot(range(len(self.sites)), self.information[:, index].cpu(), color=colours(at), alpha=0.7)
        ax.set_xticks(range(len(self.sites)), self.sites, rotation=30, ha="right", parse_math=False)
        ax.set_ylabel("variance that a linear read-out explains")
        scale = ScalarMappable(Normalize(low, high), "viridis")
        ax.figure.colorbar(scale, ax=ax, label="complexity K")
        return ax


class Residuals:
    """What read-outs leave unexplained on other samples than they were fitted on, in one pass; joins by ``a + b``.

    With e the squared residual and v the squared deviation from the training mean of a sample, sums of e, v, e², ev and v² give the
    information and its standard error. Rows that belong together (positions of one image, tokens of one text) count as one sample there.
    """

    def __init__(self, readouts: Readouts) -> None:
        self.readouts = readouts
        self.count = self.rows = 0
        sizes = (len(readouts.penalties), len(readouts.weights), len(readouts.mean))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=readouts.mean.device)

        self.e, self.ee, self.ev = zeros(*sizes), zeros(*sizes), zeros(*sizes)
        self.mm = zeros(sizes[0], sizes[2])  # of the mean over sites
        self.v, self.vv, self.d, self.active = (zeros(sizes[2]) for _ in range(4))
        self.low, self.high = zeros(sizes[2]) + torch.inf, zeros(sizes[2]) - torch.inf
        self._ready: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def update(
        self,
        activations: Activations,
        z: Float[Tensor, "batch features"],
        samples: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Take in a batch; ``samples`` numbers the sample of each row from 0, in order (by default each row is one)."""
        z = finite_rows("features", z, len(self.readouts.mean), len(z))
        rows = {}
        for site in self.readouts.weights:
            require(
                site in activations, f"activations: lack site {site!r}{checks.suggest(site, activations)}"
            )
            width = len(self.readouts.means[site])
            rows[site] = finite_rows(f"site {site!r}", activations[site], width, len(z))
        self.low = torch.minimum(self.low, z.amin(0).double())
        self.high = torch.maximum(self.high, z.amax(0).double())
        self.active += (z != 0).sum(0)
        number = torch.arange(len(z), device=z.device) if samples is None else samples.to(z.device)
        self.count += int(number[-1]) + 1
        self.rows += len(z)
        step = max(1, _ELEMENTS // (z.shape[1] * len(self.readouts.penalties)))
        start = 0
        while start < len(z):
            stop = min(start + step, len(z))
            if stop < len(z):
                # Never between two rows of a sample, unless one alone is too large.
                cut = int(torch.searchsorted(number, number[stop]))
                stop = cut if cut > start else int(torch.searchsorted(number, number[stop], right=True))
            part = {site: value[start:stop] for site, value in rows.items()}
            self._take(part, z[start:stop], None if samples is None else number[start:stop])
            start = stop

    def _take(self, rows: Activations, z: Tensor, number: Tensor | None) -> None:
        def gathered(x: Tensor) -> Tensor:
            if number is None:
                return x
            first = int(number[0])
            count = int(number[-1]) - first + 1
            return x.new_zeros(count, x.shape[1]).index_add_(0, number - first, x)

        readouts = self.readouts
        # The mean in the samples' own precision, and what that leaves of it: no cancellation, also in float32.
        deviation = (z - readouts.mean.to(z.dtype)) + (readouts.mean.to(z.dtype) - readouts.mean).to(z.dtype)
        self.d += deviation.sum(0).double()
        v = gathered(deviation.square())
        self.v += v.sum(0).double()
        self.vv += v.square().sum(0).double()
        for at in range(len(readouts.penalties)):
            total = torch.zeros_like(v)
            for number_of_site, site in enumerate(readouts.weights):
                x = rows[site]
                weight, mean, offset = self._prepared(site, x.dtype)
                residual = deviation.to(x.dtype) - torch.addmm(offset[at], x - mean, weight[at])
                e = gathered(residual.square())
                self.e[at, number_of_site] += e.sum(0).double()
                self.ee[at, number_of_site] += e.square().sum(0).double()
                self.ev[at, number_of_site] += (e * v).sum(0).double()
                total += e.to(total.dtype)
            total /= len(readouts.weights)
            self.mm[at] += total.square().sum(0).double()

    def _prepared(self, site: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if (site, dtype) not in self._ready:
            weight, mean = self.readouts.weights[site], self.readouts.means[site]
            near = mean.to(dtype)
            offset = (near.double() - mean) @ weight
            self._ready[site, dtype] = weight.to(dtype), near, offset.to(dtype)[:, None]
        return self._ready[site, dtype]

    def __add__(self, other: Residuals) -> Residuals:
        require(
            all(
                torch.equal(w, other.readouts.weights.get(s, w[:0])) for s, w in self.readouts.weights.items()
            ),
            "+: the residuals are those of different read-outs",
        )
        joined = Residuals(self.readouts)
        for name in ("count", "rows", "e", "ee", "ev", "mm", "v", "vv", "d", "active"):
            setattr(joined, name, getattr(self, name) + getattr(other, name))
        joined.low, joined.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return joined

    def __radd__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def compute(
        self, *, variance: str = "fixed", form: str = "ratio", floor: float = 1e-12
    ) -> list[Complexity]:
        """The information and complexity for each penalty.

        Args:
            variance: ``"fixed"`` gives R², ``"learned"`` ½ ln(Var(z) / MSE), in nats, without an upper bound.
            form: ``"ratio"`` gives 1 - MSE / Var over these samples, ``"difference"`` (Var - MSE) over the variance of the training samples. Both
                take the deviations from the training mean.
            floor: the smallest error, of a feature of unit variance, that ``"learned"`` takes the logarithm of.
        """
        kinds(variance, form)
        require(self.count > 0, "samples: got none to judge the read-outs on, expected at least one")
        n, readouts = self.count, self.readouts
        constant = readouts.variance.isnan() | (self.high <= self.low)
        unit = readouts.variance * self.rows / n  # of a sample, which may have several rows
        e, ee, ev = self.e / n, self.ee / n, self.ev / n
        v, vv = self.v / n, self.vv / n
        correction = n / max(n - 1, 1)

        def ratio_error(mean: Tensor, square: Tensor, product: Tensor) -> Tensor:
            rho = mean / v
            spread = square - 2 * rho * product + rho.square() * vv
            return (spread.clamp(min=0) * correction / n).sqrt() / v

        def difference_error(mean: Tensor, square: Tensor, product: Tensor) -> Tensor:
            spread = vv - 2 * product + square - (v - mean).square()
            return (spread.clamp(min=0) * correction / n).sqrt() / unit

        total, product = e.mean(1), ev.mean(1)
        mm = self.mm / n
        if variance == "learned":
            floored = torch.maximum(e, floor * unit)
            values = 0.5 * (v / floored).log()
            spread = vv / v.square() - 2 * ev / (v * floored) + ee / floored.square()
            errors = 0.5 * (spread.clamp(min=0) * correction / n).sqrt()
            clipped = values
            # The mean of logarithms is no ratio of sums: the errors of the sites are taken as fully dependent, an upper bound.
            errors_of_mean = errors.mean(1)
        elif form == "ratio":
            values, errors = 1 - e / v, ratio_error(e, ee, ev)
            clipped, errors_of_mean = values.clamp(0, 1), ratio_error(total, mm, product)
        else:
            values, errors = (v - e) / unit, difference_error(e, ee, ev)
            clipped, errors_of_mean = values.clamp(min=0), difference_error(total, mm, product)
        if n < 2:
            errors, errors_of_mean = errors * torch.nan, errors_of_mean * torch.nan
        own = (self.v / self.rows - (self.d / self.rows).square()).clamp(min=0)

        def known(x: Tensor) -> Tensor:
            return x.masked_fill(constant, torch.nan)

        _tell_constant(int(constant.sum()), len(constant))
        return [
            Complexity(
                sites=tuple(readouts.weights),
                information=known(values[at]),
                information_errors=known(errors[at]),
                complexity=known(1 - clipped[at].mean(0)),
                unclipped=known(1 - values[at].mean(0)),
                errors=known(errors_of_mean[at]),
                variance=own.masked_fill(constant, 0.0),
                active=self.active.long(),
                samples=(readouts.samples, self.rows),
                ridge=penalty,
            )
            for at, penalty in enumerate(readouts.penalties)
        ]


def kinds(variance: str, form: str) -> None:
    checks.one_of("variance", variance, ("fixed", "learned"))
    checks.one_of("form", form, ("ratio", "difference"))


def _tell_constant(count: int, total: int) -> None:
    if count:
        warnings.warn(
            f"{count} of {total} features do not vary in the training or the held-out samples: their complexity is NaN, and means leave them out",
            RuntimeWarning,
            stacklevel=3,
        )


def vinformation(
    activations: Activations | Sequence[Tensor],
    z: Float[Tensor, "samples features"],
    *,
    heldout: tuple[Activations | Sequence[Tensor], Tensor] | None = None,
    ridge: float = 1e-3,
    scale: bool = True,
    variance: str = "fixed",
    form: str = "ratio",
    floor: float = 1e-12,
) -> Complexity:
    """V-information and complexity of features whose activations are in memory.

    I_V(x -> z) = Var(z) - min_{w,c} E[(z - w·x - c)²] for z of unit variance: the R² of a linear read-out.

    Args:
        activations: (samples x width) of each site, in depth order, by name or numbered.
        z: one column a feature.
        heldout: activations and features of other samples on which the read-outs are judged; ``None`` judges them in sample, where R² is
            about width / samples too high.
        ridge: the penalty of the read-outs; 0 for least squares.
        scale: standardise activations before the penalty.
        variance: ``"fixed"``, or ``"learned"`` for ½ ln(Var(z) / MSE) in nats.
        form: ``"ratio"``: 1 - MSE / Var on the held-out samples; ``"difference"``: (Var - MSE) over the training variance.
        floor: the smallest error, of a feature of unit variance, that ``"learned"`` takes the logarithm of.

    Returns:
        :class:`Complexity`.

    Raises:
        InputError: shapes that do not match, NaN (which rows), as many activations as samples without a ridge.

    Source: Fel et al. 2024, equations 2 to 4; Xu et al. 2020, example 2.

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> z = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [3.0, 1.0]])
    >>> found = vinformation([x, x.abs()], z, ridge=0.0)
    >>> [round(value, 4) for value in found.complexity.tolist()]
    [0.0, 1.0]
    """
    kinds(variance, form)
    moments = ReadoutMoments()
    named = _named(activations)
    moments.update(named, z)
    residuals = Residuals(moments.readouts(ridge, scale=scale))
    if heldout is None:
        residuals.update(named, z)
    else:
        require(
            isinstance(heldout, (tuple, list)) and len(heldout) == 2,
            f"heldout: got {checks.show(heldout)}, expected (activations, features)",
        )
        residuals.update(_named(heldout[0]), heldout[1])
    return residuals.compute(variance=variance, form=form, floor=floor)[0]


def _named(activations: Activations | Sequence[Tensor]) -> dict[str, Tensor]:
    if isinstance(activations, Mapping):
        return dict(activations)
    require(
        isinstance(activations, (list, tuple)),
        f"activations: got {checks.show(activations)}, expected a list or a mapping of (samples, width) tensors",
    )
    return {str(number): value for number, value in enumerate(activations)}
