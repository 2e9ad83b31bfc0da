"""What a token attribution is: a score for each token of a prompt, and how it was obtained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable, axes, plain
from lineament.explain.tokens.prompts import Question, answer_text

NORMALIZATIONS = ("none", "softmax", "abs-sum", "minmax")


@dataclass(frozen=True)
class TokenAttribution(Readable):
    """A score for each token of one prompt, for one next token.

    Attributes:
        tokens, ids: the prompt (of an encoder-decoder: source, then target prefix), each token as text and as id.
        scores: larger is more important; 0 where ``scored`` is false (special tokens, and what lies outside the span).
        target, contrast: the token asked about, and the one it is compared with, as ids; ``*_text`` the same as text.
        probability: of the target after the prompt (with a contrast, among the two).
        method: which method, with which normalisation.
        converged: whether a probe passed the stop test; always true for methods without one.
        n_steps: updates made.
        rationale: positions that at least the threshold's number of probes hold among their most important.
        sequences, forwards: rows the model was asked about for this prompt, and forwards they went through in all (shared by
            prompts explained together).
        probes: of ReAGent, the final distribution of each probe over scored positions; ``stopped`` which of them passed.
        history, hits: of ReAGent with ``trace=True``, ``probes`` after each step, and the stop tests made.
    """

    tokens: tuple[str, ...]
    ids: Int[Tensor, "tokens"]
    scores: Float[Tensor, "tokens"]
    scored: Bool[Tensor, "tokens"]
    target: int
    target_text: str
    probability: float
    method: str
    contrast: int | None = None
    contrast_text: str | None = None
    source: int = 0
    converged: bool = True
    n_steps: int = 0
    rationale: tuple[int, ...] = ()
    sequences: int = 0
    forwards: int = 0
    probes: Float[Tensor, "probes scored"] | None = None
    stopped: Bool[Tensor, "probes"] | None = None
    history: Float[Tensor, "steps probes scored"] | None = None
    hits: Bool[Tensor, "steps probes"] | None = None

    @classmethod
    def of(
        cls, question: Question, scores: Float[Tensor, "scored"], method: str, **more: Any
    ) -> TokenAttribution:
        """The answer to a question: its scores, and what the question already says."""
        p, q = question.prompt, question
        texts = [None if token is None else answer_text(q.face, token) for token in (q.target, q.contrast)]
        return cls(
            p.tokens, p.ids, p.spread(scores), p.scored, q.target, texts[0] or "", q.probability, method, q.contrast,
            texts[1], p.source, forwards=q.face.forwards, **more,
        )  # fmt: skip

    def ranking(self) -> list[int]:
        """Scored positions, most important first."""
        places = self.scored.nonzero()[:, 0]
        return places[self.scores[places].argsort(descending=True, stable=True)].tolist()

    def normalized(self, how: str) -> TokenAttribution:
        """The same with its scored tokens' scores on another scale, see :func:`normalized`."""
        if how == "none":
            return self
        scores = self.scores.clone()
        scores[self.scored] = normalized(self.scores[self.scored], how)
        return replace(self, scores=scores, method=f"{self.method}, {how}")

    def to_dict(self) -> dict[str, Any]:
        large = ("probes", "stopped", "history", "hits")
        return {name: plain(value) for name, value in vars(self).items() if name not in large}

    def plot(self, ax: Any = None) -> Any:
        """Bars, one a token; the rationale is marked by colour."""
        ax = axes(ax, figsize=(max(4.0, 0.45 * len(self.tokens)), 3))
        colours = ["C1" if i in self.rationale else "C0" for i in range(len(self.tokens))]
        ax.bar(range(len(self.tokens)), self.scores.tolist(), color=colours)
        names = [t.replace("\n", "\\n") for t in self.tokens]
        ax.set_xticks(range(len(self.tokens)), names, rotation=60, ha="right")
        ax.set(ylabel=f"{self.method} for {self.target_text!r}")
        return ax


@dataclass(frozen=True)
class ContinuationAttribution(Readable):
    """The attribution of every token of a continuation: a matrix, one row a generated token.

    ``matrix[i, t]`` is the importance of token ``t`` (of the prompt, then of the continuation) for the token at position
    ``positions[i]`` of the continuation; 0 where ``t`` came later.
    """

    tokens: tuple[str, ...]
    matrix: Float[Tensor, "targets tokens"]
    positions: tuple[int, ...]
    continuation: tuple[int, ...]
    continuation_text: tuple[str, ...]
    steps: tuple[TokenAttribution, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {**plain({**vars(self), "steps": ()}), "steps": [step.to_dict() for step in self.steps]}

    def plot(self, ax: Any = None) -> Any:
        """A heat map, targets downwards, context to the right."""
        ax = axes(ax, figsize=(max(4.0, 0.4 * len(self.tokens)), 1.5 + 0.3 * len(self.positions)))
        ax.imshow(self.matrix.numpy(), aspect="auto")
        ax.set_xticks(range(len(self.tokens)), self.tokens, rotation=60, ha="right")
        ax.set_yticks(range(len(self.positions)), [step.target_text for step in self.steps])
        return ax


def normalized(scores: Float[Tensor, "*batch tokens"], how: str) -> Float[Tensor, "*batch tokens"]:
    """Scores brought to one scale: ``"softmax"``, ``"abs-sum"`` (|s| over its sum), ``"minmax"`` (to [0, 1]) or ``"none"``.

    Raises:
        InputError: an unknown way.

    >>> normalized(torch.tensor([1.0, -3.0]), "abs-sum").tolist()
    [0.25, 0.75]
    """
    checks.one_of("normalize", how, NORMALIZATIONS)
    if how == "softmax":
        return scores.softmax(-1)
    if how == "abs-sum":
        sizes = scores.abs()
        return sizes / sizes.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if how == "minmax":
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)
    return scores


def entropy(importance: Float[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch"]:
    """-Σ a log a in nats; the largest possible is log of the number of tokens.

    >>> round(float(entropy(torch.full((4,), 0.25))), 4)  # log 4
    1.3863
    """
    return -torch.special.xlogy(importance, importance).sum(-1)
