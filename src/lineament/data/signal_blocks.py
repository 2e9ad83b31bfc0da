"""The simplified data of the DiffROAR paper: many blocks, of which one at a time carries the label.

Shah, Jain, Netrapalli, NeurIPS 2021, arXiv 2102.12781, section 5. With y = ±1 and j* uniform on the blocks that may carry the signal, block i is
x_i = eta g_i + y u* [i = j*], g_i uniform in the unit ball. What a gradient should mark in one instance is j*; the theorem says what it
marks instead (:mod:`lineament.explain.faithfulness.feature_leakage`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.data.samples import Samples


def signal_blocks(
    count: int,
    *,
    blocks: int = 10,
    width: int = 1,
    eta: float = 0.0,
    signals: int | None = None,
    direction: Float[Tensor, "width"] | None = None,
    seed: int = 0,
) -> Samples:
    """Draw the simplified data: inputs (sample, blocks · width), targets 0 for y = -1 and 1 for y = 1.

    ``extras["own"]`` (sample, blocks) says which block carries the sample's signal.

    Args:
        blocks: d. width: d~, the coordinates of a block. eta: size of the noise.
        signals: how many blocks may carry the signal: d // 2 in the paper's section 5, d in its first version.
        direction: u*, (1, 0, ..., 0) by default.

    >>> data = signal_blocks(1000, signals=5)
    >>> bool((data.inputs.sum(1) == 2 * data.targets - 1).all()), data.inputs[:, 5:].abs().sum().item()
    (True, 0.0)
    """
    for name, value in (("count", count), ("blocks", blocks), ("width", width)):
        checks.number(name, value, low=1, integer=True)
    checks.number("eta", eta, low=0)
    chosen = max(1, blocks // 2) if signals is None else signals
    checks.number("signals", chosen, low=1, high=blocks, integer=True)
    generator = torch.Generator().manual_seed(checks.number("seed", seed, integer=True))
    sign = 2.0 * torch.randint(2, (count,), generator=generator) - 1
    signal = torch.randint(chosen, (count,), generator=generator)
    # Uniform in the ball: a uniform direction, as long as the width-th root of a uniform number.
    noise = torch.randn(count, blocks, width, generator=generator)
    noise /= noise.norm(dim=2, keepdim=True).clamp_min(1e-30)
    noise *= torch.rand(count, blocks, 1, generator=generator) ** (1 / width)
    x = planted(noise, sign, signal, eta=eta, direction=direction)
    extras = {"own": torch.arange(blocks) == signal[:, None]}
    return Samples(x, (sign > 0).long(), extras=extras, source="blocks of which one carries the label")


def planted(
    noise: Float[Tensor, "batch blocks width"],
    sign: Float[Tensor, "batch"],
    signal: Int[Tensor, "batch"],
    *,
    eta: float,
    direction: Tensor | None = None,
) -> Float[Tensor, "batch total"]:
    """eta · noise, with y u* added to each instance's own block; blocks side by side.

    >>> planted(torch.ones(1, 2, 1), torch.tensor([-1.0]), torch.tensor([1]), eta=0.5).tolist()
    [[0.5, -0.5]]
    """
    width = noise.shape[2]
    if direction is None:
        direction = torch.eye(width, dtype=noise.dtype)[0]
    checks.tensor("direction", direction, shape=(width,), floating=True)
    x = eta * noise
    x[torch.arange(len(x)), signal] += sign[:, None].to(noise) * direction.to(noise)
    return x.flatten(1)
