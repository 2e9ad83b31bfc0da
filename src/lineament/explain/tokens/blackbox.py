"""Token scores from probabilities alone: leave one out, LIME, KernelSHAP, and chance.

A token that is "absent" is replaced: by one given id, or by draws of a sampler, over which the value is averaged. All rows of a method are
one batch.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.question import Question
from lineament.explain.tokens.samplers import sampler_for


def random_scores(question: Question, *, seed: int = 0) -> Float[Tensor, "scored"]:
    """Uniform numbers in [0, 1): what any method has to beat."""
    return torch.rand(
        len(question.prompt.places), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def occlusion(
    question: Question,
    *,
    absent: Any = "uniform",
    n_samples: int = 10,
    batch_size: int | str = "auto",
    seed: int = 0,
) -> Float[Tensor, "scored"]:
    """f(x) - f(x without t), f = log p(target): leave one token out.

    Args:
        absent: what stands for an absent token: an id, or a sampler as for :func:`lineament.explain.tokens.attribution.reagent`.
        n_samples: draws of the sampler, averaged.
    """
    present = ~torch.eye(len(question.prompt.places), dtype=torch.bool)
    return _full(question, batch_size) - subset_values(question, present, absent, n_samples, batch_size, seed)


def lime(
    question: Question, *, n_samples: int = 500, width: float = 0.25, ridge: float = 1e-3, absent: Any = "uniform",
    batch_size: int | str = "auto", seed: int = 0,
) -> Float[Tensor, "scored"]:  # fmt: skip
    """The weights of a linear model of f on which tokens are present (Ribeiro, Singh, Guestrin 2016).

    Args:
        n_samples: random subsets, each token present in half of them.
        width: of the kernel exp(-d²/width²), d the cosine distance of the subset from the whole.
        ridge: the penalty of the linear model.
    """
    from sklearn.linear_model import Ridge

    checks.number("n_samples", n_samples, low=2, integer=True)
    checks.number("width", width, low=0, open_low=True)
    scored = len(question.prompt.places)
    present = torch.rand(n_samples, scored, generator=torch.Generator().manual_seed(seed)) < 0.5
    present[0] = True
    share = present.double().mean(1)
    weights = torch.exp(-((1 - share.sqrt()) ** 2) / width**2)
    values = subset_values(question, present, absent, 1, batch_size, seed)
    fitted = Ridge(alpha=ridge).fit(present.double().numpy(), values.numpy(), sample_weight=weights.numpy())
    return torch.from_numpy(fitted.coef_)


def kernel_shap(
    question: Question, *, n_samples: int = 512, absent: Any = "uniform", draws: int = 1, batch_size: int | str = "auto", seed: int = 0
) -> Float[Tensor, "scored"]:  # fmt: skip
    """Shapley values of f by weighted least squares (Lundberg, Lee 2017); they sum to f(all present) - f(all absent).

    Args:
        n_samples: subsets, drawn in complementary pairs; where all 2^T - 2 are no more than that, all are taken and the values are exact.
        draws: of the sampler, averaged for each subset.
    """
    checks.number("n_samples", n_samples, low=4, integer=True)
    scored = len(question.prompt.places)
    present, weights = _coalitions(scored, n_samples, seed)
    ends = torch.stack([torch.zeros(scored), torch.ones(scored)]).bool()
    values = subset_values(question, torch.cat([ends, present]), absent, draws, batch_size, seed)
    nothing, everything, v = values[0], values[1], values[2:]
    # The last value follows from the sum, which makes the constraint exact.
    z = present.double()
    design, right = z[:, :-1] - z[:, -1:], v - nothing - z[:, -1] * (everything - nothing)
    root = weights.sqrt()[:, None]
    rest = torch.linalg.lstsq(root * design, root * right[:, None], driver="gelsd").solution[:, 0]
    return torch.cat([rest, (everything - nothing - rest.sum())[None]])


def _coalitions(
    scored: int, n_samples: int, seed: int
) -> tuple[Bool[Tensor, "subsets scored"], Float[Tensor, "subsets"]]:
    """Subsets and their weights under the Shapley kernel."""
    sizes = torch.arange(1, scored, dtype=torch.float64)
    mass = (scored - 1) / (sizes * (scored - sizes))
    if 2**scored - 2 <= n_samples:
        every = torch.tensor(list(product([False, True], repeat=scored)))[1:-1]
        count = every.sum(1)
        # The kernel's mass of a size is shared by all subsets of that size.
        of_size = torch.tensor([(count == k).sum() for k in range(1, scored)]).double()
        return every, (mass / of_size)[count - 1]
    generator = torch.Generator().manual_seed(seed)
    counts = 1 + torch.multinomial(mass, n_samples // 2, replacement=True, generator=generator)
    order = torch.rand(len(counts), scored, generator=generator).argsort(1).argsort(1)
    half = order < counts[:, None]
    return torch.cat([half, ~half]), torch.ones(2 * len(half), dtype=torch.float64)


def _full(question: Question, batch_size: int | str) -> Tensor:
    return question.values(question.prompt.ids[None], batch_size)


def subset_values(
    question: Question,
    present: Bool[Tensor, "subsets scored"],
    absent: Any,
    draws: int,
    batch_size: int | str,
    seed: int,
) -> Float[Tensor, "subsets"]:
    """f with only the ``present`` tokens there, the mean over ``draws`` of what stands for the others."""
    ids, places = question.prompt.ids, question.prompt.places
    keep = torch.ones(len(present), len(ids), dtype=torch.bool)
    keep[:, places] = present
    if isinstance(absent, int) and not isinstance(absent, bool):
        checks.number("absent", absent, low=0, high=question.vocabulary - 1, integer=True)
        return question.values(torch.where(keep, ids, torch.full_like(ids, absent)), batch_size)
    checks.number("n_samples", draws, low=1, integer=True)
    sampler = sampler_for(absent, question.face, question.vocabulary)
    keep = keep.repeat_interleave(draws, 0)
    proposals = sampler(ids.expand(len(keep), -1), ~keep, torch.Generator().manual_seed(seed + 1))
    values = question.values(torch.where(keep, ids, proposals), batch_size)
    return values.reshape(-1, draws).mean(1)
