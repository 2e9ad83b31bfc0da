"""Similar people as negatives: every pair of unlike samples of a batch joins the denominator of a class head's loss.

Jung et al., "Unified Negative Pair Generation toward Well-discriminative Feature Space for Face Recognition", BMVC 2022, arXiv 2203.11593. With L the
log-sum-exp of the pairs' scaled similarities the loss of a sample is logaddexp(lse, L) - target: nothing is concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import number, one_of, require, show
from lineament.core.results import Readable
from lineament.core.shards import joined
from lineament.losses.class_head import ClassHead, checked, not_taken
from lineament.losses.contrastive import exact, wide
from lineament.losses.pair_losses import PAIR_LOSSES, pair_loss


class UNPG(nn.Module):
    """A class head whose denominators also hold the batch's negative pairs, without outliers.

    Args:
        head: any :class:`ClassHead`.
        whisker: pairs outside Q1 - r IQR to Q3 + r IQR are left out: above are suspected wrong labels, below are trivial pairs.
            1.5 for MS1MV2, 1 for K-FACE, infinity for no filter.
        aux: ``"unpg"``, or the name of a loss over pairs that is added to the head's instead, ``weight`` times: ``"triplet"``,
            ``"contrastive"``, ``"circle"``, ``"multi-similarity"``, ``"sn-pair"`` (which around an ArcFace head is MixFace).

    In a process group the pairs are those of all processes' samples, with gradients that are right as DistributedDataParallel averages them.

    >>> loss = UNPG(ClassHead(5, 4))
    >>> loss(torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 3])).ndim
    0
    """

    def __init__(self, head: ClassHead, whisker: float = 1.5, aux: str = "unpg", *, weight: float = 1.0):
        super().__init__()
        require(isinstance(head, ClassHead), f"head: got {show(head)}, expected a ClassHead")
        one_of("aux", aux, ("unpg", *PAIR_LOSSES))
        require(
            aux == "unpg" or head.reduction == "mean",
            f"aux: {aux} is added to a mean, got a head whose reduction is {head.reduction!r}",
        )
        self.head, self.pairs = head, None if aux == "unpg" else pair_loss(aux)
        self.weight = number("weight", weight, low=0)
        self.whisker = whisker if whisker == float("inf") else number("whisker", whisker, low=0)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        *,
        indices_tuple: None = None,
    ) -> Tensor:
        """The loss of embeddings [B, d] with labels [B]; rows of label -1 form no pairs. Without negatives it is the head's own."""
        not_taken(indices_tuple)
        if not self.training:
            return self.head(embeddings, labels, sample_weight=sample_weight)
        if self.pairs is not None:
            base = self.head(embeddings, labels, sample_weight=sample_weight)
            return base + self.weight * self.pairs(joined(embeddings), joined(labels))
        rows = checked(embeddings, labels, self.head.weight)
        pairs = self.negatives(joined(embeddings[rows]), joined(labels[rows]))
        return self.head(
            embeddings, labels, sample_weight=sample_weight, also=pairs.logsumexp(self.head.scale)
        )

    def negatives(self, embeddings: Tensor, labels: Tensor) -> NegativePairs:
        """The pairs that join the denominators, of the batch's labelled rows."""
        return negative_pairs(embeddings, labels, self.whisker)


@dataclass(frozen=True)
class NegativePairs(Readable):
    """Similarities [B, B], and which of them are kept: i < j, unlike labels, within the whiskers ``low`` to ``high``."""

    similarities: Tensor
    kept: Tensor
    quartiles: tuple[Tensor, Tensor]
    low: Tensor
    high: Tensor

    def logsumexp(self, scale: float) -> Tensor:
        """ln Σ exp(scale * similarity) over the kept pairs; -inf where there are none."""
        return (scale * self.similarities).masked_fill(~self.kept, -torch.inf).flatten().logsumexp(0)


def negative_pairs(embeddings: Tensor, labels: Tensor, whisker: float = 1.5) -> NegativePairs:
    """The pairs of unlike samples, filtered by box and whisker: quartiles are sorted[⌊q n⌋], bounds inclusive, no gradient through either.

    >>> int(negative_pairs(torch.eye(3), torch.tensor([0, 0, 1])).kept.sum())
    2
    """
    require(
        embeddings.ndim == 2 and labels.shape == embeddings.shape[:1],
        f"labels: got {show(labels)} beside {show(embeddings)}, expected one a row",
    )
    if whisker != float("inf"):
        number("whisker", whisker, low=0)
    unit = F.normalize(wide(embeddings), dim=1)
    with exact(unit):
        found = unit @ unit.T
    unlike = (labels[:, None] != labels).triu(1)
    with torch.no_grad():
        first, third = _quartiles(found.masked_fill(~unlike, torch.inf).flatten(), unlike.sum())
        reach = whisker * (third - first) if whisker != float("inf") else torch.full_like(first, torch.inf)
        low, high = first - reach, third + reach
        kept = unlike & (found >= low) & (found <= high)
    return NegativePairs(found, kept, (first, third), low, high)


def _quartiles(values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """sorted[⌊count / 4⌋] and sorted[⌊3 count / 4⌋] of the ``count`` finite numbers among [n]; infinity where there are none.

    On a CPU both are found without sorting; elsewhere nothing waits for the device.
    """
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        places = [min(int(q * int(count)), max(len(values) - 1, 0)) for q in (0.25, 0.75)]
        parted = torch.from_numpy(np.partition(values.numpy(), places)) if len(values) else values
    else:
        places = [(q * count).floor().long().clamp(max=len(values)) for q in (0.25, 0.75)]
        parted = values.sort().values
    parted = F.pad(parted, (0, 1), value=torch.inf)
    first, third = (parted[place] for place in places)
    return first, third
