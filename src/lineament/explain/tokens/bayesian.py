"""Which tokens are enough, and needed? Bayesian optimisation in place of ReAGent's recursion: a search for the tokens to keep, and a score from what it learned.

The official code of ReAGent (Zhao, Shan 2024, arXiv 2402.00794) has such a search and never evaluates it; its details here are ours. The scores of all tokens
decide which n are kept, and nothing else counts, so that the Gaussian process is over kept sets. A token's score is its main effect under the posterior mean, around the best sets.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.blackbox import subset_values
from lineament.explain.tokens.question import Question
from lineament.explain.tokens.recursion import kept


def bayesian_search(
    question: Question,
    *,
    evaluations: int = 96,
    batch: int = 16,
    keep: int | float = 0.3,
    draws: int = 2,
    absent: Any = "uniform",
    batch_size: int | str = "auto",
    seed: int = 0,
) -> Float[Tensor, "scored"]:
    """How much a set of n tokens gains, on average, when this token is in it; a set is good when it suffices and is needed.

    The value of a set S is log p(target) with S kept and all others replaced, less log p(target) with S replaced and all others kept. A Gaussian process (linear
    and squared-exponential kernel on which tokens are in S, with noise) is fitted to the sets tried so far; the next are, half and half, those of greatest
    expected improvement among candidates drawn around the present scores, and random ones. The score of t is the mean of μ(S with t) - μ(S without t) over
    the better half of the sets tried, with μ the posterior mean.

    Args:
        evaluations: sets tried, 2 ``draws`` rows of the model each. batch: sets tried between two fits; the first batch is random.
        keep: n, a number of tokens or a share of them (rounded up), as for :func:`lineament.explain.tokens.reagent`.
        absent: what stands for a replaced token: an id, or a sampler.

    Raises:
        InputError: a count below its range, or a keep that leaves nothing to replace.

    Source: Jones et al. 1998 for expected improvement; scikit-learn's GaussianProcessRegressor.
    """
    checks.number("evaluations", evaluations, low=4, integer=True)
    checks.number("batch", batch, low=1, integer=True)
    scored = len(question.prompt.places)
    if isinstance(keep, int):
        checks.number("keep", keep, low=1, high=scored - 1, integer=True)
    else:
        checks.number("keep", keep, low=0, high=1, open_low=True, open_high=True)
    n = min(kept(keep, scored), scored - 1)
    generator = torch.Generator().manual_seed(seed)

    def worth(sets: Tensor, first: int) -> Tensor:
        both = subset_values(question, torch.cat([sets, ~sets]), absent, draws, batch_size, seed + first)
        return both[: len(sets)] - both[len(sets) :]

    flat = torch.zeros(scored, dtype=torch.float64)
    tried = _sets(flat, n, min(batch, evaluations), generator)
    values = worth(tried, 0)
    while len(tried) < evaluations:
        process, scale = _fit(tried, values)
        scores = _main_effects(process, scale, tried)
        candidates = _sets(scores / (float(scores.std()) or 1.0), n, 256, generator)
        mean, std = (
            torch.from_numpy(x) for x in process.predict(candidates.double().numpy(), return_std=True)
        )
        z = (mean - float(((values - values.mean()) / scale).max())) / std.clamp_min(1e-9)
        normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        improvement = std * (z * normal.cdf(z) + normal.log_prob(z).exp())
        count = min(batch, evaluations - len(tried))
        best = candidates[improvement.argsort(descending=True)[: count - count // 2]]
        chosen = torch.cat([best, _sets(flat, n, count // 2, generator)])
        values = torch.cat([values, worth(chosen, len(tried))])
        tried = torch.cat([tried, chosen])
    process, scale = _fit(tried, values)
    best = torch.from_numpy(process.predict(tried.double().numpy())).argsort(descending=True)
    return _main_effects(process, scale, tried[best[: (len(best) + 1) // 2]])


def _sets(scores: Tensor, n: int, count: int, generator: torch.Generator) -> Tensor:
    """Sets of n positions drawn without replacement with log-odds ``scores`` (Gumbel's top n)."""
    noise = -torch.log(
        -torch.log(
            torch.rand(count, len(scores), generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        )
    )
    top = (scores.double() + noise).topk(n, dim=1).indices
    return torch.zeros(count, len(scores), dtype=torch.bool).scatter_(1, top, True)


def _fit(tried: Tensor, values: Tensor) -> tuple[Any, float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

    scale = float(values.std()) or 1.0
    kernel = (
        ConstantKernel(0.1) * DotProduct(1e-3, "fixed") + ConstantKernel(1.0) * RBF(2.0) + WhiteKernel(0.1)
    )
    process = GaussianProcessRegressor(kernel, random_state=0)
    with warnings.catch_warnings():
        # A length or a noise at the edge of its range is an answer too.
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(tried.double().numpy(), ((values - values.mean()) / scale).numpy())
    return process, scale


def _main_effects(process: Any, scale: float, pool: Tensor) -> Float[Tensor, "scored"]:
    """The mean change of the posterior mean when a token comes into the set."""
    count, scored = pool.shape
    on = pool.double().numpy()[:, None].repeat(scored, 1)
    off = on.copy()
    each = np.arange(scored)
    on[:, each, each], off[:, each, each] = 1.0, 0.0
    means = process.predict(np.concatenate([on, off]).reshape(-1, scored)).reshape(2, count, scored)
    return torch.from_numpy(scale * (means[0] - means[1]).mean(0))
