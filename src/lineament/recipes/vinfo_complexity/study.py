"""One network trained with checkpoints, its features, and everything that is asked of them; and the planted shortcut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from lineament.core.sites.activations import record
from lineament.core.sites.depth import default_sites
from lineament.data.samples import Samples
from lineament.data.shortcut_digits import MARK, shortcut_digits
from lineament.dictionaries.autoencoders import TopK
from lineament.dictionaries.factorisations import nmf, pca
from lineament.dictionaries.training import train_dictionary
from lineament.measure.complexity.checkpoints import spearman, temporal_score, training_dynamics, without
from lineament.measure.complexity.features import feature_function
from lineament.measure.complexity.flow import flow, residual_branches
from lineament.measure.complexity.groups import hoyer
from lineament.measure.complexity.importance import importance
from lineament.measure.complexity.layers import complexity
from lineament.measure.complexity.redundancy import redundancy
from lineament.measure.complexity.removal import dictionary_quality, removal_costs
from lineament.measure.complexity.robustness import robustness
from lineament.recipes.kit.networks import network
from lineament.recipes.vinfo_complexity.claims import Study, Suspects
from lineament.train.callbacks import Measure, Schedule
from lineament.train.loop import fit

SITE = "head:in"


def trained(config: Any, data: Samples, seed: int) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """The network, and its weights after each epoch."""
    shape, classes = data.inputs.shape[1:], len(data.classes)
    model = network(config.network, tuple(shape), classes, seed=seed, widths=config.width).to(
        data.inputs.device
    )
    kept: dict[str, dict[str, Tensor]] = {}

    def keep(net: nn.Module) -> float:
        kept[f"epoch {len(kept) + 1}"] = {name: v.detach().clone() for name, v in net.state_dict().items()}
        return 0.0

    cycle = Schedule(
        lambda sgd, total: torch.optim.lr_scheduler.OneCycleLR(sgd, config.lr, total_steps=total), by="step"
    )
    sgd = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    fit(model, data.pair, optimizer=sgd, epochs=config.epochs, batch_size=config.batch_size, seed=seed, callbacks=[cycle, Measure(kept=keep)], name=f"seed {seed}")  # fmt: skip
    return model, kept


def features_of(model: nn.Module, data: Samples) -> Tensor:
    """What the head reads, for all samples."""
    parts = data.inputs.split(500)
    return torch.cat([record(model, part, SITE)[SITE] for part in parts])


def others(x: Tensor, config: Any, model: nn.Module, data: Samples, seed: int) -> dict[str, Any]:
    """Directions that are no NMF: their codes of activations, as many of each kind."""
    generator = torch.Generator().manual_seed(seed)
    count = min(config.features, x.shape[1])
    turns = torch.randn(count, x.shape[1], generator=generator).to(x)
    centres = KMeans(count, random_state=seed).fit(x.cpu().numpy()).cluster_centers_
    means = torch.from_numpy(np.asarray(centres)).to(x)
    plain = pca(x, count)
    sparse = train_dictionary(
        model, data.pair, site=SITE, dictionary=TopK(x.shape[1], config.features, k=5), tokens=20 * len(x), batch_size=256,
        learning_rate=3e-3, seed=seed,
    ).dictionary  # fmt: skip
    return {
        "random directions": lambda a: a @ turns.T,
        "PCA": plain.encode,
        "k-means centres": lambda a: a @ means.T,
        "TopK": sparse.encode,
    }


def joined(x: Tensor, kinds: dict[str, Any]) -> tuple[Any, dict[str, slice]]:
    """One dictionary of several kinds of features side by side, so that one pass reads them all."""
    widths = {name: encode(x[:2]).shape[1] for name, encode in kinds.items()}
    places, start = {}, 0
    for name, width in widths.items():
        places[name] = slice(start, start + width)
        start += width

    def encode(a: Tensor) -> Tensor:
        return torch.cat([each(a) for each in kinds.values()], -1).detach()

    return SimpleNamespace(site=SITE, atoms=torch.zeros(start, x.shape[1]), encode=encode), places


def study(config: Any, train: Samples, test: Samples, seed: int) -> Study:
    """Everything about one network."""
    model, checkpoints = trained(config, train, seed)
    x = features_of(model, train)
    width = min(config.features, x.shape[1] - 1)
    extract = lambda net: nmf(features_of(net, train), width, site=SITE, iterations=200, seed=seed)  # noqa: E731
    dictionary = extract(model)
    sites = [":in", *default_sites(model, train.inputs[:2], most=12)]
    sites = [site for site in sites if site != SITE] + [SITE]
    options = {"pool": config.pool, "heldout": test.pair}
    kinds = {"NMF": dictionary.encode, **others(x, config, model, train, seed)}
    every, places = joined(x, kinds)
    read = complexity(
        model, train.pair, every, sites=sites, ridge=(config.ridge, 100 * config.ridge), **options
    )
    own = places["NMF"]
    k, unclipped, errors = read.complexity[own], read.unclipped[own], read.errors[own]
    late = temporal_score(model, checkpoints, train.pair, every, ridge=config.ridge, heldout=test.pair)
    when = late.complexity[own]
    weight = importance(model, test.pair, dictionary)
    dynamics = training_dynamics(
        model, {name: checkpoints[name] for name in _spread(list(checkpoints), 4)}, train.pair, extract,
        sites=sites, share=config.top, ridge=config.ridge, pool=config.pool,
    )  # fmt: skip
    moved = robustness(
        feature_function(model, dictionary), test.inputs[: config.noise_images], scales=[config.noise], draws=config.draws
    ).variance[0]  # fmt: skip
    z = dictionary.encode(features_of(model, test))
    spread = z.double().var(0).cpu()
    branches = flow(model, train.pair, dictionary, branches=residual_branches(model, train.inputs[:4]), ridge=config.ridge, heldout=test.pair)  # fmt: skip
    shared = redundancy(model, test.pair, dictionary, site=SITE)
    quality = dictionary_quality(model, test.pair, dictionary)
    few = max(2, width // 5)
    easy, hard = k.argsort()[:few], k.argsort()[-few:]
    bars = torch.stack(
        [c[:, at].nanmean(1) for at in (easy, hard) for c in (branches.residual_cka, branches.main_cka)]
    )
    third = max(1, bars.shape[1] // 3)
    numbers = {
        "test accuracy": quality.accuracy or 0.0,
        "mean K": float(k.nanmean()),
        "standard error of a K, mean": float(errors.nanmean()),
        "K and Lambda": pearson(k, when),
        "K and importance, end": pearson(k, weight.values),
        "K and importance, first epoch": pearson(
            dynamics.complexity[0].complexity, dynamics.importance[0].values
        ),
        "K and noise variance": spearman(k, moved / spread.to(moved)),
        "simplest: residual minus main CKA": float((bars[0] - bars[1]).mean()),
        "hardest: last third minus first third CKA": float(
            bars[2:, -third:].mean() - bars[2:, :third].mean()
        ),
        "top K, last minus first checkpoint": float(dynamics.top[-1] - dynamics.top[0]),
        "accuracy kept": quality.accuracy_kept or 0.0,
        "relative error of NMF": quality.relative_error,
        "K and Hoyer": pearson(k, hoyer(dictionary.atoms)),
        "K and redundancy": pearson(k, shared.values[0]),
    }
    if test.groups is not None:
        colour = explained(z, test.groups, len(test.group_names))
        numbers["K and colour"] = pearson(k, colour)
        numbers["K and digit"] = pearson(k, explained(z, test.targets // len(test.group_names), 10))
    active = (z != 0).double().mean(0).cpu()
    controls = {
        "K and Lambda, without the last read-out in either": pearson(
            without(read, SITE)[own], without(late, late.sites[-1])[own]
        ),
        "K and Lambda, given variance and sparsity": partial(k, when, spread, active),
        "K and importance, given variance and sparsity": partial(k, weight.values, spread, active),
        "K and importance permuted": pearson(k, weight.values[torch.randperm(width, generator=torch.Generator().manual_seed(seed)).to(k.device)]),
        "largest change of K with 100 times the ridge": float((read.others[0].complexity[own] - k).abs().max()),
    }  # fmt: skip
    half = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + 1)).to(
        train.inputs.device
    )
    again = [
        complexity(model, (train.inputs[rows], train.targets[rows]), dictionary, sites=sites, ridge=config.ridge, **options).complexity
        for rows in (half[: len(half) // 2], half[len(half) // 2 :])
    ]  # fmt: skip
    controls["K of two halves of the training samples, correlation"] = pearson(*again)
    controls["K of two halves, mean absolute difference"] = float((again[0] - again[1]).abs().nanmean())
    for name, place in places.items():
        controls[f"mean K, {name}"] = float(read.complexity[place].nanmean())
        if name != "NMF":
            controls[f"K and Lambda, {name}"] = pearson(read.complexity[place], late.complexity[place])
    fresh = network(config.network, tuple(train.inputs.shape[1:]), len(train.classes), seed=seed + 1, widths=config.width).to(x.device)  # fmt: skip
    controls["mean K, untrained network (NMF)"] = complexity(fresh, train.pair, extract(fresh), sites=sites, ridge=config.ridge, **options).mean  # fmt: skip
    codes = dictionary.encode(x)
    codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed)).to(x.device)]
    mixed = complexity(model, train.pair, codes, sites=sites, ridge=config.ridge, pool=config.pool)
    controls["1 - K of permuted features (0 expected), unclipped mean"] = float(
        (1 - mixed.unclipped).nanmean()
    )
    controls["its standard error, mean of the features"] = float(mixed.errors.nanmean())
    return Study(
        numbers=numbers,
        controls=controls,
        sites=list(read.sites),
        curves=read.information[:, own].cpu(),
        complexity=unclipped.cpu(),
        errors=errors.cpu(),
        temporal=when.cpu(),
        importance=weight.values.cpu(),
        flow=bars.cpu(),
        means=dynamics.mean.tolist(),
        tops=dynamics.top.tolist(),
    )


def planted(seed: int) -> Suspects:
    """A small network on digits with a planted mark, and the same without one: features read early whose removal costs much."""
    accuracies, found, cost, count = [], [], [], 12
    for mark in (True, False):
        train, test = (
            shortcut_digits(split, contrast=0.4 if mark else 1.0, seed=seed) for split in ("train", "test")
        )
        if not mark:
            for part in (train, test):
                part.inputs[(slice(None), slice(None), *MARK)] = 0
        model = network("small-resnet", tuple(train.inputs.shape[1:]), 10, seed=seed, widths=8)
        adam = torch.optim.Adam(model.parameters(), lr=3e-3)
        fit(model, train.pair, optimizer=adam, epochs=8, batch_size=64, seed=seed, name="planted mark")
        dictionary = nmf(features_of(model, train), count, site=SITE, seed=seed)
        own = test[test.groups == 0] if mark else test
        read = complexity(
            model, train.pair, dictionary, sites=":in", pool="full", ridge=0.1, heldout=own.pair
        )
        early = (read.information[0] >= 0.8).nonzero().flatten()
        lost = removal_costs(model, own.pair, dictionary, early)
        accuracies.append(lost.accuracy)
        found.append(int((lost.lost >= 0.05).sum()))
        cost.append(float(100 * lost.lost.max()) if len(early) else 0.0)
    return Suspects(tuple(accuracies), tuple(found), tuple(cost), count)


def _spread(names: list[str], count: int) -> list[str]:
    places = torch.linspace(0, len(names) - 1, min(count, len(names))).round().long().tolist()
    return [names[at] for at in dict.fromkeys(places)]


def pearson(a: Tensor, b: Tensor) -> float:
    """Over the features where both are known.

    >>> round(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])), 6)
    1.0
    """
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    known = ~(a.isnan() | b.isnan())
    if int(known.sum()) < 3:
        return float("nan")
    return float(torch.corrcoef(torch.stack([a[known], b[known]]))[0, 1])


def partial(a: Tensor, b: Tensor, *given: Tensor) -> float:
    """The correlation of what least squares on the given leaves of each.

    >>> x = torch.tensor([1.0, 2.0, 3.0, 5.0])
    >>> abs(round(partial(x + torch.tensor([1.0, -1.0, 1.0, -1.0]), x, x.square()), 1)) <= 1
    True
    """
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    columns = torch.stack([torch.ones_like(a), *(g.double().cpu() for g in given)], 1)
    known = ~(a.isnan() | b.isnan())
    columns = columns[known]
    left = [
        v[known] - columns @ torch.linalg.lstsq(columns, v[known][:, None]).solution[:, 0] for v in (a, b)
    ]
    return pearson(*left)


def explained(z: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The share of each feature's variance that lies between the classes.

    >>> explained(torch.tensor([[1.0], [1.0], [3.0], [3.0]]), torch.tensor([0, 0, 1, 1]), 2).item()
    1.0
    """
    z = z.double()
    members = nn.functional.one_hot(labels.to(z.device), classes).double()
    means = members.T @ z / members.sum(0).clamp(min=1)[:, None]
    return (members @ means - z.mean(0)).square().mean(0) / z.var(0, correction=0)
