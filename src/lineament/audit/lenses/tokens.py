"""Which tokens of a prompt decide the next one, how far back they lie, and is that account of it true?

ReAGent (Zhao and Shan 2024, arXiv 2402.00794) with a fixed budget of steps, from the model's probabilities alone. Soft sufficiency and
comprehensiveness judge it against random importances and, since both scores reward peaked maps whatever they point at, against
its own values dealt out to other tokens at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import compact, mean_interval, several, within
from lineament.audit.subject import LanguageSubject
from lineament.core.batching import progress
from lineament.core.checks import InputError, show
from lineament.explain.tokens.controls import random_importance
from lineament.explain.tokens.faithfulness import soft_faithfulness
from lineament.explain.tokens.recursion import reagent
from lineament.explain.tokens.results import TokenAttribution, entropy
from lineament.explain.tokens.samplers import UnigramSampler
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable

TITLE = "Which words decide what it says next?"
HELP = "which words of a prompt decide what a language model says next"
ORDER = 70
LANGUAGE = True
METHOD = "reagent"
_PROMPTS, _SHOWN, _MOST_TOKENS = 24, 6, 100
_STEPS, _PROBES, _DRAWS = 60, 5, 32
# The importances that are judged: ReAGent's, its values on other tokens, random ones.
_JUDGED = {"ours": "ReAGent", "dealt": "its values on other tokens", "random": "random importances"}


@dataclass(frozen=True)
class Tokens:
    """Attributions of prompts' next tokens: how far back half of each lies (``reach``), and how they fare when judged.

    ``soft`` holds soft sufficiency (``ns``) and comprehensiveness (``nc``) of each prompt, ``gain`` the lead over the same values
    on other tokens with its 95 % interval; of ``cut`` prompts only the last ``longest`` tokens were explained.
    """

    prompts: Sequence[TokenAttribution]
    reach: Sequence[int]
    near: float
    soft: Mapping[str, Tensor]
    gain: Mapping[str, tuple[float, float, float]]
    left_out: Sequence[str]
    cut: int
    longest: int

    @property
    def middle(self) -> float:
        """The median reach, between the two in the middle where their number is even."""
        return float(torch.tensor(self.reach, dtype=torch.float64).quantile(0.5))

    @property
    def true(self) -> bool:
        """Whether the tokens named decide more than others."""
        return self.gain["nc"][1] > 0 and self.gain["ns"][0] > 0

    @property
    def contradicted(self) -> bool:
        """Whether others decide more than the tokens named."""
        return self.gain["nc"][2] < 0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "middle": self.middle, "true": self.true, "contradicted": self.contradicted}


def applies(subject: LanguageSubject) -> str:
    return ""


def look(subject: LanguageSubject) -> Section:
    found, left_out, cut = _attributions(subject)
    if not found:
        raise InputError(f"no prompt could be explained; the first reason: {left_out[0]}")
    judged = [_judged(subject, prompt, a) for prompt, a in progress(found, "judging attributions")]
    scores = {name: torch.tensor([row[name] for row in judged]) for name in judged[0]}
    reach = torch.tensor([_reach(a) for _, a in found])
    measured = Tokens(
        [a for _, a in found],
        reach.tolist(),
        near=float((reach <= 4).double().mean()),
        soft=scores,
        gain={m: mean_interval(scores[f"{m}_ours"] - scores[f"{m}_dealt"]) for m in ("ns", "nc")},
        left_out=left_out,
        cut=cut,
        longest=_longest(subject),
    )
    sharp = torch.tensor([float(entropy(a.scores[a.scored])) for _, a in found]).exp()
    verdict = (
        "the tokens named do decide: taking them away moves the answer further than taking away others as strongly "
        if measured.true
        else "others, taken away as strongly, move the answer further, so do not trust the tokens named "
        if measured.contradicted
        else "whether the tokens named decide more than others cannot be told from these prompts "
    )
    middle = measured.middle
    plural = middle != 1
    sentence = (
        f"Half of what decides the next token lies {within(middle)} (median of {len(found)} prompts), spread over about "
        f"{compact(float(sharp.median()))} tokens of the prompt. By soft comprehensiveness, {verdict}"
        f"({compact(float(scores['nc_ours'].mean()))} against {compact(float(scores['nc_dealt'].mean()))}, a lead of {_lead(measured)}; random importances reach "
        f"{compact(float(scores['nc_random'].mean()))})."
    )
    if cut:
        sentence += f" {cut} prompt{'s were' if cut > 1 else ' was'} longer than {measured.longest} tokens, of which the last {measured.longest} are explained."
    if left_out:
        sentence += f" {len(left_out)} prompt{'s were' if len(left_out) > 1 else ' was'} left out: {several(left_out)}."
    return Section(
        status="warning" if measured.contradicted else "good" if measured.true else "note",
        number=compact(middle),
        unit=f"token{'s' if plural else ''} from the end hold{'' if plural else 's'} half of what decides",
        sentence=sentence,
        pictures=[_strips(measured.prompts), _distances(measured.prompts), _bars(scores)],
        tables=[_most_important(measured.prompts), _judgement(scores)],
        numbers=plain(measured),
        findings=[_finding(measured)],
    )


def _lead(found: Tokens) -> str:
    """By how much the tokens named lead, with its interval where there is one."""
    mean, low, high = found.gain["nc"]
    if not math.isfinite(low):
        return f"{compact(mean)} on one prompt"
    return f"{compact(mean)}, 95 % interval {compact(low)} to {compact(high)} over prompts"


def _finding(found: Tokens) -> Finding:
    text = f"Half of what decides its next token lies {within(found.middle)} (median of {len(found.reach)} prompts)"
    if found.contradicted:
        return Finding(
            "warning",
            f"{text}, but the attribution fails its own test: other tokens decide more.",
            advice="Do not rely on the tokens named here: try more prompts, or another method, such as integrated gradients.",
            key="attribution fails",
        )
    proof = "" if found.true else "; whether the tokens named are the right ones cannot be told from these"
    return Finding(
        "good" if found.true else "note",
        f"{text}{proof}.",
        key="attribution holds" if found.true else "attribution open",
    )


def _longest(subject: LanguageSubject) -> int:
    """How many tokens of a prompt are explained: a few positions are left for special tokens, and for text that is tokenised otherwise from its middle on."""
    return min(_MOST_TOKENS, getattr(subject.model.config, "max_position_embeddings", None) or 2**20) - 4


def _attributions(subject: LanguageSubject) -> tuple[list[tuple[str, TokenAttribution]], list[str], int]:
    """What was explained, what was left out and why, and how many prompts were cut."""
    prompts = subject.prompts.prompts[:_PROMPTS]
    sampler: Any = "uniform"
    # Words as often as these prompts have them keep the replaced prompts among what the model knows; few words would repeat themselves.
    corpus = UnigramSampler(subject.tokenizer, subject.prompts.prompts)
    if int((corpus.weights > 0).sum()) >= 100:
        sampler = corpus
    found, left_out, cut = [], [], 0
    for number, prompt in enumerate(progress(prompts, "explaining prompts")):
        kept = subject.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        most = _longest(subject)
        part = prompt if len(kept) <= most else subject.tokenizer.decode(kept[-most:])
        try:
            found.append((prompt, _explained(subject, part, sampler, number)))
            cut += part is not prompt
        except InputError as error:
            left_out.append(f"{show(prompt, 40)}: {error}")
    more = len(subject.prompts.prompts) - len(prompts)
    return found, left_out + [f"a prompt beyond the first {_PROMPTS}"] * more, cut


def _explained(subject: LanguageSubject, prompt: str, sampler: Any, number: int) -> TokenAttribution:
    found = reagent(
        subject.model,
        prompt,
        tokenizer=subject.tokenizer,
        sampler=sampler,
        steps=_STEPS,
        probes=_PROBES,
        seed=subject.seed + number,
    )
    n = found.source
    if n == 0:
        return found
    # Of an encoder-decoder the prompt is the source; behind it comes the decoder's start token.
    return replace(
        found, tokens=found.tokens[:n], ids=found.ids[:n], scores=found.scores[:n], scored=found.scored[:n]
    )


def _judged(subject: LanguageSubject, prompt: str, a: TokenAttribution) -> dict[str, float]:
    """Soft-NS and Soft-NC of the attribution, of its values on other tokens, and of random importances."""
    generator = torch.Generator().manual_seed(subject.seed)
    places = a.scored.nonzero()[:, 0]
    rows = [a.scores.double()]
    for _ in range(4):
        dealt = torch.zeros_like(rows[0])
        dealt[places] = rows[0][places[torch.randperm(len(places), generator=generator)]]
        rows.append(dealt)
    rows += list(random_importance(a.scored, seed=subject.seed, draws=4))
    soft = soft_faithfulness(
        subject.model,
        a.ids,
        # Of an encoder-decoder the decoder's start token has a score too, which is not used.
        torch.nn.functional.pad(torch.stack(rows).clamp(0, 1), (0, 0 if subject.decoder_only else 1)),
        tokenizer=subject.tokenizer,
        n_samples=_DRAWS,
        seed=subject.seed,
    )
    found = {}
    for name, values in (("ns", soft.sufficiency), ("nc", soft.comprehensiveness)):
        found[f"{name}_ours"] = float(values[0])
        found[f"{name}_dealt"] = float(values[1:5].mean())
        found[f"{name}_random"] = float(values[5:].mean())
    return found


def _reach(a: TokenAttribution) -> int:
    """How many tokens back from the end one must go to have half of the importance."""
    behind = a.scores.double().flip(0).cumsum(0)
    return int((behind < 0.5 * behind[-1]).sum()) + 1


def _strips(found: Sequence[TokenAttribution]) -> Picture:
    """A few prompts, token by token: the fuller the colour, the more it matters."""
    shown = found[:_SHOWN]
    most = min(12, max(len(a.tokens) for a in shown))
    # Few columns have room for larger letters; the figure is shrunk to the page, and its letters with it.
    size = 10 if most <= 9 else 8.5

    def draw(ax: Any) -> None:
        grid = torch.full((len(shown), most), torch.nan)
        for i, a in enumerate(shown):
            tail = a.scores[-most:]
            grid[i, most - len(tail) :] = tail / tail.max().clamp_min(1e-12)
        ax.imshow(grid.numpy(), cmap=shades(ax, "C1"), vmin=0, vmax=1, aspect="auto")
        for i, a in enumerate(shown):
            shown_tokens = a.tokens[-most:]
            for j, token in enumerate(shown_tokens):
                ax.text(
                    most - len(shown_tokens) + j,
                    i,
                    printable(token.strip() or "␣", limit=9),
                    ha="center",
                    va="center",
                    fontsize=size,
                    # On the full colour the page's own shade is the one that can be read.
                    color=ax.get_facecolor() if float(grid[i, most - len(shown_tokens) + j]) > 0.6 else None,
                )
        ax.set_yticks(
            range(len(shown)), [printable("→ " + a.target_text.strip(), limit=14) for a in shown], fontsize=9
        )
        ax.yaxis.tick_right()
        ax.set_xticks([0, most - 1], [f"{most} back", "last token"])
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)

    best = "; ".join(
        f"for {printable(a.target_text.strip(), limit=20)}: {printable(a.tokens[a.ranking()[0]].strip(), limit=20)}"
        for a in shown
    )
    return picture(
        draw,
        size=(9.6, 0.6 + 0.42 * len(shown)),
        caption=f"The last {most} tokens of {len(shown)} prompts and, at the right, the token that the model finds most probable next. The fuller a field's colour, the more its token decides.",
        alt=f"Tokens of {len(shown)} prompts shaded by importance. The most important, {best}.",
    )


def _distances(found: Sequence[TokenAttribution]) -> Picture:
    most = 20
    sums, counts = torch.zeros(most), torch.zeros(most)
    for a in found:
        tail = (a.scores / a.scores.sum().clamp_min(1e-12)).flip(0)[:most].float()
        sums[: len(tail)] += tail
        counts[: len(tail)] += 1
    mean = (sums / counts.clamp_min(1)).tolist()

    def draw(ax: Any) -> None:
        ax.bar(range(1, most + 1), [100 * v for v in mean], color="C0")
        ax.set(xlabel="tokens back from the end", ylabel="share of importance, %", xticks=[1, 5, 10, 15, 20])

    return picture(
        draw,
        size=(6.4, 2.8),
        caption="How far back the deciding tokens lie: the mean share of importance by distance from the end.",
        alt=f"Bars of mean importance by distance; the last token has {100 * mean[0]:.0f} %, the one before {100 * mean[1]:.0f} %.",
    )


def _bars(scores: dict[str, Tensor]) -> Picture:
    means = {k: [float(scores[f"{m}_{k}"].mean()) for m in ("ns", "nc")] for k in _JUDGED}

    def draw(ax: Any) -> None:
        for k, (key, name) in enumerate(_JUDGED.items()):
            ax.bar(
                [x + 0.27 * (k - 1) for x in range(2)],
                means[key],
                0.25,
                label=name,
                color=("C0", "C1", "C7")[k],
            )
        ax.set_xticks(range(2), ["sufficiency", "comprehensiveness"])
        ax.set(ylabel="soft normalised score")
        ax.legend()

    return picture(
        draw,
        size=(6.4, 3.0),
        caption="Is it true? Higher is truer in both. Its own values on other tokens are the fair rival: as peaked, but pointing elsewhere.",
        alt=f"Bars: sufficiency {means['ours'][0]:.3f} against {means['dealt'][0]:.3f} dealt at random; comprehensiveness {means['ours'][1]:.3f} against {means['dealt'][1]:.3f}.",
    )


def _most_important(found: Sequence[TokenAttribution]) -> Table:
    """The tokens that decide most where they occur, over all prompts."""
    sums: dict[str, list[float]] = {}
    for a in found:
        for token, score, scored in zip(a.tokens, a.scores.tolist(), a.scored.tolist()):
            if scored:
                sums.setdefault(token, []).append(score * int(a.scored.sum()))
    ranked = sorted(sums.items(), key=lambda item: -sum(item[1]) / (len(item[1]) + 1))[:12]
    return Table(
        "Tokens that decide where they occur (1: as much as an average token of the prompt)",
        ["token", "occurrences", "mean weight"],
        [[repr(printable(token)), len(values), sum(values) / len(values)] for token, values in ranked],
    )


def _judgement(scores: dict[str, Tensor]) -> Table:
    rows = []
    for key, name in _JUDGED.items():
        row: list[Any] = [name]
        for m in ("ns", "nc"):
            mean, low, high = mean_interval(scores[f"{m}_{key}"])
            row += [mean, f"{compact(low)} to {compact(high)}"]
        rows.append(row)
    columns = ["importances", "sufficiency", "95 % interval", "comprehensiveness", "95 % interval"]
    return Table(f"Soft faithfulness over {len(scores['ns_ours'])} prompts", columns, rows)
