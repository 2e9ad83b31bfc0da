"""Iterative feature merging against the published merging functions."""

from __future__ import annotations

import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor, nn

from lineament.measure.merging.merge import merge_as_published
from lineament.measure.merging.merged import Merged
from lineament.measure.merging.plan import prepare


def stored_names(file: File, name: str) -> list[str]:
    """Texts of an array, or of cases.json where the file has no such array."""
    return file.input(name) if file.has(name) else list(file[name])


class Sequential(nn.Module):
    """The network that the layers' names and kinds describe."""

    def __init__(self, file: File):
        super().__init__()
        names, kinds = stored_names(file, "layer_names"), stored_names(file, "layer_kinds")
        self.kinds = dict(zip(names, kinds))
        assert file["pooling"] in (None, "global_average")
        spatial = False
        for name, kind in self.kinds.items():
            weight = file.input(f"in.{name}.weight")
            bias, spatial = file.has(f"in.{name}.bias"), spatial if kind == "bn" else kind == "conv"
            if kind == "conv":
                assert weight.shape[2:] == (file["kernel_size"],) * 2
                layer: nn.Module = nn.Conv2d(
                    weight.shape[1], len(weight), file["kernel_size"], padding=file["padding"], bias=bias
                )
            elif kind == "bn":
                layer = (nn.BatchNorm2d if spatial else nn.BatchNorm1d)(len(weight), eps=file["norm_eps"])
            else:
                layer = nn.Linear(weight.shape[1], len(weight), bias=bias)
            self.add_module(name, layer.double())
            for key, old in layer.state_dict().items():
                if file.has(f"in.{name}.{key}"):
                    old.copy_(file.input(f"in.{name}.{key}"))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.kinds.items())
        for place, (name, kind) in enumerate(layers):
            if kind in ("lin", "lin_hidden") and x.ndim == 4:
                x = x.mean((2, 3))
            x = self.get_submodule(name)(x)
            normed = place + 1 < len(layers) and layers[place + 1][1] == "bn"
            if kind != "lin" and not normed:
                x = torch.relu(x)
        return x


def plan(scope: Scope, net: nn.Module, x: Tensor) -> Merged:
    rules = {("sum", "mean"): "sum_mean", ("mean", "sum"): "mean_sum"}
    rule = rules[scope["merge_incoming"], scope["merge_outgoing"]]
    norms = "fold" if {True: True, False: False}[scope["fold_batchnorm"]] else "paper"
    if rule == "sum_mean" and norms == "paper":
        return merge_as_published(net, example=x, beta=scope["beta"], max_ratio=scope["max_ratio"])
    made = prepare(net, x, None, rule=rule, norms=norms, distance="paper", rescale=False)
    made.rounds(scope["beta"], scope["max_ratio"])
    return made.finished(scope["beta"])


def compare(scope: Scope, net: nn.Module, x: Tensor, found: Merged, prefix: str, layers: list[str]) -> None:
    scope.compare(f"{prefix}sizes", torch.tensor([found.sizes[layer][1] for layer in layers]))
    scope.compare(f"{prefix}y", found.model(x))
    state = found.model.state_dict()
    for name in scope["parameter"]:
        scope.compare(f"{prefix}out.{name}", state[name])
    for layer in layers:
        scope.compare(f"{prefix}groups.perm_{layer}", found.groups[layer])


def hidden(net: Sequential) -> list[str]:
    return [name for name, kind in net.kinds.items() if kind in ("conv", "lin_hidden")]


def check_sequential(file: File) -> None:
    net, x = Sequential(file), file.input("x")
    file.compare("y", net(x))
    layers = [perm.removeprefix("perm_") for perm in stored_names(file, "perm_names")]
    assert set(layers) <= set(hidden(net))
    start = prepare(net, x, None, rule="sum_mean", norms="paper", distance="paper", rescale=False)
    for layer in layers:
        file.compare(f"negdist.perm_{layer}", -torch.from_numpy(start.channels[layer].matrix()))
    for case in file.cases:
        compare(case, net, x, plan(case, net, x), f"{case.name}.", layers)


def check_duplicates(file: File) -> None:
    net, x = Sequential(file), file.input("x")
    layers = hidden(net)
    after = [name for name, kind in net.kinds.items() if kind != "bn"]
    weight, last = (net.get_submodule(name).weight for name in after[:2])
    twins = file["duplicate_channels"]
    assert all(
        torch.equal(weight[twins[0]], weight[t]) and torch.equal(last[:, twins[0]], last[:, t]) for t in twins
    )
    file.compare("y", net(x))
    found = plan(file, net, x)
    file.compare("y", found.model(x))
    assert found.sizes[layers[0]][1] == file["size_after"]
    for name in file["parameter"]:
        file.compare(f"out.{name}", found.model.state_dict()[name])


def check_variant(file: File) -> None:
    base = file.beside(file["base"])
    net, x = Sequential(base), base.input("x")
    compare(file, net, x, plan(file, net, x), "", hidden(net))


# One limit of two stops each run, exact duplicates merge at any beta, and networks without batch norm have none to fold.
STILL = (
    "sequential:*.max_ratio",
    "sequential:cfg3.beta",
    "duplicates:beta",
    "duplicates:max_ratio",
    "duplicates:fold_batchnorm",
    "variant:fold_batchnorm",
)
test_golden, test_a_wrong_number_is_noticed = golden(
    "ifm",
    {"sequential": check_sequential, "duplicates": check_duplicates, "variant": check_variant},
    fixed=STILL,
)
