"""Costs, constraints, defences, labels and one whole restart of the search against the released code."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tests.golden.common import File, Scope, golden, listed
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.privacy import defences
from lineament.privacy.constraints import l1_projection, rate, to_sphere
from lineament.privacy.costs import chosen_tensors, code_divergence, matching_cost, total_variation
from lineament.privacy.inversion import Stage, invert
from lineament.privacy.labels import inferred_labels
from lineament.privacy.picture_scores import picture_scores


def check_units(file: File) -> None:
    for case in told(file):
        {"l1_projection": check_l1, "sphere": check_sphere, "defence": check_defence}[case["unit"]](case)
    if file.has("lr_values"):
        check_rates(file)
    if file.has("reg_x"):
        check_penalties(file)
    if file.has("kld_z"):
        file.compare("kld", code_divergence(file.input("kld_z"), eps=file["kld_eps"]))
    if file.has("met_a"):
        check_scores(file)
    if file.has("sot_x"):
        check_soteria(file)
    for k in listed(file["cost_tensor"]):  # what the values' costs are of
        for side in ("trial", "target"):
            if file.has(f"cost_{side}{k}"):
                file.input(f"cost_{side}{k}")


def check_rates(file: File) -> None:
    steps, peak = int(file["lr_steps"]), float(file["lr_peak"])
    rates = [rate(i / steps, peak, down=file["lr_rampdown"], up=file["lr_rampup"]) for i in range(steps)]
    file.compare("lr_values", torch.tensor(rates, dtype=torch.float64))


def check_penalties(file: File) -> None:
    assert file["tv"] == "anisotropic"
    x = file.input("reg_x")
    file.compare("reg_tv", total_variation(x))
    file.compare("reg_l2_unscaled", x.norm())
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    file.compare("bn_mean", mean)
    file.compare("bn_var", variance)


def check_scores(file: File) -> None:
    assert file["ssim_padding"] == file["ssim_window"] // 2
    scores = picture_scores(
        file.input("met_a"), file.input("met_b"), peak=file["data_range"], window=file["ssim_window"],
        sigma=file["ssim_sigma"], constants=(file["ssim_c1"], file["ssim_c2"]),
    )  # fmt: skip
    for name in ("mse", "psnr", "ssim"):
        file.compare(f"met_{name}", getattr(scores, name))


def told(file: File) -> list[Scope]:
    """Every case that cases.json names, also where no array bears its name."""
    names = [name for name in file.spec["cases"] if file.only in ("", name)]
    return [Scope(file, name, {**file.values, **file.spec["cases"][name]}) for name in names]


def check_l1(case: Scope) -> None:
    k = case["l1_index"]
    if not case.has(f"l1_x{k}"):
        return
    case.compare(f"l1_y{k}", l1_projection(case.input(f"l1_x{k}"), float(case["radius"])))


def check_sphere(case: Scope) -> None:
    if not case.has(f"sph_{case.name}_moved"):
        return
    before, moved = (case.input(f"sph_{case.name}_{name}") for name in ("before", "moved"))
    assert case["sphere_dims"] == ("all" if moved.ndim == 2 else "from 2")
    case.compare(f"sph_{case.name}_after", to_sphere(moved, before, eps=case["sphere_eps"]))


def defended(case: Scope, gradient: list[Tensor]) -> list[Tensor]:
    if case["defence"] == "clipping":
        return defences.clip(gradient, case["bound"], eps=case["norm_eps"])
    assert (case["defence"], case["interpolation"]) == ("compression", "linear")
    return defences.prune(gradient, case["percentile"])


def check_defence(case: Scope) -> None:
    numbers = [k for k in listed(case["defence_tensor"]) if case.has(f"def_g{k}")]
    found = defended(case, [case.input(f"def_g{k}") for k in numbers])
    for k, value in zip(numbers, found):
        case.compare(f"def_{case.name}_{k}", value)


def check_soteria(file: File) -> None:
    weights = {name: file.input(name) for name in file.arrays(r"sot_.*\.(weight|bias)")}
    x, y = file.input("sot_x"), file.input("sot_y")
    assert weights["sot_c1.weight"].shape[2] == file["soteria_kernel_size"]

    class Features(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            c1 = F.conv2d(
                x, weights["sot_c1.weight"], weights["sot_c1.bias"], padding=file["soteria_padding"]
            )
            return F.linear(c1.tanh().flatten(1), weights["sot_h.weight"], weights["sot_h.bias"]).relu()

    last = weights["sot_fc.weight"].clone().requires_grad_()
    loss = F.cross_entropy(F.linear(Features()(x), last, weights["sot_fc.bias"]), y)
    before = torch.autograd.grad(loss, last)[0]
    file.compare("sot_fcgrad_before", before)
    after = defences.soteria(Features(), x, before, float(file["soteria_rate"]), eps=file["soteria_eps"])
    file.compare("sot_fcgrad_after", after)


def check_values(file: File) -> None:
    units = file.partners("units")[0]
    numbers = [k for k in listed(units["cost_tensor"]) if units.has(f"cost_trial{k}")]
    sides = [[units.input(f"cost_{side}{k}") for k in numbers] for side in ("trial", "target")]
    known, labels = (file.input(name) if name in file.nodes else {} for name in ("costs", "labels"))
    for case in told(file):
        name = case.name
        if {"cost": True, "labels": False}[case["part"]] and name in known:
            tensors = chosen_tensors(sides[1], case["index_set"], case["k"])
            found = matching_cost(
                *sides, case["cost"], ratio=case["ratio"] or 0.0, weights=case["weights"], tensors=tensors
            )
            file.compare(f"costs.{name}", found)
        elif name in labels:
            assert len(case["labels"]) == case["batch_size"]
            told_of = ("row_sums_of_last_weight_gradient", "bias_gradient")
            sums, bias = (torch.tensor(labels[name][key], dtype=torch.float64) for key in told_of)
            guess = inferred_labels(sums[:, None], case["batch_size"], rule=case["rule"], bias=bias)
            assert guess == labels[name]["inferred"], name
    for name in ("end_to_end", "soteria_rate", "clip_bounds", "prune_percentages"):
        if name in file.nodes:
            file.input(name)


def check_search(file: File) -> None:
    get, size = file.input, int(file["render_size"])
    how = {
        "optimizer": file["optimizer"],
        "adam": (*listed(file["betas"]), file["eps"]),
        "ramps": (file["lr_rampdown"], file["lr_rampup"]),
    }
    assert (file["sphere_eps"], file["n_restarts"]) == (1e-9, 1)
    labels, start = get("y"), get("z_init")
    assert labels.tolist() == listed(file["labels"])
    mean, std = get("mean"), get("std")
    embedding = get("gen_E")[labels]
    convolution = partial(F.conv2d, padding=file["generator_padding"])
    count = len([k for k in listed(file["block"]) if file.has(f"gen_Wc.{k}")])
    assert count == file["n_blocks"] and get("gen_Wo").shape[2] == file["generator_kernel_size"]
    W0, b0, Wo = get("gen_W0"), get("gen_b0"), get("gen_Wo")
    blocks_of = [(get(f"gen_Wc.{k}"), get(f"gen_Wm.{k}")) for k in range(count)]

    def blocks(z: Tensor) -> list[Any]:
        cond = torch.cat([z, embedding], 1)

        def block(k: int, h: Tensor) -> Tensor:
            if k == 0:
                h = (cond @ W0.T + b0).view(len(z), int(file["C"]), int(file["s0"]), int(file["s0"]))
            if listed(file["ups"])[k]:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
            kernel, modulation = blocks_of[k]
            h = torch.tanh(convolution(h, kernel) + (cond @ modulation.T)[..., None, None])
            return torch.tanh(convolution(h, Wo)) if k == count - 1 else h

        return [partial(block, k) for k in range(count)]

    def render(image: Tensor) -> Tensor:
        image = F.interpolate(image, size=(size, size), mode=file["render_mode"])
        return ((image + 1) / 2 - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)

    names = ["c1.weight", "c1.bias", "c2.weight", "c2.bias", "fc.weight", "fc.bias"]
    victim = [get(f"vic_{name}").requires_grad_() for name in names]
    act = getattr(torch, file["victim_activation"])
    assert victim[0].shape[2] == file["victim_kernel_size"]

    def features(h: Tensor) -> Tensor:
        sides = {"stride": file["victim_stride"], "padding": file["victim_padding"]}
        for k in (0, 2):
            h = act(F.conv2d(h, victim[k], victim[k + 1], **sides))
        return h.flatten(1)

    def raw(x: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(F.linear(features(x), victim[4], victim[5]), labels)
        return list(torch.autograd.grad(loss, victim, create_graph=True))

    word = str(file["defence"]).lower()
    kinds = {"compression": defences.Prune, "clipping": defences.Clip, "soteria": defences.Soteria}
    defence = defences.Defence() if word == "none" else kinds[word](file["percentile"])
    # The true pictures are stored in single precision, their gradient is not.
    message = [get(f"target_grad{k}") for k in listed(file["gradient"])]
    for found, stored in zip(raw(get("x_true").double()), message, strict=True):
        torch.testing.assert_close(found, stored, rtol=1e-4, atol=1e-5)
    if word == "soteria":
        message[4] = defences.soteria(features, get("x_true").double(), message[4], defence.rate)
    else:
        message = defence.mirror(message, message)
    each = zip(file["steps"], file["lr"], file["radii"], strict=True)
    stages = [Stage(int(n), float(e), float(r), **how) for n, e, r in each]
    assert len(stages) == file["n_stages"]
    rows = ... if file["sphere"] == "whole_batch" else None  # one row: each code on its own sphere
    found = invert(
        blocks, render, lambda x: defence.mirror(raw(x), message), lambda g: matching_cost(g, message, file["cost"])[rows], start, stages,
        bounds=(-mean / std, (1 - mean) / std), variation=file["tv"], norm=file["l2"], side=file["l2_size"],
    )  # fmt: skip
    file.compare("objective_trace", found.objective)
    file.compare("z_after_stage0", found.variables[0])
    file.compare("image_stage0", found.pictures[0].float())
    file.compare("stage_scores", torch.tensor(found.scores, dtype=torch.float64))
    for k in listed(file["stage"]):
        file.compare(f"h{k}_final", lambda k=k: found.variables[k])
    file.compare("best_image", found.best.float())
    file.compare("best_score", found.score)


CHECKS = {"units": check_units, "values": check_values, "end_to_end": check_search}
test_golden, test_a_wrong_number_is_noticed = golden(
    "gifd",
    CHECKS,
    fixed=(
        *("cost_tensor", "defence_tensor", "gradient", "block", "stage"),  # they name arrays
        *("units:bound", "units:norm_eps"),  # one bound is above the norm
        *("units:cost_t*", "units:l1_eps1"),  # what the values are of; a point inside its ball
        *("units:sot_rate", "units:soteria_eps"),  # most features of this network are dead
        "end_to_end:radii",  # no ball where it is not positive
        "values:labels",  # the true ones, on which what is inferred does not depend
    ),
)
