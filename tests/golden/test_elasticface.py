"""Margin losses against the released classes, and face verification against its protocols."""

from __future__ import annotations

import torch
from tests.golden.common import File, golden
from tests.golden.margins import gradients, head_of
from torch import Tensor
from torch.nn.functional import normalize as unit

from lineament.losses.class_head import ClassHead
from lineament.losses.margins import ArcFace, CosFace, matched
from lineament.measure.embeddings.verification import fold_accuracy, tar_at_far


def check_losses(file: File) -> None:
    x, rows, y = (file.input(name) for name in ("X", "W", "y"))
    for case in file.cases:
        head = head_of(case, rows.T)
        x.requires_grad_()
        given = None
        if case.get("margins") is not None:
            # Drawn margins, matched to the samples as the case says.
            given = case["margins"]
            own = head.cosines(x).gather(1, y[:, None])[:, 0]
            if case.get("plus"):
                given = matched(own, given, {"paper": "rank", "official": "official"}[case["plus"]])
                case.compare(f"{case.name}__margin_used", given)
        logits = head.margin_logits(x, y, margins=given)
        if hasattr(head.margin, "t"):
            file.compare("curricular__t_new", head.margin.t)
            head.margin.t.fill_(case["t_prev"])
        loss = head(x, y, margins=given)
        case.compare(f"{case.name}__logits", logits)
        case.compare(f"{case.name}__loss", loss)
        if case.has(f"{case.name}__extra"):
            case.compare(f"{case.name}__extra", head.margin.extra(x.norm(dim=1)).mean())
        for name, found in zip(("gradX", "gradW"), gradients(loss, x, head)):
            case.compare(f"{case.name}__{name}", found if name == "gradX" else found.T)

    check_matches(file, x.detach(), rows, y)


def check_matches(file: File, x: Tensor, rows: Tensor, y: Tensor) -> None:
    """The margins as they are drawn, whether a case uses them or not, and what the released code gives to each sample of them."""
    own = unit(x) @ unit(rows, dim=0)
    for name, m in file.arrays(r"margins_(\w+)").items():
        given = matched(own.gather(1, y[:, None])[:, 0], file.input(name), "official")
        file.compare(f"margin_used_official_{m[1]}", given)


def check_edges(file: File) -> None:
    x, w, y = (file.input(name) for name in ("X", "W", "y"))
    for name, margin in (("arc", ArcFace(file["margin"])), ("cos", CosFace(file["margin"]))):
        head = ClassHead(*w.T.shape, margin, file["scale"])
        head.weight = torch.nn.Parameter(w.T.clone())
        x.requires_grad_()
        file.compare(f"{name}_logits", head.margin_logits(x, y))
        for found in gradients(head(x, y), x, head):
            assert found.isfinite().all(), f"{name}: a gradient is not finite"
    if file.has("theta"):
        own = head.cosines(x).gather(1, y[:, None])[:, 0]
        assert torch.allclose(own, file.input("theta").cos(), rtol=0, atol=1e-9)
    # Where the released code's arccos meets a cosine of 1 or -1 in any column.
    file.compare("arc_gradX_is_nan", (head.cosines(x).abs() >= 1).any(1))
    if not file.has("X_ign"):
        return
    x, w, y = (file.input(f"{name}_ign") for name in ("X", "W", "y"))
    labels = torch.where(y == file["ignore_index"], -1, y)
    for name, margin in (("arc", ArcFace(file["margin"])), ("cos", CosFace(file["margin"]))):
        head = ClassHead(*w.T.shape, margin, file["scale"])
        head.weight = torch.nn.Parameter(w.T.clone())
        found = head.margin_logits(x, labels, margins=file.input("margins_ign"))
        file.compare(f"elastic_{name}_logits_ign", found)


def check_sampled(file: File) -> None:
    x, rows, y = (file.input(name) for name in ("X", "W_rows", "y"))
    x.requires_grad_()
    for prefix, kept in (("", file.input("kept")), ("full_", None)):
        head = head_of(file, rows)
        loss = head(x, y, kept=kept)
        file.compare(f"{prefix}loss", loss)
        for name, found in zip(("gradX", "gradW_rows"), gradients(loss, x, head)):
            file.compare(f"{prefix}{name}", found)


def check_verification(file: File) -> None:
    assert (file["shuffle"], file["distance"], file["ddof"]) == (False, "squared_euclidean", 0)
    x, same = file.input("embeddings"), file.input("issame")
    found = fold_accuracy(
        x,
        same,
        file["n_folds"],
        start=file["threshold_start"],
        stop=file["threshold_stop"],
        step=file["threshold_step"],
    )
    file.compare("acc_folds", found.accuracies)
    file.compare("acc_mean", found.mean)
    file.compare("acc_std", found.std)
    file.compare("tpr_mean", found.tpr)
    file.compare("fpr_mean", found.fpr)
    file.compare("best_threshold_all_pairs_acc", found.optimistic)
    scores = (x[0::2] * x[1::2]).sum(1)
    file.compare("scores", scores)
    if file.has("fars"):
        file.compare("tar_at_far", tar_at_far(scores, same, file.input("fars")))


def check_schedule(file: File) -> None:
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter])
    milestones = [int(m) - 1 for m in file["milestones"]]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, file["gamma"])
    factors = []
    for _ in range(int(file["epochs"])):
        factors.append(optimizer.param_groups[0]["lr"] / optimizer.defaults["lr"])
        optimizer.step()
        schedule.step()
    file.compare("factor_per_epoch", torch.tensor(factors, dtype=torch.float64))
    if file.has("steps_per_epoch"):
        file.input("steps_per_epoch")


CHECKS = {
    "margin_losses": check_losses,
    "baselines": check_losses,
    "edge_cases": check_edges,
    "partial_fc": check_sampled,
    "verification": check_verification,
    "lr_schedule": check_schedule,
}
test_golden, test_a_wrong_number_is_noticed = golden(
    "elasticface",
    CHECKS,
    fixed=(
        "sigma",  # of the draws, which are stored
        "steps_per_epoch",
        "guard",  # few targets of these inputs lie where a guard acts
    ),
)
