"""Negative pairs against the released module, and the rates of its evaluation."""

from __future__ import annotations

import torch
from tests.golden.common import File, golden
from tests.golden.margins import gradients, head_of

from lineament.losses.unpg import UNPG, negative_pairs
from lineament.measure.embeddings.verification import (
    best_threshold_accuracy,
    nearest_tar_at_far,
    separation,
    tar_at_far,
    template_features,
)


def check_loss(file: File) -> None:
    assert file["quantiles"] == [0.25, 0.75] and file["quantile_rule"] == "sorted[floor(q n)]"
    x, rows, y = (file.input(name) for name in ("X", "W_rows", "y"))
    pairs = negative_pairs(x, y, file["whisker"])
    upper = torch.ones(len(y), len(y), dtype=torch.bool).triu(1)
    like = y[:, None] == y
    positives, negatives = pairs.similarities[upper & like], pairs.similarities[upper & ~like]
    file.compare("sp", positives)
    file.compare("sn", negatives)
    file.compare("sn_filtered_sorted", pairs.similarities[pairs.kept].sort().values)
    for name, found in zip(("q1", "q3", "lo", "hi"), (*pairs.quartiles, pairs.low, pairs.high)):
        file.compare(name, found)
    file.compare("lse_aux", pairs.logsumexp(file["scale"]))
    if len(positives) and len(negatives):
        space = separation(positives, negatives)
        for name, found in {
            "inf_sp": space.lowest_positive,
            "sup_sn": space.highest_negative,
            "gap": space.gap,
            "overlap_p": space.overlap_positive,
            "overlap_n": space.overlap_negative,
        }.items():
            file.compare(f"wdfs_{name}", found)
    for case in file.cases:
        head = head_of(case, rows)
        x.requires_grad_()
        loss = UNPG(head, case["whisker"]) if case["unpg"] else head
        found = loss(x, y)
        case.compare(f"{case.name}__loss", found)
        case.compare(f"{case.name}__cosine", head.margin_logits(x, y) / head.scale)
        if case.has(f"{case.name}__loss_g_term"):
            case.compare(f"{case.name}__loss_g_term", head.margin.extra(x.norm(dim=1)).mean())
        by_x, by_rows = gradients(found, x, head)
        case.compare(f"{case.name}__gradX", by_x)
        case.compare(f"{case.name}__gradW", by_rows)
        case.compare(f"{case.name}__gradW_cols", by_rows.T)


def check_rates(file: File) -> None:
    scores, labels, fars = (file.input(name) for name in ("scores", "labels", "far_targets"))
    percent = {True: 100, False: 1}[file["percent"]]
    rates, used = nearest_tar_at_far(scores, labels, fars, drop_intermediate=file["drop_intermediate"])
    file.compare("tar_official_pct", rates * percent)
    file.compare("far_used_official", used)
    file.compare("tar_exact_pct", tar_at_far(scores, labels, fars) * percent)
    first = file["accuracy_entries"]
    name = f"best_threshold_acc_first{first}"
    file.compare(name, best_threshold_accuracy(scores[:first], labels[:first]))


def check_templates(file: File) -> None:
    assert (file["media_pooling"], file["template_pooling"], file["normalize"]) == ("mean", "sum", "l2")
    features, numbers = template_features(
        *(file.input(name) for name in ("img_feats", "templates", "medias"))
    )
    file.compare("template_feats", features)
    file.compare("unique_templates", numbers)
    one, two = (features[torch.searchsorted(numbers, file.input(name))] for name in ("p1", "p2"))
    file.compare("scores", (one * two).sum(1))


CHECKS = {"unpg_loss": check_loss, "roc_tar_far": check_rates, "ijb_templates": check_templates}
test_golden, test_a_wrong_number_is_noticed = golden(
    "unpg",
    CHECKS,
    fixed=(
        "roc_tar_far:drop_intermediate",
        "unpg_loss:guard",  # no target of these inputs lies where a guard acts
        "unpg_loss:whisker",  # infinite in one case; the array that the others take it from is spoiled by itself
    ),
)
