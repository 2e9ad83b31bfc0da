"""A whole continuation explained, every generated token a question of its own, and judged target by target beside chance.

The sequence protocol of Zhao, Shan 2024 (arXiv 2402.00794): scores are averaged over the targets of a continuation, then over prompts, and
only then comes the logarithm of their ratio to random importances.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable, axes, plain
from lineament.core.text_parts import tail_tokens
from lineament.explain.tokens.controls import random_importance
from lineament.explain.tokens.faithfulness import SoftFaithfulness, soft_faithfulness
from lineament.explain.tokens.methods import attribute_tokens
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.prompts import Prompt, Reading, read, refuse_unknown_ids, shown, text_before
from lineament.explain.tokens.results import ContinuationAttribution, TokenAttribution, normalized


def explain_continuation(
    model: Any,
    prompt: Any,
    continuation: Any = None,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 10,
    stride: int = 1,
    reading: Reading | None = None,
    **options: Any,
) -> ContinuationAttribution:
    """Attribute every token of a continuation: to the prompt, and to what was generated before it.

    The continuation is generated once (greedily), and all its tokens are explained together, as so many prompts.

    Args:
        continuation: text or ids; ``None`` generates at most ``max_new_tokens`` tokens and stops at the end token.
        stride: explain every stride-th token only (the paper's sequence experiments: 2).
        reading: of an encoder-decoder what was generated is scored with ``scope="all"``.
        options: of :func:`~lineament.explain.tokens.methods.attribute_tokens`: ``method`` and the method's own.

    >>> def next_number(ids):
    ...     return torch.nn.functional.one_hot((ids[:, -1] + 1) % 10, 10) * 0.9 + 0.01
    >>> found = explain_continuation(next_number, [3, 4, 5], max_new_tokens=2, steps=30)
    >>> found.continuation, found.matrix.argmax(1).tolist()
    ((6, 7), [2, 3])
    """
    checks.number("stride", stride, low=1, integer=True)
    checks.number("max_new_tokens", max_new_tokens, low=1, integer=True)
    face = NextToken(model, tokenizer)
    checks.require(
        not face.classifier,
        f"model: {type(face.model).__name__} is a classifier, which continues no text; explain its class with attribute_tokens",
    )
    context = read(face, prompt)
    if continuation is None:
        made = _greedy(face, context, max_new_tokens)
    elif isinstance(continuation, str):
        checks.require(tokenizer is not None, "continuation: got text and no tokenizer; give ids")
        made = tail_tokens(tokenizer, text_before(face, context), continuation)
    else:
        made = [int(i) for i in continuation]
    ended = "the model ended at once" if continuation is None else f"got {checks.show(continuation)}"
    checks.require(len(made) > 0, f"continuation: no tokens to explain ({ended}), expected at least one")
    refuse_unknown_ids(face, "continuation", made)
    # The last token is asked about and never an input.
    most, before = face.most_tokens, len(context.ids) - context.source
    checks.require(
        most is None or before + len(made) - 1 <= most,
        f"continuation: with its {len(made)} tokens and the {before} before it the model would read {before + len(made) - 1}, and it takes at most {most}; "
        "shorten one of them",
    )
    positions = list(range(0, len(made), stride))
    if face.encoder_decoder:
        prompts: Any = [context.ids[: context.source]] * len(positions)
        reading = replace(reading or Reading(), target_prefix=[made[:i] for i in positions])
    else:
        prompts = [torch.cat([context.ids, torch.tensor(made[:i], dtype=torch.long)]) for i in positions]
    steps = attribute_tokens(
        model, prompts, target=[made[i] for i in positions], tokenizer=tokenizer, reading=reading, **options
    )
    width = max(len(a.tokens) for a in steps)
    matrix = torch.zeros(len(steps), width, dtype=steps[0].scores.dtype)
    for row, a in zip(matrix, steps):
        row[: len(a.scores)] = a.scores
    ids = torch.cat([context.ids, torch.tensor(made, dtype=torch.long)])[:width]
    return ContinuationAttribution(
        tuple(shown(tokenizer, ids)), matrix, tuple(positions), tuple(made), tuple(shown(tokenizer, made)), tuple(steps)
    )  # fmt: skip


def _greedy(face: NextToken, context: Prompt, most: int) -> list[int]:
    """The most probable continuation, up to an end token."""
    ends = getattr(face.config, "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    limit = face.most_tokens
    made: list[int] = []
    with face.ready():
        while len(made) < most:
            row = torch.cat([context.ids, torch.tensor(made, dtype=torch.long)])[None]
            if limit is not None and row.shape[1] - context.source >= limit:
                break
            token = int(face.logits([row], [context.source]).argmax())
            if token in ends:
                break
            made.append(token)
    return made


@dataclass(frozen=True)
class SequenceFaithfulness(Readable):
    """Soft-NS and Soft-NC of several continuations' attributions, one entry a continuation: means over its targets, ours and chance's.

    Attributes:
        sufficiency, comprehensiveness: of the attributions; ``random_*`` of random importances on the same targets.
        targets: for each continuation what each of its explained tokens gave; all entries but the first are random importances.
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
        logs = {name: getattr(self, name) for name in ("log_sufficiency", "log_comprehensiveness")}
        return {**plain(self), **logs}

    def plot(self, ax: Any = None) -> Any:
        """Both scores of every target of the first continuation, and of random importances."""
        ax = axes(ax)
        for color, name in (("C0", "sufficiency"), ("C1", "comprehensiveness")):
            values = torch.stack([getattr(each, name) for each in self.targets[0]])
            ax.plot(values[:, 0].tolist(), color=color, marker="o", label=f"soft normalised {name}")
            chance = values[:, 1:].mean(1).tolist()
            ax.plot(chance, color=color, linestyle="--", label=f"{name}, random importances")
        ax.set(xlabel="explained token of the continuation", ylabel="score")
        ax.legend()
        return ax


def sequence_faithfulness(
    model: Any,
    found: ContinuationAttribution | Sequence[ContinuationAttribution],
    *,
    tokenizer: Any = None,
    normalize: str = "none",
    random_draws: int = 4,
    distance: str = "hellinger",
    n_samples: int = 32,
    seed: int = 0,
    batch_size: int = 64,
) -> SequenceFaithfulness:
    """Judge what :func:`explain_continuation` found, for one continuation or several.

    Args:
        found: attributions with scores in [0, 1], or of any range with ``normalize``.
        normalize: brings scores of the scored tokens to [0, 1]: ``"softmax"``, ``"abs-sum"``, ``"minmax"``.
        random_draws: random importances on each target, averaged.
        distance, n_samples, batch_size: of :func:`lineament.explain.tokens.faithfulness.soft_faithfulness`.
        seed: of the draws and of the random importances; target i of all takes seed + i, so that methods are compared on the same draws.

    Raises:
        InputError: as :func:`~lineament.explain.tokens.faithfulness.soft_faithfulness`; no continuation.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    >>> found = explain_continuation(net, [1, 2, 3], [4, 5], method="random")
    >>> judged = sequence_faithfulness(net, found, normalize="softmax", n_samples=2)
    >>> judged.sufficiency.shape
    torch.Size([1])
    """
    one = isinstance(found, ContinuationAttribution)
    several = [found] if one else checks.listed("found", found, "continuations")
    for each in several:
        checks.require(
            isinstance(each, ContinuationAttribution),
            f"found: got {checks.show(each)}, expected what explain_continuation returns",
        )
    checks.number("random_draws", random_draws, low=1, integer=True)
    checks.number("seed", seed, integer=True)
    face = NextToken.of(model, tokenizer)
    numbers = itertools.count(seed)

    def judged(a: TokenAttribution) -> SoftFaithfulness:
        number = next(numbers)
        chance = random_importance(a.scored, seed=number, draws=random_draws)
        ids, reading = (a.ids, None) if not a.source else _source_and_prefix(a)
        return soft_faithfulness(
            face, ids, torch.cat([_importance(a, normalize)[None], chance]), target=a.target, distance=distance,
            n_samples=n_samples, seed=number, batch_size=batch_size, reading=reading,
        )  # fmt: skip

    parts = [[judged(a) for a in each.steps] for each in several]

    def mean(name: str, rows: slice) -> Tensor:
        return torch.stack(
            [torch.stack([getattr(t, name)[rows].mean() for t in part]).mean() for part in parts]
        )

    ours, chance = slice(0, 1), slice(1, None)
    return SequenceFaithfulness(
        mean("sufficiency", ours), mean("comprehensiveness", ours), mean("sufficiency", chance),
        mean("comprehensiveness", chance), parts,
    )  # fmt: skip


def _importance(a: TokenAttribution, normalize: str) -> Tensor:
    scores = torch.zeros(len(a.scores), dtype=torch.float64)
    scores[a.scored] = normalized(a.scores[a.scored].double(), normalize)
    return scores


def _source_and_prefix(a: TokenAttribution) -> tuple[Tensor, Reading]:
    """The ids of an encoder-decoder's prompt apart: behind the source come the decoder's start token and what was generated before."""
    scope = "all" if bool(a.scored[a.source :].any()) else "source"
    return a.ids[: a.source], Reading(target_prefix=a.ids[a.source + 1 :].tolist(), scope=scope)


def _log_ratio(ours: Tensor, chance: Tensor) -> float:
    a, b = float(ours.mean()), float(chance.mean())
    return math.log(a / b) if a > 0 and b > 0 else math.nan
