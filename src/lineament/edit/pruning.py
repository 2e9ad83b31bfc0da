"""A network without the channels that its layers need least, from forward passes on unlabelled inputs alone: no loss, no gradients, no training.

Kashyap et al., "ModHiFi: Identifying High Fidelity predictive components for Model Modification", NeurIPS 2025, arXiv 2511.19566. An input channel goes when
no output of any layer that reads it wants it; the weights of those that stay are compensated, batch norms are measured anew. Until the end channels
are only silenced at their readers, which is the same function; then all are taken out at once, so that the result is a plain, really smaller network.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lineament.core.checks import number, one_of, require
from lineament.core.norms import batchnorms
from lineament.core.surgery.cost import Cost, by_module
from lineament.core.surgery.groups import plain_network
from lineament.edit.layers import Inputs
from lineament.edit.pruned import Pruned, PruneOptions
from lineament.edit.readers import prunable
from lineament.edit.repairs import WAYS
from lineament.edit.silencing import Plan, is_language, measure_norms
from lineament.edit.targets import Measured, check_target, taken_out

CRITERIA = ("saliency", "fidelity", "energy", "magnitude", "random")
ORDERS = ("sequential", "one-shot")
_PASSES = 200
_USUAL = PruneOptions()


def prune(
    model: nn.Module,
    calibration: Any,
    *,
    remove: float | None = None,
    keep: float | None = None,
    params: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    criterion: str | None = None,
    compensate: str | None = "delta",
    recalibrate: bool = True,
    order: str = "sequential",
    options: PruneOptions = _USUAL,
) -> Pruned:
    """The network with fewer channels, from forwards on unlabelled inputs. The model that is passed stays as it was.

    Args:
        model: any module whose channels :func:`lineament.core.surgery.channel_groups` can follow.
        calibration: inputs, as for :func:`lineament.edit.fidelity`; labels are not used. About 2,000 images or 128 texts.
        remove: the paper's rule: each output gives up this share of its inputs, and a channel goes that no output of any reader wants. Alone: one pass;
            with ``params``, ``flops`` or ``latency``: passes until that is reached.
        keep: the share of channels that every group keeps.
        params, flops, latency: how many times fewer parameters or operations, or how many times faster; the share that is kept follows.
        criterion: ``"saliency"``, ``"fidelity"``, ``"energy"``, or to compare with ``"magnitude"`` (grouped L2 norms) and ``"random"``. By default saliency,
            and energy for gated perceptrons, as in the paper.
        compensate: ``"delta"``, ``"refit"``, ``"taps"`` or ``None``, see :func:`lineament.edit.compensated`. Linear layers of more than 2,048 inputs are
            refitted with ``"delta"``, too: one factorisation instead of one for each output.
        recalibrate: measure the statistics of batch norms anew on the calibration inputs.
        order: ``"sequential"``: each group is scored on what the network already became; ``"one-shot"``: all on the network as it was.

    Returns:
        :class:`Pruned`.

    Raises:
        InputError: no target or several, one that cannot be reached (with the nearest), a network without groups that can be pruned; NotFiniteError:
            activations that are not finite.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = prune(net, torch.randn(100, 4), keep=0.5)
    >>> found.model
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    check_target(remove=remove, keep=keep, params=params, flops=flops, latency=latency)
    _check(criterion, compensate, order, options)
    model = plain_network(model)
    widths = options.widths or (
        "one" if is_language(model) else "free" if options.allot == "global" else None
    )
    if widths == "one":
        require(
            remove is None and options.allot == "group",
            f"{'allot' if remove is None else 'remove'}: it leaves layers of several widths, which a configuration cannot say; pass keep, params, flops or latency, "
            "or widths='free' and open the folder with lineament.edit.load",
        )
    inputs = Inputs(calibration, options.batch_size)
    example = inputs.first(model)
    groups, readers, whole = prunable(model, example, options.sites)
    cost = Cost(model, example, list(groups.values()))
    before = cost.count(model), cost.operations(model)
    work = copy.deepcopy(model)
    plan = Plan(
        model, work, inputs, groups, readers, criterion, compensate, recalibrate, order == "one-shot", options
    )
    measured = Measured(model, example, groups, before)
    if remove is None:
        counts = (
            plan.counts(keep) if keep is not None else measured.counts(plan.counts, params, flops, latency)
        )
        if options.allot == "global" or options.widths == "free":
            counts = plan.allotted(counts)
        plan.run(counts=counts)
    else:
        for _ in range(_PASSES):
            left = plan.kept_total
            plan.run(removed=remove)
            if measured.reached(plan.kept, params, flops, latency):
                break
            require(
                plan.kept_total < left,
                f"remove: at {remove:g} some output wants every channel that is left, at {measured.said(plan.kept, params, flops, latency)}; pass a larger "
                "share, or no `remove` for an exact budget",
            )
    final = taken_out(work, groups, plan.kept, example)
    if recalibrate and batchnorms(final):
        measure_norms(final, inputs)
    after = cost.count(final), sum(by_module(final, example).values())
    return Pruned(
        final,
        {name: kept.nonzero()[:, 0] for name, kept in plan.kept.items()},
        {name: (group.size, int(plan.kept[name].sum())) for name, group in groups.items()},
        (before[0], after[0]),
        (before[1], after[1]),
        {name: (float(e[0]), float(e[1])) for name, e in plan.errors.items()},
        whole,
        criterion or ("energy" if all(g.products for g in groups.values()) else "saliency"),
        compensate,
        bool(recalibrate and batchnorms(model)),
    )


def _check(criterion: Any, compensate: Any, order: Any, options: PruneOptions) -> None:
    if criterion is not None:
        one_of("criterion", criterion, CRITERIA)
    if compensate is not None:
        one_of("compensate", compensate, WAYS)
    one_of("order", order, ORDERS)
    one_of("allot", options.allot, ("group", "global"))
    if options.widths is not None:
        one_of("widths", options.widths, ("one", "free"))
    number("lam", options.lam, low=0)
    number("batch_size", options.batch_size, low=1, integer=True)
