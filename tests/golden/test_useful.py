"""USEFUL, SAM and the two-layer theory against independent float64 evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.golden.common import files
from torch import Tensor, nn

from lineament.learn.useful.separating import separating_epoch
from lineament.learn.useful.slow_examples import select_slow
from lineament.learn.useful.two_layer_theory import fast_free_weights, train_cubic
from lineament.optim import ASAM, SAM

RTOL, ATOL = 1e-9, 1e-13
# What the README of the numbers gives for each kind of case.
SETTINGS = {
    "sam": (SAM, 0.1, {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4}),
    "asam": (ASAM, 1.0, {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4}),
    "rho0": (SAM, 0.0, {"lr": 0.1, "momentum": 0.9}),
}


def close(found: Tensor | float, wanted: Tensor | float) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=RTOL, atol=ATOL)


def cases(path: Path) -> dict[str, dict[str, Tensor]]:
    """{case: {array: tensor}} of a file whose arrays are named CASE__ARRAY."""
    found: dict[str, dict[str, Tensor]] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            case, _, name = key.partition("__")
            found.setdefault(case, {})[name] = torch.from_numpy(np.asarray(stored[key]))
    return found


def check_selection(a: dict[str, Tensor]) -> None:
    close(a["logits"].softmax(1), a["probs"])
    for order in (torch.arange(len(a["labels"])), torch.arange(len(a["labels"]) - 1, -1, -1)):
        found = select_slow(a["logits"][order], a["labels"][order])
        assert torch.equal(found.mask, a["slow_mask"][order])
        close(found.inertia, a["inertia"])
        close(found.centers, a["centers_fast_slow"])
    found = select_slow(a["logits"], a["labels"], losses=a["loss"])
    for name in (n for n in a if n.startswith("indices_factor")):
        assert torch.equal(found.indices(int(name.removeprefix("indices_factor"))), a[name])
    close(found.weights(2), a["weights_factor2"])


class Regression:
    """The multinomial logistic regression of a case, its optimizer, and the losses that it saw."""

    def __init__(self, case: str, a: dict[str, Tensor]) -> None:
        kind, rho, options = SETTINGS[next(k for k in SETTINGS if case.startswith(k))]
        self.X, self.y = a["X"], a["y"]
        self.W, self.b = nn.Parameter(a["W0"].clone()), nn.Parameter(a["b0"].clone())
        self.optimizer = kind(torch.optim.SGD([self.W, self.b], **options), rho=rho)
        self.losses: list[float] = []

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.X @ self.W.T + self.b, self.y)
        loss.backward()
        self.losses.append(loss.item())
        return loss

    def check(self, a: dict[str, Tensor], step: int) -> None:
        close(self.W.detach(), a["W"][step])
        close(self.b.detach(), a["b"][step])


def check_sam(case: str, a: dict[str, Tensor]) -> None:
    whole, halves = Regression(case, a), Regression(case, a)
    for step in range(len(a["loss"])):
        close(whole.optimizer.step(whole.closure).item(), a["loss"][step])
        whole.check(a, step)
        halves.closure()
        if step == 0:
            close(halves.W.grad, a["grad_W_step0"])
            close(halves.b.grad, a["grad_b_step0"])
        halves.optimizer.first_step()
        if step == 0:
            close(halves.W.detach() - a["W0"], a["eps_W_step0"])
            close(halves.b.detach() - a["b0"], a["eps_b_step0"])
        halves.closure()
        if step == 0:
            close(halves.W.grad, a["sam_grad_W_step0"])
        halves.optimizer.second_step()
        halves.check(a, step)
    for run in (whole, halves):
        close(np.array(run.losses[0::2]), a["loss"])
        close(np.array(run.losses[1::2]), a["loss_perturbed"])


def check_toy(a: dict[str, Tensor]) -> None:
    fast, slow, _, _, lr, rho = a["params"].tolist()
    y = a["y"]
    assert torch.equal(a["x"][:, 0, 1], slow * y) and torch.equal(
        a["x"][a["has_fast"], 1, 0], (fast * y)[a["has_fast"]]
    )
    runs = {
        "gd": {},
        "sam": {"rho": rho},
        "gd_up2": {"weights": fast_free_weights(a["has_fast"], 2)},
    }
    there = {name.rsplit("_", 1)[0] for name in a if name.endswith(("_loss", "_align", "_grad0"))}
    assert there <= set(runs), f"runs {there - set(runs)} have no adapter"
    for run in sorted(there):
        path = train_cubic(a["W0"], a["x"], y, steps=len(a[f"{run}_loss"]), lr=lr, **runs[run])
        close(path.first_gradient, a[f"{run}_grad0"])
        close(path.loss, a[f"{run}_loss"])
        close(path.alignments, a[f"{run}_align"])
        close(path.W, a[f"{run}_W"])


@pytest.mark.filterwarnings(
    "ignore:classes .* have fewer than two:UserWarning", "ignore:more than 70%:UserWarning"
)
@pytest.mark.parametrize("path", files("useful"), ids=lambda path: path.name)
def test_golden(path):
    if path.suffix == ".json":
        stored = json.loads(path.read_text())
        assert set(stored) == {"separating_epoch"}, f"{set(stored)} have no adapter"
        for case in stored["separating_epoch"]:
            assert separating_epoch(case["error_curve"]) == case["epoch_index0"]
        return
    for case, a in cases(path).items():
        if {"logits", "labels", "slow_mask"} <= a.keys():
            check_selection(a)
        elif {"X", "W0", "loss_perturbed"} <= a.keys():
            check_sam(case, a)
        elif {"x", "has_fast", "params"} <= a.keys():
            check_toy(a)
        else:
            pytest.fail(f"{path.name}, {case}: arrays {sorted(a)} are of no kind that an adapter knows")
