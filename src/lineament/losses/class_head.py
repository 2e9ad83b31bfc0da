"""Classes as directions: a loss over cosines between embeddings and class weights, with any margin.

The loss of a batch is mean(lse_i - target_i) over two vectors, which :meth:`ClassHead.parts` gives: losses that add to the denominator (UNPG), sampled
classes and margins compose on them. Sampling (partial FC): An et al., "Partial FC", 2021.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.losses.margins import Cosine, Margin


class ClassHead(nn.Module):
    """A layer of class directions and its loss, called as ``head(embeddings, labels)``.

    Args:
        num_classes, embedding_size: as in pytorch-metric-learning; ``weight`` is (num_classes, embedding_size).
        margin: on the target's cosine; none by default.
        scale: what cosines are multiplied by.
        sample: the share of classes a step computes, all of the batch's own and random others; the rest get no gradient.
        reduction: of the samples' losses: ``"mean"``, ``"sum"`` or ``"none"``. Label -1 is left out.
        seed: of sampled classes and random margins.

    In eval mode there is no margin and all classes are there. ``logits`` gives ``scale * cosine``.

    >>> head = ClassHead(10, 4)
    >>> head(torch.randn(8, 4), torch.arange(8)).ndim
    0
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: Margin | None = None,
        scale: float = 64.0,
        *,
        sample: float = 1.0,
        reduction: Literal["mean", "sum", "none"] = "mean",
        seed: int = 0,
    ):
        super().__init__()
        number("num_classes", num_classes, low=2, integer=True)
        number("embedding_size", embedding_size, low=1, integer=True)
        self.scale = number("scale", scale, low=0, open_low=True)
        self.sample = number("sample", sample, low=0, high=1, open_low=True)
        self.margin = Cosine() if margin is None else margin
        self.reduction = one_of("reduction", reduction, ("mean", "sum", "none"))
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.xavier_uniform_(self.weight, generator=self.generator)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        margins: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            embeddings: [B, d], not normalised. labels: [B], -1 for none. sample_weight: [B].
            margins: [B] (or of the labelled rows) instead of drawn ones. kept: class numbers instead of sampled ones.

        Raises:
            InputError: labels beyond the classes, wrong shapes, an embedding or class without direction, NaN.
        """
        return self.reduced(*self.parts(embeddings, labels, margins=margins, kept=kept), sample_weight)

    def parts(
        self, embeddings: Tensor, labels: Tensor, *, margins: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(lse [n], target logit [n], numbers of the labelled rows [n]): a sample's loss is ``lse - target``.

        A margin's own term (MagFace) is in lse.
        """
        rows = checked(embeddings, labels, len(self.weight))
        logits, extra = self._logits(embeddings[rows], labels[rows], margins, kept, rows)
        at = labels[rows] if kept is None else torch.searchsorted(kept, labels[rows])
        lse = logits.logsumexp(1)
        return lse if extra is None else lse + extra, logits.gather(1, at[:, None])[:, 0], rows

    def margin_logits(self, embeddings: Tensor, labels: Tensor, *, margins: Tensor | None = None) -> Tensor:
        """Logits [B, C] with the margin in the target's entry; rows of label -1 are without."""
        rows = checked(embeddings, labels, len(self.weight))
        found = self.logits(embeddings)
        return found.index_copy(0, rows, self._logits(embeddings[rows], labels[rows], margins, None, rows)[0])

    def logits(self, embeddings: Tensor) -> Tensor:
        """``scale * cosine`` of every class, [B, C]."""
        norms = embeddings.norm(dim=1)
        return self.cosines(embeddings) * (norms[:, None] if self.margin.by_norm else self.scale)

    def cosines(self, embeddings: Tensor, kept: Tensor | None = None) -> Tensor:
        """Cosines [B, C], or with the kept classes."""
        weight = self.weight if kept is None else self.weight[kept]
        return (F.normalize(embeddings, dim=1) @ F.normalize(weight, dim=1).T).clamp(-1, 1)

    def load_class_weights(self, source: Tensor, layout: Literal["rows", "columns"] = "rows") -> None:
        """Take class weights from another library: (C, d) rows, or (d, C) columns as in pytorch-metric-learning and ElasticFace."""
        given = source if layout == "rows" else source.T
        require(
            given.shape == self.weight.shape,
            f"source: got {show(source)} as {layout}, expected {tuple(self.weight.shape)} class rows",
        )
        with torch.no_grad():
            self.weight.copy_(given)

    def reduced(
        self, lse: Tensor, target: Tensor, rows: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The batch's loss from :meth:`parts`."""
        each = lse - target
        if sample_weight is not None:
            each = each * sample_weight[rows]
        if self.reduction == "none":
            return each
        total = each.sum()
        if self.reduction == "sum":
            return total
        return (
            total / (len(rows) if sample_weight is None else sample_weight[rows].sum())
            if len(rows)
            else total
        )

    def _logits(
        self, embeddings: Tensor, labels: Tensor, margins: Tensor | None, kept: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if kept is None and self.training and self.sample < 1:
            kept = self.sampled(labels)
        cosines = self.cosines(embeddings, kept)
        at = (labels if kept is None else torch.searchsorted(kept, labels))[:, None]
        norms = embeddings.norm(dim=1)
        scale = norms[:, None] if self.margin.by_norm else self.scale
        if not self.training:
            return cosines * scale, None
        own = cosines.gather(1, at)
        if margins is None:
            margins = self.margin.draw(own[:, 0], self.generator)
        elif len(margins) != len(rows):
            margins = margins[rows]
        target = self.margin(own[:, 0], norms, margins)[:, None]
        found = self.margin.others(cosines, own).scatter(1, at, target)
        return found * scale, self.margin.extra(norms)

    def sampled(self, labels: Tensor) -> Tensor:
        """The classes of one step, sorted: all of ``labels`` and random others, a share ``sample`` of all."""
        positive = labels.unique()
        count = max(len(positive), round(self.sample * len(self.weight)))
        order = torch.rand(len(self.weight), generator=self.generator).to(labels.device)
        order[positive] = 2
        return order.topk(count).indices.sort().values

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())


def checked(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The numbers of the labelled rows; an error for what no loss can take."""
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise InputError(f"embeddings: got {show(embeddings)}, expected floats [batch, dimension]")
    integer = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    require(
        integer and labels.shape == embeddings.shape[:1],
        f"labels: got {show(labels)} beside {show(embeddings)}, expected one whole number a row",
    )
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        require(
            low >= -1 and high < classes,
            f"labels: got {high if high >= classes else low}, expected -1 (none) to {classes - 1}",
        )
    norms = embeddings.detach().norm(dim=1)
    require(bool(norms.isfinite().all()), "embeddings: NaN or infinity in a row")
    require(bool((norms > 0).all()), "embeddings: a row is zero, so that it has no direction")
    return (labels >= 0).nonzero()[:, 0]
