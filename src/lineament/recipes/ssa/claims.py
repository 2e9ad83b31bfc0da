"""Claims of the ssa recipe: predicates from the paper and the controls, written before the first run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

from lineament.recipes.kit.claims import Paired, judged
from lineament.recipes.ssa.measures import BUDGETS, FULL, Measured
from lineament.recipes.ssa.network import MODELS
from lineament.report.outcome import Claim

# Differences of cross-entropy that one seed cannot tell from noise: a guess.
NOISE = 0.01
Value = Callable[[Measured], float]


class Found(dict[str, list[Measured]]):
    """By model, one entry a seed."""

    def mean(self, name: str, value: Value) -> float:
        return statistics.mean(map(value, self[name]))

    def apart(self, one: str, other: str, value: Value) -> Paired:
        """The first model's value minus the other's, over seeds."""
        return Paired.of([value(m) for m in self[one]], [value(m) for m in self[other]])

    def shown(self, value: Value, form: str = ".3f") -> str:
        return ", ".join(f"{name} {format(self.mean(name, value), form)}" for name in self)


def kept(m: Measured) -> float:
    return m.attention.kept


def full(m: Measured) -> float:
    return m.losses[FULL]


def rise(m: Measured) -> float:
    return m.losses[str(BUDGETS[0])] - m.losses[FULL]


def noise(difference: Paired) -> float:
    """What a difference must exceed to count: two standard errors over seeds, or with one seed a guess."""
    return NOISE if difference.count < 2 else 2 * difference.error


def claims_of(found: Found, config: Any) -> list[Claim]:
    """All claims that the trained models can judge; NSA has no full attention of its own, so it enters only where sparse models are compared."""
    claims, every = [], found
    found = Found({name: each for name, each in found.items() if not MODELS[name].branches})
    if {"FullAttn", "SSA"} <= set(found):
        claims += _concentration(found) + _budgets(found) + _losses(found)
    if {"FullAttn", "MoBA"} <= set(found):
        claims.append(
            judged(
                "The paradox: MoBA's AttnSparsity is at most FullAttn's",
                ".606 against .612 at 4k (full inference)",
                found.shown(kept),
                found.mean("MoBA", kept) <= found.mean("FullAttn", kept),
                "sparse training alone concentrates attention here",
            )
        )
    if {"NSA", "SSA"} <= set(every):
        claims += _branches(every, config)
    claims.append(_theorem(every))
    return [*claims, *_controls(found)]


def _concentration(found: Found) -> list[Claim]:
    apart = found.apart("SSA", "FullAttn", kept)
    sinks = {name: found.mean(name, lambda m: m.attention.sink) for name in found}
    claims = [
        judged(
            "AttnSparsity of SSA is at least FullAttn's + 0.05",
            ".782 against .612 at 4k (full inference)",
            f"{found.shown(kept)}; difference {apart}",
            apart.mean >= 0.05,
            "the alignment has not concentrated attention that far in so few steps",
        ),
        judged(
            "SSA has the least sink mass",
            "least (figure)",
            found.shown(lambda m: m.attention.sink, ".5f"),
            min(sinks, key=sinks.__getitem__) == "SSA",
            "another model has less",
        ),
    ]
    tens = [(m.course.alignments[:10], m.course.alignments[-10:]) for m in found["SSA"]]
    first, last = (statistics.mean(statistics.mean(pair[i]) for pair in tens) for i in (0, 1))
    claims.append(
        judged(
            "SSA's alignment loss falls fivefold, from the first 10 steps to the last 10",
            "falls through training (figure)",
            f"{first:.3g} to {last:.3g}; at most {max(max(m.course.alignments) for m in found['SSA']):.3g}",
            last * 5 <= first,
            "it starts low; why was not tested",
        )
    )
    return claims


def _budgets(found: Found) -> list[Claim]:
    rises = {name: found.mean(name, rise) for name in found}

    def worst(m: Measured) -> float:
        steps = [m.losses[str(k)] for k in BUDGETS]
        return max(b - a for a, b in itertools.pairwise(steps))

    return [
        judged(
            f"SSA loses least from full attention to k = {BUDGETS[0]}",
            "smallest gap of perplexity at every budget",
            found.shown(rise, "+.4f"),
            min(rises, key=rises.__getitem__) == "SSA",
            "another model loses less",
        ),
        judged(
            f"SSA's loss never rises from k = {BUDGETS[0]} to {BUDGETS[-1]}, by more than 0.002",
            "perplexity 15.62, 15.44, 15.39, 15.26 at growing budgets; MoBA's grows",
            found.shown(worst, "+.4f"),
            found.mean("SSA", worst) <= 0.002,
            "more blocks hurt at some budget",
        ),
    ]


def _losses(found: Found) -> list[Claim]:
    apart = found.apart("SSA", "FullAttn", full)
    longer = found.apart("SSA", "FullAttn", lambda m: m.longer[FULL])
    return [
        judged(
            "With full attention SSA is no worse than FullAttn, up to noise",
            "perplexity 15.28 against 15.13; commonsense 60.39 against 60.01",
            f"{found.shown(full)}; difference {apart}, noise {noise(apart):.3f}",
            apart.mean <= noise(apart),
            "the coin halves the training of each kind of attention",
        ),
        judged(
            "On windows twice as long SSA with full attention is better than FullAttn, beyond noise",
            "needles at 16k: 83 against 48; expected to fail at this scale",
            f"{found.shown(lambda m: m.longer[FULL])}; difference {longer}, noise {noise(longer):.3f}",
            longer.mean < -noise(longer),
            "not at this scale",
        ),
    ]


def _branches(found: Found, config: Any) -> list[Claim]:
    def sparse(m: Measured) -> float:
        return m.losses[str(config.blocks)]

    apart = found.apart("SSA", "NSA", sparse)
    replaced = Paired.of([full(m) for m in found["NSA"]], [sparse(m) for m in found["NSA"]])
    return [
        judged(
            f"At the training's budget, k = {config.blocks}, SSA is no worse than NSA, up to noise",
            "perplexity 15.96 against 16.02 at 256 tokens, 15.51 against 15.48 at 1,024",
            f"{found.mean('SSA', sparse):.3f} against {found.mean('NSA', sparse):.3f}; difference {apart}, noise {noise(apart):.3f}",
            apart.mean <= noise(apart),
            "NSA's window and means of blocks are worth more here",
        ),
        judged(
            "NSA does not run with full attention in place of its branches: its loss rises, beyond noise",
            "perplexity 191.3 against 16.02",
            f"{found.mean('NSA', full):.3f} against {found.mean('NSA', sparse):.3f}; difference {replaced}, noise {noise(replaced):.3f}",
            replaced.mean > noise(replaced),
            "full attention can stand for its branches here",
        ),
    ]


def _theorem(found: Found) -> Claim:
    over = sum(m.attention.violations for each in found.values() for m in each)
    total = sum(m.attention.queries for each in found.values() for m in each)
    return judged(
        "Theorem 1 bounds the error of sparse attention at every query",
        "proved",
        f"{over} of {total:,} queries and heads exceed it by more than rounding",
        over == 0,
        "an error of this implementation",
    )


def _controls(found: Found) -> list[Claim]:
    claims = []
    if {"FullAttn", "SSA", "SSA, alpha 0"} <= set(found):
        gain, coin = (found.apart(name, "FullAttn", kept) for name in ("SSA", "SSA, alpha 0"))
        claims.append(
            judged(
                "It is the alignment, not the coin: without it (alpha 0) under half of SSA's gain of AttnSparsity is left",
                "perplexity 24.48 without, 24.20 with (no such measure)",
                f"SSA {gain}, alpha 0 {coin}",
                gain.mean > 0 and coin.mean < gain.mean / 2,
                "the coin alone concentrates attention",
            )
        )
    if {"SSA", "FullAttn, SSA's FLOPs"} <= set(found):
        apart = found.apart("SSA", "FullAttn, SSA's FLOPs", full)
        claims.append(
            judged(
                "With full attention SSA is no worse than FullAttn trained for as many FLOPs, up to noise",
                "not compared in the paper",
                f"difference {apart}, noise {noise(apart):.3f}",
                apart.mean <= noise(apart),
                "the second branch's work is better spent on steps",
            )
        )
    sharp = [(s, m.sharpened) for s, m in zip(found.get("SSA", []), found.get("FullAttn", [])) if m.sharpened]
    if sharp:
        ours = [m.losses[FULL] for m, _ in sharp]
        theirs = [s.losses[FULL] for _, s in sharp if s is not None]
        apart = Paired.of(ours, theirs)
        factors = ", ".join(f"{s.factor:.2f} ({s.kept:.3f})" for _, s in sharp if s is not None)
        claims.append(
            judged(
                "Concentration must be trained: FullAttn sharpened to SSA's AttnSparsity is worse than SSA, beyond noise",
                "not compared in the paper",
                f"full attention: difference {apart}, noise {noise(apart):.3f}; factors of the logits (AttnSparsity) {factors}",
                apart.mean < -noise(apart),
                "a temperature does as well",
            )
        )
    if found.get("SSA") and found["SSA"][0].controls:
        claims += _selections(found)
    return claims


def _selections(found: Found) -> list[Claim]:
    def than(other: str, one: str = "exact") -> Paired:
        return Paired.of([m.controls[one] for m in found["SSA"]], [m.controls[other] for m in found["SSA"]])

    last, random, oracle = (than(name) for name in ("last", "random", "oracle"))
    released = than("exact, k = s", "released, k = s")
    return [
        judged(
            "In SSA the best blocks by mean keys beat the last blocks and random ones, beyond noise",
            "not compared in the paper",
            f"against the last {last}, random {random}, the oracle's {oracle}; noise {noise(last):.3f}",
            last.mean < -noise(last) and random.mean < -noise(random),
            "at this budget another choice is as good",
        ),
        judged(
            "In SSA the released kernel's inexact choice costs no more than noise against the exact one, at k = s",
            "the published models were trained and measured with it",
            f"difference {released}, noise {noise(released):.3f}",
            released.mean <= noise(released),
            "its bias to the newest chunk leaves out blocks that matter",
        ),
    ]
