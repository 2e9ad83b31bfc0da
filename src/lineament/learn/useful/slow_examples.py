"""Which examples does a network learn late? Two clusters of its early outputs per class: the one with the higher loss is slow.

Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv 2404.17768 (USEFUL), with the partitions that the paper compares with: highest
losses, misclassified (JTT, arXiv 2107.09044), random, and EIIL (arXiv 2010.07249). Rows are sorted before they are clustered and clusters
are told apart by their loss, so that neither the order of the examples nor k-means' numbering decides anything.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.models import class_logits
from lineament.core.results import Readable

PARTITIONS = ("clusters", "quantile", "misclassified", "eiil", "random")
_MOST = 0.7


@dataclass(frozen=True)
class Selection(Readable):
    """The slow examples of a data set, and what the partition of each class looked like.

    ``centers`` and ``cluster_losses`` hold the fast and the slow cluster of each class, NaN where the class was skipped or the partition
    makes no clusters; ``inertia`` is the sum of squared distances to the centres.
    """

    mask: Bool[Tensor, "samples"]
    labels: Int[Tensor, "samples"]
    by: str
    inertia: Float[Tensor, "classes"]
    centers: Float[Tensor, "classes 2 dims"]
    cluster_losses: Float[Tensor, "classes 2"]
    skipped: tuple[int, ...] = ()

    @property
    def fraction(self) -> float:
        """|S| / n."""
        return float(self.mask.double().mean())

    @property
    def counts(self) -> Int[Tensor, "classes 2"]:
        """Examples and slow examples of each class."""
        classes = len(self.inertia)
        every = torch.bincount(self.labels, minlength=classes)
        return torch.stack([every, torch.bincount(self.labels[self.mask], minlength=classes)], 1)

    def indices(self, factor: int = 2, *, balance: str = "none", seed: int = 0) -> Int[Tensor, "upsampled"]:
        """The enlarged data set as sorted indices: everything once, the slow examples ``factor`` times.

        Args:
            factor: k, at least 1; 1 gives the data set itself, 2 is the paper's best.
            balance: ``"none"``; ``"shares"`` fills the classes with few slow examples up by other copies until every class has the share
                of the data that it had; ``"equal"`` until all classes have as many (class rebalancing of long-tailed data).
            seed: draws the copies that fill up.

        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> mask = torch.tensor([False, True, False, False])
        >>> nan = torch.full((2,), math.nan)
        >>> Selection(mask, labels, "random", nan, nan[:, None, None], nan[:, None]).indices(3, balance="shares").tolist()
        [0, 1, 1, 1, 2, 2, 3, 3]
        """
        checks.number("factor", factor, low=1, integer=True)
        checks.one_of("balance", balance, ("none", "shares", "equal"))
        every = torch.arange(len(self.mask))
        found = torch.cat([every, every[self.mask].repeat(factor - 1)])
        if balance == "none":
            return found.sort().values
        had = torch.bincount(self.labels, minlength=len(self.inertia))
        have = torch.bincount(self.labels[found], minlength=len(self.inertia))
        if balance == "equal":
            want = torch.where(had > 0, have.max(), 0)
        else:
            growth = float((have / had.clamp(min=1)).max())
            want = torch.maximum(have, (had * growth).round().long())
        generator = torch.Generator().manual_seed(seed)
        parts = [found]
        for c, missing in enumerate((want - have).tolist()):
            own = every[self.labels == c]
            while missing > 0:
                order = own[torch.randperm(len(own), generator=generator)][:missing]
                parts.append(order)
                missing -= len(order)
        return torch.cat(parts).sort().values

    def weights(self, factor: float = 2) -> Float[Tensor, "samples"]:
        """Loss weights instead of copies: ``factor`` for the slow examples and 1 for the others.

        In full-batch training with the weights divided by their sum the two are the same.
        """
        checks.number("factor", factor, low=0)
        return 1 + (factor - 1) * self.mask.double()

    def to_dict(self) -> dict[str, Any]:
        fields = ("inertia", "centers", "cluster_losses", "counts")
        tensors = {name: getattr(self, name).tolist() for name in fields}
        slow = self.mask.nonzero()[:, 0].tolist()
        return {
            "by": self.by,
            "slow": slow,
            "fraction": self.fraction,
            "skipped": list(self.skipped),
            **tensors,
        }

    def plot(self, ax: Any = None) -> Any:
        """Each class's share of slow examples as a bar."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        counts = self.counts.double()
        ax.bar(range(len(counts)), (counts[:, 1] / counts[:, 0].clamp(min=1)).tolist())
        ax.axhline(self.fraction, color="C7", linewidth=0.8)
        ax.set(xlabel="class", ylabel="share of slow examples", ylim=(0, 1))
        return ax


def select_slow(
    logits: Float[Tensor, "samples classes"],
    labels: Int[Tensor, "samples"],
    *,
    by: str = "clusters",
    output: str | Tensor = "softmax",
    losses: Float[Tensor, "samples"] | None = None,
    like: Selection | None = None,
    exclude: Bool[Tensor, "samples"] | None = None,
    allow_empty: bool = False,
    starts: int = 10,
    seed: int = 0,
) -> Selection:
    """The slow examples, from the network's outputs early in training (un-augmented data, eval mode).

    Of each class, S_c is the cluster of {f(x_i): y_i = c} under 2-means whose mean loss is higher; at equal losses the smaller cluster.

    Args:
        logits: f(x), one row an example; a single logit z of two classes counts as (0, z).
        labels: their classes.
        by: ``"clusters"``, the method; or what the paper compares with: ``"quantile"``, the highest losses of each class, as many as the
            clusters would select; ``"misclassified"``, also the rule of JTT (which then repeats them more often); ``"random"``, as
            many as the clusters would select; ``"eiil"``, the side of EIIL's environments with the higher loss. EIIL's penalty
            (Σ q_i g_i)² + (Σ (1 - q_i) g_i)², with g_i the slope of the loss in the logits' scale, is largest where q_i = [g_i > 0],
            so no optimiser is needed.
        output: what is clustered: ``"softmax"`` probabilities, ``"logits"``, or rows of your own, such as last-layer features.
        losses: instead of the cross-entropy of the logits.
        like: take the sizes for ``"quantile"`` and ``"random"`` from this selection, instead of clustering for them.
        exclude: examples that are never selected and do not enter the clusters: those known to be mislabelled, which would
            be selected first.
        allow_empty: classes without examples are skipped; otherwise they are an error, since labels and outputs may not belong together.
        starts: k-means++ initialisations of each class; the best is taken.
        seed: of k-means and of ``"random"``.

    Returns:
        :class:`Selection`. A class with fewer than two different rows is skipped with a warning; more than 70 % of a class selected is
        a warning too.

    Raises:
        InputError: NaN in outputs or losses, labels that do not fit the outputs or leave a class empty, unequal lengths, unknown names.

    Source: Nguyen et al. (2024); the choice of softmax and the ties are ours.

    >>> logits = torch.tensor([[4.0, 0], [4, 0], [0.1, 0], [0, 3], [0, 3], [0, 0.1]])
    >>> select_slow(logits, torch.tensor([0, 0, 0, 1, 1, 1])).mask.tolist()
    [False, False, True, False, False, True]
    """
    logits = checks.tensor("logits", logits, shape=("samples", "classes"), floating=True).detach()
    labels = checks.labels("labels", labels, count=len(logits), classes=max(logits.shape[1], 2))
    logits, labels = class_logits(logits) if bool(labels.any()) else logits, labels.to(logits.device)
    count, classes = logits.shape
    checks.one_of("by", by, PARTITIONS)
    checks.number("starts", starts, low=1, integer=True)
    refuse_empty(labels, classes, allow_empty)
    if losses is None:
        losses = F.cross_entropy(logits.double(), labels, reduction="none")
    losses = checks.tensor("losses", losses, shape=(count,), floating=True).detach().double()
    if isinstance(output, Tensor):
        rows = checks.tensor("output", output, shape=(count, "dims"), floating=True).detach()
    else:
        checks.one_of("output", output, ("softmax", "logits"))
        rows = logits.double().softmax(1) if output == "softmax" else logits
    allowed = torch.ones(count, dtype=torch.bool)
    if exclude is not None:
        allowed = ~checks.tensor("exclude", exclude, shape=(count,)).bool().cpu()
    labels, losses, rows, logits = labels.cpu(), losses.cpu(), rows.double().cpu(), logits.double().cpu()

    if by == "clusters":
        return _clusters(rows, labels, losses, allowed, classes, starts, seed)
    mask = torch.zeros(count, dtype=torch.bool)
    if by == "misclassified":
        mask = (logits.argmax(1) != labels) & allowed
    elif by == "eiil":
        slope = (logits.softmax(1) * logits).sum(1) - logits[torch.arange(count), labels]
        sides = [m for m in (slope > 0, slope <= 0) if bool(m.any())]
        mask = max(sides, key=lambda m: float(losses[m].mean())) & allowed
    else:
        if like is None:
            like = _clusters(rows, labels, losses, allowed, classes, starts, seed)
        checks.require(
            len(like.mask) == count, f"like: selects among {len(like.mask)} examples, expected {count}"
        )
        if by == "random":
            free = allowed.nonzero()[:, 0]
            order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
            mask[free[order[: int(like.mask.sum())]]] = True
        else:
            for c, size in enumerate(like.counts[:, 1].tolist()):
                own = ((labels == c) & allowed).nonzero()[:, 0]
                mask[own[losses[own].argsort(descending=True, stable=True)[:size]]] = True
    nan = torch.full((classes, 2, rows.shape[1]), math.nan, dtype=torch.float64)
    return Selection(mask, labels, by, nan[:, 0, 0], nan, nan[:, :, 0])


def refuse_empty(labels: Int[Tensor, "samples"], classes: int, allow_empty: bool = False) -> None:
    """Raise where a class has no example, since labels and outputs may not belong together."""
    empty = (torch.bincount(labels, minlength=classes) == 0).nonzero()[:, 0].tolist()
    checks.require(
        allow_empty or not empty,
        f"labels: {len(empty)} of {classes} classes have no example, first class {empty[:1]}; expected some of each "
        "(or allow_empty=True)",
    )


def _clusters(
    rows: Tensor, labels: Tensor, losses: Tensor, allowed: Tensor, classes: int, starts: int, seed: int
) -> Selection:
    mask = torch.zeros(len(labels), dtype=torch.bool)
    inertia = torch.zeros(classes, dtype=torch.float64)
    centers = torch.full((classes, 2, rows.shape[1]), math.nan, dtype=torch.float64)
    means = torch.full((classes, 2), math.nan, dtype=torch.float64)
    skipped: list[int] = []
    for c in range(classes):
        own = ((labels == c) & allowed).nonzero()[:, 0]
        points = rows[own].numpy()
        # Examples whose rows agree share a cluster, so their order among themselves does not matter.
        order = np.lexsort(points.T[::-1]) if len(points) else np.zeros(0, dtype=np.int64)
        own, points = own[torch.from_numpy(order)], points[order]
        if len(points) < 2 or (points[0] == points[-1]).all():
            skipped.append(c)
            continue
        second = _two_means(points, starts, seed)
        parts = [np.flatnonzero(second == q) for q in (0, 1)]
        if not all(len(p) for p in parts):
            skipped.append(c)
            continue
        parts.sort(key=lambda p: int(p[0]))
        fast, slow = sorted(parts, key=lambda p: (float(losses[own[p]].mean()), -len(p), -int(p[0])))
        mask[own[slow]] = True
        for q, part in enumerate((fast, slow)):
            centers[c, q] = torch.from_numpy(points[part].mean(0))
            inertia[c] += float(((points[part] - points[part].mean(0)) ** 2).sum())
            means[c, q] = losses[own[part]].mean()
    if skipped:
        warnings.warn(
            f"classes {skipped} have fewer than two different outputs; nothing of them is selected",
            stacklevel=3,
        )
    found = Selection(mask, labels, "clusters", inertia, centers, means, tuple(skipped))
    counts = found.counts
    large = (counts[:, 1] > _MOST * counts[:, 0]).nonzero()[:, 0].tolist()
    if large:
        warnings.warn(
            f"more than {_MOST:.0%} of classes {large} would be selected: nearly all of the class is learned late; "
            "try a later separating epoch",
            stacklevel=3,
        )
    return found


def _two_means(points: np.ndarray, starts: int, seed: int) -> np.ndarray:
    from sklearn import config_context
    from sklearn.cluster import KMeans

    # The points were looked at; on small classes looking again is a good part of the work.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        # With a tolerance of zero Lloyd's iteration ends where no label changes.
        return KMeans(2, n_init=starts, random_state=seed % 2**32, tol=0.0).fit(points).labels_  # pyright: ignore
