"""Which layer to export: what each layer of a trained network is worth to a simple read-out.

Xue et al., ICLR 2024, arXiv 2403.11391, export the layer before the head. A read-out that standardises its features cannot see a head that only weighs them, so every
probe is made standardised and not. DFR (Kirichenko 2023) reads out from as many training samples of each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.batching import chunked
from lineament.core.checks import InputError, number, require, show
from lineament.core.loaders import batches_of
from lineament.core.readouts.logistic_readout import logistic
from lineament.core.readouts.ridge_readout import ridge
from lineament.core.results import Readable, plain
from lineament.core.sites.activations import record
from lineament.core.statistics.effective_rank import effective_rank


@dataclass(frozen=True)
class Layer(Readable):
    """One site: accuracies on the test samples by linear read-outs of it, standardised and as it is.

    ``neighbours``: of 10 nearest training samples by cosine. ``rank``: the exponential of the entropy of its principal variances' shares.
    ``worst_group``, ``mean_group``: of a logistic read-out from as many training samples of each group, as it is; ``None`` without groups.
    """

    site: str
    width: int
    logistic: float
    logistic_standardised: float
    ridge: float
    ridge_standardised: float
    neighbours: float
    rank: float
    worst_group: float | None = None
    mean_group: float | None = None


@dataclass(frozen=True)
class LayersWorth(Readable):
    """What each site is worth, in the order given, on so many training and test samples."""

    layers: tuple[Layer, ...]
    train_samples: int
    test_samples: int

    @property
    def best(self) -> Layer:
        """The site with the highest accuracy of the logistic read-out as it is."""
        return max(self.layers, key=lambda layer: layer.logistic)

    def __getitem__(self, site: str) -> Layer:
        found = {layer.site: layer for layer in self.layers}
        if site not in found:
            raise InputError(f"site: got {site!r}, expected one of {', '.join(map(repr, found))}")
        return found[site]

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

    def plot(self, ax: Any = None) -> Any:
        """Accuracy by site, as it is and standardised."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        names = [layer.site for layer in self.layers]
        ax.plot(names, [layer.logistic for layer in self.layers], "o-", label="as it is")
        ax.plot(names, [layer.logistic_standardised for layer in self.layers], "o--", label="standardised")
        ax.set(ylabel="accuracy of a logistic read-out")
        ax.legend()
        return ax


def layers_worth(
    model: nn.Module,
    train: Any,
    test: Any,
    *,
    sites: str | Sequence[str] = "*",
    groups: tuple[Tensor, Tensor] | None = None,
    penalty: float = 1.0,
    batch_size: int | str = "auto",
) -> LayersWorth:
    """Read labels out of every site of an unmodified model, frozen and in eval mode, in one pass over the data.

    Args:
        train, test: (inputs, labels), a ``Dataset`` or batches of them; any labels, also others than the model was trained on. Features are averaged over positions.
        sites: names or globs; by default the model's children.
        groups: the group of each training and test sample, for the worst group's accuracy.
        penalty: of the logistic read-outs, as scikit-learn's 1/C.

    Raises:
        InputError: unknown sites, labels that do not match, fewer than two classes.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)); y = (x[:, 0] > 0).long()
    >>> [layer.site for layer in layers_worth(net, (x, y), (x, y)).layers]
    ['0', '1', '2']
    """
    number("penalty", penalty, low=0, open_low=True)
    (x, y), (x_test, y_test) = (_pair(name, data) for name, data in (("train", train), ("test", test)))

    def features(part: Tensor) -> dict[str, Tensor]:
        return {site: pooled(value.float()) for site, value in record(model, part, sites).items()}

    own, other = (chunked(features, part, batch_size=batch_size, most=1024) for part in (x, x_test))
    if groups is not None:
        for name, g, labels in zip(("train", "test"), groups, (y, y_test)):
            require(len(g) == len(labels), f"groups: got {len(g)} for {len(labels)} {name} samples")
    found = [
        _layer(
            site, own[site], y.to(own[site].device), other[site], y_test.to(own[site].device), groups, penalty
        )
        for site in own
    ]
    return LayersWorth(tuple(found), len(y), len(y_test))


def pooled(x: Tensor) -> Tensor:
    """Features [batch, width]: maps are averaged over their positions, sequences over their steps.

    >>> pooled(torch.ones(2, 3, 4, 4)).shape, pooled(torch.ones(2, 5, 3)).shape
    (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    if x.ndim == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.ndim == 3 else x.reshape(len(x), -1)


def _layer(
    site: str, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, groups: tuple[Tensor, Tensor] | None, penalty: float
) -> Layer:  # fmt: skip
    centre, spread = x.mean(0), x.std(0)
    spread = torch.where(spread > 0, spread, 1)
    classes = int(max(y.max(), y_test.max())) + 1
    goals = F.one_hot(y, classes).to(x)
    scores = {}
    for name, (a, b) in {
        "": (x, x_test),
        "_standardised": ((x - centre) / spread, (x_test - centre) / spread),
    }.items():
        fit = logistic(a, y, penalty, classes=classes)
        scores["logistic" + name] = float((fit.predict(b)[:, 0] == y_test).double().mean())
        linear = ridge(a, goals, choose="shared").predict(b).argmax(1)
        scores["ridge" + name] = float((linear == y_test).double().mean())
    near = (F.normalize(x_test, dim=1) @ F.normalize(x, dim=1).T).topk(min(10, len(x)), 1).indices
    voted = F.one_hot(y[near], classes).sum(1).argmax(1)
    worst = mean = None
    if groups is not None:
        rows = balanced(groups[0])
        right = (
            logistic(x[rows], y[rows], penalty, classes=classes).predict(x_test)[:, 0] == y_test
        ).double()
        each = [float(right[groups[1] == g].mean()) for g in groups[1].unique()]
        worst, mean = min(each), sum(each) / len(each)
    return Layer(
        site, x.shape[1], neighbours=float((voted == y_test).double().mean()), rank=effective_rank(x), worst_group=worst,
        mean_group=mean, **scores,
    )  # fmt: skip


def balanced(groups: Tensor, seed: int = 0) -> Tensor:
    """Rows with as many of each group as the smallest has.

    >>> balanced(torch.tensor([0, 0, 0, 1])).tolist()[-1]
    3
    """
    generator = torch.Generator().manual_seed(seed)
    each = [(groups == g).nonzero()[:, 0] for g in groups.unique()]
    count = min(map(len, each))
    return (
        torch.cat([rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in each])
        .sort()
        .values
    )


def _pair(name: str, data: Any) -> tuple[Tensor, Tensor]:
    batches = list(batches_of(data, name=name, once=True))
    require(
        bool(batches) and all(isinstance(batch, (tuple, list)) and len(batch) > 1 for batch in batches),
        f"{name}: got {show(data)}, expected inputs with their labels",
    )
    inputs, labels = (torch.cat([torch.as_tensor(batch[k]) for batch in batches]) for k in range(2))
    require(
        labels.ndim == 1
        and len(labels) == len(inputs)
        and not labels.is_floating_point()
        and len(labels) > 1,
        f"{name}: got labels {show(labels)} beside {show(inputs)}, expected a class of each sample",
    )
    return inputs, labels.long()
