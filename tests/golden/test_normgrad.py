"""Saliency maps against the numbers of the official implementation."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.golden.common import files
from torch import nn

from lineament.core.sites.activations import capture, record
from lineament.explain.saliency import METHODS, saliency
from lineament.explain.saliency.aggregation import Window, aggregate_contributions, combined
from lineament.explain.saliency.checks import class_sensitivity
from lineament.explain.saliency.meta import meta_saliency
from lineament.explain.saliency.pointing import PointingGame, points_at

TOLERANCE = 1e-9


class Net(nn.Module):
    """The network of the golden files, rebuilt from its stored parameters: ReLU behind each convolution, one pooling."""

    def __init__(self, parameters: dict[str, torch.Tensor]):
        super().__init__()

        def stack(prefix: str, pools: bool) -> nn.Sequential:
            indices = sorted({int(k.split(".")[1]) for k in parameters if k.startswith(prefix)})
            modules: list[nn.Module] = []
            for index in indices:
                # A gap of three between convolutions is ReLU and a max-pool, of two a ReLU.
                while len(modules) < index:
                    second = nn.MaxPool2d(2) if pools else nn.Identity()
                    modules.append(second if isinstance(modules[-1], nn.ReLU) else nn.ReLU())
                w = parameters[f"{prefix}.{index}.weight"]
                modules.append(
                    nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], padding=w.shape[2] // 2)
                    if pools
                    else nn.Linear(w.shape[1], w.shape[0])
                )
            return nn.Sequential(*modules, *([nn.ReLU()] if pools else []))

        self.features, self.classifier = stack("features", True), stack("classifier", False)
        self.double().load_state_dict(parameters)
        self.eval()

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def load(path: Path):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(path, allow_pickle=False).items()}
    net = Net({k.split("|")[1]: v for k, v in arrays.items() if k.startswith("param|")})
    return net, arrays


def network_files() -> list[Path]:
    return [p for p in files("normgrad") if p.suffix == ".npz"]


def scalars_for(path: Path) -> dict:
    """The scalars that go with a network: the JSON with the same ending of its name, or the only one."""
    ending = path.stem.removeprefix("network_maps")
    candidates = [p for p in files("normgrad") if p.suffix == ".json"]
    chosen = [p for p in candidates if p.stem.removeprefix("scalars") == ending] or candidates
    return json.loads(chosen[0].read_text())


def site_of(name: str) -> str:
    return ":in" if name == "input" else name


@pytest.mark.parametrize("path", files("normgrad"), ids=lambda p: p.name)
def test_every_file_is_recognised(path):
    if path.suffix == ".npz":
        keys = set(np.load(path, allow_pickle=False).files)
        known = (
            "param",
            "act",
            "grad",
            "raw",
            "map",
            "meta",
            "weighted",
            "map_resized",
            "map_smooth",
            "combi_product",
        )
        assert {"x", "logits"} <= keys
        assert all(k.split("|")[0] in known for k in keys - {"x", "logits"})
    else:
        assert path.suffix == ".json", f"{path.name}: no adapter reads this file"
        assert {"target", "class_sensitivity_spearman", "pointing_game"} <= set(json.loads(path.read_text()))


@pytest.mark.parametrize("path", network_files(), ids=lambda p: p.name)
def test_maps_are_those_of_the_official_code(path):
    net, arrays = load(path)
    scalars = scalars_for(path)
    x, target = arrays["x"], int(scalars["target"])
    torch.testing.assert_close(net(x).detach(), arrays["logits"], atol=TOLERANCE, rtol=0)
    seen = 0
    for key, expected in arrays.items():
        kind, *rest = key.split("|")
        plain = {"resize": False}
        if kind == "map":
            found = saliency(net, x, target, site=site_of(rest[1]), method=rest[0], **plain)
        elif kind == "meta":
            lr, negate = scalars["lr"], rest[1] == "neg1"
            last = [n for n, m in net.named_modules() if n.startswith("features.")][-1]
            found = meta_saliency(net, x, target, eps=lr, negate=negate, method=rest[0], site=last, **plain)
        elif kind == "map_resized":
            width, height = scalars["resize_wh"]
            found = saliency(net, x, target, site=site_of(rest[1]), method=rest[0], resize=(height, width))
        elif kind == "map_smooth":
            fraction = scalars["smooth_fraction"]
            found = saliency(net, x, target, site=site_of(rest[1]), method=rest[0], smooth=fraction)
        elif kind == "raw":
            site, extract, aggregate = rest
            act, grad = arrays[f"act|{site}"][None], arrays[f"grad|{site}"][None]
            shape = re.fullmatch(r"conv(\d+)x\1(_depthwise)?", extract)
            window = Window.square(int(shape[1]) if shape else 1)
            phase = extract if shape is None else "depthwise" if shape[2] else "conv"
            found = aggregate_contributions(act, grad, phase, aggregate, window=window)[0, 0]
            again = saliency(net, x[:1], target, site=site, extract=extract, aggregate=aggregate, **plain)
            torch.testing.assert_close(again[0, 0], expected, atol=TOLERANCE, rtol=0)
        elif kind == "act":
            found = record(net, x[:1], site_of(rest[0]))[site_of(rest[0])][0]
        elif kind == "grad":
            with capture(net, site_of(rest[0]), gradients=True) as acts:
                score = net(x[:1])[0, target]
            found = acts.gradients(score)[site_of(rest[0])][0]
        elif kind in ("combi_product", "weighted"):
            sites = list(scalars["layer_weights"])
            method = "norm_grad" if kind == "combi_product" else "norm_grad_selective"
            maps = list(saliency(net, x[:1], target, site=sites, method=method, **plain).values())
            size = tuple(x.shape[-2:])
            if kind == "combi_product":
                found = combined(maps, size, how="plain_product")[0, 0]
            else:
                weights = list(scalars["layer_weights"].values()) if rest[0] == "activation" else rest[0]
                found = combined(maps, size, how=rest[1], weights=weights)
        else:
            assert key in ("x", "logits") or kind == "param", key
            continue
        seen += 1
        tolerance = 1e-6 if kind == "map_smooth" else TOLERANCE
        torch.testing.assert_close(
            found, expected.to(found), atol=tolerance, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
        )
        if kind == "map" and rest[0] == "excitation_backprop":
            torch.testing.assert_close(
                found.sum((1, 2, 3)), torch.ones(len(x)).double(), atol=TOLERANCE, rtol=0
            )
    assert seen > 0
    assert {k.split("|")[1] for k in arrays if k.startswith("map|")} <= set(METHODS)


@pytest.mark.parametrize("path", network_files(), ids=lambda p: p.name)
def test_class_sensitivity_is_that_of_the_official_code(path):
    net, arrays = load(path)
    scalars = scalars_for(path)
    output = net(arrays["x"])
    assert output.argmax(1).tolist() == scalars["argmax"] and output.argmin(1).tolist() == scalars["argmin"]
    for key, expected in scalars["class_sensitivity_spearman"].items():
        method, site = key.split("|")
        found = class_sensitivity(net, arrays["x"], method=method, site=site_of(site))
        for value, want in zip(found.per_image.tolist(), expected):
            assert math.isnan(value) if want is None else abs(value - want) < 2e-3, key
        assert found.undefined == sum(want is None for want in expected)


@pytest.mark.parametrize("path", [p for p in files("normgrad") if p.suffix == ".json"], ids=lambda p: p.name)
def test_pointing_game_is_that_of_the_official_code(path):
    game = json.loads(path.read_text())["pointing_game"]
    count = PointingGame(game["num_classes"])
    for case in game["cases"]:
        row, column, height, width = case["box_y0x0hw"]
        mask = torch.zeros(game["H"], game["W"], dtype=torch.bool)
        mask[row : row + height, column : column + width] = True
        hit = points_at(tuple(case["point_xy"]), mask, game["tolerance"])
        assert hit == (case["hit"] == 1), case
        count.add(case["class_id"], hit)
    extra = {k: v for k, v in game.items() if k not in ("H", "W", "tolerance", "num_classes", "cases")}
    per_class = [0.0 if a is None else a for a in count.accuracies()]
    for name, value in extra.items():
        if isinstance(value, list):
            assert np.allclose(per_class, value), name
        else:
            assert math.isclose(count.mean(unseen_as_zero=True), value), name
