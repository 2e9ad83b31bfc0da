"""Transformed pairs and queues against the released memory module."""

from __future__ import annotations

from typing import Any

import torch
from tests.golden.common import File, Scope, golden

from lineament.losses.feature_transform import NegativeInterpolation, PositiveExtrapolation
from lineament.losses.info_nce import info_nce, score_statistics
from lineament.losses.queue import Queue

GRANULARITY = {"scalar": "batch", "sample": "sample", "dim": "dim"}


def transforms(case: Scope) -> tuple[PositiveExtrapolation | None, NegativeInterpolation | None]:
    positive = negative = None
    given: dict[str, Any] = {"distribution": case["distribution"]}
    if case["pos_transform"] is not None:
        interpolate = {"extrapolation": False, "interpolation": True}[case["pos_transform"]]
        kind = GRANULARITY[case["pos_granularity"]]
        positive = PositiveExtrapolation(
            granularity=kind, interpolate=interpolate, normalise=case["post_normalize"], **given
        )
    if case["neg_transform"] is not None:
        # The factor of an extrapolation is one more; what is done with it is the same.
        assert case["neg_transform"] in ("interpolation", "extrapolation")
        negative = NegativeInterpolation(granularity=GRANULARITY[case["neg_granularity"]], **given)
    return positive, negative


def check_case(case: Scope) -> None:
    q, k, queue = (case.input(name) for name in ("q", "k", "queue"))
    q.requires_grad_()
    positive, negative = transforms(case)
    one, two, generator = q, k, torch.Generator().manual_seed(0)
    if positive is not None:
        lam = case.input(f"{case.name}__lam_pos")
        ours = positive.draw(tuple(q.shape), generator, q)
        assert ours.shape == lam.shape
        low = 0 if positive.interpolate else 1
        for factor in (lam, ours):
            assert ((factor >= low) & (factor <= low + 1)).all()
        one, two = positive(q, k, lam)
    score = (one * two).sum(1)
    if negative is not None:
        lam, order = case.input(f"{case.name}__lam_neg"), case.input(f"{case.name}__perm")
        assert negative.draw(tuple(queue.shape), generator, queue).shape == lam.shape
        others = negative(one, queue, lam, order)
    else:
        others = one @ queue.T
    loss = info_nce(score, others, case["temperature"])
    case.compare(f"{case.name}__logits", torch.cat([score[:, None], others], 1) / case["temperature"])
    case.compare(f"{case.name}__loss", loss)
    case.compare(f"{case.name}__gradq", torch.autograd.grad(loss, q)[0])
    case.compare(f"{case.name}__stats", score_statistics(score, others, case["temperature"]).table())


def check_transform(file: File) -> None:
    for case in file.cases:
        check_case(case)
    if file.has("keys_to_enqueue"):
        check_queue(file)
    for name in ("alpha", "pos_alpha", "neg_alpha"):  # of draws, which are stored
        if file.has(name):
            file.input(name)


def check_queue(file: File) -> None:
    rows = file.input("queue")
    queue = Queue(*rows.shape).double()
    queue.rows.copy_(rows)
    queue.pointer.fill_(int(file.input("pointer")))
    queue.enqueue(file.input("keys_to_enqueue"))
    file.compare("memory_after", queue.rows)
    file.compare("index_after", queue.pointer)


test_golden, test_a_wrong_number_is_noticed = golden(
    "contrastive-ft",
    {"feature_transform": check_transform},
    fixed=("alpha", "pos_alpha", "neg_alpha", "distribution"),
)
