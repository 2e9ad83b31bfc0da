"""Class heads as the golden cases of margin losses describe them."""

from __future__ import annotations

from typing import Any

import torch
from tests.golden.common import Scope
from torch import Tensor, nn

from lineament.losses.class_head import ClassHead
from lineament.losses.margins import (
    AdaFace,
    ArcFace,
    Combined,
    CosFace,
    Cosine,
    CurricularFace,
    Elastic,
    MagFace,
    Margin,
    SphereFace,
)


def guard(case: Scope) -> Any:
    if case.get("easy_margin"):
        return "easy"
    return {True: "taylor", False: "none"}[case.get("guard", False)]


def margin_of(case: Scope) -> Margin:
    kind = case["loss"]
    if case.get("margins") is not None:
        plus = {None: None, "official": "official", "paper": "rank"}[case.get("plus")]
        form = {"arcface": "arc", "cosface": "cos"}[kind]
        return Elastic(form, case["margin"], case["sigma"], match=plus, guard=guard(case))  # pyright: ignore
    if kind == "curricularface":
        assert guard(case) == "taylor"
        made = CurricularFace(case["margin"], alpha=case["alpha"]).double()
        made.t.fill_(case["t_prev"])
        return made
    makers = {
        "softmax": lambda: Cosine(),
        "arcface": lambda: ArcFace(case["margin"], guard=guard(case)),
        "cosface": lambda: CosFace(case["margin"]),
        "sphereface": lambda: SphereFace(
            case["margin"], by_norm=bool(case.get("scale_by_feature_norm", False))
        ),
        "combined": lambda: Combined(case["m1"], case["m2"], case["m3"]),
        "adaface": lambda: AdaFace(case["margin"], case["h"]),
        "magface": lambda: MagFace(
            (case["l_a"], case["u_a"]),
            (case["l_margin"], case["u_margin"]),
            weight=case["lambda_g"],
            guard=guard(case),
        ),
    }
    return makers[kind]()


def head_of(case: Scope, rows: Tensor) -> ClassHead:
    """A head with class weights (C, d)."""
    margin = margin_of(case)
    scale, margin.by_norm = case.get("scale"), bool(case.get("scale_by_feature_norm", False))
    assert margin.by_norm or scale is not None
    head = ClassHead(
        *rows.shape, margin, 1.0 if scale is None else scale, reduction=case.get("reduction", "mean")
    )
    head.weight = nn.Parameter(rows.clone())
    return head


def gradients(loss: Tensor, x: Tensor, head: ClassHead) -> tuple[Tensor, Tensor]:
    found = torch.autograd.grad(loss, (x, head.weight), retain_graph=True)
    return found[0], found[1]
