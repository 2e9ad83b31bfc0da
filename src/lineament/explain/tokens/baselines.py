"""ReAGent's rivals on the same interface: gradients, attention, perturbation and chance, each a score a token.

The seven of the paper (arXiv 2402.00794) are input x gradient, integrated gradients, gradient SHAP, attention of the last layer, of all layers,
rollout, and the gradient's norm; occlusion, LIME, KernelSHAP, value zeroing and random stand beside them. Scores are raw; ``normalize``
says how they become an importance, because the published comparison hangs on that (see :mod:`lineament.explain.tokens.faithfulness`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.core.models import dtype_of
from lineament.explain.tokens.attention import (
    attention_all,
    attention_last,
    of_attention,
    rollout,
    value_zeroing,
)
from lineament.explain.tokens.attribution import reagent
from lineament.explain.tokens.bayesian import bayesian_search
from lineament.explain.tokens.blackbox import kernel_shap, lime, occlusion, random_scores
from lineament.explain.tokens.embeddings import position_embeddings, through_embeddings
from lineament.explain.tokens.prompts import is_batch, paired, per_prompt, shown
from lineament.explain.tokens.question import Question, ask
from lineament.explain.tokens.results import NORMALIZATIONS, TokenAttribution, normalized


def attribute_tokens(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    target: Any = None,
    *,
    method: str = "reagent",
    normalize: str = "none",
    contrast: Any = None,
    target_prefix: Any = None,
    scope: str = "source",
    span: tuple[int, int] | None = None,
    protect: Any = (),
    **options: Any,
) -> Any:
    """A score for each token of the prompt, by any method.

    Args:
        model, tokenizer, prompt, target, contrast, target_prefix, scope, span, protect: as for :func:`lineament.explain.tokens.attribution.reagent`.
        method: ``"reagent"``; with gradients ``"grad_norm"``, ``"input_x_grad"``, ``"integrated_gradients"``, ``"gradient_shap"``; with attention
            ``"attention_last"``, ``"attention_all"``, ``"rollout"``, ``"value_zeroing"``; from probabilities ``"occlusion"``, ``"lime"``,
            ``"kernel_shap"``, ``"bayesian"`` (a search for the tokens to keep); ``"random"``.
        normalize: over scored tokens: ``"none"`` (the raw score), ``"softmax"``, ``"abs-sum"`` or ``"minmax"``.
        options: of the method, see its function.

    Returns:
        A :class:`~lineament.explain.tokens.results.TokenAttribution`, or a list of them for a list of prompts.

    Raises:
        InputError: an unknown method, an option it does not have, a model that does not show what it needs.

    >>> def parrot(ids):  # says the token at position 1 again
    ...     return torch.nn.functional.one_hot(ids[:, 1], 10) * 0.9 + 0.01
    >>> attribute_tokens(parrot, None, [3, 7, 5, 1], method="kernel_shap").ranking()[0]
    1
    """
    checks.one_of("method", method, METHODS)
    checks.one_of("normalize", normalize, NORMALIZATIONS)
    reading = {"target_prefix": target_prefix, "scope": scope, "span": span, "protect": protect}
    if method == "reagent":
        found = reagent(model, tokenizer, prompt, target, contrast=contrast, **reading, **options)
        return (
            [_renormalized(a, normalize) for a in found]
            if isinstance(found, list)
            else _renormalized(found, normalize)
        )
    several = is_batch(prompt)
    prompts, prefixes = paired(prompt if several else [prompt], target_prefix, several)
    del reading["target_prefix"]
    questions = ask(
        model, tokenizer, prompts, per_prompt("target", target, len(prompts)), per_prompt("contrast", contrast, len(prompts)), prefixes, **reading
    )  # fmt: skip
    try:
        with questions[0].face.ready(gradients=True):
            # Methods of one forward share it; the others fill batches with one prompt.
            if method in _OF_GRADIENTS:
                if method == "grad_norm":
                    checks.require(
                        "positions" not in options, "options: 'grad_norm' has no option 'positions'"
                    )
                raws = _of_gradients(questions, _OF_GRADIENTS[method], **options)
            elif method in _OF_ATTENTION:
                raws = of_attention(questions, _OF_ATTENTION[method], **options)
            else:
                raws = [METHODS[method](question, **options) for question in questions]
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise checks.InputError(
            f"options: {method!r} has no option {str(error).rsplit(' ', 1)[-1]}"
        ) from error
    found = [_renormalized(_result(q, raw, method), normalize) for q, raw in zip(questions, raws)]
    return found if several else found[0]


def _result(question: Question, raw: Tensor, method: str) -> TokenAttribution:
    p, words = question.prompt, question.face.tokenizer
    bad = int((~torch.isfinite(raw)).sum())
    checks.require(
        bad == 0,
        f"method {method!r}: {bad} of {raw.numel()} scores are NaN or infinite; "
        + (
            "half precision overflows here, so use model.float()"
            if _precision(question) in ("float16", "bfloat16")
            else "are the model's weights finite?"
        ),
    )
    return TokenAttribution(
        tokens=p.tokens,
        ids=p.ids,
        scores=question.spread(raw.detach().cpu()),
        scored=p.scored,
        target=question.target,
        target_text=shown(words, [question.target])[0],
        probability=question.probability,
        method=method,
        contrast=question.contrast,
        contrast_text=None if question.contrast is None else shown(words, [question.contrast])[0],
        source=p.source,
        forwards=question.face.forwards,
    )


def _precision(question: Question) -> str:
    model = question.face.model
    return str(dtype_of(model)).removeprefix("torch.") if question.face.is_module else ""


def grad_norm(question: Question) -> Float[Tensor, "scored"]:
    """‖∂f/∂e_t‖, with f = log p(target) and e_t the word embedding of token t."""
    return _of_gradients([question], _OF_GRADIENTS["grad_norm"])[0]


def input_x_grad(question: Question, *, positions: bool = False) -> Float[Tensor, "scored"]:
    """Σ_j e_tj ∂f/∂e_tj, signed.

    Args:
        positions: add the position embedding to e_t, as the official code does where a model has one (GPT-2, OPT).
    """
    return _of_gradients([question], _OF_GRADIENTS["input_x_grad"], positions=positions)[0]


def integrated_gradients(
    question: Question, *, steps: int = 100, rule: str = "grid", batch_size: int = 32
) -> Float[Tensor, "scored"]:
    """Σ_j e_tj times the mean gradient on the straight path from zero embeddings: the scores sum to f(input) - f(zero input).

    Args:
        steps: ``"grid"`` takes the plain mean over 0, 1/steps, ..., 1, as the official code does (100), and misses the sum by O(1/steps);
            ``"gauss"`` takes so many Gauss-Legendre points, and 32 are exact for smooth models.
        batch_size: points a forward.
    """
    checks.number("steps", steps, low=1, integer=True)
    if checks.one_of("rule", rule, ("grid", "gauss")) == "grid":
        alphas, weights = np.linspace(0, 1, steps + 1), np.full(steps + 1, 1 / (steps + 1))
    else:
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        alphas, weights = (nodes + 1) / 2, weights / 2
    e, _ = gradients(question)
    total = torch.zeros_like(e[0])
    for part, share in zip(
        torch.from_numpy(alphas).split(batch_size), torch.from_numpy(weights).split(batch_size)
    ):
        scale = _path(question, part.to(e))
        _, slopes = gradients(question, len(part), lambda x, columns, scale=scale: x * scale[:, columns])
        total += torch.einsum("a,atd->td", share.to(e), slopes)
    return (e[0] * total).sum(-1)[question.prompt.places]


def gradient_shap(
    question: Question, *, n_samples: int = 50, baseline: str = "tokens", noise: float = 0.0, batch_size: int = 32, seed: int = 0
) -> Float[Tensor, "scored"]:  # fmt: skip
    """Expected gradients: the mean over random baselines b and α ~ U[0, 1] of Σ_j (e - b)_tj ∂f/∂e_tj at b + α(e - b).

    Args:
        n_samples: pairs of a baseline and a point on its path.
        baseline: ``"tokens"`` draws other tokens of the vocabulary, ``"zero"`` takes zero embeddings.
        noise: standard deviation of Gaussian noise added to the embeddings.
    """
    checks.number("n_samples", n_samples, low=1, integer=True)
    checks.number("noise", noise, low=0)
    checks.one_of("baseline", baseline, ("tokens", "zero"))
    generator = torch.Generator().manual_seed(seed)
    ids, places = question.prompt.ids, question.prompt.places
    e, _ = gradients(question)
    total = torch.zeros_like(e[0])
    for count in [batch_size] * (n_samples // batch_size) + [n_samples % batch_size]:
        if count == 0:
            continue
        start = torch.zeros_like(e).expand(count, -1, -1)
        if baseline == "tokens":
            from lineament.explain.tokens.samplers import uniform

            rows = ids.repeat(count, 1)
            rows[:, places] = uniform(question.face, question.vocabulary)(rows[:, places], None, generator)
            start = _embedded(question, rows.to(e.device))
        jitter = noise * torch.randn(count, *e.shape[1:], generator=generator).to(e)
        alpha = torch.rand(count, generator=generator).to(e)
        scored = question.prompt.scored.to(e.device)[None, :, None]
        points = torch.where(scored, start + alpha[:, None, None] * (e + jitter - start), e)
        _, slopes = gradients(question, count, lambda x, columns, points=points: points[:, columns].clone())
        total += ((e + jitter - start) * slopes).sum(0)
    return (total / n_samples).sum(-1)[places]


def _of_gradients(
    questions: Sequence[Question], score: Callable[[Tensor, Tensor], Tensor], *, positions: bool = False
) -> list[Float[Tensor, "scored"]]:
    """A score of each prompt's embeddings and their gradients; prompts of one length go through one forward."""
    forms: dict[tuple[int, int], list[int]] = {}
    for i, q in enumerate(questions):
        forms.setdefault((len(q.prompt.ids), q.prompt.source), []).append(i)
    found: list[Tensor] = [torch.empty(0)] * len(questions)
    chunks = [
        same[first : first + _PROMPTS] for same in forms.values() for first in range(0, len(same), _PROMPTS)
    ]
    for chosen in chunks:
        asked = [questions[i] for i in chosen]
        with torch.enable_grad():
            _, e, slopes = through_embeddings(
                asked[0].face,
                torch.cat([q.rows for q in asked]),
                asked[0].prompt.source,
                score=lambda s, asked=asked: torch.cat(
                    [q.value(s[k : k + 1]) for k, q in enumerate(asked)]
                ).sum(),
            )
        assert e is not None and slopes is not None
        e = e + position_embeddings(asked[0].face, asked[0].rows) if positions else e
        for i, scores in zip(chosen, score(e, slopes)):
            found[i] = scores[questions[i].prompt.places.to(scores.device)]
    return found


def gradients(
    question: Question, count: int = 1, change: Callable[[Tensor, slice], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(count, tokens, width) embeddings and the gradients of f at them."""
    with torch.enable_grad():
        rows = question.rows.expand(count, -1)
        _, e, slopes = through_embeddings(
            question.face, rows, question.prompt.source, change, score=lambda s: question.value(s).sum()
        )
    assert e is not None and slopes is not None
    return e, slopes


def _embedded(question: Question, rows: Tensor) -> Tensor:
    parts: list[Tensor] = []
    through_embeddings(
        question.face, rows, question.prompt.source, lambda e, columns: (parts.append(e), e)[1]
    )
    return torch.cat(parts, 1).clone()


def _path(question: Question, alphas: Tensor) -> Tensor:
    """(points, tokens, 1) factors: alpha where a token is scored, 1 where it is protected."""
    scored = question.prompt.scored.to(alphas.device)[None, :, None]
    return torch.where(scored, alphas[:, None, None], torch.ones_like(alphas[:, None, None]))


def _renormalized(a: TokenAttribution, how: str) -> TokenAttribution:
    from dataclasses import replace

    if how == "none":
        return a
    scores = a.scores.clone()
    scores[a.scored] = normalized(a.scores[a.scored], how)
    return replace(a, scores=scores, method=f"{a.method}, {how}")


_OF_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_norm": lambda e, slopes: slopes.norm(dim=-1),
    "input_x_grad": lambda e, slopes: (e * slopes).sum(-1),
}
_OF_ATTENTION = {"attention_last": "last", "attention_all": "all", "rollout": "rollout"}
# Prompts that go through one forward and backward together.
_PROMPTS = 16
METHODS: dict[str, Callable[..., Tensor]] = {
    "reagent": reagent,
    "grad_norm": grad_norm,
    "input_x_grad": input_x_grad,
    "integrated_gradients": integrated_gradients,
    "gradient_shap": gradient_shap,
    "attention_last": attention_last,
    "attention_all": attention_all,
    "rollout": rollout,
    "value_zeroing": value_zeroing,
    "occlusion": occlusion,
    "lime": lime,
    "kernel_shap": kernel_shap,
    "bayesian": bayesian_search,
    "random": random_scores,
}
