"""How unlike are two gradients? Row by row, in squares, or by one angle.

Lee et al., "Dataset Condensation with Contrastive Signals", ICML 2022, arXiv 2202.02916, section 1.2; the row cosine is that of dataset condensation (Zhao, Mopuri,
Bilen 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lineament.core.checks import one_of, require
from lineament.core.gradients import distance

# The published names, and what they are of :func:`lineament.core.gradients.distance`.
KINDS = {"rows": "layer_cosine", "squares": "l2", "cosine": "cosine"}


def gradient_distance(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    kind: Literal["rows", "squares", "cosine"] = "rows",
    *,
    eps: float = 1e-6,
) -> Tensor:
    """The distance of two lists of gradients, one tensor a parameter.

    Args:
        kind: ``"rows"``: Σ over rows (of a tensor as outputs x rest) of 1 - cosine, biases and norm scales left out; ``"squares"``: of all
            differences; ``"cosine"``: 1 - the cosine of everything as one vector.
        eps: added to products of norms; a row of zeros is at distance 1.

    >>> gradient_distance([torch.eye(2)], [torch.eye(2)]).item() < 1e-5
    True
    """
    one_of("kind", kind, KINDS)
    require(
        len(first) == len(second)
        and all(a.shape == b.shape for a, b in zip(first, second))
        and len(first) > 0,
        "second: expected as many gradients as the first list has, of the same shapes",
    )
    if kind == "rows":
        return torch.stack([row_distance(a, b, eps=eps) for a, b in zip(first, second)]).sum()
    return distance(first, second, KINDS[kind], eps=eps)


def row_distance(a: Tensor, b: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Σ over rows of 1 - cosine; 0 for a tensor of one dimension.

    >>> row_distance(torch.ones(3), torch.zeros(3)).item()
    0.0
    """
    if a.ndim < 2:
        return a.sum() * 0
    return distance([a], [b], KINDS["rows"], eps=eps)
