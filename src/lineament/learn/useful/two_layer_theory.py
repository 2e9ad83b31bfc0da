"""What does gradient descent learn first, and what do SAM and upsampling change? The two-layer network of USEFUL's theory.

Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv 2404.17768. A cubic convolutional network f(x; W) = Σ_j Σ_p ⟨w_j, x_p⟩³ on patches
with a fast and a slow feature (:mod:`lineament.data.fast_slow_patches`), logistic loss, full batch. Without noise the training closes on
the alignments with the two features alone, which gives an independent check of every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable


def cubic_network(
    W: Float[Tensor, "filters dims"], x: Float[Tensor, "samples patches dims"]
) -> Float[Tensor, "samples"]:
    """f(x; W) = Σ_j Σ_p ⟨w_j, x_p⟩³.

    >>> cubic_network(torch.eye(2), torch.tensor([[[1.0, 2.0]]])).tolist()
    [9.0]
    """
    return (x @ W.T).pow(3).sum((1, 2))


def logistic_gradient(
    W: Float[Tensor, "filters dims"],
    x: Float[Tensor, "samples patches dims"],
    y: Float[Tensor, "samples"],
    weights: Float[Tensor, "samples"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "filters dims"]]:
    """The loss Σ_i u_i log(1 + exp(-y_i f(x_i; W))) and its gradient, in closed form; u_i = 1/n, or the weights over their sum.

    >>> loss, slope = logistic_gradient(torch.zeros(1, 2), torch.ones(3, 2, 2), torch.ones(3))
    >>> round(loss.item(), 4), slope.tolist()
    (0.6931, [[0.0, 0.0]])
    """
    share = torch.full_like(y, 1 / len(y)) if weights is None else weights / weights.sum()
    inner = x @ W.T
    margin = y * inner.pow(3).sum((1, 2))
    pull = -share * y * torch.sigmoid(-margin)
    slope = torch.einsum("i,ipj,ipd->jd", 3 * pull, inner.square(), x)
    return (share * F.softplus(-margin)).sum(), slope


@dataclass(frozen=True)
class Path(Readable):
    """A training: the loss before each step, max_j ⟨w_j, v⟩ of the fast and the slow feature after it, the last weights."""

    loss: Float[Tensor, "steps"]
    alignments: Float[Tensor, "steps 2"]
    W: Float[Tensor, "filters dims"]
    first_gradient: Float[Tensor, "filters dims"]

    @property
    def gap(self) -> Float[Tensor, "steps"]:
        """max_j ⟨w_j, v_e⟩ - max_j ⟨w_j, v_d⟩ after each step."""
        return self.alignments[:, 0] - self.alignments[:, 1]

    def to_dict(self) -> dict[str, Any]:
        return {name: value.tolist() for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """Both alignments over the steps."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        for column, name in enumerate(("fast feature", "slow feature")):
            ax.plot(range(1, len(self.loss) + 1), self.alignments[:, column].tolist(), label=name)
        ax.set(xlabel="step", ylabel="largest alignment of a filter")
        ax.legend()
        return ax


def train_cubic(
    W: Float[Tensor, "filters dims"],
    x: Float[Tensor, "samples patches dims"],
    y: Float[Tensor, "samples"],
    *,
    steps: int,
    lr: float,
    rho: float = 0.0,
    weights: Float[Tensor, "samples"] | None = None,
) -> Path:
    """Full-batch gradient descent, or SAM for ``rho`` > 0: W ← W - η ∇L(W + ρ ∇L(W)/‖∇L(W)‖).

    Args:
        W: the initial filters; not changed.
        weights: of the examples, as copies of some would give (:meth:`lineament.learn.useful.slow_examples.Selection.weights`).

    Raises:
        InputError: shapes that do not fit, labels other than -1 and 1, negative ``lr``, ``rho`` or ``weights``.

    >>> from lineament.data.fast_slow_patches import fast_slow_patches
    >>> data = fast_slow_patches(50, dims=6, seed=1)
    >>> path = train_cubic(0.3 * torch.ones(2, 6).double(), *data.pair, steps=30, lr=0.2)
    >>> bool((path.gap > 0).all() and (path.loss.diff() < 0).all())
    True
    """
    checks.tensor("W", W, shape=("filters", "dims"), floating=True)
    checks.tensor("x", x, shape=("samples", "patches", W.shape[1]), floating=True)
    checks.tensor("y", y, shape=(len(x),), floating=True)
    checks.require(bool((y.abs() == 1).all()), "y: got other labels than -1 and 1")
    checks.number("steps", steps, low=1, integer=True)
    checks.number("lr", lr, low=0)
    checks.number("rho", rho, low=0)
    if weights is not None:
        checks.tensor("weights", weights, shape=(len(x),), floating=True)
        checks.require(
            bool((weights >= 0).all() and weights.sum() > 0),
            "weights: expected none negative and a positive sum",
        )
    W = W.detach().clone()
    losses, alignments, first = [], [], None
    for _ in range(steps):
        loss, slope = logistic_gradient(W, x, y, weights)
        first = slope if first is None else first
        length = slope.norm()
        if rho and length > 0:
            slope = logistic_gradient(W + rho * slope / length, x, y, weights)[1]
        W = W - lr * slope
        losses.append(loss)
        alignments.append(W[:, :2].max(0).values)
    assert first is not None
    return Path(torch.stack(losses), torch.stack(alignments), W, first)


def alignment_recursion(
    a: Float[Tensor, "filters"],
    b: Float[Tensor, "filters"],
    *,
    steps: int,
    lr: float,
    fast: float,
    slow: float,
    alpha: float,
) -> tuple[Float[Tensor, "steps filters"], Float[Tensor, "steps filters"]]:
    """The noise-free training as a recursion in a_j = ⟨w_j, v_e⟩ and b_j = ⟨w_j, v_d⟩.

    With the margins M1 = β_e³ Σ a³ + β_d³ Σ b³ (fast feature there) and M2 = β_d³ Σ b³, and s(m) = 1/(1 + e^m):
    a ← a + 3η β_e³ a² α s(M1), b ← b + 3η β_d³ b² [α s(M1) + (1-α) s(M2)].

    Args:
        alpha: the share of examples with the fast feature; :func:`upsampled_share` after upsampling.

    >>> a, b = alignment_recursion(torch.ones(1), torch.ones(1), steps=1, lr=0.1, fast=1.0, slow=0.5, alpha=1.0)
    >>> round(a.item() - 1, 4), round(b.item() - 1, 4)
    (0.0735, 0.0092)
    """
    found_a, found_b = [], []
    for _ in range(steps):
        second = slow**3 * b.pow(3).sum()
        both = torch.sigmoid(-(fast**3 * a.pow(3).sum() + second))
        a, b = (
            a + 3 * lr * fast**3 * a.square() * alpha * both,
            b + 3 * lr * slow**3 * b.square() * (alpha * both + (1 - alpha) * torch.sigmoid(-second)),
        )
        found_a.append(a)
        found_b.append(b)
    return torch.stack(found_a), torch.stack(found_b)


def upsampled_share(alpha: float, factor: float = 2) -> float:
    """α' = α/(α + k(1 - α)): the share of examples with the fast feature once the others are there k times.

    At equal alignments the fast feature's initial speed is α' (β_e/β_d)³ times the slow one's.

    >>> round(upsampled_share(0.9, 2), 3)
    0.818
    """
    checks.number("alpha", alpha, low=0, high=1)
    checks.number("factor", factor, low=1)
    return alpha / (alpha + factor * (1 - alpha))


def fast_free_weights(has_fast: Bool[Tensor, "samples"], factor: float = 2) -> Float[Tensor, "samples"]:
    """Weights of a training in which the examples without the fast feature are there ``factor`` times."""
    return 1 + (factor - 1) * (~has_fast).double()
