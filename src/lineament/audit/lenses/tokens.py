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
from lineament.audit.token_maps import bars, judged, judgement, most_important, strips
from lineament.core import shards
from lineament.core.checks import InputError, show
from lineament.explain.tokens.recursion import reagent
from lineament.explain.tokens.results import TokenAttribution, entropy
from lineament.explain.tokens.samplers import UnigramSampler
from lineament.report.figures import picture
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain

TITLE = "Which words decide what it says next?"
HELP = "which words of a prompt decide what a language model says next"
ORDER = 70
LANGUAGE = True
METHOD = "reagent"
_PROMPTS, _MOST_TOKENS = 24, 100
_STEPS, _PROBES = 60, 5


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
    rows = shards.each(
        found,
        lambda pair: judged(subject.model, pair[1], subject.tokenizer, subject.seed),
        "judging attributions",
        bar=True,
    )
    scores = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
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
        pictures=[strips(measured.prompts), _distances(measured.prompts), bars(scores)],
        tables=[most_important(measured.prompts), judgement(scores)],
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

    def explained(item: tuple[int, str]) -> tuple[TokenAttribution | str, bool]:
        number, prompt = item
        kept = subject.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        most = _longest(subject)
        part = prompt if len(kept) <= most else subject.tokenizer.decode(kept[-most:])
        try:
            return _explained(subject, part, sampler, number), part is not prompt
        except InputError as error:
            return f"{show(prompt, 40)}: {error}", False

    every = shards.each(enumerate(prompts), explained, "explaining prompts", bar=True)
    found = [(prompt, a) for prompt, (a, _) in zip(prompts, every) if not isinstance(a, str)]
    left_out = [a for a, _ in every if isinstance(a, str)]
    cut = sum(shortened for _, shortened in every)
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


def _reach(a: TokenAttribution) -> int:
    """How many tokens back from the end one must go to have half of the importance."""
    behind = a.scores.double().flip(0).cumsum(0)
    return int((behind < 0.5 * behind[-1]).sum()) + 1


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
