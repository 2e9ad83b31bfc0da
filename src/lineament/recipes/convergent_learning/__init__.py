"""Do different trainings learn the same representations? Networks that differ in their seed only, aligned pair by pair.

Li, Yosinski, Clune, Lipson, Hopcroft (2015, arXiv 1511.07543). ``quick`` and ``small`` train small convolutional networks on scikit-learn's digits,
``paper`` ResNet-18 on CIFAR-10. Every number stands beside its nulls: shuffled images, units turned at random, untrained pairs, and a
copy whose units were permuted.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lineament.core.checks import require
from lineament.core.models import frozen
from lineament.core.surgery import channel_groups, permute
from lineament.data.augmentation import flip_and_crop
from lineament.data.digits import digit_images
from lineament.data.photographs import Standardise, read_photographs
from lineament.data.samples import Samples
from lineament.measure.alignment.profile import AlignmentOptions, alignment, alignments
from lineament.measure.alignment.site import SiteAlignment
from lineament.recipes.convergent_learning.claims import Layer, all_claims
from lineament.recipes.convergent_learning.figures import draw_all
from lineament.recipes.kit.networks import Network, network
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.kit.threads import few_threads
from lineament.report.outcome import Outcome, Table
from lineament.train.callbacks import Augment, Cosine
from lineament.train.loop import fit

SLUG = "convergent-learning"
TITLE = "Convergent Learning: Do different neural networks learn the same representations?"
FEW = 8  # units that a sparse map may use on average
PENALTIES = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)


@dataclass(frozen=True)
class Config:
    """One run: the data, the networks and their training, the alignment."""

    data: Literal["digits", "cifar10"] = "digits"
    data_folder: str | None = None
    device: str = "auto"

    network: Literal["cnn", "resnet18"] = "cnn"
    width: int = 16
    norm: bool = False
    seeds: tuple[int, ...] = (0, 1)
    epochs: int = 20
    lr: float = 0.05
    weight_decay: float = 5e-4
    batch_size: int = 64

    positions: int = 64
    blocks: int = 10

    preset: str = presets(
        quick={},
        small={"seeds": (0, 1, 2, 3), "epochs": 40},
        paper={
            "data": "cifar10", "network": "resnet18", "width": 64, "norm": True, "seeds": (0, 1, 2, 3), "epochs": 200, "lr": 0.1, "batch_size": 128,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    require(len(config.seeds) >= 2, f"seeds: got {config.seeds}, expected at least two networks to compare")
    data, device = load_data(config), config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    data = data.to(device)
    stages = Stages(out, config)
    with few_threads(data.inputs, device):
        states = stages.each(
            "training, seed {}", config.seeds, lambda seed: trained(config, data, seed), dict[str, Tensor]
        )
        nets = [made(config, data, seed) for seed in config.seeds]
        for net, state in zip(nets, states.values()):
            net.load_state_dict(state)
        layers = stages("alignment", lambda: aligned(config, nets, data), list[Layer])
        copied = stages("a permuted copy", lambda: permuted_copy(config, nets[0], data), float)
    accuracies = [_accuracy(net, data) for net in nets]
    claims = all_claims(layers, copied)
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims, _tables(layers, accuracies), draw_all(layers, out)
    )


def load_data(config: Config) -> Samples:
    """All of scikit-learn's digits, or CIFAR-10's training images, standardised."""
    if config.data == "digits":
        return digit_images()
    found = read_photographs(config.data, data_folder=config.data_folder)
    return replace(found, inputs=Standardise(found.inputs)(found.inputs))


def made(config: Config, data: Samples, seed: int) -> Network:
    shape = tuple(data.inputs.shape[1:])
    return network(
        config.network, shape, len(data.classes), seed=seed, widths=config.width, norm=config.norm
    ).to(data.inputs.device)


def trained(config: Config, data: Samples, seed: int) -> dict[str, Tensor]:
    """The weights after a training on the first 1,300 of the digits in a fixed order, or on all photographs."""
    rows = torch.from_numpy(
        np.random.default_rng(0).permutation(len(data))[:1300]
        if config.data == "digits"
        else np.arange(len(data))
    )
    model = made(config, data, seed)
    fit(
        model, data[rows].pair, epochs=config.epochs, batch_size=config.batch_size, seed=seed, name=f"network {seed}",
        optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay),
        callbacks=[Cosine(), *([Augment(flip_and_crop)] if data.inputs.shape[1] == 3 else [])],
    )  # fmt: skip
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def places(net: nn.Module) -> list[str]:
    """The layers that are compared: the first activation, then the last of each width."""
    example = next(net.parameters()).new_zeros(2, *net_shape(net))
    widths: dict[int, str] = {}
    with frozen(net), torch.no_grad():
        for name, module in net.get_submodule("features").named_children():
            example = module(example)
            if example.ndim == 4 and not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)):
                widths[example.shape[1]] = f"features.{name}"
    return list(widths.values())


def net_shape(net: nn.Module) -> tuple[int, int, int]:
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    return first.in_channels, 32 if first.in_channels == 3 else 8, 32 if first.in_channels == 3 else 8


def aligned(config: Config, nets: list[Network], data: Samples) -> list[Layer]:
    """Every pair of networks, all layers; the means over the pairs."""
    sites = places(nets[0])
    options = {"sites": sites, "positions": config.positions, "blocks": config.blocks}
    found = alignments(nets, data.pair, **options)
    bare = [made(config, data, 1000 + seed) for seed in config.seeds]
    untrained = alignments(bare, data.pair, nulls=(), options=AlignmentOptions(keep=0), **options)
    return [
        _layer(
            site,
            [pair[site] for pair in found.pairs.values()],
            [pair[site] for pair in untrained.pairs.values()],
        )
        for site in sites
    ]


def _layer(site: str, pairs: list[SiteAlignment], untrained: list[SiteAlignment]) -> Layer:
    first = pairs[0]
    maps = [pair.sparse_maps(PENALTIES, tolerance=1e-4) for pair in pairs]
    few = [m.best(FEW) if float(m.nonzeros.double().mean(1).min()) <= FEW else 0 for m in maps]
    spectra = [pair.mean_activations() for pair in pairs]

    def mean(values) -> float:
        return float(np.mean(list(values)))

    return Layer(
        site=site,
        units=len(first.semi.values),
        semi=mean(pair.semi_mean for pair in pairs),
        match=mean(pair.match_mean for pair in pairs),
        error=max(pair.mean_errors[1] if pair.mean_errors else 0.0 for pair in pairs),
        overlap=mean(pair.overlap for pair in pairs),
        shuffled=mean(float(pair.nulls["shuffled"].match.mean()) for pair in pairs),
        rotated=mean(float(pair.nulls["rotated"].match.mean()) for pair in pairs),
        untrained=mean(pair.match_mean for pair in untrained),
        best=mean(float(pair.match.values.max()) for pair in pairs),
        worst=mean(float(pair.match.values.min()) for pair in pairs),
        single=mean(float(m.single_half_mse.mean()) for m in maps),
        few=mean(float(m.half_mse[at].mean()) for m, at in zip(maps, few)),
        few_units=mean(float(m.nonzeros[at].double().mean()) for m, at in zip(maps, few)),
        dense=mean(float(m.dense_half_mse.mean()) for m in maps),
        information=mean(
            float(spearmanr(pair.information().flatten(), pair.correlations.abs().flatten())[0])  # pyright: ignore[reportArgumentType]
            for pair in pairs
        ),
        subspace=mean(pair.similarities(["cca"], errors=False)[0].value or 0.0 for pair in pairs),
        spectrum=mean(float(torch.corrcoef(torch.stack([s["a"], s["b"]]))[0, 1]) for s in spectra),
        curve_semi=first.semi.values.sort(descending=True).values.tolist(),
        curve_match=first.match.values.sort(descending=True).values.tolist(),
        curve_shuffled=first.nulls["shuffled"].match.sort(descending=True).values.tolist(),
        curve_untrained=untrained[0].match.values.sort(descending=True).values.tolist(),
    )


def permuted_copy(config: Config, net: Network, data: Samples) -> float:
    """The smallest correlation that matching finds between a network and itself in another order of its units."""
    # In float64: the order of a sum changes its last digits, and a unit that is barely ever active has little else.
    net, inputs = copy.deepcopy(net).double(), data.inputs.double()
    groups = channel_groups(net, inputs[:2])
    generator = torch.Generator().manual_seed(0)
    other = permute(net, {g: torch.randperm(g.size, generator=generator) for g in groups.groups.values()})
    found = alignment(
        net, other, (inputs, data.targets), sites=places(net), positions=config.positions, nulls=()
    )
    smallest = []
    for site in found.sites.values():
        dead = torch.isin(site.match.rows, torch.tensor(site.dead_a, dtype=torch.long))
        smallest.append(float(site.match.values[~dead].min()))
    return min(smallest)


def _accuracy(net: nn.Module, data: Samples) -> float:
    with frozen(net), torch.no_grad():
        return float(
            (torch.cat([net(x) for x in data.inputs.split(500)]).argmax(1) == data.targets).double().mean()
        )


def _tables(layers: list[Layer], accuracies: list[float]) -> list[Table]:
    columns = {
        "layer": "site", "units": "units", "best unit": "semi", "one to one": "match", "same partner": "overlap", "shuffled": "shuffled",
        "rotated": "rotated", "untrained": "untrained", "best pair": "best", "worst pair": "worst",
    }  # fmt: skip
    maps = {
        "layer": "site",
        "best single unit": "single",
        f"at most {FEW} units": "few",
        "units used": "few_units",
        "dense map": "dense",
    }
    return [
        Table.of("Correlations of units, means over the pairs of networks", columns, layers),
        Table.of(
            "Half-MSE of each unit from the other network's, on held-out images (0.5: nothing predicted)",
            maps,
            layers,
        ),
        Table(
            "Accuracy of the networks on all samples",
            ("network", "accuracy"),
            [(k, a) for k, a in enumerate(accuracies)],
        ),
    ]
