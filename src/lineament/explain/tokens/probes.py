"""ReAGent's recursion, for many probes of many prompts in few forwards.

What a step replaces does not depend on the scores, and a stop test depends on the scores only through which tokens it keeps. So the
perturbations of several steps, and the stop tests of the steps before, go through one forward, and the result is that of one step at a
time: the draws are made step by step, and a probe is frozen at the step whose test it passed. What is computed past that step is wasted;
the block grows with the steps already made, so that this is never more than a fraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.next_token import not_nan
from lineament.explain.tokens.options import ReagentOptions, Script
from lineament.explain.tokens.prompts import Prompt, Question, probability
from lineament.explain.tokens.samplers import Sampler

# Rows that go through a forward together while blocks grow; more would gain little on a small model and wait longer on a large one.
ROWS = 64
# Shares of dp closer to one than this would have infinite log-odds.
_EDGE = 1 - 1e-6
# What step i (from 0) replaces, by what, and what its stop test fills in: ids, or a function of what is filled.
Draw = Callable[[int], tuple[Tensor, Tensor, Any]]


def scripted(script: Script, ratio: float, probes: int, scored: int) -> tuple[Tensor, Draw]:
    """The initial scores and the draws of a script."""
    checks.tensor("script.initial", script.initial, shape=(probes, scored))

    def draw(step: int) -> tuple[Tensor, Tensor, Any]:
        made = len(script.uniforms)
        checks.require(step < made, f"script: it ends after {made} steps")
        return script.uniforms[step] < ratio, script.replacements[step], script.fills[step]

    return script.initial.double(), draw


def drawn(
    prompt: Prompt, sampler: Sampler, probes: int, ratio: float, generator: torch.Generator
) -> tuple[Tensor, Draw]:
    """The initial scores and the draws of a generator, the same whatever number of steps goes through one forward."""
    ids, scored = prompt.ids.expand(probes, -1), len(prompt.places)

    def draw(step: int) -> tuple[Tensor, Tensor, Any]:
        mask = torch.rand(probes, scored, generator=generator) < ratio
        if not sampler.joint:
            return mask, sampler(ids, None, generator), sampler(ids, None, generator)
        proposals = sampler(ids, _among_all(prompt, mask), generator)
        # What the stop test replaces is known later, but its draws belong to this step.
        own = int(torch.randint(2**31, (), generator=generator))
        return mask, proposals, lambda m: sampler(ids, m, torch.Generator().manual_seed(own))

    return torch.rand(probes, scored, generator=generator, dtype=torch.float64), draw


def _among_all(prompt: Prompt, mask: Tensor) -> Tensor:
    """A mask of the scored positions as one of all positions."""
    wide = torch.zeros(len(mask), len(prompt.ids), dtype=torch.bool)
    wide[:, prompt.places] = mask
    return wide


@dataclass
class Probes:
    """The probes of one prompt: their scores, and which have stopped; ``pending`` are steps whose stop test is still to come."""

    question: Question
    draw: Draw
    keep: int
    s: Tensor
    stopped: Tensor
    steps: int = 0
    sequences: int = 1
    done: bool = False
    spent: bool = False
    pending: list[tuple[Tensor, Any]] = field(default_factory=list)
    history: list[Tensor] = field(default_factory=list)
    hits: list[Tensor] = field(default_factory=list)

    @property
    def active(self) -> Tensor:
        return (~self.stopped).nonzero()[:, 0]


@dataclass
class _Plan:
    """What one prompt asks in a forward: the rows of the stop tests that are due, then those of the next steps' perturbations."""

    tested: list[int]
    tests: list[Tensor]
    replaced: list[tuple[Tensor, Any]]
    perturbed: list[Tensor]
    active: Tensor

    @property
    def rows(self) -> list[Tensor]:
        return self.tests + self.perturbed


def run(every: list[Probes], rules: ReagentOptions, batch_size: int | str) -> None:
    """Run all probes to their end; the results are left in them."""
    made = 0
    while open_ := [p for p in every if not p.done]:
        block = _block(open_, rules, made)
        plans = [_plan(p, rules, block) for p in open_]
        for p, plan, answer in zip(open_, plans, _ask(open_, plans, rules, batch_size)):
            count = len(plan.tests) * len(plan.active)
            _judge(p, plan, answer[:count].bool(), rules)
            if not p.done:
                _advance(p, plan, answer[count:], rules)
        made += block


def _block(open_: list[Probes], rules: ReagentOptions, made: int) -> int:
    """How many further steps are perturbed in this forward."""
    if made == rules.max_steps:
        return 0
    size = rules.lookahead
    if size is None:
        # Steps before the first test are never wasted.
        certain = rules.min_steps - made
        rows = sum(len(p.active) for p in open_)
        fits = max(1, ROWS // ((1 if certain > 0 else 2) * rows))
        size = min(fits, max(1, certain if certain > 0 else made // 4))
    return min(size, rules.max_steps - made)


def _plan(p: Probes, rules: ReagentOptions, block: int) -> _Plan:
    prompt, plan = p.question.prompt, _Plan([], [], [], [], p.active)
    first = p.steps - len(p.pending)
    for index, (s, fill) in enumerate(p.pending):
        if first + index + 1 < rules.min_steps:
            continue
        plan.tested.append(index)
        if rules.stop == "none":
            continue
        best = torch.zeros_like(s, dtype=torch.bool).scatter_(1, s.topk(p.keep, dim=1).indices, True)
        filled = _among_all(prompt, best if rules.invert_keep else ~best)
        proposals: Tensor = fill if isinstance(fill, Tensor) else fill(filled)
        plan.tests.append(torch.where(filled, proposals, prompt.ids)[plan.active])
    if rules.max_forwards is not None:
        room = rules.max_forwards - p.sequences - len(plan.tests) * len(plan.active)
        # Each further step costs its perturbation and, later, its test.
        most = 0 if p.spent else max(0, room // (len(plan.active) * (1 if rules.stop == "none" else 2)))
        p.spent = p.spent or most < block
        block = min(block, most)
    for step in range(p.steps, p.steps + block):
        mask, proposals, fill = p.draw(step)
        plan.perturbed.append(torch.where(_among_all(prompt, mask), proposals, prompt.ids)[plan.active])
        plan.replaced.append((mask, fill))
    p.sequences += sum(len(r) for r in plan.rows)
    return plan


def _ask(
    open_: list[Probes], plans: list[_Plan], rules: ReagentOptions, batch_size: int | str
) -> Sequence[Tensor]:
    """For each prompt one number a row: whether a stop test is passed, else the target's probability."""
    sizes = [sum(len(r) for r in plan.rows) for plan in plans]
    if sum(sizes) == 0:
        return [torch.zeros(0, dtype=torch.float64)] * len(plans)
    pairs = list(zip(open_, plans, sizes))
    targets = torch.cat([torch.full((n,), p.question.target) for p, _, n in pairs])
    contrasts = [p.question.contrast for p in open_]
    # All prompts of a call have a contrast, or none has.
    others = torch.cat([torch.full((n,), c) for c, n in zip(contrasts, sizes) if c is not None] or [targets])
    is_test = torch.cat([torch.arange(n) < len(plan.tests) * len(plan.active) for _, plan, n in pairs])

    def then(scores: Tensor, index: Tensor) -> Tensor:
        target, other, testing = (t[index].to(scores.device) for t in (targets, others, is_test))
        found = torch.empty(len(index), dtype=torch.float64, device=scores.device)
        for chosen, measure in ((testing, _passed), (~testing, _probability)):
            if bool(chosen.any()):
                # No copy of (rows, vocabulary) where all rows are of one kind.
                part = scores if bool(chosen.all()) else scores[chosen]
                rival = None if contrasts[0] is None else other[chosen]
                found[chosen] = measure(part, target[chosen], rival, rules).double()
        return found

    asked = [(torch.cat(plan.rows), p.question.prompt.source) for p, plan, n in pairs if n]
    values = open_[0].question.face.logits(
        [rows for rows, _ in asked], [source for _, source in asked], then=then, batch_size=batch_size
    )
    return values.cpu().split(sizes)


def _probability(scores: Tensor, target: Tensor, contrast: Tensor | None, rules: ReagentOptions) -> Tensor:
    return probability(scores, target, contrast)


def _passed(scores: Tensor, target: Tensor, contrast: Tensor | None, rules: ReagentOptions) -> Tensor:
    own = not_nan(scores.gather(1, target[:, None]))
    if callable(rules.stop):
        return rules.stop(scores, target).bool()
    rank = (scores > own).sum(1)
    near = rank < rules.top_k
    if bool(near.any()):
        # Of tokens that are equally probable (half precision has many) the first by id comes first.
        before = torch.arange(scores.shape[1], device=scores.device) < target[near][:, None]
        rank[near] += ((scores[near] == own[near]) & before).sum(1)
    hit = rank < rules.top_k
    return hit if contrast is None else hit & (own > scores.gather(1, contrast[:, None]))[:, 0]


def _judge(p: Probes, plan: _Plan, passed: Tensor, rules: ReagentOptions) -> None:
    """Freeze each probe at the first step whose test it passed, and end the prompt where enough have."""
    first, results = p.steps - len(p.pending), iter(passed.split(max(1, len(plan.active))))
    for index, (s, _) in enumerate(p.pending):
        hit = torch.zeros_like(p.stopped)
        if index in plan.tested:
            hit[plan.active] = True if rules.stop == "none" else next(results)
        hit &= ~p.stopped
        # The stopped are frozen at the step they stopped at; the others are at this step's scores.
        p.s = torch.where(p.stopped[:, None], p.s, s)
        p.stopped = p.stopped | hit
        p.steps = first + index + 1
        if rules.trace:
            p.history.append(p.s.softmax(1))
            p.hits.append(hit)
        if index in plan.tested and float(p.stopped.double().mean()) >= rules.majority - 1e-12:
            p.done = True
            break
    p.pending = []
    p.done = p.done or p.steps >= rules.max_steps


def _advance(p: Probes, plan: _Plan, chances: Tensor, rules: ReagentOptions) -> None:
    """The scores after each step of the block, waiting for their stop tests."""
    # Without a further step the budget is spent.
    p.done = not plan.replaced
    s = p.s
    for (mask, fill), chance in zip(plan.replaced, chances.split(max(1, len(plan.active)))):
        dp = torch.zeros(len(s), dtype=torch.float64)
        dp[plan.active] = p.question.probability - chance
        signed = torch.where(mask, dp[:, None], -dp[:, None])
        if rules.update == "logit":
            signed = 2 * torch.atanh(signed.clamp(-_EDGE, _EDGE))
        s = torch.where(p.stopped[:, None], s, s + signed)
        p.pending.append((s, fill))
    p.steps += len(plan.replaced)
