"""Over how many samples the lens *landscape* can measure curvature, in which parts, and what these samples say without it."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch import Tensor

from lineament.audit.estimates import PARTS
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.curvature.matrices import hessian
from lineament.core.curvature.risk import Risk
from lineament.measure.landscape.axes import random_axes
from lineament.measure.landscape.grids import line
from lineament.measure.landscape.spectrum import MeanGradient, Pooled, mean_gradient

STEPS, PROBES, _FEWEST_STEPS = 24, 3, 8
# Seconds for all products with the Hessian; samples, a power of two of them.
_SECONDS = 30.0
FEWEST, _MOST = 16, 2048


def reached(subject: Subject, rows: Tensor) -> tuple[list[str], int]:
    """The parameters that a gradient of the loss reaches, and how many numbers are in the others."""
    names = [name for name, p in subject.model.named_parameters() if p.is_floating_point()]
    risk = Risk(subject.model, subject.loss, subject.batches(rows), params=names)
    chunk = next(risk.chunks())
    with risk.ready():
        value = risk.loss(chunk)
        leaves = list(risk.leaves.values())
        grads = (
            torch.autograd.grad(value, leaves, allow_unused=True)
            if value.requires_grad
            else [None] * len(leaves)
        )
    found = [name for name, g in zip(risk.leaves, grads) if g is not None]
    return found, sum(leaf.numel() for leaf, g in zip(leaves, grads) if g is None)


def affordable(subject: Subject, names: list[str], order: Tensor, unit: int) -> tuple[int, int, float]:
    """For how many samples all products fit the time, how many Lanczos steps, and the seconds of a product: measured, not reckoned."""
    most = min(len(order), _MOST) // unit * unit
    count = min(max(FEWEST, 2 * unit), most)
    # The sixths together cost as much as all samples, and so do the halves.
    products = 3 * (PROBES * STEPS + 5 * PROBES)
    while True:
        parts = parts_of(order[:count], unit)
        operators = [hessian(subject.model, subject.loss, subject.batches(p), params=names) for p in parts]
        operator = Pooled(operators, [len(part) for part in parts])
        vector = torch.ones(operator.shape[0], dtype=operator.dtype, device=operator.device)
        times: list[float] = []
        # The first makes the graphs; of the others the fastest, since what else runs on the machine only slows a product down.
        while len(times) < 5 and (len(times) < 2 or sum(times) < 1.0):
            start = time.perf_counter()
            float((operator @ vector)[0])
            elapsed = time.perf_counter() - start
            times.append(shards.agreed("the time of a product", lambda: elapsed))  # noqa: B023
        seconds = min(times[1:])
        fit = count
        while fit < most and seconds / count * min(2 * fit, most) * products <= _SECONDS:
            fit = min(2 * fit, most)
        if fit == count:
            steps = int(STEPS * min(1.0, _SECONDS / (seconds * products)))
            return count, max(_FEWEST_STEPS, steps), seconds
        count = fit // unit * unit


def parts_of(order: Tensor, unit: int) -> list[Tensor]:
    """Disjoint parts of about as many samples, of whole batches where the model takes no others."""
    units = len(order) // unit
    count = max(min(PARTS, units), 1)
    ends = [number * units // count * unit for number in range(count)] + [len(order)]
    return [order[start:end].sort().values for start, end in pairwise(ends)]


def gradient_over(subject: Subject, names: list[str], rows: Tensor, unit: int) -> MeanGradient | None:
    """The gradient over at most sixteen parts, drawn at random, of whole batches where the model takes no others."""
    generator = torch.Generator().manual_seed((subject.seed * 1000 + 3) % 2**63)
    groups = list(rows[torch.randperm(len(rows), generator=generator)].split(unit))
    count = min(16 if len(groups) >= 128 else 8, len(groups))
    if count < 2:
        return None
    size = len(groups) // count
    parts = [torch.cat(groups[k * size : (k + 1) * size if k + 1 < count else None]) for k in range(count)]
    return mean_gradient(subject.model, subject.loss, [subject.batches(part) for part in parts], params=names)


def without_learning(subject: Subject, rows: Tensor) -> tuple[float, float | None, float | None]:
    """The loss of the best constant answer on these samples; for classes how often it is right, and the most frequent class."""
    targets = subject.targets[rows]
    if subject.task == "dense":
        # Each sample counts as much as another in the loss, however many of its positions are labelled.
        known, width = subject.known[rows].flatten(1), int(subject.width)
        weight = known.double() / known.sum(1, keepdim=True).clamp_min(1) / len(rows)
        y, said = (v.flatten(1).long() for v in (targets, subject.outputs[rows]))
        shares = torch.bincount(y.where(known, 0).flatten(), weight.flatten(), width)
        right = float((weight * (said == y)).sum())
        return float(torch.special.entr(shares).sum()), right, float(shares.max())
    if subject.task == "classification":
        shares = targets.bincount().double() / len(targets)
        right = float((subject.outputs[rows].argmax(1) == targets).double().mean())
        return float(torch.special.entr(shares).sum()), right, float(shares.max())
    values = targets.double().reshape(len(targets), -1)
    mean = values.mean(0)
    if subject.task == "regression":
        return float((values - mean).square().mean()), None, None
    return float((torch.special.entr(mean) + torch.special.entr(1 - mean)).mean()), None, None


def is_linear(subject: Subject, names: list[str], rows: Tensor) -> bool:
    """Whether a loss without curvature is indeed linear, along a random direction: else its derivatives are not those of the loss."""
    some = rows[: max(FEWEST, subject.batch_size if subject.fixed_batch else 0)]
    axis = random_axes(subject.model, 1, params=names, normalise="model", seed=subject.seed)[0]
    found = line(subject.model, subject.loss, subject.batches(some), axis, at=[-0.5, 0.0, 0.5]).loss
    return abs(float(found[0] - 2 * found[1] + found[2])) <= 1e-4 * float(found.abs().max())


def rounding(subject: Subject) -> float:
    """The mean loss below which there is nothing left to fall: what the last digits of single precision make of it."""
    eps = torch.finfo(torch.float32).eps
    if subject.task != "regression":
        return 10 * eps
    targets = subject.targets.double()
    return (10 * eps) ** 2 * max(float(targets.square().mean()), 1e-30)
