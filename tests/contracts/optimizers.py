"""The optimizers that the contract holds for: one line each. ``torch.optim.Adam`` is there to hold the contract to PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lineament.optim import ASAM, GNS, SAM, DiffGrad
from lineament.optim.gns.rules import Smoothness
from lineament.optim.gns.solvers import StepOptions


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
    differentiates: bool = False  # its closure only returns the loss, whose derivatives the optimizer takes
    own_options: bool = True  # a group may have options of its own
    separable: bool = True  # a parameter's step does not depend on the others' gradients
    complex_numbers: bool = True
    maximize: bool = True
    decay: dict[str, Any] = field(default_factory=lambda: {"weight_decay": 0.1})  # {} where there is none
    sparse: str = "sparse"  # what the refusal says
    bad: Sequence[tuple[dict[str, Any], str]] = ()  # options that are refused, and what the message says
    nonfinite: str = (
        "parameter 3.*1 of 1 values"  # what nonfinite="raise" says; "" where there is no such option
    )
    group_bad: bool = True  # every option may be a group's own
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
    ({"nonfinite": "drop"}, "nonfinite"),
    ({"rectify": "sgd"}, "rectify"),
    ({"fixed_friction": -1}, "fixed_friction"),
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
        nonfinite="" if "capturable" in options else Maker.nonfinite,
    )  # fmt: skip


def around(kind: type[SAM], name: str, rho: float) -> Maker:
    def make(params: Any, lr: float = 0.02, **options: Any) -> torch.optim.Optimizer:
        own = {key: options.pop(key) for key in ("rho", "model", "nonfinite") if key in options}
        return kind(torch.optim.SGD(params, lr=lr, momentum=0.5, **options), **{"rho": rho, **own})

    bad = [({"rho": -0.1}, "rho"), ({"rho": float("nan")}, "rho"), ({"nonfinite": "drop"}, "nonfinite")]
    # The radius is one for all parameters, and goes up the loss, so that going up itself is another method.
    return Maker(
        name,
        make,
        needs_closure=True,
        separable=False,
        maximize=False,
        complex_numbers=kind is SAM,  # ASAM scales by the modulus, which is no property of the parts
        nonfinite="gradient at the weights has NaN or infinite",
        bad=bad,
        group_bad=False,
    )


GNS_BAD = (
    ({"gamma": -0.1}, "gamma: got -0.1"),
    ({"gamma": float("nan")}, "gamma: got nan"),
    ({"rule": "armijo"}, "rule: got 'armijo'"),
    ({"step": "cg"}, "step: got 'cg'"),
    ({"dense": -1}, "dense: got -1"),
    ({"nonfinite": "propagate"}, "nonfinite: got 'propagate'"),
)


def gns(name: str, **options: Any) -> Maker:
    # γ is found by the search and joint: it starts somewhere, and no schedule nor group moves it.
    return Maker(
        f"gns {name}".strip(),
        GNS,
        options,
        rate="gamma",
        needs_closure=True,
        differentiates=True,
        own_options=False,
        separable=False,
        complex_numbers=False,
        maximize=False,
        decay={},
        nonfinite="1 of 29 entries of its gradient are not finite",
        bad=[pair for pair in GNS_BAD if not set(pair[0]) & set(options)],
    )


MAKERS = [
    gns(""),
    gns("by products", dense=0),
    gns("of low rank", step=StepOptions(form="low_rank", rank=3)),
    gns("without curvature", curvature=None),
    gns("by the gradient's test", rule=Smoothness(test="gradient", constant=4)),
    around(SAM, "sam", 0.05),
    around(ASAM, "asam", 0.5),
    Maker("torch Adam", torch.optim.Adam, bad=[p for p in NUMBERS if p[0].get("lr", 0) == p[0].get("lr", 0)],
          nonfinite="", strict_closure=False),
    diffgrad(""),
    diffgrad("by lists", foreach=True),
    diffgrad("capturable", capturable=True),
    diffgrad("decoupled", decoupled_weight_decay=True, weight_decay=0.01),
    diffgrad("amsgrad, rectified", amsgrad=True, rectify="momentum"),
    diffgrad("amsgrad by lists", amsgrad=True, foreach=True, eps_mode="code"),
    *(diffgrad(f"version {version}", version=version) for version in range(1, 6)),
    diffgrad("version 4 by lists", version=4, foreach=True),
]  # fmt: skip
