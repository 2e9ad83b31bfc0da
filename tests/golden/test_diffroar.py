"""Gradients, masks, attacks, block images and the theorem against the numbers of the official implementation and of the definitions."""

from __future__ import annotations

import torch
from tests.golden.common import ACTIVATIONS, File, Scope, golden
from torch import Tensor, nn

from lineament.data.blockmnist import null_pattern, stacked
from lineament.data.signal_blocks import planted
from lineament.explain.faithfulness.feature_leakage import (
    MaxMargin,
    leakage,
    null_fraction,
    null_mass,
)
from lineament.explain.faithfulness.input_gradients import input_gradient
from lineament.explain.faithfulness.retraining import DiffROAR
from lineament.explain.faithfulness.unmasking import Unmasked, fill_value, rank
from lineament.train.attacks import pgd

KINDS = {"loss_sum": "loss"}  # the others have the library's names
OBJECTIVES = {"plusone_targeted": "plus_one"}
KEPT = {("top", "desc"): "bottom", ("bottom", "asc"): "top"}  # the top removed is the bottom kept


def network(file: File) -> nn.Sequential:
    """Linear layers with an activation between them; the parameters' numbers leave a place for the flattening, or none."""
    weights = {m[1]: file.input(name) for name, m in file.arrays(r"param\|(.+)").items()}
    numbers = sorted({int(name.split(".")[0]) for name in weights})
    parts: list[nn.Module] = [nn.Flatten()] * numbers[0]
    for number in numbers:
        parts += [ACTIVATIONS[file["activation"]]()] * (number - len(parts))
        parts.append(nn.Linear(*weights[f"{number}.weight"].T.shape))
    net = nn.Sequential(*parts).to(weights[f"{numbers[0]}.weight"].dtype)
    net.load_state_dict(weights)
    return net


def check_gradients(file: File) -> None:
    net, x, y = network(file), file.input("x"), file.input("y")
    logits = net(x)
    file.compare("logits", logits)
    file.compare("y_pred", logits.argmax(1))
    for array, m in file.arrays(r"grad\|(.+)").items():
        file.compare(array, input_gradient(net, x, y, kind=KINDS.get(m[1], m[1])))
    ranking = rank(input_gradient(net, x, y, kind=KINDS.get(file["ranking"], file["ranking"])))
    best_first = ranking.ranks.long().argsort(1)
    file.compare("order|desc", best_first)
    file.compare("order|asc", best_first.flip(1))
    for case in file.cases:
        if case["method"] == "mask":
            end = KEPT[case["remove"], case["order"]]
            view = Unmasked(
                x.float(), ranking, 1 - case["fraction"], end, fill_value(case["fill"], x.float())
            )
            case.compare(f"masked|{case.name}", view.whole())
            rows = torch.arange(len(x)).flip(0)
            case.compare(f"masked|{case.name}", view[rows][rows])
        else:
            case.compare(f"{case['method']}|{case.name}", {"pgd": attack}[case["method"]](net, x, y, case))


def attack(net: nn.Module, x: Tensor, y: Tensor, case: Scope) -> Tensor:
    return pgd(
        net,
        x,
        y,
        norm=case["norm"],
        eps=case["eps"],
        step=case["lr"],
        steps=case["steps"],
        objective=OBJECTIVES.get(case["objective"], case["objective"]),
        random_start=float(case["random_start"]),
        bounds=(case["data_min"], case["data_max"]),
    ).delta


def check_signal(file: File) -> None:
    file.compare(
        "loss_grad",
        input_gradient(network(file), file.input("x"), file.input("y"), kind="loss"),
        torch.float32,
    )
    double = network(file).double()
    found = input_gradient(double, file.input("x").double(), file.input("y"), kind="loss")
    file.compare("loss_grad", found)


def check_scalars(file: File) -> None:
    if any(
        name in file.data
        for name in ("pr_top_gradient_is_signal", "pr_bottom_gradient_is_signal", "AQ_level_1")
    ):
        beside = file.partners("signal_coordinate")[0]
        x, y = beside.input("x").double(), beside.input("y")
        found = leakage(input_gradient(network(beside).double(), x, y, kind="loss"), x != 0, x.shape[1])
        file.compare("pr_top_gradient_is_signal", found.top_is_own)
        file.compare("pr_bottom_gradient_is_signal", found.bottom_is_own)
        file.compare("AQ_level_1", found.top_is_own - found.bottom_is_own)
    if "aggregation" in file.nodes:
        levels = file.input("aggregation.levels_kept_fraction")
        runs = (
            torch.tensor(file.input(f"aggregation.acc_keep_{end}"), dtype=torch.float64)
            for end in ("top", "bottom")
        )
        found = DiffROAR(tuple(levels), *runs)
        file.compare("aggregation.mean", found.mean)
        file.compare("aggregation.std_population", found.std)


def null_block(file: File) -> Tensor:
    """Where the lower or the upper half is the null block."""
    side = file.input("digits").shape[1]
    return (torch.arange(2 * side) >= side)[None, :, None] == file.input("signal_on_top")[:, None, None]


def check_blocks(file: File) -> None:
    digits, on_top = file.input("digits"), file.input("signal_on_top")
    pattern = null_pattern(file["S"]).to(digits)
    file.compare("null_pattern", pattern)
    images = stacked(digits[:, None], pattern.expand(len(digits), 1, 1, -1, -1), (~on_top).long())
    file.compare("images", images[:, 0])
    file.compare("null_mass_per_sample", null_mass(file.input("gradients"), null_block(file)))
    noise, signs = file.input("simplified_noise"), file.input("simplified_y")
    assert noise.shape[1] == file["d"]
    x = planted(noise[:, :, None], signs, file.input("simplified_signal_index"), eta=file["eta"])
    file.compare("simplified_x", x)
    net, s = MaxMargin(file["theory_D"]), file.input("theory_s")
    # Any input with this sum: all of it on one coordinate, and spread evenly.
    one = torch.nn.functional.pad(s[:, None], (0, net.signals - 1))
    for x in (one, (s / net.signals)[:, None].expand(-1, net.signals)):
        file.compare("theory_f", net(x))

    for told in file.partners("block_layout_and_theory_values"):
        check_block_values(told, file)


def check_block_values(file: File, arrays: File | None = None) -> None:
    arrays = arrays or file.partners("block_layout_and_theory")[0]
    gradients, null, top = arrays.input("gradients"), null_block(arrays), arrays["top_fraction"]
    file.compare("top_fraction", top)
    file.compare("top_count", round(top * gradients[0].numel()))
    file.compare("null_fraction_among_top", null_fraction(gradients, null, top).mean())
    file.compare("null_mass_mean", null_mass(gradients, null).mean())
    file.compare("eta", arrays["eta"])
    file.compare("d", arrays["d"])
    net = MaxMargin(arrays["theory_D"])
    file.compare("theory_D", net.signals)
    file.compare("theory_margin", net.margin)
    neurons = net.neurons()
    for key, values in (("w", neurons["w"].abs()), ("r", neurons["r"].abs()), ("b", neurons["b"])):
        for value in values.flatten().unique():
            file.compare(f"theory_neuron.{key}", value)


test_golden, test_a_wrong_number_is_noticed = golden(
    "diffroar",
    {
        "gradients_masks_pgd": check_gradients,
        "signal_coordinate": check_signal,
        "scalars": check_scalars,
        "block_layout_and_theory": check_blocks,
        "block_layout_and_theory_values": check_block_values,
    },
    fixed=("norm_eps", "ddof"),
)
