"""Gradients, masks, attacks, block images and the theorem against the numbers of the official implementation and of the definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.golden.common import files
from torch import nn

from lineament.data.blockmnist import null_pattern, stacked
from lineament.data.signal_blocks import planted
from lineament.explain.faithfulness.diffroar import DiffROAR
from lineament.explain.faithfulness.diffroar.feature_leakage import (
    MaxMargin,
    leakage,
    null_fraction,
    null_mass,
)
from lineament.explain.faithfulness.diffroar.input_gradients import input_gradient
from lineament.explain.faithfulness.diffroar.unmasking import Unmasked, rank
from lineament.train.attacks import pgd

FILES = files("diffroar")
GRADIENTS = {
    "loss_sum": "loss",
    "logit_true": "logit_true",
    "softmax_true": "softmax_true",
    "logit_predicted": "logit_predicted",
}
OBJECTIVES = {"untargeted": "untargeted", "targeted": "targeted", "plusone_targeted": "plus_one"}


def arrays(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as stored:
        return {k: torch.from_numpy(stored[k]) for k in stored.files}


def network(stored: dict[str, torch.Tensor]) -> nn.Sequential:
    """Linear and ReLU by turns, flattened first where the parameters' numbers leave a place for it."""
    weights = {k.split("|")[1]: v for k, v in stored.items() if k.startswith("param|")}
    last = max(int(k.split(".")[0]) for k in weights)
    parts: list[nn.Module] = []
    for index in range(last + 1):
        if f"{index}.weight" in weights:
            w = weights[f"{index}.weight"]
            parts.append(nn.Linear(w.shape[1], w.shape[0]))
        else:
            parts.append(nn.Flatten() if index == 0 else nn.ReLU())
    net = nn.Sequential(*parts).to(next(iter(weights.values())).dtype)
    net.load_state_dict(weights)
    return net


def kind(path: Path) -> str:
    """What a file holds, by its arrays; the one place where a file can go unrecognised."""
    if path.suffix == ".json":
        held = set(json.loads(path.read_text()))
        return "scalars" if "aggregation" in held else "theory" if "theory_margin" in held else ""
    with np.load(path, allow_pickle=False) as stored:
        names = set(stored.files)
    if "theory_f" in names:
        return "blocks"
    if "loss_grad" in names:
        return "signal"
    return "network" if any(n.startswith("grad|") for n in names) else ""


def of(wanted: str) -> list[Path]:
    found = [p for p in FILES if kind(p) == wanted]
    assert found, f"no golden file of kind {wanted}"
    return found


def numbers_beside(path: Path, wanted: str) -> dict:
    """The JSON with the same name, or the only one of its kind."""
    own = path.with_suffix(".json")
    return json.loads((own if own in FILES else of(wanted)[0]).read_text())


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected.to(found.dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_file_is_recognised(path):
    assert kind(path), f"{path.name}: no adapter reads this file"


@pytest.mark.parametrize("path", of("network"), ids=lambda p: p.name)
def test_gradients_masks_and_attacks(path):
    stored = arrays(path)
    net, x, y = network(stored), stored["x"], stored["y"]
    close(net(x).detach(), stored["logits"], 1e-9)
    assert net(x).argmax(1).tolist() == stored["y_pred"].tolist()
    gradients = input_gradient(net, x, y, kind=list(GRADIENTS.values()))
    order = rank(gradients["logit_predicted"])
    seen = 0
    for key, expected in stored.items():
        word, *rest = key.split("|")
        if word == "grad":
            close(gradients[GRADIENTS[rest[0]]], expected, 1e-9)
        elif word == "order":
            best_first = order.ranks.long().argsort(1)
            assert torch.equal(best_first if rest[0] == "desc" else best_first.flip(1), expected)
        elif word == "masked":
            # The top removed is the bottom kept.
            end = {"remove_top": "bottom", "remove_bottom": "top"}[rest[0]]
            view = Unmasked(x.to(expected.dtype), order, 1 - float(rest[1]), end, torch.tensor(0.5))
            close(view.whole(), expected, 1e-6)
            close(view[[1, 0]], expected[[1, 0]], 1e-6)
        elif word == "pgd":
            norm, eps, lr, steps, objective = rest
            found = pgd(
                net,
                x,
                y,
                norm=norm,
                eps=float(eps.removeprefix("eps")),
                step=float(lr.removeprefix("lr")),
                steps=int(steps.removeprefix("it")),
                objective=OBJECTIVES[objective],
            )
            close(found.delta, expected, 1e-7)
        else:
            assert word in ("param", "x", "y", "logits", "y_pred"), key
            continue
        seen += 1
    assert seen > 0


@pytest.mark.parametrize("path", of("signal"), ids=lambda p: p.name)
def test_signal_coordinates(path):
    stored, scalars = arrays(path), numbers_beside(path, "scalars")
    known = {"x", "y", "loss_grad"}
    assert all(k in known or k.startswith("param|") for k in stored)
    x, y = stored["x"], stored["y"]
    gradient = input_gradient(network(stored), x, y, kind="loss")
    w1, b1, w2, b2 = (stored[f"param|{k}"].double() for k in ("0.weight", "0.bias", "2.weight", "2.bias"))
    hidden = x.double() @ w1.T + b1
    error = (hidden.relu() @ w2.T + b2).softmax(1) - nn.functional.one_hot(y, 2)
    close(gradient.double(), ((error @ w2) * (hidden > 0)) @ w1, 1e-5)
    # The file in hand holds zeros where the gradient of its own network is not zero, by the formula above; the probabilities
    # beside it are those of zeros. Gradients that are there are compared.
    if bool((stored["loss_grad"] != 0).any()):
        close(gradient, stored["loss_grad"], 1e-5)
    own = stored["x"] != 0
    found = leakage(stored["loss_grad"], own, own.shape[1])
    assert abs(found.top_is_own - scalars["pr_top_gradient_is_signal"]) < 1e-9
    assert abs(found.bottom_is_own - scalars["pr_bottom_gradient_is_signal"]) < 1e-9
    assert abs(found.top_is_own - found.bottom_is_own - scalars["AQ_level_1"]) < 1e-9


@pytest.mark.parametrize("path", of("scalars"), ids=lambda p: p.name)
def test_aggregation_over_all_pairs_of_runs(path):
    scalars = json.loads(path.read_text())
    assert set(scalars) == {
        "pr_top_gradient_is_signal",
        "pr_bottom_gradient_is_signal",
        "AQ_level_1",
        "aggregation",
    }
    given = scalars["aggregation"]
    top, bottom = (torch.tensor(given[k], dtype=torch.float64) for k in ("acc_keep_top", "acc_keep_bottom"))
    found = DiffROAR(tuple(given["levels_kept_fraction"]), top, bottom)
    close(found.mean, torch.tensor(given["mean"]), 1e-7)
    close(found.std, torch.tensor(given["std_population"]), 1e-7)


@pytest.mark.parametrize("path", of("blocks"), ids=lambda p: p.name)
def test_block_images_leakage_and_theory(path):
    stored, told = arrays(path), numbers_beside(path, "theory")
    digits, pattern = stored["digits"], stored["null_pattern"]
    assert torch.equal(null_pattern(*pattern.shape).to(pattern), pattern)
    signal = (~stored["signal_on_top"]).long()
    images = stacked(digits[:, None], pattern[None, None, None].expand(len(digits), 1, 1, -1, -1), signal)
    close(images[:, 0], stored["images"], 1e-12)

    side = digits.shape[1]
    null = (torch.arange(2 * side) >= side)[None, :, None] == stored["signal_on_top"][:, None, None]
    gradients = stored["gradients"]
    close(null_mass(gradients, null), stored["null_mass_per_sample"], 1e-12)
    assert abs(float(null_mass(gradients, null).mean()) - told["null_mass_mean"]) < 1e-12
    assert told["top_count"] == round(told["top_fraction"] * gradients[0].numel())
    found = float(null_fraction(gradients, null, told["top_fraction"]).mean())
    assert abs(found - told["null_fraction_among_top"]) < 1e-12

    noise = stored["simplified_noise"][:, :, None]
    assert noise.shape[1] == told["d"]
    x = planted(noise, stored["simplified_y"], stored["simplified_signal_index"], eta=told["eta"])
    close(x, stored["simplified_x"], 1e-12)

    net = MaxMargin(told["theory_D"])
    assert abs(net.margin - told["theory_margin"]) < 1e-12
    # Any input with this sum: all of it on one coordinate, and spread evenly.
    one = torch.zeros(len(stored["theory_s"]), net.signals, dtype=torch.float64)
    one[:, 0] = stored["theory_s"]
    even = (stored["theory_s"] / net.signals)[:, None].expand(-1, net.signals)
    for x in (one, even):
        close(net(x), stored["theory_f"], 1e-12)
    neurons = net.neurons()
    close(neurons["w"].abs(), torch.full((2,), told["theory_neuron"]["w"], dtype=torch.float64), 1e-12)
    close(
        neurons["r"].abs(),
        torch.full((2, net.signals), told["theory_neuron"]["r"], dtype=torch.float64),
        1e-12,
    )
    close(neurons["b"], torch.full((2,), told["theory_neuron"]["b"], dtype=torch.float64), 1e-12)
