"""What a patch is judged by: functions from logits to one number for each example, and tokens for their answers.

A metric takes logits (batch, positions, vocabulary), in which position -1 is each prompt's last token, and returns (batch,). Any function will
do; those made here say by ``last_only`` that they need no other position, so that the model computes no other logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import InputError, require, show
from lineament.core.text_parts import one_token

Metric = Callable[[Tensor], Tensor]


def logit_difference(
    correct: Int[Tensor, "batch"] | Int[Tensor, "batch right"] | Sequence[int],
    wrong: Int[Tensor, "batch"] | Int[Tensor, "batch others"] | Sequence[int],
) -> Metric:
    """Logit of the correct answer minus that of the wrong one at the last position; means where there are several answers.

    Args:
        correct, wrong: a token for each example, or several, (batch, answers).

    Raises:
        InputError: answers of different batches; when called, a token outside the vocabulary or logits of another batch.

    >>> logit_difference([0], [2])(torch.tensor([[[3.0, 0.0, 1.0]]])).tolist()
    [2.0]
    """
    right, other = _tokens("correct", correct), _tokens("wrong", wrong)
    require(
        len(right) == len(other),
        f"wrong: got answers for {len(other)} examples, expected {len(right)} as in correct",
    )

    def metric(logits: Tensor) -> Tensor:
        last = _last(logits, right, other)
        return last.gather(1, right.to(last.device)).mean(1) - last.gather(1, other.to(last.device)).mean(1)

    return _last_only(metric)


def probability(
    answers: Int[Tensor, "batch"] | Int[Tensor, "batch answers"] | Sequence[int], *, log: bool = False
) -> Metric:
    """Probability (or its logarithm) of the answer at the last position, summed over the answers where there are several.

    >>> probability([1])(torch.zeros(1, 1, 4)).tolist()
    [0.25]
    """
    tokens = _tokens("answers", answers)

    def metric(logits: Tensor) -> Tensor:
        last = _last(logits, tokens)
        total = torch.logsumexp(last.log_softmax(-1).gather(1, tokens.to(last.device)), 1)
        return total if log else total.exp()

    return _last_only(metric)


def probability_difference(
    right: Int[Tensor, "batch vocabulary"], *, wrong: Int[Tensor, "batch vocabulary"] | None = None
) -> Metric:
    """Probability of all right answers minus that of all wrong ones at the last position, as in the greater-than task.

    Args:
        right, wrong: truth values over the vocabulary for each example; ``wrong`` is everything else where it is not given.

    >>> probability_difference(torch.tensor([[True, False, False, False]]))(torch.zeros(1, 1, 4)).tolist()
    [-0.5]
    """
    sign = right.double() - ((~right.bool()) if wrong is None else wrong).double()

    def metric(logits: Tensor) -> Tensor:
        last = _last(logits)
        require(
            last.shape == sign.shape,
            f"right: got {show(right)}, expected (batch, vocabulary) = {tuple(last.shape)} as in the logits",
        )
        return (last.softmax(-1) * sign.to(last)).sum(-1)

    return _last_only(metric)


def kl_divergence(reference: Float[Tensor, "batch vocabulary"]) -> Metric:
    """Kullback-Leibler divergence of the last position's prediction from a reference prediction, in nats.

    Σ p log(p/q) with p the softmax of ``reference`` (logits at the last position, usually of the clean run).

    >>> kl_divergence(torch.zeros(1, 3))(torch.zeros(1, 2, 3)).tolist()
    [0.0]
    """
    target = checks.tensor("reference", reference, shape=("batch", "vocabulary"), floating=True).detach()

    def metric(logits: Tensor) -> Tensor:
        last = _last(logits)
        require(
            last.shape == target.shape,
            f"reference: got {show(target)}, expected logits of shape {tuple(last.shape)}",
        )
        log_p = target.to(last).log_softmax(-1)
        return F.kl_div(last.log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)

    return _last_only(metric)


def single_tokens(tokenizer: Any, words: Sequence[str], *, after: str = "\n") -> Int[Tensor, "words"]:
    """The token of each word (with its leading space, where the vocabulary has one) as it is read behind a prompt.

    Args:
        after: the prompt; it matters only where the tokens of a word depend on what is before it.

    Raises:
        InputError: a word that is not one token; the message shows its pieces.

    >>> class Words:  # a tokenizer with three words
    ...     vocabulary = {"is": 0, "are": 1, "was": 2}
    ...     def __call__(self, text, **_): return {"input_ids": [self.vocabulary[word] for word in text.split()]}
    ...     def decode(self, ids): return " ".join(list(self.vocabulary)[i] for i in ids)
    >>> single_tokens(Words(), ["are", "is"]).tolist()
    [1, 0]
    """
    tokens = []
    for word in words:
        ids = one_token(tokenizer, after, word)
        if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise InputError(
                f"answers: {word!r} is {len(ids)} tokens {pieces}, expected one; choose a word that the vocabulary has whole "
                "(many vocabularies want its leading space)"
            )
        tokens.append(ids[0])
    return torch.tensor(tokens)


def _tokens(name: str, values: Any) -> Tensor:
    tokens = values if isinstance(values, Tensor) else torch.tensor(values)
    require(
        tokens.ndim in (1, 2) and tokens.numel() > 0 and not tokens.is_floating_point(),
        f"{name}: got {show(tokens)}, expected token numbers of shape (batch,) or (batch, answers)",
    )
    return tokens.long().reshape(len(tokens), -1)


def _last(logits: Tensor, *answers: Tensor) -> Tensor:
    last = logits[:, -1] if logits.ndim == 3 else logits
    last = last if last.dtype == torch.float64 else last.float()
    require(
        not bool(last.isnan().any()),
        "metric: the logits hold NaN; are the weights finite? In float64 eager attention gives NaN where padding comes before the text: pad on the right, or "
        "load with attn_implementation='sdpa'",
    )
    for tokens in answers:
        require(
            len(tokens) == len(last),
            f"metric: got answers for {len(tokens)} examples and logits for {len(last)}",
        )
        high = int(tokens.max())
        require(
            high < last.shape[-1] and int(tokens.min()) >= 0,
            f"metric: token {high if high >= last.shape[-1] else int(tokens.min())} is outside the vocabulary of {last.shape[-1]}",
        )
    return last


def _last_only(metric: Any) -> Metric:
    metric.last_only = True
    return metric
