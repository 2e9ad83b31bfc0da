"""What the paper claims of relevance patching, as predicates over the measured agreements: written before the first run, and the controls beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lineament.explain.patching.result import Fidelity
from lineament.report.outcome import Claim, Table

if TYPE_CHECKING:
    from lineament.recipes.relp.circuits import Circuits

KINDS = ("resid_pre", "attn_out", "mlp_out")
ATP, RELP, LN, AH, IG = "AtP", "RelP (LN, identity)", "LN only", "RelP and AH", "IG"
RULE_SETS: dict[str, tuple[str, ...]] = {
    ATP: (), LN: ("ln",), "identity only": ("identity",), RELP: ("ln", "identity"), AH: ("ln", "identity", "ah"),
    "AttnLRP": ("ln", "identity", "uniform"),
}  # fmt: skip


# The sizes of circuits that are compared, in nodes.
COUNTS = (5, 10, 20, 40, 80, 160, 320, 640)


@dataclass(frozen=True)
class Comparison:
    """One model's maps by method, how they agree with activation patching, how many modules each rule acted in, and whether any logit changed."""

    truth: dict[str, Tensor]
    maps: dict[str, dict[str, Tensor]]
    agreement: dict[str, dict[str, Fidelity]]
    active: dict[str, dict[str, int]]
    same_logits: bool


def mean_of(runs: Sequence[Comparison], method: str, kind: str, of: str = "pearson") -> float:
    return sum(getattr(run.agreement[method][kind], of) for run in runs) / len(runs)


def over(runs: Sequence[Circuits], method: str, which: str, index: int) -> float:
    return sum(getattr(run.curves[method], which)[index] for run in runs) / len(runs)


def agreement_table(runs: Sequence[Comparison], title: str) -> Table:
    rows = []
    for method in runs[0].maps:
        cells = [f"{mean_of(runs, method, k):.3f} ({mean_of(runs, method, k, 'rmse'):.3f})" for k in KINDS]
        overlap = [
            f"{mean_of(runs, method, k, 'spearman'):.3f} / {mean_of(runs, method, k, 'overlap'):.2f}"
            for k in KINDS
        ]
        rows.append([method, *cells, *overlap])
    return Table(title, ["method", *KINDS, *(f"{k}: Spearman / top-10 overlap" for k in KINDS)], rows)


def circuit_tables(runs: Sequence[Circuits]) -> list[Table]:
    if not runs:
        return []
    tables = []
    for which in ("faithfulness", "completeness"):
        rows = [[m, *(over(runs, m, which, i) for i in range(len(COUNTS)))] for m in runs[0].curves]
        title = f"Circuits of dictionary features: {which} by nodes (of {runs[0].nodes})"
        tables.append(Table(title, ["method", *map(str, COUNTS)], rows))
    seconds = [[m, sum(run.seconds[m] for run in runs) / len(runs)] for m in runs[0].seconds]
    largest = max(u for run in runs for u in run.unexplained)
    return [
        *tables,
        Table("Time for all effects", ["method", "seconds"], seconds),
        Table("Dictionaries", ["measure", "value"], [["largest share of variance not explained", largest]]),
    ]


def claims_of(runs: Sequence[Comparison], ig_steps: int) -> list[Claim]:
    atp, relp, ln, ah = ({k: mean_of(runs, m, k) for k in KINDS} for m in (ATP, RELP, LN, AH))
    gain = {k: relp[k] - atp[k] for k in KINDS}
    acted_all = all(run.active[RELP].get("ln") and run.active[RELP].get("identity") for run in runs)
    differs = all(any(not torch.equal(run.maps[RELP][k], run.maps[LN][k]) for k in KINDS) for run in runs)
    same = all(run.same_logits for run in runs)
    acted = ", ".join(f"{rule} in {count} modules" for rule, count in runs[0].active[RELP].items())
    claims = [
        Claim(
            "Relevance patching follows activation patching better at the residual stream (by at least 0.03)",
            "GPT-2 small: Pearson 0.753 with gradients, 0.968 with relevance",
            f"{atp['resid_pre']:.3f} and {relp['resid_pre']:.3f}", gain["resid_pre"] >= 0.03,
        ),
        Claim(
            "... and at MLP outputs (by at least 0.01)", "GPT-2 small: 0.195 and 0.992; large: 0.006 and 0.956",
            f"{atp['mlp_out']:.3f} and {relp['mlp_out']:.3f}", gain["mlp_out"] >= 0.01,
        ),
        Claim(
            "... while attention outputs lose at most 0.05", "GPT-2 small: 0.979 and 0.962",
            f"{atp['attn_out']:.3f} and {relp['attn_out']:.3f}", gain["attn_out"] >= -0.05,
        ),
        Claim(
            "The rules were active: every rule ran, the identity rule changed the scores, and no logit changed",
            "the official flag set after loading leaves the identity rule off without a word",
            f"{acted}; scores {'differ' if differs else 'do not differ'} from LN only; logits {'the same to the bit' if same else 'changed'}",
            acted_all and differs and same,
        ),
        Claim(
            "The LN-rule alone brings at least half of the gain at the residual stream",
            "official notebook, GPT-2 small: 0.735 with gradients, 0.873 without and 0.962 with the identity rule",
            f"{ln['resid_pre']:.3f} with LN only, of {atp['resid_pre']:.3f} to {relp['resid_pre']:.3f}",
            ln["resid_pre"] - atp["resid_pre"] >= 0.5 * gain["resid_pre"],
        ),
        Claim(
            "Holding the attention pattern constant lowers the correlation at the residual stream",
            "the AH-rule is off in the paper's runs", f"{relp['resid_pre']:.3f} to {ah['resid_pre']:.3f}",
            ah["resid_pre"] < relp["resid_pre"],
        ),
    ]  # fmt: skip
    if ig_steps:
        ig = {k: mean_of(runs, IG, k) for k in KINDS}
        claims.append(
            Claim(
                f"Integrated gradients with {ig_steps} steps a site reach 0.99 at every kind of site, at {ig_steps} backward passes for each site and layer",
                "the costly reference", ", ".join(f"{k} {ig[k]:.3f}" for k in KINDS), min(ig.values()) >= 0.99,
            )
        )  # fmt: skip
    return claims


def controls_of(
    trained: Sequence[Comparison], untrained: Sequence[Comparison], accuracies: Sequence[float]
) -> list[Claim]:
    gain = [
        mean_of(runs, RELP, "resid_pre") - mean_of(runs, ATP, "resid_pre") for runs in (trained, untrained)
    ]
    return [
        Claim(
            "Control: the models solve the task (at least 95 % of other prompts)", "", ", ".join(f"{a:.3f}" for a in accuracies),
            min(accuracies) >= 0.95,
        ),
        Claim(
            "Control: without training there is no such gain at the residual stream (less than 0.03)",
            "on random weights relevance is no better, often worse", f"{gain[1]:+.3f} untrained, {gain[0]:+.3f} trained", gain[1] < 0.03,
        ),
    ]  # fmt: skip


def circuit_claims(found: Sequence[Circuits]) -> list[Claim]:
    if not found:
        return []
    size = range(len(COUNTS))
    faithful = {
        m: sum(over(found, m, "faithfulness", i) for i in size) / len(COUNTS) for m in found[0].curves
    }
    at80 = COUNTS.index(80)
    complete = {m: over(found, m, "completeness", at80) for m in found[0].curves}
    return [
        Claim(
            "Circuits found by relevance are as faithful as those of integrated gradients (at most 0.05 less on average), with one backward pass for ten",
            "comparable", f"{faithful['relp']:.3f} and {faithful['ig']:.3f}; gradients {faithful['attrib']:.3f}",
            faithful["relp"] >= faithful["ig"] - 0.05,
        ),
        Claim(
            "Circuits of 80 nodes found by relevance leave less outside than those of gradients (completeness, low is good)", "",
            f"{complete['relp']:.3f} and {complete['attrib']:.3f}", complete["relp"] <= complete["attrib"],
        ),
        Claim(
            "Control: random nodes make no circuit (faithfulness below 0.05 on average)", "", f"{faithful['random']:.3f}",
            abs(faithful["random"]) < 0.05,
        ),
    ]  # fmt: skip
