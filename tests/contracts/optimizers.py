"""The optimizers that the contract holds for: one line each. ``torch.optim.Adam`` is there to hold the contract to PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lineament.learn.optim import DiffGrad


@dataclass(frozen=True)
class Maker:
    """How an optimizer is made, and what it has of what an optimizer can have."""

    name: str
    make: Callable[
        ..., torch.optim.Optimizer
    ]  # make(params, **options); takes lr unless ``rate`` is another word
    options: dict[str, Any] = field(default_factory=dict)
    rate: str = "lr"
    needs_closure: bool = False
    separable: bool = True  # a parameter's step does not depend on the others' gradients
    complex_numbers: bool = True
    maximize: bool = True
    decay: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.1})  # {} where there is none
    sparse: str = "sparse"  # what the refusal says
    bad: Sequence[tuple[dict[str, Any], str]] = ()  # options that are refused, and what the message says
    nan_policy: bool = True  # takes nan_policy="raise" and "skip"
    strict_closure: bool = True  # a closure must return a tensor

    def __call__(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        return self.make(params, **{**self.options, **options})


NUMBERS = (
    ({"lr": -0.1}, "lr|learning rate"),
    ({"lr": float("nan")}, "lr|learning rate"),
    ({"eps": -1e-8}, "eps"),
    ({"betas": (1.0, 0.999)}, "bet"),
    ({"betas": (0.9, -0.1)}, "bet"),
    ({"weight_decay": -1}, "weight_decay"),
)
DIFFGRAD = (
    *NUMBERS,
    ({"lr": float("inf")}, "lr"),
    ({"betas": 0.9}, "betas: got 0.9, expected a pair"),
    ({"weight_decay": float("nan")}, "weight_decay"),
    ({"version": 6}, "version: got 6"),
    ({"version": True}, "version: got True"),
    ({"eps_mode": "papr"}, "eps_mode: got 'papr'.*nearest: 'paper'"),
    ({"nan_policy": "drop"}, "nan_policy"),
    ({"rectify": "sgd"}, "rectify"),
    ({"fixed_friction": -1}, "fixed_friction"),
    ({"differentiable": True}, "differentiable: got True"),
    ({"foreach": True, "compiled": True}, "foreach and compiled: got both"),
    (
        {"alias_previous_grad": True, "maximize": True},
        "alias_previous_grad: got both|alias_previous_grad and maximize",
    ),
    ({"capturable": True, "rectify": "skip"}, "capturable and rectify"),
)


def diffgrad(name: str, **options: Any) -> Maker:
    return Maker(
        f"diffgrad {name}".strip(),
        DiffGrad,
        options,
        bad=[
            pair for pair in DIFFGRAD if not set(pair[0]) & set(options) and not ("capturable" in options and len(pair[0]) > 1)
        ],
        nan_policy="capturable" not in options,
    )  # fmt: skip


MAKERS = [
    Maker("torch Adam", torch.optim.Adam, bad=[p for p in NUMBERS if p[0].get("lr", 0) == p[0].get("lr", 0)],
          nan_policy=False, strict_closure=False),
    diffgrad(""),
    diffgrad("by lists", foreach=True),
    diffgrad("capturable", capturable=True),
    diffgrad("decoupled", decoupled_weight_decay=True, weight_decay=0.01),
    diffgrad("amsgrad, rectified", amsgrad=True, rectify="momentum"),
    diffgrad("amsgrad by lists", amsgrad=True, foreach=True, eps_mode="code"),
    *(diffgrad(f"version {version}", version=version) for version in range(1, 6)),
    diffgrad("version 4 by lists", version=4, foreach=True),
]  # fmt: skip
