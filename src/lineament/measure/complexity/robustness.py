"""How far does a feature move when noise is added to the input?

Fel et al. (NeurIPS 2024, arXiv 2407.06076, section 5): the variance over draws of z(x + s ε), ε standard normal, averaged over inputs,
and the range (maximum minus minimum). All noise scales see the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks, results
from lineament.core.batching import auto_batch, progress
from lineament.core.checks import require
from lineament.core.results import Readable


@dataclass(frozen=True)
class Robustness(Readable):
    """How far features move under noise, by scale and feature, averaged over inputs.

    Attributes:
        scales: standard deviations of the noise.
        variance: over the draws (population); range: maximum minus minimum over the draws.
        variance_errors: standard error of ``variance`` over the inputs.
        draws, samples: how many noises for each input, and how many inputs.
    """

    scales: tuple[float, ...]
    variance: Float[Tensor, "scales features"]
    range: Float[Tensor, "scales features"]
    variance_errors: Float[Tensor, "scales features"]
    draws: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {name: results.plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """Variance against noise scale, a line a feature."""
        ax = results.axes(ax)
        ax.loglog(self.scales, self.variance.cpu().clamp(min=1e-30), alpha=0.5)
        ax.set(xlabel="standard deviation of the noise", ylabel="variance of the feature")
        return ax


def robustness(
    function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "samples ..."],
    *,
    scales: Sequence[float] = (0.01, 0.1, 0.5),
    draws: int = 100,
    noise: Float[Tensor, "draws samples ..."] | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
) -> Robustness:
    """Variance and range of features over noisy copies of each input.

    Args:
        function: features of inputs, (samples, ...) -> (samples, features), such as :func:`~lineament.measure.complexity.features.feature_function`.
        inputs: as the function takes them; noise is in their units.
        scales: standard deviations of the noise; draws: of it for each input.
        noise: standard normal numbers of one's own instead, (draws, samples, ...).
        batch_size: inputs at a time; seed: of the noise.

    Raises:
        InputError: a scale below 0, fewer than two draws, noise that does not fit.

    >>> found = robustness(lambda x: x.sum(1, keepdim=True), torch.zeros(1000, 4), scales=[0.5], draws=50)
    >>> round(found.variance.item(), 1)
    1.0
    """
    inputs = checks.tensor("inputs", inputs, floating=True)
    levels = [
        checks.number("scales", scale, low=0) for scale in checks.listed("scales", scales, "deviations")
    ]
    if noise is None:
        checks.number("draws", draws, low=2, integer=True)
    else:
        checks.tensor("noise", noise, shape=("draws", *inputs.shape))
        require(len(noise) >= 2, f"noise: got {len(noise)} draw, expected at least 2")
        draws = len(noise)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))

    def one(x: Tensor, n: Tensor) -> Tensor:
        parts = auto_batch(
            lambda a, b: function(x[a:b] + n[a:b]), len(x), batch_size=batch_size, memory=function, most=256
        )
        found = torch.cat(list(parts)).detach()
        require(
            found.ndim == 2 and len(found) == len(x),
            f"function(inputs): got {checks.show(found)}, expected ({len(x)}, features)",
        )
        return checks.tensor("function(inputs)", found).double()

    count, state = 0, {}
    for draw in progress(range(draws), "robustness"):
        if noise is None:
            drawn = torch.randn(inputs.shape, generator=generator).to(inputs)
        else:
            drawn = noise[draw].to(inputs)
        count += 1
        for level in levels:
            z = one(inputs, level * drawn)
            if level not in state:
                state[level] = (z, torch.zeros_like(z), z, z)
                continue
            mean, squares, low, high = state[level]
            shift = z - mean
            mean = mean + shift / count
            state[level] = (mean, squares + shift * (z - mean), torch.minimum(low, z), torch.maximum(high, z))
    variances = torch.stack([state[level][1] / draws for level in levels])
    ranges = torch.stack([state[level][3] - state[level][2] for level in levels])
    samples = len(inputs)
    errors = variances.std(1) / samples**0.5 if samples > 1 else variances[:, 0] * torch.nan
    return Robustness(tuple(map(float, levels)), variances.mean(1), ranges.mean(1), errors, draws, samples)
