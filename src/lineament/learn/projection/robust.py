"""Read-outs for the worst group: the last layer trained anew on as many samples of each group.

DFR (Kirichenko, Izmailov, Wilson, ICLR 2023, arXiv 2204.02937) fits logistic regressions to standardised features of group-balanced subsets and averages their weights; here their
penalty is quadratic. DFR-MLP (Xue et al., ICLR 2024, arXiv 2403.11391) trains a perceptron on one such subset. Both come back as modules on the features as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, number, require, show
from lineament.core.checks import seed as checked_seed
from lineament.core.readouts.logistic_readout import logistic
from lineament.core.results import Readable, plain


@dataclass(frozen=True)
class DFRMLP:
    """How the perceptron of DFR-MLP is trained: gradient descent on all balanced samples, its rate falling to 0 along a cosine.

    The defaults are the paper's for Waterbirds; for CelebA it takes ``rate=0.001``. The time grows with ``hidden`` times ``steps``.

    >>> DFRMLP(rate=0.001).hidden
    2048
    """

    hidden: int = 2048
    rate: float = 0.1
    steps: int = 1000
    seed: int = 0

    def __post_init__(self):
        number("hidden", self.hidden, low=1, integer=True)
        number("rate", self.rate, low=0, open_low=True)
        number("steps", self.steps, low=1, integer=True)
        checked_seed("seed", self.seed)


@dataclass(frozen=True)
class ByGroup(Readable):
    """Accuracies in each group of test samples, in the order of ``groups``; ``worst`` and ``mean`` are over groups.

    >>> by_group(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 7])).worst_group
    0
    """

    worst: float
    mean: float
    groups: tuple[int, ...]
    accuracies: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def worst_group(self) -> int:
        """The group with the lowest accuracy, the first of equals."""
        return self.groups[self.accuracies.index(self.worst)]

    def to_dict(self) -> dict[str, Any]:
        return plain(self)


def by_group(predicted: Tensor, y: Tensor, groups: Tensor) -> ByGroup:
    """Accuracy in each group: predicted classes, labels and groups, [samples] each.

    >>> by_group(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])).accuracies
    (0.5, 1.0)
    """
    require(
        predicted.shape == y.shape == groups.shape,
        f"groups: got {show(groups)} beside labels {show(y)} and predictions {show(predicted)}, expected one of each a sample",
    )
    names, index, counts = groups.unique(return_inverse=True, return_counts=True)
    right = torch.zeros(len(names), dtype=torch.float64, device=y.device)
    right.index_add_(0, index, (predicted == y).double())
    each = (right / counts).tolist()
    return ByGroup(
        min(each), sum(each) / len(each), tuple(names.tolist()), tuple(each), tuple(counts.tolist())
    )


def balanced(groups: Tensor, seed: int = 0) -> Tensor:
    """Rows with as many of each group as the smallest has, in their order.

    >>> balanced(torch.tensor([0, 0, 0, 1])).tolist()[-1]
    3
    """
    generator = torch.Generator().manual_seed(seed)
    each = [(groups == g).nonzero()[:, 0].cpu() for g in groups.unique()]
    count = min(map(len, each))
    chosen = [rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in each]
    return torch.cat(chosen).sort().values.to(groups.device)


def dfr(
    x: Tensor, y: Tensor, groups: Tensor, *, penalty: float = 1.0, standardised: bool = True, subsets: int = 10,
    classes: int | None = None, seed: int = 0,
) -> nn.Linear:  # fmt: skip
    """Deep feature reweighting: a last layer for features [n, width], fitted to as many samples of each group.

    The mean of logistic regressions to ``subsets`` random balanced subsets, in which a rare group always takes part whole.

    Args:
        y, groups: the class and the group of each sample, [n] integers.
        penalty: λ of the logistic regressions, scikit-learn's 1/C.
        standardised: fit to features of mean 0 and deviation 1 over all n samples; the layer takes them as they are either way.
        classes: the largest label plus one by default.

    Raises:
        InputError: lengths that do not match, fewer than two classes in the balanced subsets.

    >>> x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    >>> dfr(x, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))(x).argmax(1).tolist()
    [0, 1, 0, 1]
    """
    classes = _checked(x, y, groups, classes)
    number("subsets", subsets, low=1, integer=True)
    checked_seed("seed", seed)
    centre, spread = _scale(x) if standardised else (torch.zeros_like(x[0]), torch.ones_like(x[0]))
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    even = bool((groups.unique(return_counts=True)[1].diff() == 0).all())
    draws = 1 if even else subsets  # there is only one subset of groups of one size
    for draw in range(draws):
        rows = balanced(groups, seed + draw)
        fit = logistic((x[rows] - centre) / spread, y[rows], penalty, classes=classes)
        weight += fit.weight[0] / draws
        bias += fit.bias[0] / draws
    layer = nn.Linear(x.shape[1], classes).to(x)
    return _filled(layer, weight, bias, centre, spread)


def dfr_mlp(
    x: Tensor,
    y: Tensor,
    groups: Tensor,
    options: DFRMLP | None = None,
    *,
    standardised: bool = True,
    classes: int | None = None,
) -> nn.Sequential:
    """DFR-MLP: a perceptron with one hidden layer on features [n, width], trained on as many samples of each group.

    Args:
        y, groups: the class and the group of each sample, [n] integers.
        options: its width, rate, steps and seed.
        standardised: train on features of mean 0 and deviation 1; the module takes them as they are either way.

    Raises:
        InputError: lengths that do not match, or a training that ends in NaN.

    >>> x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    >>> net = dfr_mlp(x, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), DFRMLP(hidden=8, steps=50))
    >>> net(x).argmax(1).tolist()
    [0, 1, 0, 1]
    """
    options = options or DFRMLP()
    classes = _checked(x, y, groups, classes)
    rows = balanced(groups, options.seed)
    centre, spread = _scale(x) if standardised else (torch.zeros_like(x[0]), torch.ones_like(x[0]))
    features, goals = ((x[rows] - centre) / spread).detach(), y[rows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = nn.Sequential(
            nn.Linear(x.shape[1], options.hidden), nn.ReLU(), nn.Linear(options.hidden, classes)
        )
    net = net.to(x)
    if len(rows) < x.shape[1]:
        _by_samples(net, features, goals, options)
    else:
        optimizer = torch.optim.SGD(net.parameters(), options.rate)
        for step in range(options.steps):
            optimizer.param_groups[0]["lr"] = _rate(options, step)
            optimizer.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(net(features), goals).backward()
            optimizer.step()
    net.requires_grad_(False)
    if not all(bool(p.isfinite().all()) for p in net.parameters()):
        raise InputError(
            f"rate: the training of DFR-MLP ended in NaN at {options.rate:g}; take a smaller one"
        )
    first = net[0]
    assert isinstance(first, nn.Linear)
    _filled(first, first.weight.clone(), first.bias.clone(), centre, spread)
    return net


def _rate(options: DFRMLP, step: int) -> float:
    return options.rate * (1 + math.cos(math.pi * step / options.steps)) / 2


@torch.no_grad()
def _by_samples(net: nn.Sequential, x: Tensor, y: Tensor, options: DFRMLP) -> None:
    """The same descent for fewer samples than features: the hidden units' inputs Z move by -rate (X Xᵀ + 1) dL/dZ, and the first layer by the sum of it all at the end.

    One product [n, n] x [n, hidden] a step in place of two with [n, width].
    """
    (w1, b1), (w2, b2) = (
        (layer.weight, layer.bias) for layer in (net[0], net[2]) if isinstance(layer, nn.Linear)
    )
    onehot = F.one_hot(y, len(w2)).to(x)
    gram, moved = x @ x.T + 1, x.new_zeros(len(x), len(w1))
    z = torch.addmm(b1, x, w1.T)
    for step in range(options.steps):
        rate, active = _rate(options, step), z.clamp(min=0)
        off = (torch.addmm(b2, active, w2.T).softmax(1) - onehot) / len(x)
        slope = (off @ w2).mul_(z > 0)
        w2.addmm_(off.T, active, alpha=-rate)
        b2.sub_(off.sum(0), alpha=rate)
        moved.add_(slope, alpha=rate)
        z.addmm_(gram, slope, alpha=-rate)
    w1.addmm_(moved.T, x, alpha=-1)
    b1.sub_(moved.sum(0))


def _filled(layer: nn.Linear, weight: Tensor, bias: Tensor, centre: Tensor, spread: Tensor) -> nn.Linear:
    """The layer on features as they are that equals (weight, bias) on standardised ones."""
    with torch.no_grad():
        layer.weight.copy_(weight / spread)
        layer.bias.copy_(bias - layer.weight @ centre)
    return layer.requires_grad_(False)


def _scale(x: Tensor) -> tuple[Tensor, Tensor]:
    spread = x.std(0, correction=0)
    return x.mean(0), torch.where(spread > 0, spread, 1)


def _checked(x: Tensor, y: Tensor, groups: Tensor, classes: int | None) -> int:
    require(
        x.ndim == 2 and x.is_floating_point(),
        f"x: got {show(x)}, expected floating-point features [samples, width]",
    )
    for name, value in (("y", y), ("groups", groups)):
        require(
            value.shape == x.shape[:1] and not value.is_floating_point() and len(value) > 0,
            f"{name}: got {show(value)}, expected {len(x)} integers, one a sample",
        )
    return int(y.max()) + 1 if classes is None else number("classes", classes, low=2, integer=True)
