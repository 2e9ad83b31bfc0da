"""Which tokens of the context made a language model say this word? ReAGent asks by replacing tokens, and needs only probabilities.

Zhao, Shan, "ReAGent: A Model-agnostic Feature Attribution Method for Generative Language Models", 2024, arXiv 2402.00794. A random part of the
context is replaced; where the target's probability falls, the replaced tokens gain and the kept ones lose, in log-odds. A probe stops when its best
tokens alone, all others replaced, bring the target back among the top k. Not obvious: stopping early is stopping by luck; ``min_steps`` (with
``stop="dummy"`` for a fixed budget) is what makes the scores good, see the paper's page.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.draws import Random, Script, Scripted
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.prompts import (
    Prompt,
    different,
    is_batch,
    paired,
    per_prompt,
    read_all,
    shown,
    token_id,
)
from lineament.explain.tokens.recursion import Draws, Probes, Rules, kept, probability, recurse
from lineament.explain.tokens.results import TokenAttribution
from lineament.explain.tokens.samplers import Sampler, sampler_for

__all__ = ["Script", "rationale", "reagent"]

STOPS = ("top_k", "dummy")
UPDATES = ("logit", "imp")


def reagent(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    target: Any = None,
    *,
    contrast: Any = None,
    sampler: Any = "uniform",
    ratio: float = 0.3,
    keep: int | float = 0.3,
    top_k: int = 3,
    probes: int = 5,
    max_steps: int = 3000,
    min_steps: int = 0,
    stop: str | Callable[[Tensor, Tensor], Tensor] = "top_k",
    invert_keep: bool = False,
    majority: float = 1.0,
    max_forwards: int | None = None,
    update: str = "logit",
    overlap: int = 2,
    vote: str = "position",
    target_prefix: Any = None,
    scope: str = "source",
    span: tuple[int, int] | None = None,
    protect: Sequence[int] = (),
    batch_size: int | str = "auto",
    lookahead: int | None = None,
    use_cache: bool | None = None,
    seed: int = 0,
    script: Script | None = None,
    trace: bool = False,
) -> Any:
    """How much each token of the prompt mattered for the next token, from probabilities alone.

    With R a Bernoulli(r) mask for each probe, x' the context with those positions replaced and dp = p(y|x) - p(y|x'), every step adds
    log((1 + g) / (1 - g)) to each position's score, g = dp where it was replaced and -dp where not. The result is the mean over the probes
    that passed the stop test of softmax(score).

    Args:
        model: a causal or encoder-decoder language model, or a function from ids (batch, tokens) to next-token probabilities.
        tokenizer: the model's; ``None`` for prompts given as ids.
        prompt: text or ids; a list of texts or of id vectors explains all of them together.
        target: the next token asked about: an id, a text that is one token, ``None`` for the most probable; one for each prompt or one for all.
        contrast: explain the target rather than this token: p is then p(target) / (p(target) + p(contrast)), and the stop test also asks
            that the target be the more probable one.
        sampler: what replaces a token: ``"uniform"``, ``"inferential"``, or a sampler of :mod:`lineament.explain.tokens.samplers`, or a
            function ids -> ids.
        ratio: r, the share of positions replaced by a step, in (0, 1).
        keep: n, what the stop test keeps: a number of tokens, or a share of them (rounded up).
        top_k: k, the target must be among the k most probable.
        probes: B, independent runs.
        max_steps, min_steps: N, and how many steps are made before the first stop test (0: the paper).
        stop: ``"top_k"``, ``"dummy"`` (every test is passed: with ``min_steps=n`` a fixed budget of n steps) or a function of logits
            (rows, vocabulary) and targets (rows,) that says which rows pass.
        invert_keep: let the stop test replace the best tokens instead of the others.
        majority: a prompt ends when this share of its probes has stopped.
        max_forwards: at most this many rows are asked of the model for each prompt.
        update: ``"logit"``, or ``"imp"``: s + g from s = 0.
        overlap: the rationale are positions in the top n of at least this many probes; ``vote="token"`` counts equal tokens as one.
        target_prefix, scope: of an encoder-decoder, what was generated before the target, and whether that is scored too (``"all"``).
        span, protect: score only positions start ... stop - 1; ids that are never replaced, besides the special ones.
        batch_size: rows a forward, or ``"auto"``: halved when memory runs out.
        lookahead: steps that go through one forward; ``None`` lets it grow with the steps made. It never changes the result.
        use_cache: whether what all rows have in common at the start comes from the key-value cache; ``None`` decides by its length.
        seed: of all draws; prompt i of a list uses seed + i, so that each is explained as it would be alone.
        script: scripted draws instead of random ones, for one prompt.
        trace: keep the distribution of every probe after each step.

    Returns:
        A :class:`~lineament.explain.tokens.results.TokenAttribution`, or a list of them for a list of prompts. Where no probe stops, the
        scores are the mean over all probes, ``converged`` is false, and a warning says so.

    Raises:
        InputError: options outside their range, prompts with fewer than two scored tokens or more than the model takes, a target that is no
            one token, a stop test that would keep everything, outputs that are no distribution.

    >>> def parrot(ids):  # says the token at position 1 again
    ...     return torch.nn.functional.one_hot(ids[:, 1], 10) * 0.9 + 0.01
    >>> reagent(parrot, None, [3, 7, 5, 1], min_steps=40).scores.argmax().item()
    1
    """
    checks.number("ratio", ratio, low=0, high=1, open_low=True, open_high=True)
    checks.number("majority", majority, low=0, high=1, open_low=True)
    for what, value, low in (("top_k", top_k, 1), ("probes", probes, 1), ("max_steps", max_steps, 1), ("min_steps", min_steps, 0), ("overlap", overlap, 1)):  # fmt: skip
        checks.number(what, value, low=low, integer=True)
    checks.require(
        min_steps <= max_steps, f"min_steps: got {min_steps}, expected at most max_steps ({max_steps})"
    )
    if isinstance(keep, int):
        checks.number("keep", keep, low=1, integer=True)
    else:
        checks.number("keep", keep, low=0, high=1, open_low=True, open_high=True)
    for what, value in (("max_forwards", max_forwards), ("lookahead", lookahead)):
        if value is not None:
            checks.number(what, value, low=1, integer=True)
    if not callable(stop):
        checks.one_of("stop", stop, STOPS)
    checks.one_of("update", update, UPDATES)
    checks.one_of("vote", vote, ("position", "token"))
    checks.number("seed", seed, integer=True)
    face = NextToken(model, tokenizer)
    several = is_batch(prompt)
    texts, prefixes = paired(prompt if several else [prompt], target_prefix, several)
    prompts = read_all(face, texts, prefixes, several=several, scope=scope, span=span, protect=protect)
    for p in prompts:
        n, scored = kept(keep, int(p.scored.sum())), int(p.scored.sum())
        checks.require(
            n < scored,
            f"keep: the stop test would keep {n} of {scored} scored tokens, so that nothing is replaced; expected fewer",
        )
    checks.require(script is None or not several, "script: it is for one prompt")
    rules = Rules(
        keep, top_k, max_steps, min_steps, stop, invert_keep, majority, update, max_forwards, lookahead, batch_size, trace
    )  # fmt: skip
    uneven = len({len(p.ids) for p in prompts}) > 1
    with face.ready(), face.sharing(_common(prompts), use_cache, uneven=uneven):
        first = face.logits([p.ids[None] for p in prompts], [p.source for p in prompts]).cpu()
        checks.require(
            top_k < first.shape[1],
            f"top_k: got {top_k}, expected less than the vocabulary ({first.shape[1]})",
        )
        targets = [
            int(row.argmax()) if wanted is None else token_id(face, "target", wanted, first.shape[1])
            for row, wanted in zip(first, per_prompt("target", target, len(prompts)))
        ]
        others = _contrasts(face, contrast, targets, first.shape[1])
        p0 = probability(
            first, torch.tensor(targets), None if others is None else torch.tensor(others)
        ).tolist()
        made = None if script is not None else sampler_for(sampler, face, first.shape[1])
        every = [
            _probes(p, targets[i], None if others is None else others[i], p0[i], rules, probes, script, made, ratio, seed + i)
            for i, p in enumerate(prompts)
        ]  # fmt: skip
        recurse(face, every, rules)
    found = [_result(face, p, rules, overlap, vote) for p in every]
    unstopped = [i for i, a in enumerate(found) if not a.converged]
    if unstopped:
        which = (
            ""
            if not several
            else f" (prompts {', '.join(map(str, unstopped[:5]))}{' ...' if len(unstopped) > 5 else ''})"
        )
        warnings.warn(
            f"no probe passed the stop test{which}: the scores are the mean over all probes; more steps, a larger top_k or keep, or a "
            'fixed budget (stop="dummy" with min_steps) would help',
            stacklevel=2,
        )
    return found if several else found[0]


def _probes(
    p: Prompt, target: int, contrast: int | None, p0: float, rules: Rules, probes: int, script: Script | None,
    sampler: Sampler | None, ratio: float, seed: int,
) -> Probes:  # fmt: skip
    draws: Draws
    if script is not None:
        draws = Scripted(script, ratio)
    else:
        assert sampler is not None
        draws = Random(p, sampler, probes, ratio, torch.Generator().manual_seed(seed))
    scored = len(p.places)
    s = draws.initial(probes, scored)
    s = torch.zeros_like(s) if rules.update == "imp" else s
    stopped = torch.zeros(probes, dtype=torch.bool)
    return Probes(p, target, contrast, p0, draws, kept(rules.keep, scored), s, stopped)


def _result(face: NextToken, p: Probes, rules: Rules, overlap: int, vote: str) -> TokenAttribution:
    shares = p.s.softmax(1)
    converged = bool(p.stopped.any())
    mean = shares[p.stopped].mean(0) if converged else shares.mean(0)
    scores = torch.zeros(len(p.prompt.ids), dtype=mean.dtype)
    scores[p.prompt.places] = mean
    return TokenAttribution(
        tokens=p.prompt.tokens,
        ids=p.prompt.ids,
        scores=scores,
        scored=p.prompt.scored,
        target=p.target,
        target_text=shown(face.tokenizer, [p.target])[0],
        probability=p.p0,
        method="reagent",
        contrast=p.contrast,
        contrast_text=None if p.contrast is None else shown(face.tokenizer, [p.contrast])[0],
        source=p.prompt.source,
        converged=converged,
        n_steps=p.steps,
        rationale=rationale(shares, p.keep, overlap, p.prompt, vote),
        sequences=p.sequences,
        forwards=face.forwards,
        probes=shares,
        stopped=p.stopped,
        history=torch.stack(p.history) if rules.trace else None,
        hits=torch.stack(p.hits) if rules.trace else None,
    )


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


def _contrasts(face: NextToken, contrast: Any, targets: list[int], vocabulary: int) -> list[int] | None:
    if contrast is None:
        return None
    every = per_prompt("contrast", contrast, len(targets))
    return [different(face, token_id(face, "contrast", c, vocabulary), t) for c, t in zip(every, targets)]


def _common(prompts: Sequence[Prompt]) -> Tensor:
    """The ids that every row of every prompt begins with, whatever is replaced."""
    length = min(int(p.places[0]) for p in prompts)
    # At least one token is left for the forward itself.
    length = min(length, *(len(p.ids) - 1 for p in prompts))
    together = torch.stack([p.ids[:length] for p in prompts])
    same = (together == together[:1]).all(0).long().cumprod(0)
    return together[0, : int(same.sum())]
