"""Descriptors and scores against scikit-image, OpenCV's formula and scikit-learn."""

from __future__ import annotations

import re

import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor

from lineament.handcrafted.gabor import gabor_kernel, gabor_kernel_opencv, responses
from lineament.handcrafted.hog import hog
from lineament.handcrafted.lbp import lbp_codes, neighbours
from lineament.handcrafted.scores import class_scores


def scaled(case: Scope) -> Tensor:
    return case.input(case["image"]).double() / case["input_scale"]


def check_hog(case: Scope) -> None:
    assert (case["block_stride"], case["eps"], case["clip"]) == (1, 1e-5, 0.2)
    found = hog(
        scaled(case),
        case["orientations"],
        case["pixels_per_cell"],
        case["cells_per_block"],
        norm=case["block_norm"],
        sqrt=case["transform_sqrt"],
    )
    case.compare(f"hog_{case.name}", found)


def check_lbp(case: Scope) -> None:
    assert (case["lbp_rounding_decimals"], case["lbp_outside"]) == (5, 0)
    images, array = case.input(case["image"]), f"lbp_{case.name}"
    found = lbp_codes(images, case["P"], case["R"], codes=case["method"])
    gap = (neighbours(images.double(), case["P"], case["R"]) - images.double()).abs()
    ties = case.tolerance(array, torch.float64).get("ties", 0)
    case.compare(array, found, either=((gap > 0) & (gap <= ties)).any(0))


def check_gabor(case: Scope) -> None:
    given = (case["frequency"], case["theta"])
    options = {key: case[key] for key in ("bandwidth", "n_stds", "offset")}
    case.compare(f"gaborkernel_{case.name}", gabor_kernel(*given, **options))
    for array in case.arrays(rf"gaborresp_\w+?_{re.escape(case.name)}"):
        image = scaled(case)[case["index"]]
        found = responses(image[None], [given[0]], [given[1]], **options, border=case["boundary"])
        case.compare(array, found[0, 0].to(torch.float32))


def check_features(file: File) -> None:
    for case in file.cases:
        {"hog": check_hog, "lbp": check_lbp, "gabor": check_gabor}[case["feature"]](case)


def check_gabor_real(file: File) -> None:
    for case in file.cases:
        keys = ("ksize", "sigma", "theta", "lambd", "gamma", "psi")
        case.compare(case.name, gabor_kernel_opencv(*(case[key] for key in keys)))


def check_metrics(file: File) -> None:
    found = class_scores(
        file.input("y_true"), file.input("y_pred"), file["labels"], zero_division=file["zero_division"]
    )
    file.compare("confusion", torch.tensor(found.confusion))
    file.compare("accuracy", found.accuracy)
    for key in ("macro", "weighted", "micro"):
        file.compare(f"{key}_prf", torch.tensor(getattr(found, key), dtype=torch.float64))
    file.compare("per_class_prf_support", torch.tensor(found.by_class, dtype=torch.float64).T)


test_golden, test_a_wrong_number_is_noticed = golden(
    "bangla-digits",
    {
        "features": check_features,
        "gabor_real": check_gabor_real,
        "classification_metrics": check_metrics,
    },
    # A constant image has no features, and the roots of 0 and 1 are themselves.
    fixed=("features:constant", "features:transform_sqrt"),
)
