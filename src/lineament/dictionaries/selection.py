"""Which latents does a TopK step keep? Those of the largest pre-activation, or those that also matter to the model's loss.

Olmo, Wilson, Forsey, Hepner, Howe, Wingate, "Features that Make a Difference: Leveraging Gradients for Improved Dictionary Learning" (2024,
arXiv 2411.10397). With the gradient g of the model's loss with respect to the activation x, moving x along atom w_i changes the loss by
about w_i . g, so that the latents are ranked by

    score = z + beta * z * |w_i . g| / influence_scale

The kept values are always relu(z), never the scores, and no gradient passes through the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.core.checks import number, one_of, require, show

SCORES = ("sum", "product", "signed", "topk_of_l1")
PRECISIONS = ("full", "bfloat16")


@dataclass(frozen=True)
class Selection:
    """How latents are ranked where the model's gradient is given, and which of them compete.

    Attributes:
        score: with influence I = |w . g| / influence_scale,
            ``"sum"``: z + beta z I, the paper's;
            ``"product"``: z I, its limit for large beta;
            ``"signed"``: relu(-z w . g), only latents that lower the loss where they are on (``raising=True``: only those that raise it);
            ``"topk_of_l1"``: z / |z|_1 + beta z I / |z I|_1, both parts normalised over the row's latents.
        beta: the weight of the influence. Its unit is that of 1 / I: without ``influence_scale`` it changes with the loss's reduction,
            the activation's units and the site.
        influence_scale: what |w . g| is divided by, such as its root mean square over the data; 1 is the raw form.
        raising: for ``"signed"``.
        pool: which latents compete: ``"row"``, k of each row; ``"batch"``, k times the rows of all given rows together; or a number of
            consecutive rows that share k times that number.
        candidates: with the score ``"sum"`` by row, score only so many times k latents, those of largest z, where they surely hold the k best (and all
            of them in other rows): the same choice, without the product of all atoms with g; 0 scores all. 8 is usually right.
        precision: ``"full"``, or ``"bfloat16"`` for the products that rank, in both modes; the values kept are those of full precision.

    >>> z, g = torch.tensor([[2.0, 1.5]]), torch.tensor([[0.0, 1.0]])
    >>> Selection(beta=1.0).scores(z, g @ torch.eye(2)).tolist()
    [[2.0, 3.0]]
    """

    score: str = "sum"
    beta: float = 1.0
    influence_scale: float = 1.0
    raising: bool = False
    pool: str | int = "row"
    candidates: int = 0
    precision: str = "full"

    def __post_init__(self) -> None:
        one_of("score", self.score, SCORES)
        number("beta", self.beta, low=0)
        number("influence_scale", self.influence_scale, low=0, open_low=True)
        if isinstance(self.pool, str):
            one_of("pool", self.pool, ("row", "batch"))
        else:
            number("pool", self.pool, low=1, integer=True)
        number("candidates", self.candidates, low=0, integer=True)
        one_of("precision", self.precision, PRECISIONS)
        require(
            not self.candidates or (self.score == "sum" and self.pool == "row"),
            f"candidates: got {self.candidates} with score={self.score!r} and pool={self.pool!r}; the bound that makes them sure is that of score='sum' by row",
        )
        require(
            self.precision == "full" or self.pool == "row",
            f"precision: got {self.precision!r} with pool={self.pool!r}, expected 'full' there",
        )

    def scores(self, z: Tensor, along: Tensor) -> Tensor:
        """The scores of rows of pre-activations.

        Args:
            z: (rows, width).
            along: (rows, width), w . g: how the loss changes along each atom.
        """
        require(z.shape == along.shape, f"along: got {show(along)}, expected the shape of z {tuple(z.shape)}")
        if self.score == "signed":
            effect = z.relu() * along
            return (effect if self.raising else -effect).relu_()
        influence = along.abs() / self.influence_scale
        if self.score == "product":
            return z * influence
        if self.score == "sum":
            return z * influence.mul_(self.beta).add_(1)
        tiny = torch.finfo(z.dtype).tiny
        weighted = z * influence
        parts = [each / each.abs().sum(-1, keepdim=True).clamp_min(tiny) for each in (z, weighted)]
        return parts[0] + self.beta * parts[1]
