"""Is a token attribution true? Keep each embedding in proportion to its importance, or take it away so, and watch the prediction move.

Soft normalised sufficiency and comprehensiveness: Zhao, Aletras 2023, as Zhao, Shan 2024 (arXiv 2402.00794) use them on the next-token
distribution. Not obvious: both reward peaked scores. Softmaxed attention over 40 tokens keeps next to nothing and loses next to nothing, whatever
it points at. So :mod:`lineament.explain.tokens.controls` brings methods to one sharpness first, and a fair table shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable, axes, plain
from lineament.explain.tokens.gradients import through_embeddings
from lineament.explain.tokens.next_token import NextToken, not_nan
from lineament.explain.tokens.prompts import Prompt, Reading, read, token_id

DISTANCES = ("hellinger", "squared_official", "kl", "probability")


@dataclass(frozen=True)
class SoftFaithfulness(Readable):
    """Soft-NS and Soft-NC of one attribution or of several (one entry each), with the standard errors of their draws.

    Attributes:
        sufficiency, comprehensiveness: Soft-NS and Soft-NC, means over the draws.
        sufficiency_error, comprehensiveness_error: standard errors; NaN for a single draw.
        raw_sufficiency, raw_comprehensiveness, zero_sufficiency: S, C and S0 before normalisation.
        distance, n_samples: what they were measured with.
    """

    sufficiency: Float[Tensor, "*methods"]
    comprehensiveness: Float[Tensor, "*methods"]
    sufficiency_error: Float[Tensor, "*methods"]
    comprehensiveness_error: Float[Tensor, "*methods"]
    raw_sufficiency: Float[Tensor, "*methods"]
    raw_comprehensiveness: Float[Tensor, "*methods"]
    zero_sufficiency: float
    distance: str
    n_samples: int

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

    def plot(self, ax: Any = None) -> Any:
        """Bars of both, with their standard errors."""
        ax = axes(ax)
        places = torch.arange(self.sufficiency.numel(), dtype=torch.float64)
        for shift, name in ((-0.2, "sufficiency"), (0.2, "comprehensiveness")):
            heights = getattr(self, name).flatten().tolist()
            errors = getattr(self, f"{name}_error").flatten().nan_to_num().tolist()
            ax.bar((places + shift).tolist(), heights, 0.4, yerr=errors, label=f"soft normalised {name}")
        ax.legend()
        return ax


def distance_between(
    p: Float[Tensor, "*batch vocabulary"],
    q: Float[Tensor, "*rows vocabulary"],
    how: str = "hellinger",
    target: int | None = None,
) -> Float[Tensor, "*rows"]:
    """How far a next-token distribution q has moved from p.

    ``"hellinger"``: √Σ(√p-√q)² / √2, in [0, 1]. ``"squared_official"``: Σ(√p-√q)² / √2, what the paper's code computes. ``"kl"``:
    Σ p log(p/q). ``"probability"``: max(0, p(y) - q(y)) of the target.

    >>> distance_between(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item()
    1.0
    """
    checks.one_of("distance", how, DISTANCES)
    if how == "probability":
        checks.require(target is not None, "distance: 'probability' needs a target")
        return (p[..., target] - q[..., target]).clamp_min(0)
    if how == "kl":
        return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1).clamp_min(0)
    squared = (p.sqrt() - q.sqrt()).square().sum(-1)
    return squared / 2**0.5 if how == "squared_official" else (squared / 2).sqrt()


def soft_faithfulness(
    model: Any,
    prompt: Any,
    scores: Float[Tensor, "*methods tokens"],
    *,
    target: Any = None,
    tokenizer: Any = None,
    distance: str = "hellinger",
    n_samples: int = 32,
    clip: bool = False,
    seed: int = 0,
    uniforms: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 64,
    reading: Reading | None = None,
) -> SoftFaithfulness:
    """Soft normalised sufficiency and comprehensiveness of importance scores.

    Each entry of the word embedding e_t is kept with probability a_t (sufficiency) or 1 - a_t (comprehensiveness); with D the distance
    of the next-token distribution from the unperturbed one and D0 that of all-zero embeddings,
    Soft-NS = max(0, D0 - D) / D0 and Soft-NC = D / D0. Special tokens are never masked.

    Args:
        model: with weights; a causal or encoder-decoder model.
        scores: importances in [0, 1], of one method (tokens,) or of several (methods, tokens); of a batch of methods the draws are shared.
        target: only for ``distance="probability"`` (``None``: the most probable).
        distance: see :func:`distance_between`.
        n_samples: draws; one draw is very noisy.
        clip: cut both to [0, 1], as the classification code of 2023 does (Soft-NC can exceed 1).
        uniforms: the draws written down, two tensors (samples, tokens, width) in [0, 1): a part is kept where they are below its chance.
        batch_size: rows a forward.
        reading: how the prompt was read when it was attributed.

    Raises:
        InputError: scores outside [0, 1] or of another length, a model without weights, an input that zeroing does not change.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    >>> everything = soft_faithfulness(net, [1, 2, 3, 4], torch.ones(4))
    >>> round(float(everything.sufficiency), 3), round(float(everything.comprehensiveness), 3)  # all is kept, and all is taken away
    (1.0, 1.0)
    """
    checks.number("n_samples", n_samples, low=1, integer=True)
    checks.number("batch_size", batch_size, low=1, integer=True)
    face, p, a = _opened(model, tokenizer, prompt, scores, distance, reading)
    shape, a = a.shape[:-1], a.reshape(-1, a.shape[-1])
    with face.ready():
        judge = _Judge(face, p, target, distance, batch_size)
        if uniforms is None:
            generator = torch.Generator().manual_seed(seed)
            size = (n_samples, len(p.ids), judge.width)
            draws = [torch.rand(size, generator=generator, dtype=judge.dtype) for _ in range(2)]
        else:
            draws = [checks.tensor("uniforms", u, shape=(None, len(p.ids), judge.width)) for u in uniforms]
            n_samples = len(draws[0])
        a = a.to(draws[0])
        kept, removed = (
            torch.stack([judge(u < q[:, None]) for q in chances]) for u, chances in zip(draws, (a, 1 - a))
        )
    sufficient, comprehensive = judge.normalised(kept, removed, clip)

    def error(values: Tensor) -> Tensor:
        # NaN for a single draw.
        return (values.std(1) if n_samples > 1 else values[:, 0] * torch.nan).reshape(shape) / n_samples**0.5

    return SoftFaithfulness(
        sufficient.mean(1).reshape(shape), comprehensive.mean(1).reshape(shape), error(sufficient), error(comprehensive),
        1 - kept.mean(1).reshape(shape), removed.mean(1).reshape(shape), 1 - float(judge.zero), distance, n_samples,
    )  # fmt: skip


def exact_soft_faithfulness(
    model: Any, prompt: Any, scores: Float[Tensor, "tokens"], *, target: Any = None, tokenizer: Any = None,
    distance: str = "hellinger", reading: Reading | None = None,
) -> dict[str, float]:  # fmt: skip
    """The expectation over all 2^(tokens · width) masks, for models tiny enough: what :func:`soft_faithfulness` estimates.

    Returns:
        ``sufficiency``, ``comprehensiveness`` (expected Soft-NS and Soft-NC), ``raw_sufficiency``, ``raw_comprehensiveness``, ``zero_sufficiency``.

    Raises:
        InputError: more than 2^16 masks.
    """
    face, p, a = _opened(model, tokenizer, prompt, scores, distance, reading)
    with face.ready():
        judge = _Judge(face, p, target, distance, 4096)
        bits = len(p.ids) * judge.width
        checks.require(
            bits <= 16, f"prompt: it has {bits} embedding entries, expected at most 16 to enumerate all masks"
        )
        masks = (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1).bool()
        masks = masks.reshape(-1, len(p.ids), judge.width)
        moved = judge(masks)
    sufficient, comprehensive = judge.normalised(moved, moved, False)

    def expected(keep: Tensor, values: Tensor) -> float:
        keep = keep.to(moved.dtype)[:, None]
        return float((torch.where(masks, keep, 1 - keep).flatten(1).prod(1) * values).sum())

    return {
        "sufficiency": expected(a, sufficient),
        "comprehensiveness": expected(1 - a, comprehensive),
        "raw_sufficiency": expected(a, 1 - moved),
        "raw_comprehensiveness": expected(1 - a, moved),
        "zero_sufficiency": 1 - float(judge.zero),
    }


def hard_faithfulness(
    model: Any,
    prompt: Any,
    scores: Float[Tensor, "*methods tokens"],
    *,
    target: Any = None,
    tokenizer: Any = None,
    ratios: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    distance: str = "hellinger",
    clip: bool = False,
    batch_size: int = 64,
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Normalised sufficiency and comprehensiveness with whole tokens: the top int(ratio · tokens) kept, or removed.

    Args:
        ratios: shares of the scored tokens. clip: cut both to [0, 1], as for :func:`soft_faithfulness`.

    Returns:
        ``ratios``, ``sufficiency`` and ``comprehensiveness`` (..., ratios), and ``aopc_sufficiency`` and ``aopc_comprehensiveness``, their means
        over the ratios (the area over the perturbation curve); before normalisation ``raw_sufficiency`` (1 - D), ``raw_comprehensiveness`` (D)
        and ``zero_sufficiency``.

    Raises:
        InputError: a ratio outside (0, 1), scores of another length; as :func:`soft_faithfulness`, but scores of any range.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    >>> found = hard_faithfulness(net, [1, 2, 3, 4], torch.tensor([0.1, 0.2, 0.3, 0.4]), ratios=(0.5,))
    >>> sorted(found)[:2], found["sufficiency"].shape
    (['aopc_comprehensiveness', 'aopc_sufficiency'], torch.Size([1]))
    """
    ratios = checks.listed("ratios", ratios, "shares in (0, 1), such as [0.2, 0.5]")
    for ratio in ratios:
        checks.number("ratios", ratio, low=0, high=1, open_low=True, open_high=True)
    face, p, a = _opened(model, tokenizer, prompt, scores, distance, reading, bounded=False)
    places = p.places
    ranks = a[..., places].argsort(dim=-1, descending=True, stable=True).argsort(-1)
    # int() cuts off, as the official code does; the small shift is for 0.3 * 10 = 3.
    counts = [int(ratio * len(places) + 1e-9) for ratio in ratios]
    top = torch.stack([ranks < n for n in counts], -2)
    rows = torch.zeros(*top.shape[:-1], len(p.ids), dtype=torch.bool)
    rows[..., places] = top
    with face.ready():
        judge = _Judge(face, p, target, distance, batch_size)
        flat = rows.reshape(-1, len(p.ids), 1)
        moved = [judge(m.expand(-1, -1, judge.width)).reshape(rows.shape[:-1]) for m in (flat, ~flat)]
    sufficient, comprehensive = judge.normalised(moved[0], moved[1], clip)
    return {
        "ratios": list(ratios),
        "sufficiency": sufficient,
        "comprehensiveness": comprehensive,
        "aopc_sufficiency": sufficient.mean(-1),
        "aopc_comprehensiveness": comprehensive.mean(-1),
        "raw_sufficiency": 1 - moved[0],
        "raw_comprehensiveness": moved[1],
        "zero_sufficiency": 1 - float(judge.zero),
    }


class _Judge:
    """How far the next-token distribution moves when entries of the embeddings are zeroed."""

    def __init__(self, face: NextToken, p: Prompt, target: Any, distance: str, batch_size: int):
        self.face, self.p, self.distance, self.batch_size = face, p, distance, batch_size
        self.fixed = ~p.scored.to(face.device)[:, None]
        seen: list[Tensor] = []
        first = self._scores(1, lambda e, columns: (seen.append(e), e)[1])
        self.width = seen[0].shape[-1]
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.original = first.softmax(1)[0]
        self.target = int(first.argmax())
        if distance == "probability" and target is not None:
            self.target = token_id(face, "target", target, first.shape[1], p)
        self.zero = self(torch.zeros(1, len(p.ids), self.width, dtype=torch.bool))[0]
        checks.require(
            float(self.zero) > 1e-9,
            "prompt: with all embeddings zero the model predicts the same, so that there is nothing to normalise by",
        )

    def __call__(self, keep: Bool[Tensor, "rows tokens width"]) -> Float[Tensor, "rows"]:
        found = []
        for part in keep.split(self.batch_size):
            part = part.to(self.face.device) | self.fixed
            scores = self._scores(len(part), lambda e, columns, part=part: e * part[:, columns])
            found.append(distance_between(self.original, scores.softmax(1), self.distance, self.target).cpu())
        return torch.cat(found)

    def normalised(self, kept: Tensor, removed: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
        sufficient, comprehensive = (self.zero - kept).clamp_min(0) / self.zero, removed / self.zero
        return sufficient, comprehensive.clamp_max(1) if clip else comprehensive

    def _scores(self, count: int, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
        rows = self.p.ids.to(self.face.device).expand(count, -1)
        return not_nan(through_embeddings(self.face, rows, self.p.source, change)[0])


def _opened(
    model: Any, tokenizer: Any, prompt: Any, scores: Any, distance: str, reading: Reading | None, bounded: bool = True
) -> tuple[NextToken, Prompt, Tensor]:  # fmt: skip
    checks.one_of("distance", distance, DISTANCES)
    checks.tensor("scores", scores, floating=True)
    face = NextToken.of(model, tokenizer)
    face.needs_weights("the word embeddings")
    p = read(face, prompt, reading)
    checks.require(
        scores.ndim in (1, 2) and scores.shape[-1] == len(p.ids),
        f"scores: got {checks.show(scores)} for a prompt of {len(p.ids)} tokens, expected one score a token",
    )
    low, high = float(scores.min()), float(scores.max())
    checks.require(
        not bounded or (low >= 0 and high <= 1 + 1e-9),
        f"scores: they reach from {low:.4g} to {high:.4g}, expected importances in [0, 1]; bring them there with "
        "normalized(scores, 'softmax'), 'abs-sum' or 'minmax'",
    )
    return face, p, scores.detach().cpu()
