"""Which activations carry a behaviour, approximated with relevance: attribution patching with LRP coefficients in the place of gradients.

Rezaei Jafari, Eberle, Khakzar, Nanda, "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching", 2025 (arXiv 2508.21258).
The rules are those of :mod:`lineament.explain.relevance.rules`; the rest is :mod:`lineament.explain.patching.attribution`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lineament.explain.patching.attribution import first_order
from lineament.explain.patching.experiment import Experiment, Options
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import Prompts
from lineament.explain.patching.result import PatchingResult
from lineament.explain.relevance.rules import Rules

if TYPE_CHECKING:
    from typing_extensions import Unpack


@torch.inference_mode(False)
def relevance_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    *,
    rules: Rules = "relp",
    qk_fix: bool = False,
    grad_drop: bool = False,
    **options: Unpack[Options],
) -> PatchingResult:
    """The effect of every node, approximated: Σ (a_source - a_base)·c with c the LRP coefficient of the metric on the base run.

    Args:
        rules: see :func:`lineament.explain.relevance.rules.relevance_rules`; the default is the paper's (ln, identity, half where there are gates).
        qk_fix, grad_drop, options: as in :func:`lineament.explain.patching.attribution.attribution_patching`.

    Raises:
        InputError: as :func:`lineament.explain.patching.activation.activation_patching`; also a rule that matches no module, or whose modules did not run.

    Source: Rezaei Jafari et al. 2025, section 3.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.SiLU(), nn.Linear(2, 1, bias=False))
    >>> _ = [nn.init.ones_(net[k].weight) for k in (0, 2)]
    >>> result = relevance_patching(net, torch.ones(1, 2), torch.zeros(1, 2), lambda y: y[:, 0], sites={"hidden": "[0]"})
    >>> round(float(result.scores["hidden"]), 4), result.coverage  # silu(x)/x is 1/2 at the base run's 0
    (0.5677, {'identity': 1})
    """
    return first_order(
        Experiment(model, clean, corrupt, metric, **options), rules, qk_fix=qk_fix, grad_drop=grad_drop
    )
