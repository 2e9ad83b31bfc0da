"""The network without its repetition: iterative feature merging (Chen, Zhou, Yan, 2023, arXiv 2310.06756), without data and without training.

In each round every layer merges its two closest channels, until the closest two are further apart than beta times the furthest two. What makes the
channels is averaged and what reads them is summed (``"mean_sum"``), which keeps merged channels comparable and is exact for duplicates; the paper
sums and averages (``"sum_mean"``). Batch norms are folded first: a sum of two equal channels has four times their variance, not twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lineament.core import checks
from lineament.core.checks import require
from lineament.measure.merging.distance import DISTANCES, RULES
from lineament.measure.merging.merged import Merged
from lineament.measure.merging.plan import prepare

NORMS = ("fold", "paper", "sigma")


def merge(
    model: nn.Module,
    *,
    example: Any,
    sites: str | Sequence[str] | None = None,
    beta: float | None = None,
    keep: float | Mapping[str, int] | None = None,
    params: float | None = None,
    flops: float | None = None,
    rule: str = "mean_sum",
    norms: str = "fold",
    distance: str = "all",
    rescale: bool = False,
) -> Merged:
    """The network with its closest channels merged, without data and without training.

    Args:
        model: any module; it stays as it was.
        example: inputs for one forward; only their shapes matter.
        sites: layers to merge (globs), as :func:`lineament.core.surgery.channel_groups` names them; all by default.
        beta: merge until the closest two channels of a layer are further apart than this share of its furthest two (squared); 0.1 by default.
        keep: instead: a share of the channels of every layer, or ``{layer: channels}``.
        params, flops: instead: the share of the parameters, or of the operations of a forward, that may be left; the least different channels of all layers first.
        rule: ``"mean_sum"`` averages what makes a channel and sums what reads it; ``"sum_mean"``, the paper's, the other way round.
        norms: ``"fold"`` makes batch norms part of the layer before them, which is exact; ``"sigma"`` merges standard deviations; ``"paper"`` variances.
        distance: ``"all"`` (every weight and bias that makes or reads the channels), ``"paper"`` (without biases and norms), ``"in"``, ``"out"``, ``"cosine"``.
        rescale: first bring what makes each channel to norm one, and the norm to what reads it; where the activation allows it (ReLU).

    Returns:
        The smaller network with what was merged.

    Raises:
        InputError: beta outside [0, 1), an unknown layer, several targets, weights that are not finite, a rule that a gate does not bear.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with torch.no_grad():
    ...     for t in (net[0].weight, net[0].bias):
    ...         t[3] = t[1]
    >>> found = merge(net, example=torch.ones(1, 3), beta=0.0, distance="in")
    >>> found.groups["0"].tolist(), found.model[0]
    ([0, 2, 1, 2], Linear(in_features=3, out_features=3, bias=True))
    """
    targets = {"beta": beta, "keep": keep, "params": params, "flops": flops}
    given = [name for name, value in targets.items() if value is not None]
    require(len(given) < 2, f"{' and '.join(given)}: got several targets, expected one")
    beta = 0.1 if not given else beta
    if beta is not None:
        require(
            isinstance(beta, (int, float)) and 0 <= beta < 1,
            f"beta: got {beta!r}, expected a number of at least 0 and below 1",
        )
    for name in ("params", "flops"):
        value = targets[name]
        require(
            value is None or (isinstance(value, (int, float)) and 0 < value <= 1),
            f"{name}: got {value!r}, expected a share above 0 and up to 1",
        )
    checks.one_of("rule", rule, RULES)
    checks.one_of("norms", norms, NORMS)
    checks.one_of("distance", distance, DISTANCES)
    plan = prepare(model, example, sites, rule=rule, norms=norms, distance=distance, rescale=rescale)
    if beta is not None:
        plan.rounds(float(beta))
    else:
        plan.until(keep, params, flops)
    return plan.finished(beta)


def merge_as_published(
    model: nn.Module,
    *,
    example: Any,
    sites: str | Sequence[str] | None = None,
    beta: float = 0.1,
    max_ratio: float = 1.0,
) -> Merged:
    """Iterative feature merging as the paper's code does it: sums of what makes a channel, means of what reads it, batch norm vectors summed.

    Its variances are wrong (the variance of a sum of two equal channels is four times theirs); :func:`merge` is for use, this for comparison.

    Args:
        model, example, sites, beta: as for :func:`merge`.
        max_ratio: a layer of n channels stops after ``max_ratio * n`` rounds.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> merge_as_published(net, example=torch.ones(1, 3), max_ratio=0.0).sizes
    {'0': (4, 4)}
    """
    require(
        isinstance(beta, (int, float)) and 0 <= beta < 1,
        f"beta: got {beta!r}, expected a number of at least 0 and below 1",
    )
    require(max_ratio >= 0, f"max_ratio: got {max_ratio!r}, expected a number of at least 0")
    plan = prepare(model, example, sites, rule="sum_mean", norms="paper", distance="paper", rescale=False)
    plan.rounds(float(beta), float(max_ratio))
    return plan.finished(float(beta))
