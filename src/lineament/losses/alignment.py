"""Two views of one sample without negatives: the loss of BYOL (Grill et al. 2020) and SimSiam (Chen and He 2021), with positives that may be extrapolated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show
from lineament.losses.contrastive import directions, exact
from lineament.losses.feature_transform import PositiveExtrapolation


class CosineAlignment(nn.Module):
    """Mean of 2 - 2 p·t, directions of a prediction and of what it predicts, which is a constant: ``loss(prediction, target)``.

    Args:
        transform: pushes prediction and target apart, from its own ``start`` on (see :meth:`set_epoch`). The transformed target then has the prediction in it, and its gradient with it.
        seed: of its draws.

    What keeps all samples from becoming one point is the method's: a predictor, a slowly moving target, or both. SimSiam's loss is the mean of both views' calls, less 1 and halved. Of
    SwAV, whose views are compared by clusters, ``transform`` alone serves: it is called with the two projections before they meet the prototypes.

    >>> round(CosineAlignment()(torch.eye(2), torch.eye(2).flip(0)).item(), 4)
    2.0
    """

    def __init__(self, transform: PositiveExtrapolation | None = None, *, seed: int = 0):
        super().__init__()
        require(
            transform is None or isinstance(transform, PositiveExtrapolation),
            f"transform: got {show(transform)}, expected a PositiveExtrapolation, as there are no negatives",
        )
        self.transform, self.epoch = transform, 0
        self.generator = torch.Generator().manual_seed(seed)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is, from 0; a transform with a later ``start`` waits."""
        self.epoch = epoch

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of [B, d] and [B, d], of any length but zero.

        Raises:
            InputError: other shapes, a row without direction.
        """
        p = directions(prediction)
        if not isinstance(target, Tensor) or target.shape != prediction.shape:
            raise InputError(f"target: got {show(target)}, expected the shape of the prediction, {show(prediction)}")  # fmt: skip
        t, transform = directions(target.detach()).to(p), self.transform
        if transform is not None and self.training and self.epoch >= transform.start:
            lam = transform.draw((p.shape[0], p.shape[1]), self.generator, p).to(p.device)
            p, t = transform(p, t, lam)
        with exact(p):
            return 2 - 2 * (p * t).sum(1).mean()

    def get_extra_state(self) -> dict[str, Any]:
        """The state of the draws, which a resumed training needs."""
        return {"generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
