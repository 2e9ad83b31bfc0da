"""Is the attribution of a whole continuation true? Soft sufficiency and comprehensiveness of every explained token, beside chance.

The sequence protocol of Zhao, Shan 2024 (arXiv 2402.00794): scores are averaged over the targets of a continuation, then over prompts, and
only then comes the logarithm of their ratio to random importances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.controls import random_importance
from lineament.explain.tokens.faithfulness import SoftFaithfulness, soft_faithfulness
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.results import ContinuationAttribution, TokenAttribution, normalized


@dataclass(frozen=True)
class SequenceFaithfulness:
    """Soft-NS and Soft-NC of several continuations' attributions, one entry a continuation: means over its targets, ours and chance's.

    Attributes:
        sufficiency, comprehensiveness: of the attributions; ``random_*`` of random importances on the same targets.
        targets: for each continuation what each of its explained tokens gave; the last entry of each is the mean over random importances.
    """

    sufficiency: Float[Tensor, "continuations"]
    comprehensiveness: Float[Tensor, "continuations"]
    random_sufficiency: Float[Tensor, "continuations"]
    random_comprehensiveness: Float[Tensor, "continuations"]
    targets: Sequence[Sequence[SoftFaithfulness]] = field(default=(), repr=False)

    @property
    def log_sufficiency(self) -> float:
        """log(mean Soft-NS / mean Soft-NS of random importances): the paper's unit."""
        return _log_ratio(self.sufficiency, self.random_sufficiency)

    @property
    def log_comprehensiveness(self) -> float:
        """log(mean Soft-NC / mean Soft-NC of random importances)."""
        return _log_ratio(self.comprehensiveness, self.random_comprehensiveness)

    def to_dict(self) -> dict[str, Any]:
        names = ("sufficiency", "comprehensiveness", "random_sufficiency", "random_comprehensiveness")
        found: dict[str, Any] = {name: getattr(self, name).tolist() for name in names}
        return {
            **found,
            "log_sufficiency": self.log_sufficiency,
            "log_comprehensiveness": self.log_comprehensiveness,
            "targets": [[each.to_dict() for each in part] for part in self.targets],
        }

    def plot(self, ax: Any = None) -> Any:
        """Both scores of every target of the first continuation, and of random importances."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        for color, name in (("C0", "sufficiency"), ("C1", "comprehensiveness")):
            values = torch.stack([getattr(each, name) for each in self.targets[0]])
            ax.plot(values[:, 0].tolist(), color=color, marker="o", label=f"soft normalised {name}")
            ax.plot(
                values[:, 1:].mean(1).tolist(),
                color=color,
                linestyle="--",
                label=f"{name}, random importances",
            )
        ax.set(xlabel="explained token of the continuation", ylabel="score")
        ax.legend()
        return ax


def sequence_faithfulness(
    model: Any,
    tokenizer: Any,
    found: ContinuationAttribution | Sequence[ContinuationAttribution],
    *,
    normalize: str = "none",
    random_draws: int = 4,
    distance: str = "hellinger",
    n_samples: int = 32,
    seed: int = 0,
    batch_size: int = 64,
) -> SequenceFaithfulness:
    """Judge what :func:`lineament.explain.tokens.explain_continuation` found, for one continuation or several.

    Args:
        found: attributions with scores in [0, 1], or of any range with ``normalize``.
        normalize: brings scores of the scored tokens to [0, 1]: ``"softmax"``, ``"abs-sum"``, ``"minmax"``.
        random_draws: random importances on each target, averaged.
        distance, n_samples, batch_size: of :func:`lineament.explain.tokens.faithfulness.soft_faithfulness`.
        seed: of the draws and of the random importances; target i of all takes seed + i, so that methods are compared on the same draws.

    Raises:
        InputError: as :func:`~lineament.explain.tokens.faithfulness.soft_faithfulness`; no continuation.
    """
    several = (
        [found]
        if isinstance(found, ContinuationAttribution)
        else checks.listed("found", found, "continuations")
    )
    for each in several:
        checks.require(
            isinstance(each, ContinuationAttribution),
            f"found: got {checks.show(each)}, expected what explain_continuation returns",
        )
    checks.number("random_draws", random_draws, low=1, integer=True)
    checks.number("seed", seed, integer=True)
    face = model if isinstance(model, NextToken) else NextToken(model, tokenizer)
    options = {"distance": distance, "n_samples": n_samples, "batch_size": batch_size}
    parts: list[list[SoftFaithfulness]] = []
    number = seed
    for each in several:
        parts.append([])
        for a in each.steps:
            parts[-1].append(_judged(face, tokenizer, a, normalize, random_draws, number, options))
            number += 1
    means = [
        torch.stack([torch.stack([getattr(t, name)[rows].mean() for t in part]).mean() for part in parts])
        for name in ("sufficiency", "comprehensiveness")
        for rows in (slice(0, 1), slice(1, None))
    ]
    return SequenceFaithfulness(means[0], means[2], means[1], means[3], parts)


def _judged(
    face: NextToken,
    tokenizer: Any,
    a: TokenAttribution,
    normalize: str,
    draws: int,
    seed: int,
    options: dict[str, Any],
) -> SoftFaithfulness:
    scores = torch.zeros(len(a.scores), dtype=torch.float64)
    scores[a.scored] = normalized(a.scores[a.scored].double(), normalize)
    every = torch.cat([scores[None], random_importance(a.scored, seed=seed, draws=draws)])
    reading: dict[str, Any] = {}
    ids = a.ids
    if a.source:
        # Behind the source come the decoder's start token and what was generated before.
        ids = a.ids[: a.source]
        reading["target_prefix"] = a.ids[a.source + 1 :].tolist()
        reading["scope"] = "all" if bool(a.scored[a.source :].any()) else "source"
    return soft_faithfulness(face, tokenizer, ids, every, a.target, seed=seed, **options, **reading)


def _log_ratio(ours: Tensor, chance: Tensor) -> float:
    a, b = float(ours.mean()), float(chance.mean())
    return math.log(a / b) if a > 0 and b > 0 else math.nan
