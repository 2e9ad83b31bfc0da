"""Which tokens of the context made a language model say this word? ReAGent asks by replacing tokens, and needs only probabilities.

Zhao, Shan, "ReAGent: A Model-agnostic Feature Attribution Method for Generative Language Models", 2024, arXiv 2402.00794. A random part of the
context is replaced; where the target's probability falls, the replaced tokens gain and the kept ones lose, in log-odds. A probe stops when its best
tokens alone, all others replaced, bring the target back among the top k. Not obvious: stopping early is stopping by luck; a fixed budget of
``steps`` is what makes the scores good, see the paper's page. How many probes go through few forwards is in :mod:`lineament.explain.tokens.probes`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.options import ReagentOptions, kept
from lineament.explain.tokens.probes import Probes, drawn, run, scripted
from lineament.explain.tokens.prompts import Prompt, Question, Reading, ask, is_batch
from lineament.explain.tokens.results import TokenAttribution
from lineament.explain.tokens.samplers import sampler_for


def reagent(
    model: Any,
    prompt: Any,
    *,
    target: Any = None,
    contrast: Any = None,
    tokenizer: Any = None,
    sampler: Any = "uniform",
    steps: int | None = None,
    probes: int = 5,
    seed: int = 0,
    batch_size: int | str = "auto",
    reading: Reading | None = None,
    options: ReagentOptions | None = None,
) -> Any:
    """How much each token of the prompt mattered for the next token, from probabilities alone.

    With R a Bernoulli(r) mask for each probe, x' the context with those positions replaced and dp = p(y|x) - p(y|x'), every step adds
    log((1 + g) / (1 - g)) to each position's score, g = dp where it was replaced and -dp where not. The result is the mean over the probes
    that passed the stop test of softmax(score).

    Args:
        model: a causal or encoder-decoder language model, a text classifier of transformers', or a function from ids (batch, tokens) to next-token
            probabilities.
        prompt: text or ids; a list of texts or of id vectors explains all of them together.
        target: the next token asked about: an id, a text that is one token, ``None`` for the most probable; one for each prompt or one for all. Of a
            classifier the class, by number or name.
        contrast: explain the target rather than this token: p is then p(target) / (p(target) + p(contrast)), and the stop test also asks
            that the target be the more probable one.
        tokenizer: the model's; ``None`` for prompts given as ids.
        sampler: what replaces a token: ``"uniform"``, ``"inferential"``, ``"pos"``, a sampler of :mod:`lineament.explain.tokens.samplers`, or a
            function ids -> ids.
        steps: a fixed budget of so many steps for each probe; ``None`` is the paper's stopping rule, see ``options``.
        probes: B, independent runs.
        seed: of all draws; prompt i of a list uses seed + i, so that each is explained as it would be alone.
        batch_size: rows a forward, or ``"auto"``: halved when memory runs out.
        reading: what of the prompt is scored, and an encoder-decoder's target prefix.
        options: shares, stopping rule, rationale, computation.

    Returns:
        A :class:`~lineament.explain.tokens.results.TokenAttribution`, or a list of them for a list of prompts. Where no probe stops, the
        scores are the mean over all probes, ``converged`` is false, and a warning says so.

    Raises:
        InputError: options outside their range, prompts with fewer than two scored tokens or more than the model takes, a target that is
            not one token, a stop test that would keep everything, outputs that are no distribution.

    >>> def parrot(ids):  # says the token at position 1 again
    ...     return torch.nn.functional.one_hot(ids[:, 1], 10) * 0.9 + 0.01
    >>> reagent(parrot, [3, 7, 5, 1], steps=40).scores.argmax().item()
    1
    """
    questions = ask(NextToken.of(model, tokenizer), prompt, target, contrast, reading or Reading())
    found = recursion(
        questions, sampler=sampler, steps=steps, probes=probes, seed=seed, batch_size=batch_size, options=options
    )  # fmt: skip
    return found if is_batch(prompt) else found[0]


def recursion(
    questions: Sequence[Question],
    *,
    sampler: Any = "uniform",
    steps: int | None = None,
    probes: int = 5,
    seed: int = 0,
    batch_size: int | str = "auto",
    options: ReagentOptions | None = None,
) -> list[TokenAttribution]:
    """ReAGent's answer to each question; see :func:`reagent`."""
    # Of two classes, one is always among the three most probable.
    rules = options or ReagentOptions(top_k=1 if questions[0].face.classifier else 3)
    if steps is not None:
        checks.number("steps", steps, low=1, integer=True)
        rules = replace(rules, min_steps=steps, max_steps=steps, stop="none")
    checks.number("probes", probes, low=1, integer=True)
    checks.number("seed", seed, integer=True)
    checks.require(
        rules.script is None or len(questions) == 1, "script: it is for one prompt, with draws of its own"
    )
    face, vocabulary = questions[0].face, questions[0].vocabulary
    answers = questions[0].answers
    checks.require(
        rules.top_k < answers,
        f"top_k: got {rules.top_k}, expected less than the {'classes' if face.classifier else 'vocabulary'} ({answers})",
    )
    every = []
    made = sampler_for(sampler, face, vocabulary) if rules.script is None else None
    for i, q in enumerate(questions):
        scored = len(q.prompt.places)
        n = kept(rules.keep, scored)
        checks.require(
            n < scored,
            f"keep: the stop test would keep {n} of {scored} scored tokens, so that nothing is replaced; expected fewer",
        )
        if rules.script is not None:
            start, draw = scripted(rules.script, rules.ratio, probes, scored)
        else:
            assert made is not None
            generator = torch.Generator().manual_seed(seed + i)
            start, draw = drawn(q.prompt, made, probes, rules.ratio, generator)
        start = torch.zeros_like(start) if rules.update == "imp" else start
        every.append(Probes(q, draw, n, start, torch.zeros(probes, dtype=torch.bool)))
    prompts = [q.prompt for q in questions]
    uneven = len({len(p.ids) for p in prompts}) > 1
    with face.ready(), face.sharing(_common(prompts), rules.use_cache, uneven=uneven):
        run(every, rules, batch_size)
    found = [_result(p, rules) for p in every]
    _warn_of_unstopped(found)
    return found


def _result(p: Probes, rules: ReagentOptions) -> TokenAttribution:
    shares = p.s.softmax(1)
    converged = bool(p.stopped.any())
    return TokenAttribution.of(
        p.question, shares[p.stopped].mean(0) if converged else shares.mean(0), "reagent", converged=converged,
        n_steps=p.steps, rationale=rationale(shares, p.keep, rules.overlap, p.question.prompt, rules.vote),
        sequences=p.sequences, probes=shares, stopped=p.stopped,
        history=torch.stack(p.history) if rules.trace else None, hits=torch.stack(p.hits) if rules.trace else None,
    )  # fmt: skip


def rationale(
    shares: Float[Tensor, "probes scored"], keep: int, overlap: int, prompt: Prompt, vote: str = "position"
) -> tuple[int, ...]:
    """Positions among the ``keep`` best of at least ``overlap`` probes; with ``vote="token"`` equal tokens share their votes.

    >>> prompt = Prompt(torch.tensor([5, 6, 5]), torch.ones(3, dtype=torch.bool), 0, ("a", "b", "a"))
    >>> shares = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    >>> rationale(shares, 1, 2, prompt), rationale(shares, 1, 2, prompt, "token")
    ((), (0, 2))
    """
    votes = torch.zeros_like(shares).scatter_(1, shares.topk(keep, dim=1).indices, 1.0)
    if vote == "token":
        ids = prompt.ids[prompt.places]
        votes = (votes @ (ids[:, None] == ids).to(votes.dtype)).clamp_max(1)
    return tuple(prompt.places[votes.sum(0) >= overlap].tolist())


def _common(prompts: Sequence[Prompt]) -> Tensor:
    """The ids that every row of every prompt begins with, whatever is replaced."""
    # At least one token is left for the forward itself.
    length = min(min(int(p.places[0]), len(p.ids) - 1) for p in prompts)
    starts = torch.stack([p.ids[:length] for p in prompts])
    same = (starts == starts[:1]).all(0).long().cumprod(0)
    return starts[0, : int(same.sum())]


def _warn_of_unstopped(found: list[TokenAttribution]) -> None:
    unstopped = [i for i, a in enumerate(found) if not a.converged]
    if not unstopped:
        return
    which = f" (prompts {', '.join(map(str, unstopped[:5]))}{' ...' if len(unstopped) > 5 else ''})"
    warnings.warn(
        f"no probe passed the stop test{which if len(found) > 1 else ''}: the scores are the mean over all probes; more steps, a larger top_k or keep, "
        "or a fixed budget (steps) would help",
        stacklevel=4,
    )
