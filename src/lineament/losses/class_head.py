"""Classes as directions: a loss over cosines between embeddings and class weights, with any margin.

The loss of a batch is mean(lse_i - target_i) over two vectors, which :meth:`ClassHead.parts` gives; it is made in chunks (:mod:`lineament.losses.fused`)
that never hold all logits. Losses that add to the denominator (UNPG), sampled classes and margins compose on it. Sampling (partial FC): An et al.,
"Partial FC", 2021.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.core.shards import joined
from lineament.core.whole_files import divided, load_parts, save_whole
from lineament.losses import sharded
from lineament.losses.contrastive import wide
from lineament.losses.fused import class_lengths, cosine_softmax_loss
from lineament.losses.margins import Cosine, Margin


class ClassHead(nn.Module):
    """A layer of class directions and its loss, called as ``head(embeddings, labels)``.

    Args:
        num_classes, embedding_size: as in pytorch-metric-learning; ``weight`` is (num_classes, embedding_size).
        margin: on the target's cosine; none by default.
        scale: what cosines are multiplied by.
        sample: the share of classes a step computes, all of the batch's own and random others; the rest get no gradient.
        sparse: with ``sample`` below 1, the weight's gradient is sparse: only the step's classes are in it, so that an optimizer of sparse
            gradients (SGD without momentum, Adagrad, SparseAdam) neither moves nor reads the others.
        chunk: samples whose logits are in memory at once; ``"auto"``: what takes 44 MB; ``None``: all, by plain autograd.
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
        sparse: bool = False,
        chunk: int | Literal["auto"] | None = "auto",
        reduction: Literal["mean", "sum", "none"] = "mean",
        seed: int = 0,
    ):
        super().__init__()
        number("num_classes", num_classes, low=2, integer=True)
        number("embedding_size", embedding_size, low=1, integer=True)
        self.scale = number("scale", scale, low=0, open_low=True)
        self.sample = number("sample", sample, low=0, high=1, open_low=True)
        self.sparse = sparse
        if chunk is not None and chunk != "auto":
            number("chunk", chunk, low=1, integer=True)
        self.chunk = chunk
        require(
            margin is None or isinstance(margin, Margin),
            f"margin: got {show(margin)}, expected one of lineament.losses, as ArcFace(0.5)",
        )
        self.margin = Cosine() if margin is None else margin
        self.reduction = one_of("reduction", reduction, ("mean", "sum", "none"))
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.xavier_uniform_(self.weight, generator=self.generator)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        *,
        margins: Tensor | None = None,
        kept: Tensor | None = None,
        also: Tensor | None = None,
        indices_tuple: None = None,
    ) -> Tensor:
        """The loss.

        Args:
            embeddings: [B, d], not normalised. labels: [B], -1 for none. sample_weight: [B].
            margins: [B] (or of the labelled rows) instead of drawn ones. kept: class numbers, sorted, instead of sampled ones.
            also: a scalar logit that joins every denominator.

        Raises:
            InputError: labels beyond the classes, wrong shapes, an embedding or class without direction, NaN.
        """
        not_taken(indices_tuple)
        plain = self.reduction == "none" or self.chunk is None or self.margin.changes_others
        if plain and not self.sharded:
            parts = self.parts(embeddings, labels, margins=margins, kept=kept, also=also)
            return self.reduced(*parts, sample_weight)
        rows = checked(embeddings, labels, self.weight)
        _fitting(margins, rows, labels)
        if self.sharded:
            given = None if margins is None else margins if len(margins) == len(rows) else margins[rows]
            both = sharded.parts(self, wide(embeddings[rows]), labels[rows], given, kept, also)
            shares = None if sample_weight is None else joined(_per_row(sample_weight, rows, both[0]))
            return self.reduced(*both, torch.arange(len(both[0]), device=labels.device), shares)
        x, weight, y = self._chosen(embeddings[rows], labels[rows], kept)
        if not len(rows):
            return (x.sum() + weight[:1].sum()) * 0
        norms = x.norm(dim=1)
        each = torch.ones_like(norms) if sample_weight is None else _per_row(sample_weight, rows, x)
        each = each if self.reduction == "sum" else each / _positive(each.sum())

        def target(cosines: Tensor, norms: Tensor) -> Tensor:
            return self._target(cosines, norms, margins, rows) * (
                norms if self.margin.by_norm else self.scale
            )

        loss = cosine_softmax_loss(
            F.normalize(x, dim=1), norms, weight, y, target, scale=None if self.margin.by_norm else self.scale,
            weights=each, also=also, chunk=self.chunk or "auto",
        )  # fmt: skip
        extra = self.margin.extra(norms) if self.training else None
        return loss if extra is None else loss + (each * extra).sum()

    def parts(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        margins: Tensor | None = None,
        kept: Tensor | None = None,
        also: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(lse [n], target logit [n], numbers of the labelled rows [n]): a sample's loss is ``lse - target``. By plain autograd.

        A margin's own term (MagFace) is in lse.
        """
        rows = checked(embeddings, labels, self.weight)
        _fitting(margins, rows, labels)
        x, weight, y = self._chosen(embeddings[rows], labels[rows], kept)
        logits, extra = self._logits(x, weight, y, margins, rows)
        lse = logits.logsumexp(1)
        lse = lse if also is None else torch.logaddexp(lse, also)
        return lse if extra is None else lse + extra, logits.gather(1, y[:, None])[:, 0], rows

    def margin_logits(self, embeddings: Tensor, labels: Tensor, *, margins: Tensor | None = None) -> Tensor:
        """Logits [B, C] with the margin in the target's entry; rows of label -1 are without."""
        rows = checked(embeddings, labels, self.weight)
        _fitting(margins, rows, labels)
        found = self.logits(embeddings)
        return found.index_copy(
            0, rows, self._logits(wide(embeddings[rows]), self.weight, labels[rows], margins, rows)[0]
        )

    def logits(self, embeddings: Tensor) -> Tensor:
        """``scale * cosine`` of every class, [B, C]."""
        norms = embeddings.norm(dim=1)
        return self.cosines(embeddings) * (norms[:, None] if self.margin.by_norm else self.scale)

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Cosines [B, C]; of a divided head every process must ask for them."""
        weight: Any = self.weight
        return _cosines(embeddings, weight.full_tensor() if self.sharded else weight)

    def shard(self, mesh: Any = None) -> None:
        """Divide the classes among the processes of a training; called by all of them, before an optimizer is given the weights.

        ``weight`` is then a DTensor, ``Shard(0)``, which ``torch.distributed.checkpoint`` saves and opens in any number of processes (``weight.full_tensor()`` is the whole of
        it). Each process passes its own samples, and has the loss of all; the head stays outside of DistributedDataParallel, which is for the network before it. Of the logits each
        process holds those of its classes, for all samples: ``chunk`` is not looked at.

        Args:
            mesh: a DeviceMesh of one dimension with all processes; made where there is none.

        >>> ClassHead(10, 4).shard()
        Traceback (most recent call last):
        ...
        lineament.core.checks.InputError: mesh: there is no process group; start the processes by torchrun and call torch.distributed.init_process_group() first
        """
        sharded.shard(self, mesh)

    def save(self, path: str | Path) -> None:
        """Write the head as one safetensors file, the ``state_dict``; every process of a divided one must call it, and none holds it whole.

        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/head.safetensors"; ClassHead(10, 4).save(path)
        >>> ClassHead(11, 4).load(path)
        Traceback (most recent call last):
        ...
        lineament.core.checks.InputError: path: 'weight' in ... is (10, 4), expected (11, 4)
        """
        save_whole(self.state_dict(), path)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote, in any number of processes; each reads its classes.

        Raises:
            InputError: other classes or another size, no file of a head.
        """
        state = dict(self.state_dict())
        load_parts(path, state)
        self.load_state_dict(state)

    @property
    def sharded(self) -> bool:
        """Whether the classes are divided among processes."""
        return divided(self.weight)

    def load_class_weights(self, source: Tensor, layout: Literal["rows", "columns"] = "rows") -> None:
        """Take class weights from another library: (C, d) rows, or (d, C) columns as in pytorch-metric-learning and ElasticFace."""
        one_of("layout", layout, ("rows", "columns"))
        require(
            isinstance(source, Tensor),
            f"source: got {show(source)}, expected the class weights themselves, a tensor such as state[{next(iter(source), 'weight') if isinstance(source, dict) else 'weight'!r}]",
        )
        given = source.mT if layout == "columns" and source.ndim == 2 else source
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
        weights = None if sample_weight is None else _per_row(sample_weight, rows, each)
        if weights is not None:
            each = each * weights
        if self.reduction == "none":
            return each
        total = each.sum()
        if self.reduction == "sum":
            return total
        return total / (len(rows) if weights is None else _positive(weights.sum())) if len(rows) else total

    def _chosen(self, x: Tensor, y: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Wide embeddings, the step's class rows, and which of those are the samples' own."""
        if kept is None and self.training and self.sample < 1:
            kept = self.sampled(y)
        if kept is None:
            return wide(x), self.weight, y
        return wide(x), F.embedding(kept, self.weight, sparse=self.sparse), torch.searchsorted(kept, y)

    def _target(self, cosines: Tensor, norms: Tensor, margins: Tensor | None, rows: Tensor) -> Tensor:
        """The targets' cosines with their margin."""
        if not self.training:
            return cosines
        if margins is None:
            margins = self.margin.draw(cosines, self.generator)
        elif len(margins) != len(rows):
            margins = margins[rows]
        return self.margin(cosines, norms, margins)

    def _logits(
        self, x: Tensor, weight: Tensor, y: Tensor, margins: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        class_lengths(weight)
        cosines, norms = _cosines(x, weight), x.norm(dim=1)
        scale = norms[:, None] if self.margin.by_norm else self.scale
        if not self.training:
            return cosines * scale, None
        own = cosines.gather(1, y[:, None])
        target = self._target(own[:, 0], norms, margins, rows)[:, None]
        found = self.margin.others(cosines, own).scatter(1, y[:, None], target)
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


def _cosines(x: Tensor, weight: Tensor) -> Tensor:
    return wide(F.normalize(x, dim=1) @ F.normalize(weight, dim=1).T).clamp(-1, 1)


def _positive(total: Tensor) -> Tensor:
    require(
        bool(total > 0), f"sample_weight: the labelled rows' sum is {float(total):g}, expected more than 0"
    )
    return total


def _per_row(sample_weight: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    last = int(rows[-1]) if len(rows) else -1
    if not isinstance(sample_weight, Tensor) or sample_weight.ndim != 1 or len(sample_weight) <= last:
        raise InputError(
            f"sample_weight: got {show(sample_weight)}, expected one number a row (pytorch-metric-learning's indices_tuple is not taken)"
        )
    found = sample_weight[rows].to(like)
    require(bool(found.isfinite().all()), "sample_weight: NaN or infinity")
    return found


def not_taken(indices_tuple: Any) -> None:
    """An error for what pytorch-metric-learning's losses take beside labels."""
    require(
        indices_tuple is None,
        "indices_tuple: pytorch-metric-learning's pairs are not taken; weigh samples by sample_weight",
    )


def _fitting(margins: Tensor | None, rows: Tensor, labels: Tensor) -> None:
    require(margins is None or bool(margins.isfinite().all()), "margins: NaN or infinity")
    require(
        margins is None or margins.shape in ((len(rows),), labels.shape),
        f"margins: got {show(margins)}, expected one a row ({len(labels)}), or one a labelled row ({len(rows)})",
    )


def checked(embeddings: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The numbers of the labelled rows; an error for what no loss can take."""
    classes, size = weight.shape
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise InputError(f"embeddings: got {show(embeddings)}, expected floats [batch, dimension]")
    require(
        embeddings.shape[1] == size,
        f"embeddings: got {show(embeddings)}, expected rows of {size} numbers as the class directions",
    )
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
