"""Token scores from probabilities alone: leave one out, LIME, KernelSHAP, a Bayesian search, and chance.

A token that is "absent" is replaced: by one given id, or by draws of a sampler, over which the value f = log p(target) is averaged. All rows of
a method are one batch.
"""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.options import kept
from lineament.explain.tokens.prompts import Question
from lineament.explain.tokens.samplers import sampler_for


def random_scores(question: Question, *, seed: int = 0) -> Float[Tensor, "scored"]:
    """Uniform numbers in [0, 1): what any method has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(question.prompt.places), generator=generator, dtype=torch.float64)


def occlusion(
    question: Question, *, absent: Any = "uniform", n_samples: int = 10, batch_size: int | str = "auto", seed: int = 0
) -> Float[Tensor, "scored"]:  # fmt: skip
    """f(x) - f(x without t): leave one token out.

    Args:
        absent: what stands for an absent token: an id, or a sampler as for :func:`lineament.explain.tokens.recursion.reagent`.
        n_samples: draws of the sampler, averaged.
    """
    present = ~torch.eye(len(question.prompt.places), dtype=torch.bool)
    whole = question.values(question.prompt.ids[None], batch_size)
    return whole - subset_values(question, present, absent, n_samples, batch_size, seed)


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
    weights = torch.exp(-((1 - present.double().mean(1).sqrt()) ** 2) / width**2)
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
        return every, (mass / torch.bincount(count)[1:])[count - 1]
    generator = torch.Generator().manual_seed(seed)
    counts = 1 + torch.multinomial(mass, n_samples // 2, replacement=True, generator=generator)
    order = torch.rand(len(counts), scored, generator=generator).argsort(1).argsort(1)
    half = order < counts[:, None]
    return torch.cat([half, ~half]), torch.ones(2 * len(half), dtype=torch.float64)


def bayesian_search(
    question: Question, *, evaluations: int = 96, batch: int = 16, keep: int | float = 0.3, draws: int = 2,
    absent: Any = "uniform", batch_size: int | str = "auto", seed: int = 0,
) -> Float[Tensor, "scored"]:  # fmt: skip
    """How much a set of n tokens gains, on average, when this token is in it; a set is good when it suffices and is needed.

    The value of a set S is log p(target) with S kept and all others replaced, less log p(target) with S replaced and all others kept. A Gaussian
    process (linear and squared-exponential kernel on which tokens are in S, with noise) is fitted to the sets tried so far; the next are, half and
    half, those of maximum expected improvement (Jones et al. 1998) among candidates drawn around the present scores, and random ones. The score of t
    is the mean of μ(S with t) - μ(S without t) over the better half of the sets tried, with μ the posterior mean. ReAGent's official code has such a
    search and never evaluates it; the details here are ours.

    Args:
        evaluations: sets tried, 2 ``draws`` rows of the model each. batch: sets tried between two fits; the first batch is random.
        keep: n, a number of tokens or a share of them (rounded up).

    Raises:
        InputError: a count below its range, or a keep that leaves nothing to replace.
    """
    checks.number("evaluations", evaluations, low=4, integer=True)
    checks.number("batch", batch, low=1, integer=True)
    scored = len(question.prompt.places)
    checks.require(
        not isinstance(keep, int) or keep < scored,
        f"keep: got {keep}, expected fewer than the {scored} scored tokens",
    )
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
        mean, std = map(torch.from_numpy, process.predict(candidates.double().numpy(), return_std=True))
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
    u = torch.rand(count, len(scores), generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    top = (scores.double() - torch.log(-torch.log(u))).topk(n, dim=1).indices
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


def subset_values(
    question: Question, present: Bool[Tensor, "subsets scored"], absent: Any, draws: int, batch_size: int | str, seed: int
) -> Float[Tensor, "subsets"]:  # fmt: skip
    """f with only the ``present`` tokens there, the mean over ``draws`` of what stands for the others."""
    ids, places = question.prompt.ids, question.prompt.places
    keep = torch.ones(len(present), len(ids), dtype=torch.bool)
    keep[:, places] = present
    if isinstance(absent, int) and not isinstance(absent, bool):
        checks.number("absent", absent, low=0, high=question.vocabulary - 1, integer=True)
        return question.values(torch.where(keep, ids, absent), batch_size)
    checks.number("n_samples", draws, low=1, integer=True)
    sampler = sampler_for(absent, question.face, question.vocabulary)
    keep = keep.repeat_interleave(draws, 0)
    proposals = sampler(ids.expand(len(keep), -1), ~keep, torch.Generator().manual_seed(seed + 1))
    return question.values(torch.where(keep, ids, proposals), batch_size).reshape(-1, draws).mean(1)
