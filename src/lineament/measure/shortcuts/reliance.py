"""Which of two latents does a rule decide by? Reliance, and how far it is from the best rule's: shortcut bias.

Hermann, Mobahi, Fel, Mozer (ICLR 2024, arXiv 2310.16228). Over a grid of latents, with decisions ŷ = ±1,

    reliance = E[ŷ sign z_s] - E[ŷ sign z_c],      shortcut bias = reliance - reliance of the best rule.

+1: it decides by the shortcut alone, -1: by the core latent alone. The difference cannot tell a latent that is not used from one that is used the wrong way
round (weights (0, 1) and (-0.8, 1) both give -1 on a fine grid), so both terms are always given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks, results
from lineament.core.results import Readable


@dataclass(frozen=True)
class Reliance(Readable):
    """How decisions go with each latent, over a grid.

    ``with_shortcut`` is E[ŷ sign z_s], ``with_core`` E[ŷ sign z_c]; negative: used the wrong way round (``reversed`` names those).
    """

    value: float
    with_shortcut: float
    with_core: float
    cells: int

    @property
    def reversed(self) -> tuple[str, ...]:
        """The latents that are used against their sign."""
        return tuple(
            name for name, term in (("shortcut", self.with_shortcut), ("core", self.with_core)) if term < 0
        )

    @property
    def absolute(self) -> float:
        """|E[ŷ sign z_s]| - |E[ŷ sign z_c]|, as some quote the measure: how much each is used, whichever way round."""
        return abs(self.with_shortcut) - abs(self.with_core)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "absolute": self.absolute, "reversed": list(self.reversed)}

    def plot(self, ax: Any = None) -> Any:
        """Both terms as bars."""
        ax = results.axes(ax)
        ax.bar(["shortcut", "core"], [self.with_shortcut, self.with_core], color=["C1", "C0"])
        ax.axhline(0, color="C7", linewidth=0.8)
        ax.set(ylim=(-1.05, 1.05), ylabel="decisions that go with its sign, less those against")
        return ax


def decisions(scores: Tensor) -> Float[Tensor, "sample"]:
    """±1 from one score a sample (its sign, +1 at 0) or two logits (the larger, the second where they are equal).

    >>> decisions(torch.tensor([-2.0, 0.0])).tolist(), decisions(torch.tensor([[1.0, 3.0], [2.0, 0.0]])).tolist()
    ([-1.0, 1.0], [1.0, -1.0])
    """
    checks.tensor("scores", scores)
    two = scores.ndim == 2 and scores.shape[1] == 2
    checks.require(
        two or scores.numel() == len(scores),
        f"scores: got {checks.show(scores)}, expected one score or two logits a sample, since the label is one of two",
    )
    single = scores[:, 1] - scores[:, 0] if two else scores.reshape(len(scores))
    return torch.where(single >= 0, 1.0, -1.0).double()


def reliance(
    scores: Tensor,
    latents: Float[Tensor, "cell 2"],
    *,
    weights: Float[Tensor, "cell"] | None = None,
) -> Reliance:
    """Reliance of the decisions that ``scores`` make on ``latents``, the shortcut's first.

    Args:
        scores: (cell,), whose sign decides, or (cell, 2) logits.
        latents: z of each; a latent of 0 has no sign and counts as 0.
        weights: of the cells, any positive scale; all alike by default.

    Returns:
        :class:`Reliance`.

    >>> z = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]))
    >>> reliance(z[:, 0], z).value, reliance(z[:, 1], z).value, reliance(torch.ones(4), z).value
    (1.0, -1.0, 0.0)
    """
    checks.tensor("latents", latents, shape=("cell", 2))
    checks.require(
        len(scores) == len(latents), f"scores: got {len(scores)} for {len(latents)} latents, expected as many"
    )
    answers, signs = decisions(scores), latents.double().sign()
    if weights is None:
        # Sums of small whole numbers, so that the shares are exact.
        terms = (answers[:, None] * signs).sum(0) / len(signs)
        value = (answers * (signs[:, 0] - signs[:, 1])).sum() / len(signs)
    else:
        checks.tensor("weights", weights, shape=(len(latents),), floating=True)
        share = weights.double() / weights.double().sum()
        terms = (share * answers) @ signs
        value = terms[0] - terms[1]
    return Reliance(float(value), float(terms[0]), float(terms[1]), len(signs))


def linear_reliance(weights: Float[Tensor, "2"], means: Float[Tensor, "2"]) -> float:
    """Reliance of the rule sign(w · z) on an infinitely fine grid in ± any multiple of the means.

    With p = w_s μ_s and q = w_c μ_c: sign(p)|p|/2|q| - sign(q)(1 - |p|/2|q|) where |p| ≤ |q|, and with the roles exchanged the negative of that.

    >>> round(linear_reliance(torch.tensor([1.0, 1.0]), torch.tensor([0.5, 1.0])), 6)
    -0.5
    """
    p, q = (weights.double() * means.double()).tolist()
    if p == 0 and q == 0:
        return 0.0
    if abs(p) > abs(q):
        return -linear_reliance(weights.flip(0), means.flip(0))
    half = abs(p) / (2 * abs(q))
    return (p > 0) * half - (p < 0) * half - math.copysign(1 - half, q)
