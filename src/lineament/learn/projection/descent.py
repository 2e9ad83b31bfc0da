"""Gradient descent on the spectral loss by a deep linear network from a balanced start: where F^(l/L) comes from.

Xue et al., ICLR 2024, arXiv 2403.11391. From orthogonal layers of one scale, W_{l+1}ᵀ W_{l+1} = W_l W_lᵀ stays true along gradient flow, and up to second order in the rate along
descent; a small random start would stay near the saddle at 0 for about 1 / (start² rate) steps instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import number, require, show
from lineament.core.checks import seed as checked_seed
from lineament.core.results import Readable, plain
from lineament.learn.projection.theory import invariance, layer_gram, minimiser, spectral_gradient


@dataclass(frozen=True)
class Descent(Readable):
    """The trained layers W_1, ..., W_L, the first [width, features]; ``slope`` is the norm of the loss's gradient after ``steps`` steps."""

    layers: tuple[Tensor, ...]
    steps: int
    slope: float

    def product(self, layer: int | None = None) -> Tensor:
        """W_l ... W_1, by default of all layers."""
        last = (
            len(self.layers)
            if layer is None
            else number("layer", layer, low=1, high=len(self.layers), integer=True)
        )
        found = self.layers[0]
        for weight in self.layers[1:last]:
            found = weight @ found
        return found

    def gram(self, layer: int | None = None) -> Tensor:
        """(W_l ... W_1)ᵀ (W_l ... W_1), which descent brings to F^(l/L), [features, features]."""
        product = self.product(layer)
        return product.T @ product

    def weights(self, layer: int | None = None) -> Tensor:
        """‖W_l ... W_1 v_i‖ of each input coordinate i, [features]."""
        return self.product(layer).norm(dim=0)

    @property
    def imbalance(self) -> float:
        """The largest ‖W_{l+1}ᵀ W_{l+1} - W_l W_lᵀ‖ relative to ‖W_l W_lᵀ‖; 0 of one layer."""
        pairs = zip(self.layers, self.layers[1:])
        return max((float((b.T @ b - a @ a.T).norm() / (a @ a.T).norm()) for a, b in pairs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {**plain(self), "imbalance": self.imbalance}


def balanced_descent(
    moment: Tensor, across: Tensor, depth: int = 2, *, steps: int = 5000, rate: float = 0.5, start: float = 0.4,
    width: int | None = None, decay: float = 0.0, flow: bool = False, seed: int = 0,
) -> Descent:  # fmt: skip
    """Train W = W_L ... W_1 by gradient descent on -2 tr(F M') + tr(F M F M) + decay Σ ‖W_l‖², F = WᵀW, from a balanced orthogonal start, in float64.

    Args:
        moment, across: M and M', [features, features] symmetric.
        rate: of a step, as a share of the largest that is sure to be stable at the minimum, where the curvature is bounded in closed form.
        start: the scale of each layer, in units of the inputs' largest deviation to the power -1/depth.
        flow: follow gradient flow by steps of Runge and Kutta, four gradients each, which keep the layers balanced to the fourth order of the rate.
        width: of all layers; below the number of features the embedding has that rank.

    Raises:
        InputError: shapes that do not match, a width above the number of features, an M that is not positive definite.

    >>> found = balanced_descent(torch.eye(2), torch.diag(torch.tensor([1.0, 0.25])), steps=2000)
    >>> [round(w, 3) for w in found.weights(1).tolist()], [round(w, 3) for w in found.weights(2).tolist()]
    ([1.0, 0.707], [1.0, 0.5])
    """
    require(
        moment.ndim == 2
        and moment.shape[0] == moment.shape[1] == len(across)
        and across.shape == moment.shape,
        f"across: got {show(across)} beside {show(moment)}, expected two square matrices of one size",
    )
    features = len(moment)
    number("depth", depth, low=1, integer=True)
    number("steps", steps, low=1, integer=True)
    number("decay", decay, low=0)
    wide = features if width is None else number("width", width, low=1, high=features, integer=True)
    moment, across = moment.double(), across.double()
    number("rate", rate, low=0, open_low=True)
    pace = 2 * rate / (_curvature(moment, across, depth) + 2 * decay)
    largest = float(torch.linalg.eigvalsh(moment)[-1])
    scale = number("start", start, low=0, open_low=True) * largest ** (-0.5 / depth)
    generator = torch.Generator().manual_seed(checked_seed("seed", seed))
    layers = []
    for size in (features, *[wide] * (depth - 1)):
        turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        layers.append(scale * turn[:wide].to(moment))

    def slopes(at: list[Tensor]) -> list[Tensor]:
        return _slopes(at, moment, across, decay)

    for _ in range(steps):
        down = slopes(layers)
        if flow:
            second = slopes(_moved(layers, down, pace / 2))
            third = slopes(_moved(layers, second, pace / 2))
            fourth = slopes(_moved(layers, third, pace))
            down = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(down, second, third, fourth)]
        layers = _moved(layers, down, pace)
    last = slopes(layers)
    return Descent(tuple(layers), steps, float(torch.stack([slope.norm() for slope in last]).norm()))


def _curvature(moment: Tensor, across: Tensor, depth: int) -> float:
    """A bound on the loss's largest second derivative at the minimum that balanced layers reach.

    The loss is ‖PᵀP - A‖² but for a constant, with P = W M^(1/2) and A = M^(-1/2) M' M^(-1/2): at PᵀP = A it bends by at most 8 ‖A‖ ‖dP‖², and layer l
    moves P by at most ‖W_L ... W_{l+1}‖ ‖W_{l-1} ... W_1 M^(1/2)‖.
    """
    best = minimiser(moment, across)
    top = float(torch.linalg.matrix_norm(best, 2))
    total = 0.0
    for layer in range(1, depth + 1):
        below = moment
        if layer > 1:
            # The spectrum of M^(1/2) G M^(1/2) is that of Rᵀ M R for G = R Rᵀ.
            root = layer_gram(best, layer - 1, 2 * depth)
            below = root @ moment @ root
        total += top ** ((depth - layer) / depth) * float(torch.linalg.matrix_norm(below, 2))
    return 8 * float(invariance(moment, across)[0]) * total


def _moved(layers: list[Tensor], slopes: list[Tensor], pace: float) -> list[Tensor]:
    return [weight - pace * slope for weight, slope in zip(layers, slopes)]


def _slopes(layers: list[Tensor], moment: Tensor, across: Tensor, decay: float) -> list[Tensor]:
    """The loss's gradient by each layer."""
    below: list[Tensor | None] = [None]
    for weight in layers[:-1]:
        first = below[-1]
        below.append(weight if first is None else weight @ first)
    under = below[-1]
    slope = spectral_gradient(layers[-1] if under is None else layers[-1] @ under, moment, across)
    found = []
    for weight, under in zip(reversed(layers), reversed(below)):
        found.append((slope if under is None else slope @ under.T) + 2 * decay * weight)
        slope = weight.T @ slope
    return found[::-1]
