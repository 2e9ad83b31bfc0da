"""Trainings of the recipe: a linear network on the spectral loss, digits by their parity, views that drop the digit, marked digits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.data.digits import digit_images
from lineament.data.shortcut_digits import shortcut_digits
from lineament.learn.projection.descent import balanced_descent
from lineament.learn.projection.heads import WithHead, projection_head
from lineament.learn.projection.layers import layers_worth
from lineament.learn.projection.robust import DFRMLP
from lineament.learn.projection.theory import feature_weights
from lineament.losses.contrastive import NTXent, SupCon
from lineament.recipes.kit.threads import few_threads
from lineament.train.callbacks import Augment, Cosine
from lineament.train.loop import fit

# (how it is trained, its head)
KINDS = {
    "SL, no head": ("sl", "none"),
    "SL, MLP head": ("sl", "mlp"),
    "SL, fixed head": ("sl", "fixed"),
    "SCL, no head": ("scl", "none"),
    "SCL, MLP head": ("scl", "mlp"),
    "SCL, fixed head": ("scl", "fixed"),
}


@dataclass(frozen=True)
class Weights:
    """Each feature's weight before and after the head: of a trained linear network, and the closed form."""

    strength: list[float]
    before: list[float]
    after: list[float]
    before_theory: list[float]
    after_theory: list[float]


@dataclass(frozen=True)
class Read:
    """Accuracies of read-outs as they are and standardised, of the fine classes and of those trained on."""

    fine: float
    fine_standardised: float
    coarse: float


@dataclass(frozen=True)
class Probed:
    """Before the head, after it, after an untrained head of the same shape, and after principal components of its width."""

    before: Read
    after: Read
    untrained: Read
    components: Read


@dataclass(frozen=True)
class Pair:
    """One number before the head and after it."""

    before: float
    after: float


@dataclass(frozen=True)
class Groups:
    """The worst group's accuracy by DFR on features as they are, standardised, and by DFR-MLP."""

    dfr: Pair
    standardised: Pair
    mlp: Pair


def linear_weights(steps: int, sigma: float = 0.5) -> Weights:
    """Gradient descent on the expected spectral loss of independent features, by two balanced layers."""
    phi = torch.tensor([0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5], dtype=torch.float64)
    theory = feature_weights(phi, torch.zeros_like(phi), torch.full_like(phi, sigma))
    found = balanced_descent(torch.diag(theory.moment), torch.diag(theory.across), steps=steps, start=0.8)
    return Weights(
        phi.tolist(), found.weights(1).tolist(), found.weights(2).tolist(), theory.before.tolist(), theory.after.tolist()
    )  # fmt: skip


def encoder(inputs: int, seed: int, head: str, kappa: float) -> WithHead:
    """A perceptron inputs-256-64 and a head."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # that few coordinates of the fixed head count is what it is for
        body = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 64))
        return WithHead(body, projection_head(head, 64, kappa=kappa))  # pyright: ignore


class Classified(nn.Module):
    """An encoder with its head, and a linear classifier behind them."""

    def __init__(self, net: WithHead, classes: int, seed: int, width: int = 64):
        super().__init__()
        self.net = net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1000)
            self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.net(x))


def by_parity(name: str, config: Any, seed: int) -> Probed:
    """Train on whether a digit is odd; read out which digit it is."""
    (how, head), (train, test) = KINDS[name], _split(seed)
    net = encoder(64, seed, head, config.kappa)
    parity = train.targets % 2
    options: dict[str, Any] = {
        "epochs": config.epochs,
        "seed": seed,
        "batch_size": 128,
        "callbacks": [Cosine()],
    }
    with few_threads(train.inputs, "cpu"):
        if how == "sl":
            fit(Classified(net, 2, seed), (train.inputs, parity), optimizer=_sgd(0.1), **options)
        else:
            loss = SupCon(0.5)
            fit(net, (train.inputs, parity), optimizer=_sgd(0.2), loss=loss, **options)
        net.eval()
        fresh = encoder(64, seed + 500, head, config.kappa).head
        with torch.no_grad():
            sides = [(net.encoder(part.inputs), part.targets, part.targets % 2) for part in (train, test)]
        return probed(net.head, fresh, *sides)


def probed(
    head: nn.Module,
    fresh: nn.Module,
    train: tuple[Tensor, Tensor, Tensor],
    test: tuple[Tensor, Tensor, Tensor],
) -> Probed:
    """Read-outs of (features, fine classes, coarse ones): ``fresh`` is an untrained head of the same shape."""
    (x, *labels), (y, *goals) = train, test
    with torch.no_grad():
        width = int(torch.linalg.matrix_rank(head(x) - head(x).mean(0), rtol=1e-3))
        axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][: max(1, width)]
        sides = {
            "before": (x, y),
            "after": (head(x), head(y)),
            "untrained": (fresh(x), fresh(y)),
            "components": (x @ axes.T, y @ axes.T),
        }
    found = {}
    for side, (a, b) in sides.items():
        fine, coarse = (
            layers_worth(nn.Sequential(nn.Identity()), (a, known), (b, goal)).layers[0]
            for known, goal in zip(labels, goals)
        )
        found[side] = Read(fine.logistic, fine.logistic_standardised, coarse.logistic)
    return Probed(**found)


def dropped_digit(drop: float, config: Any, seed: int) -> Pair:
    """SimCLR on digits before textures, where a view loses the digit with probability ``drop``: how well the digit is read out."""
    train, test = _split(seed)
    generator = torch.Generator().manual_seed(seed)

    def scene(images: Tensor, keep: Tensor, textures: Tensor) -> Tensor:
        return textures + 0.7 * images * keep[:, None, None, None]

    def textures(count: int) -> Tensor:
        coarse = torch.rand(count, 1, 3, 3, generator=generator)
        return 0.6 * F.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=True)

    own, others = textures(len(train)), textures(len(test))
    both = torch.cat([train.inputs, own], 1)

    def views(x: Tensor, generator: torch.Generator) -> Tensor:
        made = []
        for _ in range(2):
            keep = (torch.rand(len(x), generator=generator) >= drop).float()
            light = 0.8 + 0.4 * torch.rand(len(x), 1, 1, 1, generator=generator)
            view = scene(x[:, :1], keep, x[:, 1:]) * light
            made.append(view + 0.1 * torch.randn(view.shape, generator=generator))
        return torch.cat(made)

    net, loss = encoder(64, seed, "mlp", config.kappa), NTXent(0.5)
    with few_threads(train.inputs, "cpu"):
        fit(
            net, (both, torch.zeros(len(both))), optimizer=lambda n: torch.optim.Adam(n.parameters(), 1e-3), epochs=config.view_epochs,
            seed=seed, batch_size=256, loss=lambda z, _: loss(z), callbacks=[Augment(views)],
        )  # fmt: skip
        whole = torch.ones(len(train)), torch.ones(len(test))
        data = (
            (scene(train.inputs, whole[0], own), train.targets),
            (scene(test.inputs, whole[1], others), test.targets),
        )
        found = layers_worth(net, *data, sites=["encoder", "head"])
    return Pair(found["encoder"].logistic, found["head"].logistic)


def worst_group(config: Any, seed: int) -> Groups:
    """Classify digits whose mark agrees with the class in 98 %; then read out from as many of each group: the worst group's accuracy."""
    train, held = shortcut_digits("train", seed=seed), shortcut_digits("test", seed=seed)
    net = encoder(400, seed, "mlp", config.kappa)
    with few_threads(train.inputs, "cpu"):
        fit(
            Classified(net, 10, seed), train, optimizer=_sgd(0.05), epochs=config.group_epochs, seed=seed, batch_size=128,
            callbacks=[Cosine()],
        )  # fmt: skip
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))
        tune, judge = held[order[: len(order) // 2]], held[order[len(order) // 2 :]]
        found = layers_worth(
            net, tune.pair, judge.pair, sites=["encoder", "head"], groups=(tune.groups, judge.groups),
            mlp=DFRMLP(config.mlp_hidden, seed=seed),
        )  # fmt: skip

    def pair(name: str) -> Pair:
        before, after = (getattr(found[site], name).worst for site in ("encoder", "head"))
        return Pair(before, after)

    return Groups(pair("dfr"), pair("dfr_standardised"), pair("dfr_mlp"))


def _split(seed: int) -> tuple[Any, Any]:
    data = digit_images()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data[order[:1000]], data[order[1000:]]


def _sgd(lr: float) -> Any:
    return lambda net: torch.optim.SGD(net.parameters(), lr, momentum=0.9)
