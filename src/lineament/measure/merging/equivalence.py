"""How many channels are there that differ, do the merged ones do the same, and do two networks hold the same features in another order?

Feature complexity (Chen, Zhou, Yan, 2023, arXiv 2310.06756) is the number of channels that are left of a layer. Channels that are equivalent tolerate
it when each is fed by another's weights; as many random channels do not. Networks are equivalent under permutations tau_l if tau_l f_a = f_b in
every layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.loaders import batches_of
from lineament.core.models import called, device_of, frozen, moved
from lineament.core.results import Readable
from lineament.core.sites.activations import capture
from lineament.core.surgery.rewriting import rewrite
from lineament.load.data import load_data
from lineament.load.model_and_data import bring_together
from lineament.load.models import load_model
from lineament.measure.merging.merged import Merged, bend
from lineament.measure.merging.plan import prepare

BETAS = (0.01, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3)


@dataclass(frozen=True, repr=False)
class Complexity(Readable):
    """How many different channels each layer has, by how different they have to be.

    Attributes:
        betas: thresholds, rising.
        channels: {layer: channels in the network}; sizes: {layer: channels that are left at each beta}.
        area: {layer: mean share that is left over the betas}; knee: {layer: the beta at which its curve bends}.
    """

    betas: tuple[float, ...]
    channels: dict[str, int]
    sizes: dict[str, Int[Tensor, " betas"]]

    @property
    def shares(self) -> dict[str, Float[Tensor, " betas"]]:
        """{layer: the share of its channels that is left at each beta}."""
        return {name: sizes.double() / self.channels[name] for name, sizes in self.sizes.items()}

    @property
    def area(self) -> dict[str, float]:
        return {name: float(share.mean()) for name, share in self.shares.items()}

    @property
    def knee(self) -> dict[str, float]:
        """{layer: the beta at which its curve bends, NaN where it does not}."""
        found = {}
        for name, share in self.shares.items():
            value = bend(share)
            place = (share - value).abs().argmin() if value == value else None
            found[name] = float("nan") if place is None else self.betas[int(place)]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return results.plain(self) | {"area": self.area, "knee": self.knee}

    def plot(self, ax: Any = None) -> Any:
        """The share of channels that is left over beta, a line a layer."""
        ax = results.axes(ax)
        for name, share in self.shares.items():
            ax.plot(self.betas, share, "o-", label=name)
        ax.set(xlabel="beta", ylabel="channels left / channels", ylim=(0, 1.05))
        ax.legend()
        return ax


def feature_complexity(
    model: nn.Module,
    betas: Sequence[float] = BETAS,
    *,
    example: Any,
    sites: str | Sequence[str] | None = None,
    rule: str = "mean_sum",
    norms: str = "fold",
    distance: str = "all",
) -> Complexity:
    """How many channels of each layer differ: what merging leaves at each beta.

    Args:
        model, example, sites, rule, norms, distance: as for :func:`lineament.measure.merge`.
        betas: thresholds, at least 0 and below 1.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> feature_complexity(net, [0.0, 0.5], example=torch.ones(1, 3)).sizes["0"].tolist()
    [4, 3]
    """
    found = sorted({float(b) for b in checks.listed("betas", betas, "thresholds")})
    require(
        len(found) > 0 and all(0 <= b < 1 for b in found),
        f"betas: got {list(betas)}, expected numbers of at least 0 and below 1",
    )
    sizes: dict[str, list[int]] = {}
    channels: dict[str, int] = {}
    for beta in found:
        plan = prepare(model, example, sites, rule=rule, norms=norms, distance=distance, rescale=False)
        plan.rounds(beta)
        for name, c in plan.channels.items():
            sizes.setdefault(name, []).append(len(c))
            channels[name] = c.group.size
    return Complexity(tuple(found), channels, {name: torch.tensor(s) for name, s in sizes.items()})


@dataclass(frozen=True, repr=False)
class SwapTest(Readable):
    """What it does to the accuracy when channels of a group are fed by each other's weights.

    Attributes:
        accuracy: of the network as it is, on ``samples`` samples.
        swapped: of each draw, within the groups that were found; random: within random groups of the same sizes.
        agreement, random_agreement: the share of samples whose class stays, means over the draws.
        moved: how many channels were fed by another's weights.
    """

    accuracy: float
    swapped: tuple[float, ...]
    random: tuple[float, ...]
    agreement: float
    random_agreement: float
    moved: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return results.plain(self)

    def plot(self, ax: Any = None) -> Any:
        """Accuracy of each draw, beside that of the network."""
        ax = results.axes(ax)
        for place, (name, values) in enumerate(
            {"groups found": self.swapped, "random groups": self.random}.items()
        ):
            ax.plot([place] * len(values), values, "o", label=name)
        ax.axhline(self.accuracy, color="grey", linestyle="--", label="not swapped")
        ax.set_xticks([0, 1], ["groups found", "random groups"])
        ax.set(ylabel="accuracy", xlim=(-0.5, 1.5))
        return ax


def swap_test(merged: Merged, data: Any, *, draws: int = 5, seed: int = 0, samples: int = 2000) -> SwapTest:
    """Feed each channel by the incoming weights of another member of its group, and the same in random groups of the same sizes.

    Args:
        merged: what :func:`lineament.measure.merge` found; its network before is tested.
        data: as :func:`lineament.load.load_data` reads it; labels are classes.
        draws: random swaps of either kind.
        seed: of these, and of the choice of samples.

    Raises:
        InputError: nothing was merged, so that there is nothing to swap.

    >>> from lineament.measure import merge
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with torch.no_grad():
    ...     for t in (net[0].weight, net[0].bias):
    ...         t[3] = t[1]
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> found = swap_test(merge(net, example=x[:1], beta=0.0, distance="in"), (x, (x[:, 0] > 0).long()))
    >>> found.agreement, found.moved
    (1.0, 2)
    """
    checks.number("draws", draws, low=1, integer=True)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    members = {
        name: [torch.nonzero(group == k).flatten() for k in range(int(group.max()) + 1)]
        for name, group in merged.groups.items()
    }
    some = {
        name: [g for g in groups if len(g) > 1]
        for name, groups in members.items()
        if not merged.channels[name].heads
    }
    moved_channels = sum(len(g) for groups in some.values() for g in groups)
    require(
        moved_channels > 0,
        "merged: no two channels were merged, so there is nothing to swap; merge with a larger beta",
    )
    read = load_data(data, samples=samples, seed=seed)

    def swapped(random: bool) -> nn.Module:
        changes = {}
        for name, groups in some.items():
            n = merged.sizes[name][0]
            source = torch.arange(n)
            pool = torch.randperm(n, generator=generator)
            for group in groups:
                group, pool = (pool[: len(group)], pool[len(group) :]) if random else (group, pool)
                order = group[torch.randperm(len(group), generator=generator)]
                source[order] = order.roll(1)
            eye = torch.eye(n, dtype=torch.float64)
            changes[merged.channels[name]] = eye[source], eye
        return rewrite(merged.original, changes)

    straight, targets = _answers(merged.original, read)
    right: dict[bool, list[float]] = {False: [], True: []}
    same: dict[bool, list[float]] = {False: [], True: []}
    for random in (False, True):
        for _ in range(draws):
            answers, _ = _answers(swapped(random), read)
            right[random].append(float((answers == targets).double().mean()))
            same[random].append(float((answers == straight).double().mean()))
    return SwapTest(
        float((straight == targets).double().mean()), tuple(right[False]), tuple(right[True]),
        statistics.mean(same[False]), statistics.mean(same[True]), moved_channels, len(targets),
    )  # fmt: skip


def _answers(model: nn.Module, samples: Any) -> tuple[Tensor, Tensor]:
    """The classes that a network chooses, and the labels."""
    with frozen(model), bring_together(load_model(model), samples, task="classification") as subject:
        return subject.outputs.argmax(1), subject.targets.cpu()


def equivalence_error(
    model_a: nn.Module, model_b: nn.Module, perms: Mapping[str, Sequence[int] | Tensor], data: Any
) -> dict[str, float]:
    """How far the features of two networks are from being the same in another order, layer by layer.

    ``|f_b - tau f_a| / |f_b|`` over all samples and positions, where channel i of B is channel ``perms[site][i]`` of A.

    Args:
        perms: {site: order of its channels}; sites as :func:`lineament.core.sites.capture` names them, in both networks.
        data: inputs: a tensor, or batches of inputs or of (inputs, targets).

    Returns:
        {site: error}; 0 for networks that are equivalent.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> equivalence_error(net, net, {"0": [0, 1, 2]}, torch.ones(4, 2))
    {'0': 0.0}
    """
    require(len(perms) > 0, "perms: got none, expected the order of channels at one site or more")
    batches = batches_of(data, name="data", once=True)
    wrong, whole = dict.fromkeys(perms, 0.0), dict.fromkeys(perms, 0.0)
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        seen = []
        for model in (model_a, model_b):
            with frozen(model), torch.no_grad(), capture(model, list(perms)) as acts:
                called(model, moved(inputs, device_of(model)))
            seen.append({site: acts[site].double().cpu() for site in perms})
        for site, order in perms.items():
            a, b = (_channels_last(found[site]) for found in seen)
            order = torch.as_tensor(order)
            require(
                a.shape == b.shape and torch.equal(order.sort().values, torch.arange(a.shape[-1])),
                f"perms: {site!r} has {a.shape[-1]} channels in A and {b.shape[-1]} in B, got an order of {len(order)}; it must be a permutation of them",
            )
            wrong[site] += float((b - a[..., order]).square().sum())
            whole[site] += float(b.square().sum())
    return {site: (wrong[site] / whole[site]) ** 0.5 if whole[site] else 0.0 for site in perms}


def _channels_last(features: Tensor) -> Tensor:
    return features.movedim(1, -1) if features.ndim >= 4 else features


def mean_activation(
    merged: Merged, layer: str, images: Float[Tensor, "batch ..."]
) -> Float[Tensor, "groups batch height width"]:
    """The mean map of each merged channel's members on some images, before they were merged: what the group sees.

    Raises:
        InputError: a layer that was not merged, or one that makes no maps.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> from lineament.measure import merge
    >>> mean_activation(merge(net, example=torch.ones(1, 1, 4, 4), keep=0.5), "0", torch.ones(3, 1, 4, 4)).shape
    torch.Size([2, 3, 2, 2])
    """
    maps, member = _maps(merged, layer, images)
    found = maps.new_zeros(int(member.max()) + 1, len(maps), *maps.shape[2:])
    found.index_add_(0, member.to(maps.device), maps.transpose(0, 1))
    return found / torch.bincount(member).to(found).view(-1, 1, 1, 1)


def _maps(merged: Merged, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    require(layer in merged.groups, f"layer: {layer!r} was not merged{checks.suggest(layer, merged.groups)}")
    site = merged.layers[layer][0]
    with frozen(merged.original), torch.no_grad(), capture(merged.original, [site]) as acts:
        called(merged.original, images.to(device_of(merged.original)))
    maps = acts[site]
    require(
        maps.ndim == 4,
        f"layer: {layer!r} gives {checks.show(maps)}, expected maps (batch, channels, height, width)",
    )
    return maps, merged.groups[layer]


def group_pictures(
    merged: Merged, layer: str, group: int, images: Float[Tensor, "batch channels height width"]
) -> Tensor:
    """What in each image the members of a merged channel react to: guided backpropagation of their summed maps.

    Gradients pass a ReLU only where they and its input are positive.

    Returns:
        The images' guided gradients, of their shape.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> from lineament.measure import merge
    >>> group_pictures(merge(net, example=torch.ones(1, 1, 4, 4), keep=0.5), "0", 0, torch.ones(3, 1, 4, 4)).shape
    torch.Size([3, 1, 4, 4])
    """
    _, member = _maps(merged, layer, images[:1])
    members = torch.nonzero(member == group).flatten()
    require(len(members) > 0, f"group: {layer!r} has {int(member.max()) + 1} merged channels, got {group}")
    site, model = merged.layers[layer][0], merged.original
    hooks = []
    with frozen(model), torch.enable_grad():
        try:
            for module in model.modules():
                if isinstance(module, (nn.ReLU, nn.ReLU6)):
                    hooks.append(module.register_forward_hook(_guided))
            x = images.detach().to(device_of(model)).clone().requires_grad_()
            with capture(model, [site], gradients=True) as acts:
                called(model, x)
            (gradient,) = torch.autograd.grad(acts[site][:, members.to(x.device)].relu().sum(), x)
        finally:
            for hook in hooks:
                hook.remove()
    return gradient


def _guided(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    output = output.clone()
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.clamp_min(0))
    return output
