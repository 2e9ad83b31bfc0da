"""diffGrad's trajectories against the corrected reference code, the authors' notebook, and the released bug."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.golden.common import files

from lineament.optim.diffgrad import DiffGrad
from lineament.optim.frictions import STATISTICAL, friction

BASE = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "eps_mode": "code"}
CASES = {
    "base": {},
    "paper_eps": {"eps_mode": "paper"},
    "bigeps_code": {"lr": 0.05, "betas": (0.95, 0.99), "eps": 1e-2},
    "bigeps_paper": {"lr": 0.05, "betas": (0.95, 0.99), "eps": 1e-2, "eps_mode": "paper"},
    "l2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    **{f"v{version}": {"version": version} for version in range(1, 6)},
    "aliased_bug": {"alias_previous_grad": True},
}
WAYS = {"blocks": {"foreach": False}, "lists": {"foreach": True}, "capturable": {"capturable": True}}
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-4, "atol": 1e-6},
}

GRADIENTS = {
    "F1": lambda x: 2 * x + 0.6 if x <= 0 else 2 * x - 0.4,
    "F2true": lambda x: -40.0 if x <= -0.9 else 8 * x * math.cos(8 * x) + math.sin(8 * x) + 3 * x**2,
    "F2rel": lambda x: -40.0 if x <= -0.9 else x * math.cos(8 * x) + math.sin(8 * x) + 3 * x**2,
    "F3": lambda x: (
        2 * x
        if x <= -0.5 or x > 0.5
        else 1.0
        if x <= -0.4
        else -0.875
        if x <= 0
        else 0.875
        if x <= 0.4
        else -1.0
    ),
}
RUNS = {"diffgrad": (0.1, None), "adam": (0.1, 1.0), "adam_half": (0.05, 1.0)}


def load(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def kind(arrays: dict[str, torch.Tensor]) -> str:
    if {"p0", "grads"} <= set(arrays):
        return "trajectory"
    if arrays and all(name.split("_", 1)[0] in GRADIENTS for name in arrays):
        return "functions"
    return "unknown"


def cases(wanted: str, ends: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Every (file, case) of one kind; a case is what stands before ``__``."""
    found = []
    for path in files("diffgrad"):
        arrays = load(path)
        if kind(arrays) == wanted:
            found += [
                (path, name) for name in dict.fromkeys(a.split("__")[0] for a in arrays if a.endswith(ends))
            ]
    return found


def name(value: object) -> str | None:
    return value.stem if isinstance(value, Path) else None


def test_every_file_and_array_is_known():
    for path in files("diffgrad"):
        arrays = load(path)
        assert kind(arrays) != "unknown", f"{path.name}: no adapter"
        for array in arrays:
            case, _, what = array.partition("__")
            if kind(arrays) == "trajectory":
                assert array in ("p0", "grads") or (case in CASES and what in ("p", "xi", "m", "v")), array
            else:
                assert case.split("_", 1)[1] in RUNS and what in ("x", "xi"), array


@pytest.mark.parametrize(("path", "case"), cases("trajectory", ("__p",)), ids=name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_trajectories(path, case, dtype, way):
    options = {**BASE, **CASES[case], **WAYS[way]}
    if case == "aliased_bug" and way != "blocks":
        pytest.skip("the switch has one way to run")
    arrays = load(path)
    w = torch.nn.Parameter(arrays["p0"].to(dtype))
    optimizer = DiffGrad([w], **options, track_friction=way != "capturable")
    w.grad = torch.empty_like(w)
    for t, raw in enumerate(arrays["grads"]):
        w.grad.copy_(raw)  # in place, as zero_grad() once did: what uncovers the released bug
        optimizer.step()
        torch.testing.assert_close(w.detach().double(), arrays[f"{case}__p"][t], **TOLERANCE[dtype])
        if way != "capturable" and f"{case}__xi" in arrays:
            measured = optimizer.friction_summary()
            expected = arrays[f"{case}__xi"][t]
            assert measured.mean == pytest.approx(float(expected.mean()), **approx(dtype))
            assert measured.maximum == pytest.approx(float(expected.max()), **approx(dtype))
            assert measured.minimum == pytest.approx(float(expected.min()), **approx(dtype))
        state = optimizer.state[w]
        for key, moment in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            if f"{case}__{key}" in arrays:
                expected = arrays[f"{case}__{key}"][t]
                torch.testing.assert_close(state[moment].double(), expected, **TOLERANCE[dtype])


def approx(dtype: torch.dtype) -> dict[str, float]:
    return {"rel": TOLERANCE[dtype]["rtol"], "abs": TOLERANCE[dtype]["atol"]}


@pytest.mark.parametrize(("path", "case"), cases("trajectory", ("__xi",)), ids=name)
def test_every_friction(path, case):
    """The friction of each coordinate, from the gradients that the optimizer sees."""
    arrays, options = load(path), {**BASE, **CASES[case]}
    version = options.get("version", 0)
    g = arrays["grads"] * (-1 if options.get("maximize") else 1)
    if "weight_decay" in options and not options.get("decoupled_weight_decay"):
        g = g + options["weight_decay"] * torch.cat([arrays["p0"][None], arrays[f"{case}__p"][:-1]])
    before = torch.cat([torch.zeros_like(g[:1]), g[:-1]])
    for t in range(len(g)):
        mean = g[:t].mean(0) if t else torch.zeros_like(g[0])
        deviation = g[:t].std(0, correction=0) if t else torch.zeros_like(g[0])
        statistics = {"mean": mean, "deviation": deviation} if version in STATISTICAL else {}
        found = friction(before[t] - g[t], version, **statistics)
        torch.testing.assert_close(found, arrays[f"{case}__xi"][t], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", [p for p in files("diffgrad") if kind(load(p)) == "trajectory"], ids=name)
def test_the_right_code_does_not_show_the_bug(path):
    arrays = load(path)
    if "aliased_bug__p" not in arrays:
        pytest.skip("no trajectory of the bug in this file")
    w = torch.nn.Parameter(arrays["p0"].clone())
    optimizer = DiffGrad([w], **BASE)
    w.grad = torch.empty_like(w)
    for raw in arrays["grads"]:
        w.grad.copy_(raw)
        optimizer.step()
    assert (w - arrays["aliased_bug__p"][-1]).abs().max() > 1e-3


@pytest.mark.parametrize(("path", "run"), cases("functions", ("__x",)), ids=name)
def test_one_dimensional_functions(path, run):
    arrays = load(path)
    function, how = run.split("_", 1)
    lr, fixed = RUNS[how]
    expected, frictions = arrays[f"{run}__x"], arrays[f"{run}__xi"]
    w = torch.nn.Parameter(expected[0].clone())
    optimizer = DiffGrad([w], lr=lr, betas=(0.95, 0.999), fixed_friction=fixed, track_friction=True)
    xs, xis = [w.item()], [0.0]
    for _ in range(len(expected) - 1):
        w.grad = torch.tensor(GRADIENTS[function](w.item()), dtype=w.dtype)
        optimizer.step()
        xs.append(w.item())
        xis.append(optimizer.friction_summary().mean)
    for found, truth in ((xs, expected), (xis, frictions)):
        found = torch.tensor(found, dtype=torch.float64)
        torch.testing.assert_close(found[:60], truth[:60], rtol=0, atol=1e-9)
        torch.testing.assert_close(found[60:], truth[60:], rtol=0, atol=1e-6)
