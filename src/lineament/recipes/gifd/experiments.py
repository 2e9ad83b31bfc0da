"""One seed: a prior, a network that has learned nothing yet, and every attack on the messages of some pictures.

Every attack has equally many step sizes to choose from, on pictures that no seed judges, and as many passes through the audited network.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, require
from lineament.data.digits import digit_images
from lineament.privacy.defences import defence_of
from lineament.privacy.evolution import population
from lineament.privacy.identification import Judge
from lineament.privacy.labels import guessed_targets
from lineament.privacy.leakage import Attacked, LeakageOptions, leakage, psnr
from lineament.privacy.messages import Message
from lineament.privacy.priors import Prior, train_prior
from lineament.privacy.reconstruction import reconstruct
from lineament.privacy.search import Search
from lineament.recipes.kit.bangla import FILES, bangla_digits
from lineament.recipes.kit.image_sets import faces
from lineament.train.stacked import refreshed

ATTACKS = ("gifd", "no ball", "latent", "gias", "ggl", "gi", "ig", "idlg", "dlg")
BY_LAYER = ("gifd", "no ball")
MLP_ATTACKS = ("closed form", "gifd", "ig")
MOST = 6000


@dataclass(frozen=True)
class Trial:
    """Each by "defence | attack": PSNR of every picture, and of every guess against another's picture; the share that is named, by its own message and by
    another's, of people recognised (faces only), and of labels that are right; PSNR of each layer searched, and ``depths`` [pictures, layers] of the picture that
    is chosen where layers end there. ``without``: PSNR of the mean public picture."""

    psnr: dict[str, Tensor]
    wrong: dict[str, Tensor]
    named: dict[str, Tensor]
    wrong_named: dict[str, Tensor]
    labels: dict[str, Tensor]
    stages: dict[str, Tensor]
    depths: dict[str, Tensor]
    people: dict[str, Tensor]
    without: Tensor


@dataclass(frozen=True)
class Setting:
    """What one seed's audits share: the pictures, which of them are public, audited, or there to choose step sizes by, the prior, and the network."""

    x: Tensor
    y: Tensor
    public: Tensor
    audited: Tensor
    tuning: Tensor
    prior: Prior
    net: nn.Module
    people: Tensor | None = None

    @property
    def judge(self) -> Judge:
        """Of faces, people are looked for among all photographs that are not audited."""
        if self.people is None:
            return Judge()
        others = torch.ones(len(self.x), dtype=torch.bool)
        others[self.audited] = False
        gallery = self.x[others], self.people[others]
        return Judge(
            groups=self.people[self.audited], public_groups=self.people[self.public], gallery=gallery
        )

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.x.shape[1]), torch.ones(self.x.shape[1])

    def attacked(
        self,
        config: Any,
        defence: str,
        scales: dict[str, float],
        *,
        batch: int = 1,
        known_labels: bool = False,
        seed: int = 0,
    ) -> tuple[dict[str, Attacked], Tensor]:
        """Each attack at its step size on the messages of the audited pictures, and the PSNR of the mean public picture."""
        groups: dict[Search, list[str]] = {}
        for attack, scale in scales.items():
            groups.setdefault(search_of(config, attack, scale), []).append(attack)
        told, without = {}, torch.zeros(0)
        for search, attacks in groups.items():
            found = leakage(
                self.net, self.x[self.audited], self.y[self.audited], public=self.x[self.public], prior=self.prior, bounds=self.bounds, seed=seed,
                options=LeakageOptions([defence_of(defence)], attacks, search, batch, known_labels=known_labels, copies=False, judge=self.judge),
            )  # fmt: skip
            told |= {a.attack: a for a in found.attacked}
            without = found.without["the mean of public pictures"]
        return {attack: told[attack] for attack in scales}, without

    def best_scales(self, config: Any, defence: str, attacks: Sequence[str]) -> dict[str, float]:
        """Each attack's step size at which pictures that are not judged are nearest, as a multiple of its default."""
        if len(config.scales) == 1:
            return {attack: float(config.scales[0]) for attack in attacks}
        x, how = self.x[self.tuning], defence_of(defence)
        rows = [(x[k : k + 1], self.y[row : row + 1]) for k, row in enumerate(self.tuning.tolist())]
        messages = [Message.of(self.net, *row, defence=how) for row in rows]
        labels = torch.stack([guessed_targets(self.net, message, x[:1])[0] for message in messages])

        def near(attack: str, scale: float) -> float:
            found = reconstruct(
                self.net, messages, labels, tuple(x.shape[1:]), prior=self.prior, attack=attack, search=search_of(config, attack, scale), bounds=self.bounds
            )  # fmt: skip
            return float(psnr(found.pictures[:, 0], x).mean())

        def best(attack: str) -> float:
            scales: tuple[float, ...] = (1.0,) if attack == "closed form" else config.scales
            return max(scales, key=lambda scale: near(attack, scale))

        return {attack: best(attack) for attack in attacks}


@lru_cache(maxsize=2)
def setting_of(config: Any, domain: str, seed: int) -> Setting:
    """Prior on one part of the pictures, audits on another: within the same classes, on the other half of them, or on Bangla digits. Every tenth picture is there
    for tuning."""
    x, y = pictures(config)
    if domain == "bangla":
        others, named = bangla(config)
        public, private = torch.arange(len(y)), len(y) + torch.arange(len(named))
        x, y = torch.cat([x, others]), torch.cat([y, named])
    else:
        public, private = split(y, domain, seed, config.data)
    order = private[torch.randperm(len(private), generator=torch.Generator().manual_seed(seed))]
    tuning, audited = order[order % 10 == 0], order[order % 10 != 0]
    people = y if config.data == "faces" else None
    if people is not None:  # the next message, which serves as a control, is then somebody else's
        audited = in_turn(audited, people[audited])
    for name, some, count in (("pictures", audited, config.pictures), ("tuning", tuning, config.tuning)):
        require(len(some) >= count, f"{name}: got {count}, but there are {len(some)} to audit")
    prior = _prior(x[public], config, seed)
    net = victim(x.shape[1], config.side, int(y.max()) + 1, seed)
    return Setting(
        x,
        y,
        public,
        audited[: config.pictures],
        tuning[: config.tuning],
        prior,
        net,
        y if config.data == "faces" else None,
    )


def in_turn(rows: Tensor, groups: Tensor) -> Tensor:
    """Rows such that each group has its first before any has its second.

    >>> in_turn(torch.tensor([5, 6, 7]), torch.tensor([1, 1, 0])).tolist()
    [5, 7, 6]
    """
    before = (groups[:, None] == groups[None]).tril(-1).sum(1)
    return rows[before.argsort(stable=True)]


def _prior(x: Tensor, config: Any, seed: int) -> Prior:
    return train_prior(x, code=config.code, width=config.width, steps=config.prior_steps, seed=seed)


def attacks_of(config: Any) -> tuple[str, ...]:
    """The attacks that can run here: CMA-ES is a package of its own."""
    return tuple(a for a in config.attacks if a != "ggl" or importlib.util.find_spec("cma") is not None)


def search_of(config: Any, attack: str, scale: float) -> Search:
    """How an attack looks at a multiple of its default step size. A step through second derivatives takes seven forward passes (1 + 2 + 4), a point of CMA-ES three,
    of which it has as many points as fit into the same passes."""
    plain = Search(steps=config.steps, restarts=config.restarts, radius=config.radius)
    rounds = max(1, round(7 * config.steps / (3 * population(config.code))))
    return replace(
        plain, steps=rounds if attack == "ggl" else config.steps, rate=scale * plain.rate, feature_rate=scale * plain.feature_rate,
        weight_rate=scale * plain.weight_rate, deviation=scale * plain.deviation,
    )  # fmt: skip


def scales_of(config: Any, domain: str, defence: str) -> dict[str, float]:
    """Each attack's best step size under one defence, as a multiple of its default."""
    return setting_of(config, domain, config.seeds[0]).best_scales(config, defence, attacks_of(config))


def trial_of(config: Any, domain: str, seed: int, scales: dict[str, dict[str, float]]) -> Trial:
    """Every attack under every defence at its best step size, by defence."""
    setting = setting_of(config, domain, seed)
    by, without = {}, torch.zeros(0)
    for defence, each in scales.items():
        found, without = setting.attacked(config, defence, each, seed=seed)
        by |= {f"{defence_of(defence)} | {attack}": a for attack, a in found.items()}
    return _trial(by, without)


def further_of(config: Any, seed: int, scales: dict[str, float]) -> Trial:
    """Undefended messages of several pictures, with labels read off and given; a prior that has seen the audited; and a network that begins with a linear layer."""
    setting, plain = setting_of(config, config.domains[0], seed), config.defences[0]
    by, without = {}, torch.zeros(0)

    def add(
        name: str,
        attacks: Sequence[str],
        where: Setting = setting,
        own: dict[str, float] = scales,
        **how: Any,
    ) -> None:
        nonlocal without
        found, without = where.attacked(config, plain, {a: own[a] for a in attacks}, seed=seed, **how)
        by.update({f"{name} | {attack}": a for attack, a in found.items()})

    for batch in config.batches:
        add(f"batches of {batch}", ("gifd", "latent"), batch=batch)
        add(f"batches of {batch}, labels given", ("gifd",), batch=batch, known_labels=True)
    knowing = torch.cat([setting.public, setting.audited.repeat(max(1, len(setting.public) // (4 * len(setting.audited))))])  # fmt: skip
    add(
        "prior knows the audited",
        ("gifd", "latent"),
        replace(setting, prior=_prior(setting.x[knowing], config, seed)),
    )
    shape = setting.x.shape[1:]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 32), nn.ReLU(), nn.Linear(32, int(setting.y.max()) + 1))  # fmt: skip
    linear = replace(setting, net=refreshed(flat, seed).eval())
    add("linear first layer", MLP_ATTACKS, linear, linear.best_scales(config, plain, MLP_ATTACKS))
    return _trial(by, without)


def _trial(by: dict[str, Attacked], without: Tensor) -> Trial:
    return Trial(
        {k: a.psnr for k, a in by.items()},
        {k: a.wrong for k, a in by.items() if a.wrong is not None},
        {k: a.named.double().mean() for k, a in by.items()},
        {k: torch.tensor(a.wrong_named, dtype=torch.float64) for k, a in by.items()},
        {k: torch.tensor(a.labels_right) for k, a in by.items()},
        {k: a.stage_psnr.mean(0) for k, a in by.items() if k.split(" | ")[1] in BY_LAYER},
        {
            k: a.depth_psnr
            for k, a in by.items()
            if k.split(" | ")[1] in BY_LAYER and a.depth_psnr is not None
        },
        {
            k: _recognised(a)
            for k, a in by.items()
            if a.identified is not None and a.identified.person is not None
        },
        without,
    )


def _recognised(a: Attacked) -> Tensor:
    """The shares of guesses whose person comes first, by its own message, by another's, and by chance."""
    who = a.identified
    assert who is not None and who.person is not None
    other = float("nan") if who.control is None else float((who.control == 1).double().mean())
    return torch.tensor([float((who.person == 1).double().mean()), other, who.chance], dtype=torch.float64)


def pooled(trials: Sequence[Trial], name: str) -> Tensor:
    """PSNR of all seeds' pictures."""
    return torch.cat([t.psnr[name] for t in trials])


def pictures(config: Any) -> tuple[Tensor, Tensor]:
    """All pictures in [0, 1] at the side that is asked for, and their classes (of faces, the person)."""
    if config.data == "faces":
        held = faces(config.data_folder)
        x, y = held.inputs, held.targets
        x = x / x.max()
    else:
        held = digit_images(config.data, data_folder=config.data_folder, count=MOST if config.data == "mnist" else None)  # fmt: skip
        x, y = held.inputs, held.targets
    return _sized(x, config), y


def bangla(config: Any) -> tuple[Tensor, Tensor]:
    """Bangla digits at the side that is asked for, and their classes.

    Raises:
        InputError: they are not there.
    """
    held = bangla_digits("cmaterdb", config.data_folder)
    if held is None:
        raise InputError(
            f"data_folder: {FILES['cmaterdb']} is not in it; give the folder of the Bangla digits, or set LINEAMENT_DATA, or leave out the domain 'bangla'"
        )
    return _sized(held.images[:, None].float(), config), torch.from_numpy(held.labels)


def _sized(x: Tensor, config: Any) -> Tensor:
    return F.interpolate(x, size=(config.side, config.side), mode="bilinear", antialias=True)


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
