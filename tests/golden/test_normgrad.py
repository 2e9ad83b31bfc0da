"""Saliency maps against the numbers of the official implementation."""

from __future__ import annotations

import re
from typing import Any

import torch
from tests.golden.common import File, golden
from torch import Tensor, nn

from lineament.core.sites.activations import capture
from lineament.explain.saliency.aggregation import Window, aggregate_contributions, combined
from lineament.explain.saliency.checks import class_sensitivity
from lineament.explain.saliency.maps import saliency
from lineament.explain.saliency.meta import meta_saliency
from lineament.explain.saliency.methods import Method
from lineament.explain.saliency.pointing import PointingGame, points_at

POOLINGS = {
    "global_average": lambda x: x.mean((2, 3)),
    "global_max": lambda x: x.amax((2, 3)),
    "flatten": lambda x: x.flatten(1),
}
RESIZES = {("bilinear", False): True}
SIGNS = {"neg0": False, "neg1": True}
SCORES = {"logit": lambda net: net}
DISTANCES = {"strict": points_at}


class Net(nn.Module):
    """Feature layers, a pooling and a classifier, as the file lists them."""

    def __init__(self, file: File):
        super().__init__()
        state = {m[1]: file.input(name) for name, m in file.arrays(r"param\|(.+)").items()}

        def stack(prefix: str) -> nn.Sequential:
            return nn.Sequential(
                *(layer(spec, state.get(f"{prefix}.{k}.weight")) for k, spec in enumerate(file[prefix]))
            )

        def layer(spec: dict[str, Any], weight: Tensor | None) -> nn.Module:
            options = {key: value for key, value in spec.items() if key != "type"}
            sizes: tuple[int, ...] = ()
            if weight is not None:
                outputs, *inputs = weight.shape[:2]
                sizes = (*(n * options.get("groups", 1) for n in inputs), outputs)
            return getattr(nn, spec["type"])(*sizes, **options)

        self.features, self.classifier = stack("features"), stack("classifier")
        self.pooling = POOLINGS[file["pooling"]]
        self.double().load_state_dict(state)
        self.eval()

    def forward(self, x):
        return self.classifier(self.pooling(self.features(x)))


def site_of(name: str) -> str:
    return ":in" if name == "input" else name


def check_maps(file: File) -> None:
    net, x = SCORES[file["score"]](Net(file)), file.input("x")
    targets = torch.as_tensor(file["target"]).expand(len(x))
    first, target, plain = (
        x[:1],
        targets[:1],
        {"resize": not RESIZES[file["resize_mode"], file["align_corners"]]},
    )
    # Where the official code gives NaN or infinity, the library must not.
    broken = {
        name
        for told in file.partners("scalars")
        for name in told.nodes.get("nonfinite_in_official_output", [])
    }

    def compare(name: str, found: Tensor) -> None:
        if name in broken:
            assert bool(found.isfinite().all()), name
            stored = file.input(name)
            found = torch.where(stored.isfinite(), found, stored)
        file.compare(name, found)

    def at_layers(**options: Any) -> list[Tensor]:
        return list(saliency(net, first, target, site=file["combined_layers"], **options, **plain).values())

    file.compare("logits", net(x))
    for name, m in file.arrays(r"(?:act|grad)\|(.+)").items():
        with capture(net, site_of(m[1]), gradients=True) as seen:
            score = net(first)[0, target[0]]
        found = seen.gradients(score) if name.startswith("grad") else {site_of(m[1]): seen[site_of(m[1])]}
        compare(name, found[site_of(m[1])][0])
    for name, m in file.arrays(r"map_resized\|(\w+)\|(.+)").items():
        width, height = file["resize_wh"]
        compare(name, saliency(net, x, targets, site=site_of(m[2]), method=m[1], resize=(height, width)))
    for name, m in file.arrays(r"map_smooth\|(\w+)\|(.+)").items():
        compare(
            name, saliency(net, x, targets, site=site_of(m[2]), method=m[1], smooth=file["smooth_fraction"])
        )
    for name, m in file.arrays(r"meta\|(\w+)\|(\w+)").items():
        step: dict[str, Any] = {"eps": file["lr"], "order": file["meta_steps"], "negate": SIGNS[m[2]]}
        compare(
            name,
            meta_saliency(net, x, targets, site=site_of(file["meta_layer"]), method=m[1], **step, **plain),
        )
    size = (x.shape[2], x.shape[3])
    for name, m in file.arrays(r"combi_product\|(\w+)\|(\w+)").items():
        maps = at_layers(method=Method(m[1], m[2]))
        compare(name, combined(maps, size, how="plain_product")[0, 0])
    for name, m in file.arrays(r"weighted\|(\w+)\|(\w+)").items():
        weights = [file[f"{m[1]}_weights"][layer] for layer in file["combined_layers"]]
        maps = at_layers(method=file["weighted_method"])
        compare(name, combined(maps, size, how=m[2], weights=weights))
    for name, m in file.arrays(r"raw\|(.+)\|(\w+)\|(\w+)").items():
        site, extract, aggregate = site_of(m[1]), m[2], m[3]
        compare(
            name, saliency(net, first, target, site=site, method=Method(extract, aggregate), **plain)[0, 0]
        )
        with capture(net, site, gradients=True) as seen:
            score = net(first)[0, target[0]]
        size = re.fullmatch(r"conv(\d+)x\1(_depthwise)?", extract)
        width, phase = (1, extract) if size is None else (int(size[1]), "depthwise" if size[2] else "conv")
        window = Window((width, width), padding=(file["contribution_padding"] if width > 1 else 0,) * 4)
        found = aggregate_contributions(
            seen[site], seen.gradients(score)[site], phase, aggregate, window=window
        )
        compare(name, found[0, 0])
    for name, m in file.arrays(r"map\|(\w+)\|(.+)").items():
        found = saliency(net, x, targets, site=site_of(m[2]), method=m[1], **plain)
        compare(name, found)
        if m[1] == "excitation_backprop":
            torch.testing.assert_close(found.sum((1, 2, 3)), torch.ones(len(x)).double())


def check_scalars(file: File) -> None:
    arrays = file.partners("network_maps")[0]
    net, x = Net(arrays), arrays.input("x")
    output = net(x)
    file.compare("argmax", output.argmax(1))
    file.compare("argmin", output.argmin(1))
    for key in file.nodes.get("class_sensitivity_spearman", {}):
        method, site = key.split("|")
        file.compare(
            f"class_sensitivity_spearman.{key}",
            class_sensitivity(net, x, method=method, site=site_of(site)).per_image,
        )
    for key in (
        "target",
        "lr",
        "resize_wh",
        "smooth_fraction",
        "layer_weights",
        "nonfinite_in_official_output",
    ):
        if key in file.nodes:
            file.input(key)  # read for the maps
    if "pointing_game" in file.nodes:
        check_pointing_game(file)


def check_pointing_game(file: File) -> None:
    at = "pointing_game"
    height, width, tolerance, classes = (
        file.input(f"{at}.{key}") for key in ("H", "W", "tolerance", "num_classes")
    )
    count = PointingGame(classes)
    for k in range(len(file.nodes[f"{at}.cases"])):
        box, point, label = (
            file.input(f"{at}.cases[{k}].{key}") for key in ("box_y0x0hw", "point_xy", "class_id")
        )
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = True
        hit = DISTANCES[file["pointing_distance"]](tuple(point), mask, tolerance)
        count.add(label, hit)
        file.compare(f"{at}.cases[{k}].hit", 1 if hit else -1)
    file.compare(
        f"{at}.class_accuracies", torch.tensor([a or 0.0 for a in count.accuracies()], dtype=torch.float64)
    )
    file.compare(f"{at}.mean_accuracy", count.mean(unseen_as_zero=True))


test_golden, test_a_wrong_number_is_noticed = golden(
    "normgrad",
    {"network_maps": check_maps, "scalars": check_scalars},
    fixed=("smooth_truncate", "smooth_padding", "contrast_layer", "constant_map_rtol"),
)
