"""One seed: a prior, a network that has learned nothing yet, and every attack on the messages of some pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import require
from lineament.data.digits import digit_images
from lineament.privacy.defences import defence_of
from lineament.privacy.leakage import leakage
from lineament.privacy.priors import train_prior
from lineament.privacy.search import Search
from lineament.recipes.kit.image_sets import faces
from lineament.train.stacked import refreshed

ATTACKS = ("gifd", "no ball", "latent", "ig")


@dataclass(frozen=True)
class Trial:
    """Each by "defence | attack": PSNR of every picture, and of every guess against another's picture; the share that is named, and of labels that are
    right; PSNR of each layer searched. ``without``: PSNR of the mean public picture; ``cosine``: of each defence's message with the undefended."""

    psnr: dict[str, Tensor]
    wrong: dict[str, Tensor]
    named: dict[str, Tensor]
    labels: dict[str, Tensor]
    stages: dict[str, Tensor]
    without: Tensor
    cosine: dict[str, float]


def trial_of(config: Any, domain: str, seed: int) -> Trial:
    """Prior on one part of the pictures, audits on another: within the same classes, or on the other half of them."""
    x, y = pictures(config)
    public, private = split(y, domain, seed, config.data)
    audited = private[
        torch.randperm(len(private), generator=torch.Generator().manual_seed(seed))[: config.pictures]
    ]
    require(
        len(audited) == config.pictures,
        f"pictures: got {config.pictures}, but there are {len(private)} to audit",
    )
    prior = train_prior(x[public], code=config.code, width=config.width, steps=config.prior_steps, seed=seed)
    found = leakage(
        victim(x.shape[1], config.side, int(y.max()) + 1, seed), x[audited], y[audited], public=x[public], prior=prior,
        defences=[defence_of(name) for name in config.defences], attacks=ATTACKS,
        copies=False, search=Search(steps=config.steps, restarts=config.restarts, radius=config.radius),
        bounds=(torch.zeros(x.shape[1]), torch.ones(x.shape[1])), seed=seed,
    )  # fmt: skip
    by = {f"{a.defence} | {a.attack}": a for a in found.attacked}
    return Trial(
        {k: a.psnr for k, a in by.items()},
        {k: a.wrong for k, a in by.items() if a.wrong is not None},
        {k: a.named.double().mean() for k, a in by.items()},
        {k: torch.tensor(a.labels_right) for k, a in by.items()},
        {k: a.stage_psnr.mean(0) for k, a in by.items()},
        found.without["the mean of public pictures"],
        {p.defence: p.cosine for p in found.prices},
    )


def pictures(config: Any) -> tuple[Tensor, Tensor]:
    """All pictures in [0, 1] at the side that is asked for, and their classes (of faces, the person)."""
    if config.data == "faces":
        held = faces(config.data_folder)
        x, y = held.inputs, held.targets
        x = x / x.max()
    else:
        held = digit_images(config.data, data_folder=config.data_folder)
        x, y = held.inputs, held.targets
    return F.interpolate(x, size=(config.side, config.side), mode="bilinear", antialias=True), y


def split(y: Tensor, domain: str, seed: int, data: str) -> tuple[Tensor, Tensor]:
    """Rows of public and of private pictures. Faces: 30 people and the 10 others, who are unlike them in both domains but split otherwise."""
    classes = int(y.max()) + 1
    if data == "faces":
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
        cut = 3 * classes // 4 if domain == "in" else classes // 4
        known = torch.isin(y, order[:cut])
        return known.nonzero()[:, 0], (~known).nonzero()[:, 0]
    if domain == "out":
        return (y < 5).nonzero()[:, 0], (y >= 5).nonzero()[:, 0]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    cut = 3 * len(y) // 4
    return order[:cut], order[cut:]


def victim(channels: int, side: int, classes: int, seed: int) -> nn.Module:
    """The audited network: three convolutions and a linear layer, as drawn."""
    net = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * side**2, classes),
    )  # fmt: skip
    return refreshed(net, seed).eval()
