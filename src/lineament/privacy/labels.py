"""Which labels were in the batch? They can be read off the last layer's gradient.

Fang et al. 2023, arXiv 2308.04699, section 1.3; Zhao, Mopuri, Bilen 2020.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, one_of


def inferred_labels(
    weight: Tensor, batch: int, *, rule: Literal["row_sums", "bias"] = "row_sums", bias: Tensor | None = None
) -> list[int]:
    """The labels of a batch, sorted.

    Args:
        weight: gradient of the last weights [classes, features]; bias: of its bias [classes].
        rule: ``"row_sums"``: the classes of the smallest row sums, each once (exact for one picture and features that are not negative);
            ``"bias"``: classes of negative bias gradient, and again those that stay most negative, so that labels may repeat.

    >>> inferred_labels(torch.tensor([[1.0], [-2.0]]), 1)
    [1]
    """
    number("batch", batch, low=1, integer=True)
    one_of("rule", rule, ("row_sums", "bias"))
    if rule == "row_sums":
        number("batch", batch, low=1, high=len(weight), integer=True)
        return sorted(weight.sum(1).topk(batch, largest=False).indices.tolist())
    if bias is None:
        raise InputError("bias: the rule 'bias' needs the gradient of the last bias")
    left = bias.clone()
    found = torch.nonzero(left < 0)[:, 0].tolist()[:batch]
    impact = left[left < 0].sum() / batch
    for label in found:
        left[label] -= impact
    while len(found) < batch:
        best = int(left.argmin())
        found.append(best)
        left[best] -= impact
    return sorted(found)
