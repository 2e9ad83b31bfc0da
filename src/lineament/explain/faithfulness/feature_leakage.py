"""How much of a gradient lies where this input has no signal, and how much theory says must lie there.

Shah, Jain, Netrapalli, NeurIPS 2021, arXiv 2102.12781, section 5: a max-margin network with one hidden layer has a gradient of the same size on
every block that carries the signal in *some* instance. The closed form below is ours (noise 0): its margin, and that its two neurons are the
maximiser, agree with a linear program over tens of thousands of neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.results import Readable, axes


def null_fraction(
    scores: Float[Tensor, "batch *shape"], null: Bool[Tensor, "batch *mask"], top: float = 0.1
) -> Float[Tensor, "batch"]:
    """The share of the largest \\|scores\\| that lies in the null part; the share of its area is chance.

    Args:
        scores: one attribution an input.
        null: where there is no signal; broadcasts to the scores.
        top: which share of the coordinates is the largest ones: int(round(top · coordinates)), at least one.

    >>> null_fraction(torch.tensor([[3.0, -2.0, 1.0, 0.0]]), torch.tensor([[False, True, True, True]]), 0.5).tolist()
    [0.5]
    """
    flat, mask = _flat(scores, null)
    checks.number("top", top, low=0, high=1, open_low=True)
    count = max(1, round(top * flat.shape[1]))
    best = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    return mask.gather(1, best).to(flat.dtype).mean(1)


def null_mass(
    scores: Float[Tensor, "batch *shape"], null: Bool[Tensor, "batch *mask"]
) -> Float[Tensor, "batch"]:
    """Σ\\|scores\\| in the null part over Σ\\|scores\\|; 0 where all scores are zero.

    >>> null_mass(torch.tensor([[3.0, -1.0]]), torch.tensor([[False, True]])).tolist()
    [0.25]
    """
    flat, mask = _flat(scores, null)
    total = flat.sum(1)
    return torch.where(total > 0, (flat * mask).sum(1) / total.clamp_min(1e-300), 0.0)


@dataclass(frozen=True)
class Leakage(Readable):
    """Where the gradient of instances with one signal block lies, as shares of its mass, averaged over instances.

    ``own`` is the instance's own block, ``other`` those that carry the signal elsewhere, ``noise`` those that never do. ``top_is_own`` and
    ``bottom_is_own`` say how often the largest and the smallest block is the instance's own; ``ratio`` is the mean size on another signal block
    over that on the own one: the theorem says 1, a gradient that marks the instance's feature 0. ``silent`` is the share of instances whose gradient is zero everywhere
    (a saturated loss), for which "largest" and "smallest" mean nothing.
    """

    own: float
    other: float
    noise: float
    top_is_own: float
    bottom_is_own: float
    ratio: float
    silent: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def plot(self, ax: Any = None) -> Any:
        """The shares as bars."""
        ax = axes(ax)
        ax.bar(["own block", "other signal blocks", "noise blocks"], [self.own, self.other, self.noise])
        ax.set(ylabel="share of the gradient", ylim=(0, 1))
        return ax


def leakage(
    gradients: Float[Tensor, "batch total"], own: Bool[Tensor, "batch blocks"], signals: int
) -> Leakage:
    """Measure :class:`Leakage`.

    Args:
        gradients: of a batch of :func:`lineament.data.signal_blocks.signal_blocks`.
        own: its ``own``: the instance's block.
        signals: the first so many blocks may carry the signal.

    >>> own = torch.eye(2, dtype=torch.bool)
    >>> leakage(torch.tensor([[3.0, 1.0], [1.0, 3.0]]), own, 2).own
    0.75
    """
    checks.tensor("gradients", gradients, shape=("batch", "total"), floating=True)
    count, blocks = own.shape
    checks.require(
        len(gradients) == count and gradients.shape[1] % blocks == 0,
        f"gradients: got {checks.show(gradients)} for {count} instances of {blocks} blocks",
    )
    checks.number("signals", signals, low=1, high=blocks, integer=True)
    size = gradients.detach().double().reshape(count, blocks, -1).norm(dim=2)
    total = size.sum(1).clamp_min(1e-300)
    may = torch.arange(blocks) < signals
    other = may & ~own
    mine = (size * own).sum(1)
    elsewhere = (size * other).sum(1)
    # Ties as the official code breaks them: by the ascending stable order.
    order = size.argsort(dim=1, stable=True)
    first, last = order[:, -1], order[:, 0]
    picked = torch.arange(count)
    # The mean over the other blocks beside the instance's own: 1 where all signal blocks are alike.
    mean_other = elsewhere / max(signals - 1, 1)
    return Leakage(
        own=float((mine / total).mean()),
        other=float((elsewhere / total).mean()),
        noise=float(((size * ~may).sum(1) / total).mean()),
        top_is_own=float(own[picked, first].double().mean()),
        bottom_is_own=float(own[picked, last].double().mean()),
        ratio=float(mean_other.mean() / mine.mean().clamp_min(1e-300)),
        silent=float((size == 0).all(1).double().mean()),
    )


class MaxMargin(nn.Module):
    """The max-margin one-hidden-layer ReLU network of the simplified data without noise, in closed form.

    With D signal blocks and unit direction u*, two neurons (w, r, b) of mass 1/2: ±(1/√2, a·(u*, ..., u*), a), b positive in both,
    a = 1/√(2(D + 1)). Then f(x) = a/(2√2) · (relu(s + 1) - relu(1 - s)) with s = Σ_j ⟨u*, x_j⟩, and y f(x) = 1/(2√(D + 1)) on every instance.

    Args:
        signals: D. blocks: how many there are; the rest gets no weight. direction: u*, of length 1.

    >>> net = MaxMargin(5, blocks=10)
    >>> round(net.margin, 6), round(net(torch.eye(10)[:1].double()).item(), 6)
    (0.204124, 0.204124)
    """

    direction: Tensor

    def __init__(self, signals: int, *, blocks: int | None = None, direction: Tensor | None = None):
        super().__init__()
        checks.number("signals", signals, low=1, integer=True)
        self.blocks = (
            signals if blocks is None else checks.number("blocks", blocks, low=signals, integer=True)
        )
        self.signals = signals
        u = torch.ones(1, dtype=torch.float64) if direction is None else direction.double()
        checks.tensor("direction", u, shape=("width",), floating=True)
        length = float(u.norm())
        checks.require(abs(length - 1) < 1e-6, f"direction: its length is {length:g}, expected 1")
        used = torch.arange(self.blocks) < signals
        self.register_buffer("direction", (used[:, None] * u).flatten())

    @property
    def margin(self) -> float:
        """1 / (2 √(D + 1)), also the size of the gradient on every signal block where the sum s lies inside (-1, 1)."""
        return 1 / (2 * math.sqrt(self.signals + 1))

    def neurons(self) -> dict[str, Float[Tensor, "2 ..."]]:
        """The two atoms: ``w`` (2,), ``r`` (2, total), ``b`` (2,), ``mass`` (2,)."""
        a = 1 / math.sqrt(2 * (self.signals + 1))
        sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
        return {
            "w": sign / math.sqrt(2),
            "r": sign[:, None] * a * self.direction,
            "b": torch.full((2,), a, dtype=torch.float64),
            "mass": torch.full((2,), 0.5, dtype=torch.float64),
        }

    def forward(self, x: Float[Tensor, "batch total"]) -> Float[Tensor, "batch"]:
        n = {k: v.to(x) for k, v in self.neurons().items()}
        return torch.relu(x @ n["r"].T + n["b"]) @ (n["mass"] * n["w"])


def predicted_gradients(signals: int, blocks: int) -> Float[Tensor, "blocks"]:
    """What the theorem says of every instance: the size of the gradient on each block, up to one constant, as shares of its sum.

    >>> predicted_gradients(2, 4).tolist()
    [0.5, 0.5, 0.0, 0.0]
    """
    checks.number("blocks", blocks, low=1, integer=True)
    checks.number("signals", signals, low=1, high=blocks, integer=True)
    return (torch.arange(blocks) < signals).double() / signals


def _flat(scores: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    checks.tensor("scores", scores, floating=True)
    checks.require(null.dtype == torch.bool, f"null: got {checks.show(null)}, expected a bool mask")
    fits = null.ndim == scores.ndim and all(a in (1, b) for a, b in zip(null.shape, scores.shape))
    checks.require(
        fits, f"null: got {checks.show(null)}, expected one that broadcasts to {tuple(scores.shape)}"
    )
    return scores.detach().abs().flatten(1), null.expand_as(scores).flatten(1)
