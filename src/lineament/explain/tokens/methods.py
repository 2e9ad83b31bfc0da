"""A score for each token of a prompt, by any method: ReAGent, gradients, attention, perturbation, chance.

The seven baselines of ReAGent's paper (arXiv 2402.00794) are input x gradient, integrated gradients, gradient SHAP, attention of the last layer, of all
layers, rollout, and the gradient's norm; occlusion, LIME, KernelSHAP, value zeroing and random stand beside them. Scores are raw; ``normalize``
says how they become an importance, because the published comparison hangs on that (see :mod:`lineament.explain.tokens.faithfulness`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.models import dtype_of
from lineament.explain.tokens.attention import of_attention, value_zeroing
from lineament.explain.tokens.gradients import grad_norm, gradient_shap, input_x_grad, integrated_gradients
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.perturbation import bayesian_search, kernel_shap, lime, occlusion, random_scores
from lineament.explain.tokens.prompts import Question, Reading, ask, is_batch
from lineament.explain.tokens.recursion import recursion
from lineament.explain.tokens.results import NORMALIZATIONS, TokenAttribution


def _each(score: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """A method of one prompt as one of several, one after the other: it fills batches with one prompt."""
    return lambda questions, **options: [score(question, **options) for question in questions]


METHODS: dict[str, Callable[..., Sequence[Any]]] = {
    "reagent": recursion,
    "grad_norm": grad_norm,
    "input_x_grad": input_x_grad,
    "integrated_gradients": _each(integrated_gradients),
    "gradient_shap": _each(gradient_shap),
    "attention_last": partial(of_attention, how="last"),
    "attention_all": partial(of_attention, how="all"),
    "rollout": partial(of_attention, how="rollout"),
    "value_zeroing": _each(value_zeroing),
    "occlusion": _each(occlusion),
    "lime": _each(lime),
    "kernel_shap": _each(kernel_shap),
    "bayesian": _each(bayesian_search),
    "random": _each(random_scores),
}


def attribute_tokens(
    model: Any,
    prompt: Any,
    *,
    target: Any = None,
    contrast: Any = None,
    tokenizer: Any = None,
    method: str = "reagent",
    normalize: str = "none",
    reading: Reading | None = None,
    **options: Any,
) -> Any:
    """A score for each token of the prompt, by any method.

    Args:
        model, prompt, target, contrast, tokenizer, reading: as for :func:`lineament.explain.tokens.recursion.reagent`.
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
    >>> attribute_tokens(parrot, [3, 7, 5, 1], method="kernel_shap").ranking()[0]
    1
    """
    checks.one_of("method", method, METHODS)
    checks.one_of("normalize", normalize, NORMALIZATIONS)
    questions = ask(NextToken.of(model, tokenizer), prompt, target, contrast, reading or Reading())
    try:
        with questions[0].face.ready(gradients=method != "reagent"):
            raws = METHODS[method](questions, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise checks.InputError(
            f"options: {method!r} has no option {str(error).rsplit(' ', 1)[-1]}"
        ) from error
    found = [raw if method == "reagent" else _answer(q, raw, method) for q, raw in zip(questions, raws)]
    found = [a.normalized(normalize) for a in found]
    return found if is_batch(prompt) else found[0]


def _answer(question: Question, raw: Tensor, method: str) -> TokenAttribution:
    bad = int((~torch.isfinite(raw)).sum())
    model = question.face.model
    half = question.face.is_module and dtype_of(model) in (torch.float16, torch.bfloat16)
    checks.require(
        bad == 0,
        f"method {method!r}: {bad} of {raw.numel()} scores are NaN or infinite; "
        + (
            "half precision overflows here, so use model.float()"
            if half
            else "are the model's weights finite?"
        ),
    )
    return TokenAttribution.of(question, raw.detach().cpu(), method)
