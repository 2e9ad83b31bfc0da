"""Which layer to export: what each layer of a trained network is worth to a simple read-out.

Xue et al., ICLR 2024, arXiv 2403.11391, export the layer before the head. A read-out that standardises its features cannot see a head that only weighs them, so every
probe is made standardised and not. For the worst group DFR and DFR-MLP read out from as many training samples of each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from lineament.learn.projection.directions import direction_weights
from lineament.learn.projection.pooling import pooled
from lineament.learn.projection.robust import DFRMLP, ByGroup, by_group, dfr, dfr_mlp

_MLP = DFRMLP()


@dataclass(frozen=True)
class Layer(Readable):
    """One site: accuracies on the test samples by linear read-outs of it, standardised and as it is.

    ``neighbours``: of 10 nearest training samples by cosine. ``rank``: the exponential of the entropy of its principal variances' shares.
    ``dfr``, ``dfr_standardised``, ``dfr_mlp``: accuracies by group of :func:`dfr` on features as they are and standardised, and of :func:`dfr_mlp`; ``None`` without groups.
    ``directions``: of each direction given, how strongly the site weighs it (:func:`direction_weights`); ``None`` without directions.
    """

    site: str
    width: int
    logistic: float
    logistic_standardised: float
    ridge: float
    ridge_standardised: float
    neighbours: float
    rank: float
    dfr: ByGroup | None = None
    dfr_standardised: ByGroup | None = None
    dfr_mlp: ByGroup | None = None
    directions: tuple[float, ...] | None = None


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
    directions: Tensor | None = None,
    mlp: DFRMLP | None = _MLP,
    penalty: float = 1.0,
    batch_size: int | str = "auto",
) -> LayersWorth:
    """Read labels out of every site of an unmodified model, frozen and in eval mode, in one pass over the data.

    Args:
        train, test: (inputs, labels), a ``Dataset`` or batches of them; any labels, also others than the model was trained on. Features are averaged over positions.
        sites: names or globs; by default the model's children.
        groups: the group of each training and test sample, integers, for DFR and DFR-MLP.
        directions: [k, ...] directions of the input, each of a sample's shape, to be weighed by each site, on average over the test samples.
        mlp: how DFR-MLP is trained; with groups it takes most of the time (``DFRMLP(hidden=256)`` an eighth of it), and ``None`` leaves it out.
        penalty: of the logistic read-outs, as scikit-learn's 1/C.

    Raises:
        InputError: unknown sites, labels or groups that do not match, fewer than two classes, directions that are not of a sample's shape.

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
        groups = _checked(groups, y, y_test)
    weights = (
        {}
        if directions is None
        else direction_weights(model, x_test, directions, sites=sites, batch_size=batch_size)
    )
    found = []
    for site in own:
        device = own[site].device
        labels, labels_test = y.to(device), y_test.to(device)
        layer = _layer(site, own[site], labels, other[site], labels_test, penalty)
        if groups is not None:
            g, g_test = (each.to(device) for each in groups)
            layer = replace(
                layer, **_robust(own[site], labels, g, other[site], labels_test, g_test, penalty, mlp)
            )
        if site in weights:
            layer = replace(layer, directions=tuple(weights[site].tolist()))
        found.append(layer)
    return LayersWorth(tuple(found), len(y), len(y_test))


def _layer(site: str, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, penalty: float) -> Layer:
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
    return Layer(
        site,
        x.shape[1],
        neighbours=float((voted == y_test).double().mean()),
        rank=effective_rank(x),
        **scores,
    )


def _robust(
    x: Tensor, y: Tensor, groups: Tensor, x_test: Tensor, y_test: Tensor, groups_test: Tensor, penalty: float, mlp: DFRMLP | None
) -> dict[str, ByGroup]:  # fmt: skip
    classes = int(max(y.max(), y_test.max())) + 1
    made: dict[str, nn.Module] = {
        "dfr": dfr(x, y, groups, penalty=penalty, standardised=False, classes=classes),
        "dfr_standardised": dfr(x, y, groups, penalty=penalty, classes=classes),
    }
    if mlp is not None:
        made["dfr_mlp"] = dfr_mlp(x, y, groups, mlp, classes=classes)
    return {name: by_group(net(x_test).argmax(1), y_test, groups_test) for name, net in made.items()}


def _checked(groups: Any, y: Tensor, y_test: Tensor) -> tuple[Tensor, Tensor]:
    require(
        isinstance(groups, (tuple, list)) and len(groups) == 2,
        f"groups: got {show(groups)}, expected (groups of the training samples, groups of the test samples)",
    )
    train, test = (torch.as_tensor(each) for each in groups)
    for name, each, labels in (("train", train, y), ("test", test, y_test)):
        require(len(each) == len(labels), f"groups: got {len(each)} for {len(labels)} {name} samples")
        require(
            each.ndim == 1 and not each.is_floating_point(),
            f"groups: got {show(each)} for the {name} samples, expected an integer each",
        )
    return train, test


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
    require(int(labels.min()) >= 0, f"{name}: got label {int(labels.min())}, expected classes from 0 on")
    return inputs, labels.long()
