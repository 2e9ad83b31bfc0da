"""How much of a layer does each feature take as training goes on, on one scale?

Lampinen, Chan, Hermann (TMLR 2024, arXiv 2405.05847): the easy feature goes on taking more variance while the hard one is learned. Activations grow in training, so that what a feature
explains at each checkpoint is divided by the variance of the last one:

    R²_f(t) = (variance explained at t) / (total variance at the end).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import results
from lineament.core.models import holding
from lineament.core.results import Readable
from lineament.measure.bias.variance import Features, VarianceExplained, variance_explained
from lineament.measure.complexity.checkpoints import by_name, weights_of


@dataclass(frozen=True)
class VarianceGrowth(Readable):
    """Variance explained at several checkpoints.

    Attributes:
        names: of the checkpoints, in the order of training; sites, features: what was measured.
        r2: explained variance over the last checkpoint's total.
        decodable: how well a linear read-out gives each feature there (NaN where it was not computed).
        checkpoints: what :func:`~lineament.measure.bias.variance.variance_explained` says of each, on its own scale.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    features: tuple[str, ...]
    r2: Float[Tensor, "checkpoints sites features"]
    decodable: Float[Tensor, "checkpoints sites features"]
    checkpoints: tuple[VarianceExplained, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return results.plain(self)

    def plot(self, ax: Any = None, site: str | None = None) -> Any:
        """Each feature over the checkpoints, at one site (the last by default)."""
        ax = results.axes(ax)
        at = len(self.sites) - 1 if site is None else self.sites.index(site)
        for number, name in enumerate(self.features):
            ax.plot(range(len(self.names)), self.r2[:, at, number].numpy(), "o-", label=name)
        ax.set_xticks(range(len(self.names)), self.names, rotation=30, ha="right", parse_math=False)
        ax.set_ylabel(f"variance explained at {self.sites[at]} / the last checkpoint's")
        ax.legend()
        return ax


def variance_growth(
    model: nn.Module,
    checkpoints: Sequence[Any] | Mapping[str, Any],
    data: Any,
    features: Features | Sequence[str],
    **options: Any,
) -> VarianceGrowth:
    """How much of each site's variance each feature explains at each checkpoint, in units of the last one's total; the model is left as it was.

    Args:
        model: the network that the checkpoints are of.
        checkpoints: in the order of training: state dicts, networks, or files; a mapping gives them names.
        data, features: as for :func:`~lineament.measure.bias.variance.variance_explained`.
        options: sites, reduction, interactions, held_out, pool, seed and batch_size, as there.

    Raises:
        InputError: no checkpoint, or one that does not fit the network.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    >>> small = {name: value / 2 for name, value in net.state_dict().items()}
    >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    >>> found = variance_growth(net, [small, net.state_dict()], (x, torch.zeros(400)), {"first": x[:, 0]}, sites="0")
    >>> round(float(found.r2[0, 0, 0] / found.r2[1, 0, 0]), 6)
    0.25
    """
    states = {name: weights_of(model, state, name) for name, state in by_name(checkpoints).items()}
    found = []
    for state in states.values():
        with holding(model, state):
            found.append(variance_explained(model, data, features, **options))
    last = found[-1]
    named = tuple(feature.name for feature in last.sites[0].features)
    scaled = [each.relative_to(last) for each in found]
    decodable = [
        [[float("nan") if f.decodable is None else f.decodable for f in site.features] for site in each.sites]
        for each in found
    ]
    return VarianceGrowth(
        tuple(states),
        tuple(site.site for site in last.sites),
        named,
        torch.tensor([[list(row.values()) for row in each.values()] for each in scaled]).double(),
        torch.tensor(decodable).double(),
        tuple(found),
    )
