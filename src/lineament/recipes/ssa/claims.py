"""Claims of the recipe ssa: predicates from the paper and its controls, written before the first run; all on means over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lineament.recipes.kit.claims import judged
from lineament.recipes.ssa.training import Measured, Sharpened, Trained
from lineament.report.outcome import Claim

# Rise of the loss in nats a byte that counts as none, and as noise between trainings.
LEVEL, NOISE = 0.002, 0.01


@dataclass
class Found:
    """By model, one entry a seed; ``sharpened`` one a seed."""

    trained: dict[str, list[Trained]] = field(default_factory=dict)
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    sharpened: list[Sharpened] = field(default_factory=list)

    def mean(self, name: str, value: Callable[[Measured], float]) -> float:
        return statistics.mean(map(value, self.measured[name]))

    def told(self, name: str, value: Callable[[Measured], float], digits: int = 3) -> str:
        """The mean, with its spread where there are several seeds."""
        values = [value(m) for m in self.measured[name]]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{name} {statistics.mean(values):.{digits}f}{spread}"


def claims_of(found: Found, config: Any) -> list[Claim]:
    """All claims that the run's models can judge."""
    claims = [*_concentration(found), *_budgets(found, config), *_theorem(found), *_training(found)]
    return claims + _controls(found, config)


def _concentration(found: Found) -> list[Claim]:
    def kept(m: Measured) -> float:
        return m.kept

    claims, paper = [], "full inference at 4k: SSA .782, FullAttn .612, MoBA .606"
    if {"SSA", "FullAttn"} <= found.measured.keys():
        ours, theirs = found.mean("SSA", kept), found.mean("FullAttn", kept)
        claims.append(
            judged("The chosen blocks hold at least 0.05 more of SSA's full attention than of FullAttn's", paper,
                   f"{found.told('SSA', kept)}, {found.told('FullAttn', kept)}", ours >= theirs + 0.05, "its attention is not yet as concentrated")
        )  # fmt: skip
        sinks = {n: found.mean(n, lambda m: m.first) for n in _main(found)}
        claims.append(
            judged("SSA has the least full weight on token 0", "sinks are weaker in SSA",
                   ", ".join(found.told(n, lambda m: m.first, 4) for n in sinks), sinks["SSA"] == min(sinks.values()), "another has less")
        )  # fmt: skip
    if {"MoBA", "FullAttn"} <= found.measured.keys():
        claims.append(
            judged("The paradox: the chosen blocks hold no more of MoBA's full attention than of FullAttn's", paper,
                   f"{found.told('MoBA', kept)}, {found.told('FullAttn', kept)}", found.mean("MoBA", kept) <= found.mean("FullAttn", kept), "sparse training concentrates it here")
        )  # fmt: skip
    return claims


def _main(found: Found) -> list[str]:
    return [n for n in ("FullAttn", "MoBA", "SSA") if n in found.measured]


def _budgets(found: Found, config: Any) -> list[Claim]:
    least, claims = min(config.budgets), []

    def rise(m: Measured) -> float:
        return m.sparse[least] - m.full

    if "SSA" not in found.measured or len(_main(found)) < 2:
        return []
    rises = {n: found.mean(n, rise) for n in _main(found)}
    claims.append(
        judged(f"SSA's loss rises least from full attention to {least} blocks", "PPL 15.28 to 15.96; FullAttn 15.13 to 17.05",
               ", ".join(found.told(n, rise) for n in rises), rises["SSA"] == min(rises.values()), "another rises less")
    )  # fmt: skip
    by_budget = {n: found.mean("SSA", lambda m, n=n: m.sparse[n]) for n in sorted(config.budgets)}
    claims.append(
        judged(f"SSA's loss never rises by more than {LEVEL} from one budget to the next", "PPL 15.62, 15.44, 15.39, 15.26",
               ", ".join(f"{n} blocks {v:.3f}" for n, v in by_budget.items()), all(b <= a + LEVEL for a, b in pairwise(by_budget.values())), "more blocks cost")
    )  # fmt: skip
    if "FullAttn" in found.measured:
        ours, theirs = (found.mean(n, lambda m: m.full) for n in ("SSA", "FullAttn"))
        claims.append(
            judged(f"With full attention SSA is no worse than FullAttn: by less than {NOISE} nats", "PPL 15.28 against 15.13, accuracy 60.39 against 60.01",
                   f"{found.told('SSA', lambda m: m.full)}, {found.told('FullAttn', lambda m: m.full)}", ours <= theirs + NOISE, "it is worse")
        )  # fmt: skip
        longer = {n: found.mean(n, lambda m: m.long_full) for n in ("SSA", "FullAttn")}
        claims.append(
            judged("At twice the length of its training SSA is better than FullAttn, full attention", "needles at 16k: 83 against 48",
                   f"{found.told('SSA', lambda m: m.long_full)}, {found.told('FullAttn', lambda m: m.long_full)}", longer["SSA"] < longer["FullAttn"],
                   "a small model on short windows extrapolates no worse with plain full attention")
        )  # fmt: skip
    return claims


def _theorem(found: Found) -> list[Claim]:
    each = [m for measured in found.measured.values() for m in measured]
    broken, queries = sum(m.violations for m in each), sum(m.queries for m in each)
    return [judged("Theorem 1 holds at every query", "proved", f"{broken} of {queries:,} above the bound", broken == 0, "rounding or a fault")]  # fmt: skip


def _training(found: Found) -> list[Claim]:
    if "SSA" not in found.trained:
        return []
    parts = [statistics.mean(x) for x in zip(*(t.alignment for t in found.trained["SSA"]))]
    return [
        judged("The alignment loss falls fivefold: its last tenth is at most a fifth of its highest", "not reported (3e-3 to 1.5e-4 in a small trial)",
               f"{max(parts):.2e} to {parts[-1]:.2e}", parts[-1] <= max(parts) / 5, "too short a training")
    ]  # fmt: skip


def _controls(found: Found, config: Any) -> list[Claim]:
    claims = []
    if {"SSA", "FullAttn", "SSA, coin alone"} <= found.measured.keys():
        kept = {n: found.mean(n, lambda m: m.kept) for n in ("FullAttn", "SSA, coin alone", "SSA")}
        gain = kept["SSA"] - kept["FullAttn"]
        claims.append(
            judged("Control: it is the alignment, not the coin: the coin alone gives less than half of the gain in held weight", "no alignment: PPL 24.48 against 24.20",
                   ", ".join(f"{n} {v:.3f}" for n, v in kept.items()), gain > 0 and kept["SSA, coin alone"] - kept["FullAttn"] < gain / 2, "the coin alone does much of it")
        )  # fmt: skip
    if {"SSA", "FullAttn, SSA's FLOPs"} <= found.measured.keys():
        least = min(config.budgets)
        names = ("SSA", "FullAttn, SSA's FLOPs")
        loss = {n: found.mean(n, lambda m: m.sparse[least]) for n in names}
        claims.append(
            judged(f"Control: with {least} blocks SSA is better than FullAttn trained for as many FLOPs", "not compared",
                   ", ".join(f"{n} {v:.3f}" for n, v in loss.items()), loss["SSA"] < loss["FullAttn, SSA's FLOPs"], "training FullAttn longer does as well")
        )  # fmt: skip
    if found.sharpened:
        sharp, ours = statistics.mean(s.full for s in found.sharpened), found.mean("SSA", lambda m: m.full)
        factor = statistics.mean(s.factor for s in found.sharpened)
        claims.append(
            judged("Control: not any concentration is as good: FullAttn, sharpened until the blocks hold as much, has a higher full loss than SSA", "not compared",
                   f"logits times {factor:.2f}: {sharp:.3f}; SSA {ours:.3f}", sharp > ours, "sharpening is as good")
        )  # fmt: skip
    for name in ("FullAttn", "SSA"):
        if config.controls and name in found.measured:
            loss = {
                by: found.mean(name, lambda m, by=by: m.chosen[by]) for by in found.measured[name][0].chosen
            }
            ours = found.mean(name, lambda m: m.sparse.get(config.blocks, float("nan")))
            claims.append(
                judged(f"Control: {name}'s chosen blocks are better than the last ones and random ones, and the oracle's are no worse (to {LEVEL})", "not compared",
                       f"chosen {ours:.3f}, last {loss['last']:.3f}, random {loss['random']:.3f}, oracle {loss['oracle']:.3f}",
                       ours < min(loss["last"], loss["random"]) and loss["oracle"] <= ours + LEVEL, "the choice is not what matters here")
            )  # fmt: skip
            claims.append(
                judged(f"Control: {name} loses nothing by the exact choice against the released kernel's (to {LEVEL})", "trained and evaluated with the released choice",
                       f"exact {loss['exact']:.3f}, released {loss['released']:.3f}", loss["exact"] <= loss["released"] + LEVEL, "the released choice favours what is near, which helps here")
            )  # fmt: skip
    return claims
