"""Two latents, a shortcut and a core one, whose predictivity and availability are set independently: data with a known best rule.

Hermann, Mobahi, Fel, Mozer (ICLR 2024, arXiv 2310.16228). With a label y = ±1, latents z | y ~ N(y μ, Σ), Σ = [[1, σ], [σ, 1]], where sign(z_i)
is right with probability ρ_i = Φ(μ_i) (predictivity). What a network sees is ``embed(z)``: how far and how plainly each latent reaches the
input is its availability. Latents, directions and nesting have generators of their own, so that one setting can change and all else stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable
from lineament.data.samples import Samples

LATENTS = ("shortcut", "core")


@dataclass(frozen=True, eq=False)
class TwoLatents(Readable):
    """The distribution of two latents, and how they are embedded in an input.

    Args:
        embed: inputs from latents (sample, 2), the shortcut's first.
        predictivity: (ρ_s, ρ_c), each in (1/2, 1): how often the latent's sign is the label.
        correlation: σ, of the latents within a class, in (-1, 1).
        name: where samples are from.

    >>> world = two_latents(predictivity=(0.85, 0.9))
    >>> [round(v, 4) for v in world.means.tolist()], round(world.optimal_accuracy, 4)
    ([1.0364, 1.2816], 0.9073)
    """

    embed: Callable[[Tensor], Tensor]
    predictivity: tuple[float, float] = (0.85, 0.9)
    correlation: float = 0.6
    name: str = "two latents"

    def __post_init__(self) -> None:
        for rho in _two("predictivity", self.predictivity):
            checks.number("predictivity", rho, low=0.5, high=1, open_low=True, open_high=True)
        checks.number("correlation", self.correlation, low=-1, high=1, open_low=True, open_high=True)

    @property
    def means(self) -> Float[Tensor, "2"]:
        """μ_i = Φ⁻¹(ρ_i), of the class +1."""
        return torch.from_numpy(ndtri(np.array(self.predictivity, dtype=float)))

    @property
    def covariance(self) -> Float[Tensor, "2 2"]:
        """Σ, within a class."""
        s = float(self.correlation)
        return torch.tensor([[1.0, s], [s, 1.0]], dtype=torch.float64)

    @property
    def optimal_weights(self) -> Float[Tensor, "2"]:
        """Σ⁻¹ μ: the best rule is the sign of z · w. Its weight for the shortcut is negative where ρ_s is small enough."""
        return torch.linalg.solve(self.covariance, self.means)

    @property
    def optimal_accuracy(self) -> float:
        """Φ(√(μᵀ Σ⁻¹ μ)), which no rule exceeds."""
        return _normal_cdf(float(self.means @ self.optimal_weights) ** 0.5)

    def latents(
        self, labels: Float[Tensor, "sample"], noise: Float[Tensor, "sample 2"]
    ) -> Float[Tensor, "sample 2"]:
        """z = y μ + L ε, with L the lower Cholesky factor of Σ, for labels ±1 and standard normal noise."""
        labels, noise = labels.double(), noise.double()
        return labels[:, None] * self.means + noise @ torch.linalg.cholesky(self.covariance).T

    def draw(
        self,
        samples: int = 3200,
        *,
        stratified: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Samples:
        """Balanced samples, of either class in turn; ``extras["latents"]`` are their z (sample, 2), targets 1 for y = +1 and 0 for y = -1.

        Args:
            samples: an even number.
            stratified: each latent takes the quantiles of its distribution once, so that its sign is right in a share of ρ_i up to 1/``samples``.
            seed: of the latents alone; settings that differ elsewhere share them.

        >>> x = two_latents().draw(1000, stratified=True)
        >>> y, z = 2 * x.targets - 1, x.extras["latents"]
        >>> [round(v, 3) for v in (z.sign() == y[:, None]).double().mean(0).tolist()]
        [0.85, 0.9]
        """
        checks.number("samples", samples, low=2, integer=True)
        checks.require(
            samples % 2 == 0, f"samples: got {samples}, expected an even number, half of each class"
        )
        draw = np.random.default_rng([checks.seed("seed", seed), 0])
        labels = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(samples // 2)
        noise = torch.from_numpy(draw.standard_normal((samples, 2)))
        z = self.latents(labels, noise)
        if stratified:
            for label in (-1.0, 1.0):
                own = labels == label
                # The order within a class keeps the correlation, the values become the quantiles of N(y μ, 1).
                ranks = z[own].argsort(0).argsort(0).double()
                levels = torch.from_numpy(ndtri(((ranks + 0.5) / (samples // 2)).numpy()))
                z[own] = label * self.means + levels
        return Samples(
            self.embed(z.to(dtype)).to(dtype),
            (labels > 0).long(),
            ("-1", "+1"),
            extras={"latents": z},
            source=self.name,
        )

    def grid(self, points: int = 30, *, reach: float = 3.0) -> Float[Tensor, "cell 2"]:
        """Latents on a grid, z_s (the outer loop) and z_c evenly in ± ``reach`` times their means."""
        checks.number("points", points, low=2, integer=True)
        checks.number("reach", reach, low=0, open_low=True)
        axes = [_even(float(reach * m), points) for m in self.means]
        return torch.cartesian_prod(*axes)


def two_latents(
    *,
    predictivity: tuple[float, float] = (0.85, 0.9),
    correlation: float = 0.6,
    amplification: tuple[float, float] = (0.1, 0.1),
    nesting: tuple[int, int] = (0, 0),
    dims: int = 100,
    orthogonal: bool = False,
    seed: int = 0,
) -> TwoLatents:
    """Two latents as a vector: x = f_s(α_s z_s w_s) + f_c(α_c z_c w_c), with w_i random unit vectors and f_i some fixed tanh layers.

    Args:
        predictivity: (ρ_s, ρ_c), each in (1/2, 1).
        correlation: of the latents within a class.
        amplification: (α_s, α_c), positive; their ratio is the shortcut's availability.
        nesting: how many layers e -> tanh(A e), A ~ N(0, 1/``dims``), each latent passes; more of them make it less available.
        dims: of the input.
        orthogonal: make w_c orthogonal to w_s.
        seed: of the directions and, apart, of the nesting.

    Raises:
        InputError: ρ outside (1/2, 1), |σ| ≥ 1, α ≤ 0, sizes that are too small.

    >>> world = two_latents(amplification=(6.4, 0.1))
    >>> tuple(world.draw(10).inputs.shape), tuple(world.grid(30).shape)
    ((10, 100), (900, 2))
    """
    checks.number("dims", dims, low=2, integer=True)
    checks.seed("seed", seed)
    directions = np.random.default_rng([seed, 1]).standard_normal((2, dims))
    layers = np.random.default_rng([seed, 2])
    matrices = []
    for count in _two("nesting", nesting):
        checks.number("nesting", count, low=0, integer=True)
        drawn = layers.standard_normal((int(count), dims, dims)) / math.sqrt(dims)
        matrices.append([torch.from_numpy(A) for A in drawn])
    embed = VectorEmbedding(
        torch.from_numpy(directions), amplification, (matrices[0], matrices[1]), orthogonal=orthogonal
    )
    return TwoLatents(embed, predictivity, correlation)


class VectorEmbedding:
    """Latents as vectors: α_i z_i w_i through nesting layers, summed.

    Args:
        directions: (2, dims), of any length; they are normalised (and, if ``orthogonal``, w_c made orthogonal to w_s before).
        amplification: (α_s, α_c).
        nesting: the matrices A of each latent's layers e -> activation(A e), in order.

    >>> VectorEmbedding(torch.eye(2), (2.0, 1.0))(torch.tensor([[1.0, -1.0]])).tolist()
    [[2.0, -1.0]]
    """

    def __init__(
        self,
        directions: Float[Tensor, "2 dims"],
        amplification: tuple[float, float],
        nesting: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
        *,
        orthogonal: bool = False,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ):
        for alpha in _two("amplification", amplification):
            checks.number("amplification", alpha, low=0, open_low=True)
        w = checks.tensor("directions", directions, shape=(2, "dims"), floating=True)
        w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
        if orthogonal:
            core = w[1] - (w[1] @ w[0]) * w[0]
            w = torch.stack([w[0], core / torch.linalg.vector_norm(core)])
        self.directions, self.amplification = w, tuple(map(float, amplification))
        self.nesting, self.activation = nesting, activation

    def __call__(self, z: Float[Tensor, "sample 2"]) -> Float[Tensor, "sample dims"]:
        if not any(map(len, self.nesting)):
            return (
                z * torch.tensor(self.amplification, dtype=z.dtype, device=z.device)
            ) @ self.directions.to(z)
        found = torch.zeros(())
        for i, (alpha, w, layers) in enumerate(zip(self.amplification, self.directions, self.nesting)):
            e = alpha * z[:, i : i + 1] * w.to(z)
            for A in layers:
                e = self.activation(e @ A.to(z).T)
            found = found + e
        return found


def _two(what: str, values: Sequence[Any]) -> Sequence[Any]:
    checks.require(
        isinstance(values, Sequence) and len(values) == 2,
        f"{what}: got {checks.show(values)}, expected two values, of the shortcut and of the core latent",
    )
    return values


def _even(end: float, points: int) -> Tensor:
    """``points`` values evenly in ± ``end``, each the exact negative of its mirror image."""
    half = torch.linspace(-end, end, points, dtype=torch.float64)
    return (half - half.flip(0)) / 2


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
