"""Which features each layer still has: a head that is not linear can delete a feature that the layer before it keeps.

Xue et al., ICLR 2024, arXiv 2403.11391: in a diagonal network of symmetric ReLUs with threshold b, a feature whose weighted amplitude stays below b is absent from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.batching import chunked
from lineament.core.checks import number, require, show
from lineament.core.results import Readable, plain
from lineament.core.sites.activations import record
from lineament.learn.projection.pooling import pooled


@dataclass(frozen=True)
class FeaturesByLayer(Readable):
    """``correlation`` [sites, features]: the largest |correlation| of one of the site's coordinates with each feature.

    A feature is ``present`` [sites, features] where it is above ``tolerance``.
    """

    sites: tuple[str, ...]
    correlation: Tensor
    tolerance: float

    @property
    def present(self) -> Tensor:
        return self.correlation > self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**plain(self), "present": self.present.tolist()}

    def plot(self, ax: Any = None) -> Any:
        """Correlation by site, a line a feature."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        ax.plot(self.sites, self.correlation.cpu(), "o-", label=range(self.correlation.shape[1]))
        ax.axhline(self.tolerance, color="grey", linewidth=1)
        ax.set(ylabel="largest |correlation|", ylim=(0, 1.05))
        ax.legend(title="feature")
        return ax


def features_by_layer(
    model: nn.Module,
    inputs: Tensor,
    features: Tensor,
    *,
    sites: str | Sequence[str] = "*",
    tolerance: float = 0.1,
    batch_size: int | str = "auto",
) -> FeaturesByLayer:
    """Which known features of the inputs are present in each layer of a network.

    A correlation of n samples that is 0 comes out at about 1/√n, the largest of many coordinates above that: choose ``tolerance`` accordingly.

    Args:
        inputs: [n, ...]. features: their values in each sample, [n, features].
        sites: names or globs; by default the model's children. Maps are averaged over positions.

    Raises:
        InputError: unknown sites, or another number of feature values than of samples.

    >>> from lineament.learn.projection.heads import DiagonalNetwork
    >>> x = torch.tensor([[1.0, 0.25], [1.0, -0.25], [-1.0, 0.25], [-1.0, -0.25]])
    >>> features_by_layer(DiagonalNetwork(2, bias=0.125, start=0.75), x, x).present.tolist()
    [[True, True], [True, False]]
    """
    number("tolerance", tolerance, low=0, high=1)
    require(
        features.ndim == 2 and len(features) == len(inputs) and len(inputs) > 1,
        f"features: got {show(features)}, expected [{len(inputs)}, features], their values in each sample",
    )

    def values(part: Tensor) -> dict[str, Tensor]:
        return {site: pooled(value.float()) for site, value in record(model, part, sites).items()}

    found = chunked(values, inputs, batch_size=batch_size, most=1024)
    rows = [_correlation(value, features.to(value.device)).amax(0) for value in found.values()]
    return FeaturesByLayer(tuple(found), torch.stack(rows), float(tolerance))


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """|Correlation| of each column of x with each of y, [columns, columns]; 0 where one is constant."""
    units = []
    for value in (x.double(), y.double()):
        apart = value - value.mean(0)
        # A constant column differs from its mean by rounding.
        varies = apart.norm(dim=0) > 1e-7 * value.norm(dim=0)
        units.append(torch.where(varies, apart / apart.norm(dim=0).clamp_min(1e-300), 0))
    return (units[0].T @ units[1]).abs()
