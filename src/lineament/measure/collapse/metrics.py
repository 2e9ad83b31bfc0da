"""How collapsed are a classifier's features? NC1 to NC4 with every variant, in one pass.

Papyan, Han, Donoho (2020, arXiv 2008.08186) found that late in training features gather at their class means (NC1), the
means form a simplex (NC2), the head aligns with them (NC3) and the network decides by the nearest mean (NC4); Tirer,
Huang, Niles-Weed (2022, arXiv 2210.16658) analyse what happens near that point, by NC1~ = tr S_W / tr S_B.

NC1 needs no pseudo-inverse of a features-by-features matrix: the thin singular value decomposition of the K centred means
gives the K - 1 directions on which the within-class variance counts. :func:`lineament.measure.collapse.profile.collapse` runs these
over a loader, all sites in one pass of forwards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable
from lineament.core.statistics.class_scatter import ClassScatter
from lineament.measure.collapse import class_geometry as geometry


@dataclass(frozen=True)
class CollapseMetrics(Readable):
    """Neural-collapse metrics of one set of features. ``None``: not measured (no head, no second look at the samples).

    Attributes:
        nc1: (1/K) tr(S_W S_B⁺), within-class variance in units of the between-class variance, direction by direction.
        nc1_tilde: tr S_W / tr S_B, the metric of the paper's theorems.
        cdnv: the mean over pairs of classes of (v_k + v_l) / (2 ‖h_k - h_l‖²).
        nc2: distance of the means' Gram matrix from a simplex's.
        equinorm, equiangle: NC2's two halves, relative spread of the norms and mean |cos + 1/(K-1)|.
        nc3: distance of W Mcᵀ from a simplex's Gram matrix.
        self_duality: ‖W/‖W‖ - Mc/‖Mc‖‖²; not 0 at the collapse of bias-free squared loss.
        nc4: the fraction of samples whose decision is not the nearest class mean.
        nearest_mean_accuracy: the fraction of samples that lie nearest to the mean of their own class.
        trace_within, trace_between: tr S_W and tr S_B.
        variances: the mean of ‖h - h_k‖² in each class.
        cosines: between the centred class means (classes x classes).
        samples: the number of samples of each class.
    """

    nc1: float | None
    nc1_tilde: float
    cdnv: float
    nc2: float
    equinorm: float
    equiangle: float
    nc3: float | None
    self_duality: float | None
    nc4: float | None
    nearest_mean_accuracy: float | None
    trace_within: float
    trace_between: float
    variances: Float[Tensor, " classes"]
    cosines: Float[Tensor, "classes classes"]
    samples: Int[Tensor, " classes"]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items()}

    def plot(self, ax: Any = None) -> Any:
        """The cosines between the centred class means; collapsed features show -1/(K-1) everywhere off the diagonal."""
        ax = results.axes(ax)
        image = ax.imshow(self.cosines.cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        ax.figure.colorbar(image, ax=ax, label="cosine between centred class means")
        ax.set(xlabel="class", ylabel="class", title=f"NC1~ {self.nc1_tilde:.3g}, NC2 {self.nc2:.3g}")
        return ax


class SecondLook:
    """What only a second look at the samples gives, once the class means are known: NC4, and NC1 without S_W.

    ``update`` takes the same features and labels again; it costs one product with the K - 1 directions
    between the class means. Looks of several processes join by ``a + b``. Made by :meth:`CollapseMeter.second_look`.
    """

    def __init__(self, between: geometry.Between, classes: int) -> None:
        self.between = between
        self.projected = ClassScatter(classes, scatter=True)
        self.samples = 0
        self.own = 0
        self.decided = 0
        self.disagreed = 0

    def update(
        self,
        features: Float[Tensor, "batch features"],
        labels: Int[Tensor, " batch"],
        decisions: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Take in a batch; ``decisions`` are the classes that the network chose."""
        features = features if features.dtype in (torch.float32, torch.float64) else features.float()
        projected = geometry.project(features, self.between)
        if projected.shape[1]:
            self.projected.update(projected, labels)
        nearest = geometry.nearest_mean(projected, self.between)
        self.samples += len(features)
        self.own += int((nearest == labels.to(nearest.device)).sum())
        if decisions is not None:
            self.decided += len(features)
            self.disagreed += int((nearest != decisions.to(nearest.device)).sum())

    def __add__(self, other: SecondLook) -> SecondLook:
        joined = SecondLook(self.between, len(self.between.means))
        joined.projected = self.projected + other.projected
        for name in ("samples", "own", "decided", "disagreed"):
            setattr(joined, name, getattr(self, name) + getattr(other, name))
        return joined


class CollapseMeter:
    """Neural-collapse metrics over batches, in one pass, mergeable across processes by ``a + b``.

    Class means and per-class sums of squares are gathered (O(samples x features)); with ``scatter=True`` also the
    features x features matrix that gives NC1 without a second look. NC4 always needs one, because it asks for
    distances to the final means: feed the batches again to :meth:`second_look` and pass that to :meth:`compute`.

    Args:
        classes: how many classes; ``None`` takes the largest label seen plus one.
        weighting: ``"class"`` (S_B and the center weigh classes equally) or ``"sample"``.
        scatter: gather the within-class scatter matrix, so that NC1 is known after one pass.
        rcond: which singular values of the centred means count as zero (see :func:`class_geometry.between`).

    >>> meter = CollapseMeter(2)
    >>> meter.update(torch.tensor([[1.0, 0.1], [1.0, -0.1]]), torch.tensor([0, 0]))
    >>> meter.update(torch.tensor([[-1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1, 1]))
    >>> round(meter.compute().nc1_tilde, 6)
    0.005
    """

    def __init__(
        self,
        classes: int | None = None,
        *,
        weighting: str = "class",
        scatter: bool = True,
        rcond: float | None = None,
    ) -> None:
        checks.one_of("weighting", weighting, ["class", "sample"])
        require(classes is None or classes >= 2, f"classes: got {checks.show(classes)}, expected at least 2")
        self.weighting = weighting
        self.rcond = rcond
        self.stream = ClassScatter(classes, scatter=scatter)

    def update(self, features: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"]) -> None:
        """Take in a batch of features (floating point, any precision) and class labels."""
        checks.tensor("features", features, shape=("batch", "features"), floating=True, finite=False)
        self.stream.update(features, labels)

    def __add__(self, other: CollapseMeter) -> CollapseMeter:
        mine, theirs = (self.weighting, self.rcond), (other.weighting, other.rcond)
        require(mine == theirs, f"+: (weighting, rcond) {mine} and {theirs} do not match")
        joined = CollapseMeter(weighting=self.weighting, rcond=self.rcond)
        joined.stream = self.stream + other.stream
        return joined

    def __radd__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def state_dict(self) -> dict[str, Any]:
        """Everything that was gathered, as nested tensors and numbers."""
        return {"weighting": self.weighting, "rcond": self.rcond, "stream": self.stream.state_dict()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> CollapseMeter:
        """The meter that :meth:`state_dict` described."""
        meter = cls(weighting=state["weighting"], rcond=state["rcond"])
        meter.stream = ClassScatter.from_state_dict(state["stream"])
        return meter

    def second_look(self) -> SecondLook:
        """A :class:`SecondLook` at the same samples, now that the means are known."""
        between = geometry.between(self.stream, weighting=self.weighting, rcond=self.rcond)
        return SecondLook(between, len(self.stream.counts))

    def compute(
        self,
        weight: Float[Tensor, "classes features"] | None = None,
        *,
        second: SecondLook | None = None,
    ) -> CollapseMetrics:
        """The metrics of everything seen so far.

        Args:
            weight: the head's weight matrix without its bias, for NC3 and self-duality.
            second: the second look, for NC4 and nearest-mean accuracy (and NC1 when ``scatter=False``).

        Raises:
            InputError: a class has no sample, or there is only one class.
        """
        stream = self.stream
        between = (
            second.between
            if second is not None
            else geometry.between(stream, weighting=self.weighting, rcond=self.rcond)
        )
        classes, width = between.means.shape
        if weight is not None:
            checks.tensor("weight", weight, shape=(classes, width), floating=True)
        samples = int(stream.counts.sum())
        require(
            second is None or second.samples == samples,
            f"second: saw {second.samples if second else 0} samples, expected the same {samples} again",
        )
        trace_within = float(stream.squares.sum()) / samples
        degenerate = between.trace == 0
        if degenerate:
            warnings.warn(
                "all class means are equal (tr S_B = 0): NC1 and NC1~ are infinite and the geometry of the means is "
                "undefined" + ("; the features are constant" if trace_within == 0 else ""),
                RuntimeWarning,
                stacklevel=2,
            )
        nothing = math.inf if trace_within > 0 else math.nan
        nc1 = nothing if degenerate else self._nc1(between, second, samples)
        gram = between.means @ between.means.T
        undefined = math.nan if degenerate else None
        head = None if weight is None else weight.detach().to(between.means)
        return CollapseMetrics(
            nc1=nc1,
            nc1_tilde=nothing if degenerate else trace_within / between.trace,
            cdnv=_mean_pair(nothing, degenerate, stream),
            nc2=undefined or geometry.simplex_distance(gram),
            equinorm=undefined or geometry.equinorm(between.means),
            equiangle=undefined or geometry.equiangle(between.means),
            nc3=None if head is None else undefined or geometry.simplex_distance(head @ between.means.T),
            self_duality=None if head is None else undefined or geometry.self_duality(head, between.means),
            nc4=second.disagreed / second.decided if second is not None and second.decided else None,
            nearest_mean_accuracy=second.own / second.samples if second is not None else None,
            trace_within=trace_within,
            trace_between=between.trace,
            variances=stream.squares / stream.counts,
            cosines=geometry.cosines(between.means),
            samples=stream.counts.clone(),
        )

    def _nc1(self, between: geometry.Between, second: SecondLook | None, samples: int) -> float | None:
        if second is not None:
            variances = second.projected.within.diagonal() / samples
        elif self.stream.scatter:
            directions = between.directions
            variances = ((self.stream.within @ directions) * directions).sum(0) / samples
        else:
            return None
        return geometry.nc1_from_variances(variances, between, len(between.means))


def _mean_pair(nothing: float, degenerate: bool, stream: ClassScatter) -> float:
    if degenerate:
        return nothing
    k = len(stream.counts)
    return float(geometry.cdnv(stream).sum()) / (k * (k - 1))


def collapse_metrics(
    features: Float[Tensor, "batch features"],
    labels: Int[Tensor, " batch"],
    weight: Float[Tensor, "classes features"] | None = None,
    bias: Float[Tensor, " classes"] | None = None,
    *,
    decisions: Int[Tensor, " batch"] | None = None,
    classes: int | None = None,
    weighting: str = "class",
    rcond: float | None = None,
) -> CollapseMetrics:
    """Every neural-collapse metric of features that are in memory.

    NC1 = tr(S_W S_B⁺)/K, NC1~ = tr S_W / tr S_B, NC2 = ‖G/‖G‖ - (I - 11ᵀ/K)/√(K-1)‖ with G = Mc Mcᵀ, NC3 the same with
    W Mcᵀ, NC4 the fraction of samples with argmax(W h + b) ≠ argmin_k ‖h - h_k‖.

    Args:
        features: one row a sample, in eval mode, from data without augmentation.
        labels: class of each sample, 0 to K-1; each class must occur.
        weight, bias: the head's, for NC3, self-duality and NC4 (the bias for NC4 only).
        decisions: the classes that the network chose; instead of those of ``weight`` and ``bias`` for NC4.
        classes: K; ``None`` takes the largest label plus one.
        weighting: ``"class"`` or ``"sample"``, see :mod:`lineament.measure.collapse.class_geometry`.
        rcond: which singular values of the centred means count as zero.

    Returns:
        :class:`CollapseMetrics`; NC3, self-duality and NC4 are ``None`` without a head.

    Raises:
        InputError: wrong shapes, NaN, a class without samples (named), fewer than two classes.

    Source: Papyan et al. 2020; Tirer et al. 2022, section 3.

    >>> simplex = torch.eye(3).double() - 1 / 3
    >>> m = collapse_metrics(simplex[[0, 0, 1, 1, 2, 2]], torch.tensor([0, 0, 1, 1, 2, 2]), weight=2 * simplex)
    >>> m.nc1_tilde, round(m.nc2, 9), round(m.nc3, 9), m.nc4
    (0.0, 0.0, 0.0, 0.0)
    """
    meter = CollapseMeter(classes, weighting=weighting, scatter=False, rcond=rcond)
    require(bias is None or weight is not None, "bias: got one without weight; pass the head's weight too")
    meter.update(features, labels)
    second = meter.second_look()
    known = len(meter.stream.counts)
    if weight is not None:
        checks.tensor("weight", weight, shape=(known, features.shape[1]), floating=True)
        if decisions is None:
            scores = features.detach() @ weight.detach().to(features).T
            if bias is not None:
                checks.tensor("bias", bias, shape=(known,), floating=True)
                scores = scores + bias.detach().to(features)
            decisions = scores.argmax(1)
    if decisions is not None:
        decisions = checks.labels("decisions", decisions, count=len(features))
    second.update(features.detach(), labels, decisions)
    return meter.compute(weight, second=second)
