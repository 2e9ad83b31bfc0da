"""USEFUL, SAM and the two-layer theory against independent float64 evaluations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.golden.common import File, Scope, golden, listed
from torch import Tensor, nn

from lineament.learn.useful.separating import separating_epoch
from lineament.learn.useful.slow_examples import select_slow
from lineament.learn.useful.two_layer_theory import fast_free_weights, train_cubic
from lineament.optim import ASAM, SAM

RULES = {(2, "larger mean loss", "squared_euclidean"): "clusters"}
OPTIMIZERS = {"sam": SAM, "asam": ASAM}


def check_selection(file: File) -> None:
    for case in file.cases:
        at = f"{case.name}__"
        logits, labels = case.input(f"{at}logits"), case.input(f"{at}labels")
        by = RULES[case["n_clusters"], case["slow"], case["distance"]]
        case.compare(f"{at}probs", logits.softmax(1))
        case.compare(f"{at}loss", F.cross_entropy(logits, labels, reduction="none"))
        for order in (torch.arange(len(labels)), torch.arange(len(labels)).flip(0)):
            found = select_slow(logits[order], labels[order], by=by)
            case.compare(f"{at}slow_mask", found.mask[order.argsort()])
            case.compare(f"{at}inertia", found.inertia)
            case.compare(f"{at}centers_fast_slow", found.centers)
        found = select_slow(logits, labels, by=by)
        for factor in case["factor"]:
            case.compare(f"{at}indices_factor{factor}", found.indices(factor))
        for factor in case["weight_factor"]:
            case.compare(f"{at}weights_factor{factor}", found.weights(factor))


class Regression:
    """The multinomial logistic regression of a case, and its optimizer."""

    def __init__(self, case: Scope):
        self.X, self.y, W, b = (case.input(f"{case.name}__{key}") for key in ("X", "y", "W0", "b0"))
        self.reduction = {"full": case["reduction"]}[case["batch"]]
        self.W, self.b = nn.Parameter(W), nn.Parameter(b)
        options = {key: case[key] for key in ("lr", "momentum", "weight_decay", "dampening", "nesterov")}
        self.optimizer = OPTIMIZERS[case["optimizer"]](
            torch.optim.SGD([self.W, self.b], **options), rho=case["rho"]
        )
        self.losses: list[float] = []

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.X @ self.W.T + self.b, self.y, reduction=self.reduction)
        loss.backward()
        self.losses.append(loss.item())
        return loss


def check_sam(file: File) -> None:
    for case in file.cases:
        at = f"{case.name}__"
        whole, halves = Regression(case), Regression(case)
        after: list[list[Tensor]] = [[], [], [], []]
        for step in range(case["steps"]):
            whole.optimizer.step(whole.closure)
            halves.closure()
            first = [halves.W.detach().clone(), halves.b.detach().clone()]
            if step == 0:
                case.compare(f"{at}grad_W_step0", halves.W.grad)
                case.compare(f"{at}grad_b_step0", halves.b.grad)
            halves.optimizer.first_step()
            if step == 0:
                case.compare(f"{at}eps_W_step0", halves.W - first[0])
                case.compare(f"{at}eps_b_step0", halves.b - first[1])
            halves.closure()
            if step == 0:
                case.compare(f"{at}sam_grad_W_step0", halves.W.grad)
            halves.optimizer.second_step()
            for k, p in enumerate((whole.W, whole.b, halves.W, halves.b)):
                after[k].append(p.detach().clone())
        for key, values in zip(("W", "b", "W", "b"), after):
            case.compare(f"{at}{key}", torch.stack(values))
        for run in (whole, halves):
            case.compare(f"{at}loss", torch.tensor(run.losses[0::2], dtype=torch.float64))
            case.compare(f"{at}loss_perturbed", torch.tensor(run.losses[1::2], dtype=torch.float64))


def check_toy(file: File) -> None:
    for case in file.cases:
        at = f"{case.name}__"
        x, y, has_fast, W = (case.input(f"{at}{key}") for key in ("x", "y", "has_fast", "W0"))
        values = case["params"]
        told = dict(zip(case["param_names"], values.tolist() if isinstance(values, Tensor) else values))
        # Patch 0 holds the slow feature, patch 1 the fast one where there is one.
        torch.testing.assert_close(x[:, 0, 1], told["beta_d"] * y)
        torch.testing.assert_close(x[has_fast, 1, 0], told["beta_e"] * y[has_fast])
        runs: dict[str, dict[str, Any]] = {"gd": {}, "sam": {"rho": told.get("rho", 0.0)}}
        for factor in listed(case["upsampling_factor"]):
            runs[f"gd_up{factor}"] = {"weights": fast_free_weights(has_fast, factor)}
        for run in case["run"]:
            path = train_cubic(W, x, y, steps=case["steps"], lr=told["lr"], **runs[run])
            for key, found in (
                ("grad0", path.first_gradient),
                ("loss", path.loss),
                ("align", path.alignments),
                ("W", path.W),
            ):
                case.compare(f"{at}{run}_{key}", found)


def check_scalars(file: File) -> None:
    for k in range(len(file.nodes["separating_epoch"])):
        curve = file.input(f"separating_epoch[{k}].error_curve")
        file.compare(f"separating_epoch[{k}].epoch_index0", separating_epoch(curve))


pytestmark = pytest.mark.filterwarnings("ignore:classes .* have fewer than two", "ignore:more than 70%")
test_golden, test_a_wrong_number_is_noticed = golden(
    "useful",
    {"selection": check_selection, "sam": check_sam, "toy_cnn": check_toy, "scalars": check_scalars},
    fixed=("eps", "sam_eps", "power"),
)
