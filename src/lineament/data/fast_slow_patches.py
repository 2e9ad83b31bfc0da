"""Patches with a fast and a slow feature: the data on which USEFUL's theory shows what gradient descent learns first.

Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv 2404.17768. Every example holds the weak (slow) feature, most hold the strong (fast)
one; only the slow one classifies all of them.
"""

from __future__ import annotations

import torch

from lineament.core import checks
from lineament.data.samples import Samples


def fast_slow_patches(
    samples: int,
    *,
    dims: int = 50,
    patches: int = 3,
    fast: float = 1.0,
    slow: float = 0.6,
    alpha: float = 0.9,
    noise: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Samples:
    """Examples x = (β_d y v_d, β_e y v_e or noise, noise, ...) with v_e = e_0, v_d = e_1 and y = ±1.

    Inputs are (sample, patch, dimension): patch 0 is the slow feature, patch 1 the fast one where ``extras["has_fast"]`` says so. Targets
    are -1.0 and 1.0.

    Args:
        samples: n.
        dims, patches: d and P, at least 2 each.
        fast, slow: β_e and β_d.
        alpha: probability that the fast feature is there.
        noise: σ_p; each coordinate of a noise patch has variance σ_p²/(d P).

    Raises:
        InputError: sizes that are too small, a probability outside [0, 1], a negative σ_p.

    Source: the follow-up TADA (arXiv 2505.21574) restates the construction.

    >>> data = fast_slow_patches(1000, noise=0.0)
    >>> tuple(data.inputs.shape), round(data.extras["has_fast"].double().mean().item(), 1)
    ((1000, 3, 50), 0.9)
    """
    checks.number("samples", samples, low=1, integer=True)
    checks.number("dims", dims, low=2, integer=True)
    checks.number("patches", patches, low=2, integer=True)
    checks.number("alpha", alpha, low=0, high=1)
    checks.number("noise", noise, low=0)
    checks.number("fast", fast)
    checks.number("slow", slow)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    y = torch.randint(2, (samples,), generator=generator).to(dtype) * 2 - 1
    has_fast = torch.rand(samples, generator=generator, dtype=torch.float64) < alpha
    x = torch.randn(samples, patches, dims, generator=generator, dtype=dtype) * (
        noise / (dims * patches) ** 0.5
    )
    x[:, 0] = 0
    x[:, 0, 1] = slow * y
    x[has_fast, 1] = 0
    x[has_fast, 1, 0] = fast * y[has_fast]
    return Samples(x, y, extras={"has_fast": has_fast}, source="patches with a fast and a slow feature")
