"""ReAGent's recursion, for many probes of many prompts in few forwards.

What a step replaces does not depend on the scores, and a stop test depends on the scores only through which tokens it keeps. So the
perturbations of several steps, and the stop tests of the steps before, go through one forward, and the result is that of one step at a
time: the draws are made step by step, and a probe is frozen at the step whose test it passed. What is computed past that step is wasted;
the block grows with the steps already made, so that this is never more than a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.explain.tokens.next_token import NextToken, not_nan
from lineament.explain.tokens.prompts import Prompt

# Rows that go through a forward together while blocks grow; more would gain little on a small model and wait longer on a large one.
ROWS = 64
# Shares of dp closer to one than this would have infinite log-odds.
_EDGE = 1 - 1e-6


class Draws(Protocol):
    """The randomness of one prompt, in the order in which steps ask for it."""

    def initial(self, probes: int, scored: int) -> Float[Tensor, "probes scored"]: ...

    def step(self, step: int) -> tuple[Bool[Tensor, "probes scored"], Int[Tensor, "probes tokens"], Any]:
        """What step ``step`` (from 0) replaces, by what, and what its stop test fills in: ids, or a function of what is filled."""
        ...


@dataclass(frozen=True)
class Rules:
    """When to stop, what a step does to the scores, and how many steps go through one forward."""

    keep: int | float
    top_k: int
    max_steps: int
    min_steps: int
    stop: str | Callable[[Tensor, Tensor], Tensor]
    invert_keep: bool
    majority: float
    update: str
    budget: int | None
    lookahead: int | None
    batch_size: int | str
    trace: bool


@dataclass
class Probes:
    """The probes of one prompt: their scores, and which have stopped."""

    prompt: Prompt
    target: int
    contrast: int | None
    p0: float
    draws: Draws
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


def kept(keep: int | float, scored: int) -> int:
    """How many positions the stop test keeps: ``keep`` itself, or that share of the scored ones, rounded up.

    >>> kept(0.3, 10), kept(5, 10)
    (3, 5)
    """
    return keep if isinstance(keep, int) else math.ceil(keep * scored - 1e-9)


def recurse(model: NextToken, every: list[Probes], rules: Rules) -> None:
    """Run all probes to their end; the results are left in them."""
    made = 0
    while any(not p.done for p in every):
        open_ = [p for p in every if not p.done]
        block = _block(open_, rules, made)
        plans = [_plan(p, rules, block) for p in open_]
        answers = _ask(model, open_, [plan.rows for plan in plans], [plan.tests for plan in plans], rules)
        for p, plan, answer in zip(open_, plans, answers):
            tests = answer[: plan.tests]
            _judge(p, plan, tests.bool() if len(tests) else tests, rules)
            if not p.done:
                _advance(p, plan, answer[plan.tests :], rules)
        made += block


@dataclass
class _Plan:
    rows: Tensor
    tests: int
    tested: list[int]
    active: Tensor
    replaced: list[Tensor]
    fills: list[Any]


def _block(open_: list[Probes], rules: Rules, made: int) -> int:
    """How many further steps are perturbed in this forward."""
    left = rules.max_steps - made
    if left == 0:
        return 0
    rows = sum(len(p.active) for p in open_)
    if rules.lookahead is not None:
        size = rules.lookahead
    else:
        # Steps before the first test are never wasted.
        certain = rules.min_steps - made
        fits = max(1, ROWS // ((1 if certain > 0 else 2) * rows))
        size = min(fits, max(1, certain if certain > 0 else made // 4))
    return max(1, min(size, left))


def _plan(p: Probes, rules: Rules, block: int) -> _Plan:
    """The rows of one prompt: the stop tests that are due, then the perturbations of the next steps."""
    active, places, ids = p.active, p.prompt.places, p.prompt.ids
    rows: list[Tensor] = []
    tested: list[int] = []
    for index, (s, fill) in enumerate(p.pending):
        if not _tests(rules, p.steps - len(p.pending) + index + 1):
            continue
        tested.append(index)
        if rules.stop == "dummy":
            continue
        top = s.topk(p.keep, dim=1).indices
        filled = torch.ones_like(s, dtype=torch.bool).scatter_(1, top, False)
        filled = ~filled if rules.invert_keep else filled
        wide = torch.zeros(len(s), len(ids), dtype=torch.bool)
        wide[:, places] = filled
        proposals: Tensor = fill if isinstance(fill, Tensor) else fill(wide)
        rows.append(torch.where(wide, proposals, ids)[active])
    tests = len(rows) * len(active)
    if rules.budget is not None:
        room = rules.budget - p.sequences - tests
        # Each further step costs its perturbation and, later, its test.
        most = 0 if p.spent else max(0, room // (len(active) * (1 if rules.stop == "dummy" else 2)))
        p.spent = p.spent or most < block
        block = min(block, most)
    replaced, fills = [], []
    for step in range(p.steps, p.steps + block):
        mask, proposals, fill = p.draws.step(step)
        wide = torch.zeros(len(mask), len(ids), dtype=torch.bool)
        wide[:, places] = mask
        rows.append(torch.where(wide, proposals, ids)[active])
        replaced.append(mask)
        fills.append(fill)
    found = torch.cat(rows) if rows else ids.new_zeros(0, len(ids))
    p.sequences += len(found)
    return _Plan(found, tests, tested, active, replaced, fills)


def _ask(
    model: NextToken, open_: list[Probes], rows: list[Tensor], tests: list[int], rules: Rules
) -> list[Tensor]:
    """For each prompt one number a row: whether a stop test is passed, else the target's probability."""
    asked = [i for i, r in enumerate(rows) if len(r)]
    empty = torch.zeros(0, dtype=torch.float64)
    if not asked:
        return [empty] * len(rows)
    sizes = [len(rows[i]) for i in asked]
    targets = torch.cat([torch.full((n,), open_[i].target) for i, n in zip(asked, sizes)])
    chosen_others = [open_[i].contrast for i in asked]
    # All prompts of a call have a contrast, or none has.
    pairs = [(n, c) for n, c in zip(sizes, chosen_others) if c is not None]
    others = torch.cat([torch.full((n,), c) for n, c in pairs]) if pairs else None
    is_test = torch.cat([torch.arange(n) < tests[i] for i, n in zip(asked, sizes)])

    def then(scores: Tensor, index: Tensor) -> Tensor:
        target = targets[index].to(scores.device)
        other = None if others is None else others[index].to(scores.device)
        testing = is_test[index].to(scores.device)
        found = torch.empty(len(index), dtype=torch.float64, device=scores.device)
        for chosen, measure in ((testing, _passed), (~testing, probability)):
            if bool(chosen.any()):
                # No copy of (rows, vocabulary) where all rows are of one kind.
                part = scores if bool(chosen.all()) else scores[chosen]
                found[chosen] = measure(
                    part, target[chosen], None if other is None else other[chosen], rules
                ).double()
        return found

    sources = [open_[i].prompt.source for i in asked]
    values = model.logits([rows[i] for i in asked], sources, then=then, batch_size=rules.batch_size).cpu()
    parts = dict(zip(asked, values.split(sizes)))
    return [parts.get(i, empty) for i in range(len(rows))]


def probability(scores: Tensor, target: Tensor, contrast: Tensor | None, rules: Any = None) -> Tensor:
    """p(target), or with a contrast p(target) / (p(target) + p(contrast)); float64 where the odds need it."""
    own = not_nan(scores.gather(1, target[:, None])[:, 0])
    if contrast is not None:
        return torch.sigmoid((own - not_nan(scores.gather(1, contrast[:, None])[:, 0])).double())
    return not_nan((own - scores.logsumexp(1)).double().exp())


def _passed(scores: Tensor, target: Tensor, contrast: Tensor | None, rules: Rules) -> Tensor:
    own = not_nan(scores.gather(1, target[:, None]))
    if callable(rules.stop):
        return rules.stop(scores, target).bool()
    rank = (scores > own).sum(1)
    near = rank < rules.top_k
    if bool(near.any()):
        # Of tokens that are equally probable (half precision has many) the first by id comes first.
        part, before = (
            scores[near],
            torch.arange(scores.shape[1], device=scores.device) < target[near][:, None],
        )
        rank[near] += ((part == own[near]) & before).sum(1)
    hit = rank < rules.top_k
    return hit if contrast is None else hit & (own > scores.gather(1, contrast[:, None]))[:, 0]


def _tests(rules: Rules, step: int) -> bool:
    """Whether step ``step`` (from 1) ends with a stop test."""
    return step >= rules.min_steps


def _judge(p: Probes, plan: _Plan, passed: Tensor, rules: Rules) -> None:
    """Freeze each probe at the first step whose test it passed, and end the prompt where enough have."""
    count = len(plan.active)
    first = p.steps - len(p.pending)
    for index, (s, _) in enumerate(p.pending):
        hit = torch.zeros_like(p.stopped)
        if index in plan.tested:
            at = plan.tested.index(index)
            hit[plan.active] = True if rules.stop == "dummy" else passed[at * count : (at + 1) * count]
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
    if p.steps >= rules.max_steps:
        p.done = True


def _advance(p: Probes, plan: _Plan, chances: Tensor, rules: Rules) -> None:
    """The scores after each step of the block, waiting for their stop tests."""
    if not plan.replaced:
        # The budget is spent.
        p.done = True
        return
    s = p.s
    for mask, fill, chance in zip(plan.replaced, plan.fills, chances.split(len(plan.active))):
        dp = torch.zeros(len(s), dtype=torch.float64)
        dp[plan.active] = p.p0 - chance
        signed = torch.where(mask, dp[:, None], -dp[:, None])
        if rules.update == "logit":
            signed = 2 * torch.atanh(signed.clamp(-_EDGE, _EDGE))
        s = torch.where(p.stopped[:, None], s, s + signed)
        p.pending.append((s, fill))
    p.steps += len(plan.replaced)
