"""Gradient distances, matching losses, the miniature schedule, augmentations and coresets against the released functions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tests.golden.common import File, Scope, golden, listed
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.learn.condensation import augmentation, coresets
from lineament.learn.condensation.distances import gradient_distance, row_distance
from lineament.learn.condensation.learning import learn_pictures
from lineament.learn.condensation.matching import matching_loss
from lineament.learn.condensation.options import Condensation, loops

KINDS = {"ours": "rows", "mse": "squares", "cos": "cosine"}


def network(file: File, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The file's network: convolution, norm, ReLU and pooling at each level (norm and pooling where there are some), then a linear layer."""
    layers: list[nn.Module] = []
    channels, width = state["features.0.weight"].shape[1], int(file["width"])
    pool = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d, "none": None, None: None}[file["pooling"]]
    for level in range(int(file["depth"])):
        padding = file["first_padding"] if level == 0 else file["padding"]
        layers.append(nn.Conv2d(channels, width, file["kernel_size"], padding=padding))
        layers += norm_of(file, width, state.get(f"features.{len(layers)}.weight"))
        layers.append(nn.ReLU())
        layers += [] if pool is None else [pool(file["pool_size"])]
        channels = width
    head = nn.Linear(state["classifier.weight"].shape[1], int(file["num_classes"]))
    net = nn.Sequential()
    net.add_module("features", nn.Sequential(*layers))
    net.add_module("flat", nn.Flatten())
    net.add_module("classifier", head)
    net.to(dtype).load_state_dict(state)
    return net


def norm_of(file: File, width: int, weight: Tensor | None) -> list[nn.Module]:
    """The norm of a level; a layer norm has a weight for every channel and place, and so knows the maps' sizes."""
    name, eps = file["norm"], file["norm_eps"]
    if name in (None, "none"):
        return []
    if name == "layernorm":
        assert weight is not None
        return [
            nn.LayerNorm(list(weight.shape), eps=eps) if weight.ndim == 3 else nn.GroupNorm(1, width, eps)
        ]
    return [nn.GroupNorm({"instancenorm": width, "groupnorm": 4}[name], width, eps)]


def check_arrays(file: File) -> None:
    values = file.partners("values")[0]
    for dtype in file.dtypes:
        check_matching(file, values, dtype)
    check_augmentations(file)
    for name in file.arrays(r"dist_\w+|core_feats|ntk_J\d+"):  # what the values are of
        file.input(name)


def setting(file: File, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor, list[Tensor]]:
    names = [name for name in listed(file["parameter"]) if file.has(f"net_{name}")]
    state = {name: file.input(f"net_{name}").to(dtype) for name in names}
    real, syn = file.input("real").to(dtype), file.input("syn").to(dtype)
    assert real.shape[:2] == (int(file["num_classes"]), int(file["n_real_per_class"]))
    labels = torch.arange(len(real)).repeat_interleave(int(file["ipc"]))
    return state, syn, labels, list(real)


def check_matching(file: File, values: File, dtype: torch.dtype) -> None:
    state, syn, labels, real = setting(file, dtype)
    net, kind = network(file, state, dtype), KINDS[file["distance"]]
    for name, summed in (("class", False), ("sum", True)):
        x = syn.clone().requires_grad_()
        loss = matching_loss(net, x, labels, real, summed=summed, kind=kind, eps=file["eps"])
        file.compare(f"grad_{name}", torch.autograd.grad(loss, x)[0], dtype)
    schedule = Condensation(
        **{
            name: int(file[key])
            for name, key in (
                ("outer", "outer_loop"),
                ("inner", "inner_loop"),
                ("epochs", "net_steps"),
                ("outer_warmup", "outer_warmup"),
                ("inner_warmup", "inner_warmup"),
            )
        },
        rate=file["lr_img"],
        momentum=file["momentum_img"],
        network_rate=file["lr_net"],
        network_momentum=file["momentum_net"],
        distance=kind,
        batch_train=len(syn),
    )
    nets: list[nn.Module] = []

    def fresh(outer: int) -> nn.Module:
        made = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(1 + file["outer_parameter_growth"] * outer)
        nets.append(made)
        return made

    pictures, trace = learn_pictures(fresh, syn, labels, lambda outer, inner: real, schedule)
    file.compare("sched_trace", trace[:, :4], dtype)
    file.compare("sched_syn_final", pictures, dtype)
    for name, parameter in nets[-1].named_parameters():
        file.compare(f"sched_net_final_{name}", parameter, dtype)


def drawn(case: Scope) -> Any:
    p = case["params"]
    if case["op"] == "color":
        amounts = (case["brightness"], case["saturation"], case["contrast"])
        numbers = [p[f"r_{name}"] for name in ("brightness", "saturation", "contrast")]
        return lambda x: augmentation.color(x, *numbers, amounts=amounts)
    if case["op"] in ("scale", "rotate"):
        assert (case["padding_mode"], case["mode"]) == ("zeros", "bilinear")
    return {
        "crop": lambda x: augmentation.shift(x, p["tx"], p["ty"]),
        "cutout": lambda x: augmentation.cutout(x, p["ox"], p["oy"], tuple(p["size"])),
        "flip": lambda x: augmentation.flip(x, p["r"], probability=case["prob_flip"]),
        "scale": lambda x: augmentation.scale(x, p["sx"], p["sy"], align_corners=case["align_corners"]),
        "rotate": lambda x: augmentation.rotate(x, p["angle_rad"], align_corners=case["align_corners"]),
    }[case["op"]]


def check_augmentations(file: File) -> None:
    for case in file.cases:
        case.compare(f"aug_{case.name}", drawn(case)(file.input("aug_x").float()))


def check_values(file: File) -> None:
    arrays = file.partners("arrays")[0]
    if any(arrays.has(f"dist_syn{k}") for k in listed(arrays["tensor"])):
        check_distances(file, arrays)
    state, syn, labels, real = setting(arrays, torch.float64)
    net = network(arrays, state, torch.float64)
    for name, summed in (("class", False), ("sum", True)):
        loss = matching_loss(
            net, syn, labels, real, summed=summed, kind=KINDS[arrays["distance"]], eps=arrays["eps"]
        )
        file.compare(f"loss_{name}", loss)
    for name in file.arrays(r"loops\[\d+\]"):
        told = file.input(name)
        try:
            found = list(loops(int(name[6:-1])))
        except InputError:
            found = [0, 0]
        assert torch.as_tensor(told).tolist() == found, name
    if arrays.has("core_feats"):
        features, count = arrays.input("core_feats"), file["n_select"]
        file.compare("herding_mean_matching", torch.tensor(coresets.herding(features, count)))
        found = torch.tensor(coresets.k_centers(features, count))
        file.compare("k_center_greedy_from_nearest_to_mean", found)
    if arrays.has("ntk_J1"):
        distance = coresets.kernel_distance(arrays.input("ntk_J1"), arrays.input("ntk_J2"))
        file.compare("kernel_distance", distance)
        file.compare("kernel_velocity", lambda: distance / file["kernel_velocity_dt"])
    for name in ("schedule", "net", "aug_params"):  # settings, which the arrays' cases take
        if name in file.nodes:
            file.input(name)


def check_distances(file: File, arrays: File) -> None:
    numbers = [k for k in listed(arrays["tensor"]) if arrays.has(f"dist_syn{k}")]
    sides = [[arrays.input(f"dist_{side}{k}") for k in numbers] for side in ("syn", "real")]
    for told, kind in KINDS.items():
        file.compare(f"distance.{told}", gradient_distance(*sides, kind, eps=file["eps"]))
    each = [row_distance(a, b, eps=file["eps"]) for a, b in zip(*sides)]
    file.compare("distance_per_tensor_layerwise", torch.stack(each))


test_golden, test_a_wrong_number_is_noticed = golden(
    "dcc",
    {"arrays": check_arrays, "values": check_values},
    fixed=(
        *(
            "arrays:seed",
            "arrays:params",
            "arrays:tensor",
            "arrays:parameter",
        ),  # they name arrays, or are drawn from
        "arrays:align_corners",  # on square pictures it makes no difference
        *("arrays:dist_*", "arrays:core_feats", "arrays:ntk_J*"),  # what the values are of
    ),
)
