"""Which words of a text decide its class, is that account of it true, and does it rely on a single word?

ReAGent (Zhao and Shan 2024, arXiv 2402.00794) with a fixed budget of steps, where other words stand in for those of a text: a masked language model's
(``filler``), or those of all texts as often as they have them. It is judged beside the gradient's products with the embeddings, random importances and
its own values on other words; by soft sufficiency and comprehensiveness, and by taking the words away. Words that recur are then taken from the texts
that hold them, and put into others that are answered otherwise: what that does to the answers is what the network relies on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import compact, mean_interval, percent, points, several
from lineament.audit.subject import Subject
from lineament.audit.token_maps import bars, judged, judgement, most_important, strips
from lineament.core import shards
from lineament.core.checks import InputError
from lineament.core.statistics.shares import difference
from lineament.explain.tokens.infill import MlmSampler
from lineament.explain.tokens.methods import attribute_tokens
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.recursion import reagent
from lineament.explain.tokens.results import TokenAttribution
from lineament.explain.tokens.samplers import UnigramSampler
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain, printable

TITLE = "Which words decide its answer?"
HELP = "which words decide the class of a text, and whether it relies on a single one"
ORDER = 23
VERDICT_ORDER = 1  # what it relies on comes first
METHOD = "reagent"
OPTIONAL = True
_TEXTS, _TRIALS, _MOST_TOKENS = 24, 400, 100
_STEPS, _PROBES = 40, 5
_WORDS, _HELD, _SHARE = 3, 8, 0.2
_GRADIENT = {"gradient": "gradient x embedding"}


@dataclass(frozen=True)
class Word:
    """What one word does that recurs: shares of answers, and what exceeds another word in the same places, with 95 % intervals.

    ``taken``: answers of ``held`` texts that change without it; ``put``: answers of ``others`` texts that become ``answer`` with it.
    """

    word: str
    answer: str
    held: int
    taken: float
    taken_excess: tuple[float, float, float]
    others: int
    put: float
    put_excess: tuple[float, float, float]

    @property
    def decides(self) -> bool:
        return self.put_excess[1] > 0.15


@dataclass(frozen=True)
class Words:
    """Attributions of some texts' classes, and how they fare when judged; ``words``: what single words do.

    ``soft`` holds soft sufficiency (``ns``) and comprehensiveness (``nc``) of each text, ``gain`` the lead over the same values on other words with its
    95 % interval; ``deleted`` how many answers change when the fifth of the words named is taken away, by method, ``deleted_gain`` by how many more
    than without as many others.
    """

    texts: Sequence[TokenAttribution]
    soft: Mapping[str, Tensor]
    gain: Mapping[str, tuple[float, float, float]]
    deleted: Mapping[str, float]
    deleted_gain: tuple[float, float, float]
    words: Sequence[Word]
    left_out: Sequence[str]

    @property
    def true(self) -> bool:
        """Whether the words named decide more than others."""
        return (self.gain["nc"][1] > 0 and self.gain["ns"][0] > 0) if self.gain else self.deleted_gain[1] > 0

    @property
    def contradicted(self) -> bool:
        """Whether others decide more than the words named."""
        return self.gain["nc"][2] < 0 if self.gain else self.deleted_gain[2] < 0

    @property
    def deciding(self) -> Word | None:
        found = [word for word in self.words if word.decides]
        return max(found, key=lambda word: word.put_excess[1], default=None)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "true": self.true, "contradicted": self.contradicted}


def applies(subject: Subject) -> str:
    if subject.tokenizer is None:
        return "Its inputs are no texts."
    if subject.task != "classification":
        return f"Words explain the class that it names; this network answers with {'several labels' if subject.task == 'multi-label' else 'real values'}."
    return ""


def look(subject: Subject) -> Section:
    face = NextToken(subject.model, subject.tokenizer, classifier=True)
    passes = _STEPS * _PROBES + 600
    rows = subject.subset(subject.affordable(3e13, passes, most=_TEXTS, least=6), salt=9)
    explained, left_out = _attributions(subject, face, rows)
    if not explained:
        raise InputError(f"no text could be explained; the first reason: {left_out[0]}")
    found = list(explained.values())
    embeds = callable(getattr(subject.model, "get_input_embeddings", None))
    slopes = [_slopes(subject, face, a) for a in found] if embeds else []
    soft, trouble = _soft(subject, face, found, slopes)
    deleted = _deleted(subject, face, found, slopes)
    measured = Words(
        found,
        soft,
        {m: mean_interval(soft[f"{m}_ours"] - soft[f"{m}_dealt"]) for m in ("ns", "nc") if soft},
        {name: float(values.mean()) for name, values in deleted.items()},
        mean_interval(deleted["ours"] - deleted["random"]),
        _recurring(subject, face, explained),
        left_out,
    )
    return Section(
        status="warning"
        if measured.deciding or measured.contradicted
        else "good"
        if measured.true
        else "note",
        number=percent(measured.deleted["ours"], 0),
        unit="of answers change without the fifth of the words that matters most",
        sentence=_sentence(subject, measured, trouble),
        pictures=[strips(found, texts=True), *([bars(soft)] if soft else [])],
        tables=[
            most_important(found),
            *([judgement(soft, _GRADIENT)] if soft else []),
            *([_table(measured.words)] if measured.words else []),
        ],
        numbers=plain(measured),
        findings=[*_word_findings(measured), _finding(measured)],
    )


def _attributions(
    subject: Subject, face: NextToken, rows: Tensor
) -> tuple[dict[int, TokenAttribution], list[str]]:
    """ReAGent's answer for each of some samples, by its row, and why others have none."""
    sampler: Any = "uniform"
    corpus = UnigramSampler(subject.tokenizer, [_ids(subject, row) for row in range(len(subject))])
    if subject.filler is not None:
        sampler = MlmSampler(*subject.filler, subject.tokenizer, fallback=corpus)
    elif int((corpus.weights > 0).sum()) >= 100:
        sampler = corpus

    def explained(row: int) -> TokenAttribution | str:
        ids = _ids(subject, row)
        if len(ids) > _MOST_TOKENS:
            return f"texts of more than {_MOST_TOKENS} tokens"
        try:
            own = reagent(face, ids, sampler=sampler, steps=_STEPS, probes=_PROBES, seed=subject.seed + row)
        except InputError as error:
            return str(error)
        return replace(own, target_text=subject.class_name(own.target))

    every = shards.each(rows.tolist(), explained, "explaining texts", bar=True)
    found = {row: a for row, a in zip(rows.tolist(), every) if not isinstance(a, str)}
    return found, [a for a in every if isinstance(a, str)]


def _ids(subject: Subject, row: int) -> list[int]:
    lengths = subject.samples.lengths
    return subject.samples.inputs[row, : None if lengths is None else int(lengths[row])].tolist()


def _slopes(subject: Subject, face: NextToken, a: TokenAttribution) -> Tensor:
    """|embedding · gradient| of each word, as shares."""
    found = attribute_tokens(face, a.ids, target=a.target, method="input_x_grad", normalize="abs-sum")
    return found.scores


def _soft(
    subject: Subject, face: NextToken, found: Sequence[TokenAttribution], slopes: Sequence[Tensor]
) -> tuple[dict[str, Tensor], str]:
    """Soft scores of the texts that have some, or why there are none."""
    if not slopes:
        return {}, "it does not show its word embeddings (get_input_embeddings)"

    def scored(pair: tuple[TokenAttribution, Tensor]) -> dict[str, float] | str:
        try:
            return judged(face, pair[0], subject.tokenizer, subject.seed, {"gradient": pair[1]})
        except InputError as error:
            return str(error)

    every = shards.each(zip(found, slopes), scored, "judging attributions", bar=True)
    rows = [row for row in every if not isinstance(row, str)]
    trouble = next((text for text in reversed(every) if isinstance(text, str)), "")
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]} if rows else {}, trouble


def _answers(face: NextToken, texts: Sequence[Sequence[int]]) -> Tensor:
    with face.ready():
        return face.logits([torch.tensor([list(ids)]) for ids in texts]).argmax(1).cpu()


def _without(a: TokenAttribution, places: Sequence[int]) -> list[int]:
    gone = set(places)
    return [i for place, i in enumerate(a.ids.tolist()) if place not in gone]


def _deleted(
    subject: Subject, face: NextToken, found: Sequence[TokenAttribution], slopes: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Whether each text's answer changes without the fifth of its words that a method names, and how often without as many others."""
    generator = torch.Generator().manual_seed(subject.seed)
    texts: dict[str, list[list[int]]] = {
        name: [] for name in ("ours", *(["gradient"] if slopes else []), "random")
    }
    draws = 5
    for number, a in enumerate(found):
        places = a.scored.nonzero()[:, 0]
        # At least one word stays.
        count = max(1, min(round(_SHARE * len(places)), len(places) - 1))
        texts["ours"].append(_without(a, a.ranking()[:count]))
        if slopes:
            best = slopes[number][places].argsort(descending=True)[:count]
            texts["gradient"].append(_without(a, places[best].tolist()))
        for _ in range(draws):
            some = places[torch.randperm(len(places), generator=generator)[:count]]
            texts["random"].append(_without(a, some.tolist()))
    said = torch.tensor([a.target for a in found])
    changed = {}
    for name, each in texts.items():
        answers = _answers(face, each).reshape(len(found), -1)
        changed[name] = (answers != said[:, None]).double().mean(1)
    return changed


def _recurring(subject: Subject, face: NextToken, explained: Mapping[int, TokenAttribution]) -> list[Word]:
    """What the words do that matter most where they occur, on texts that did not choose them."""
    rows = [row for row in subject.subset(_TRIALS, salt=10).tolist() if row not in explained]
    texts = [_ids(subject, row) for row in rows]
    said = subject.outputs[rows].argmax(1) if rows else torch.empty(0)
    weights: dict[int, list[float]] = {}
    speaks: dict[int, dict[int, float]] = {}
    for a in explained.values():
        for i, score, scored in zip(a.ids.tolist(), a.scores.tolist(), a.scored.tolist()):
            if scored:
                weights.setdefault(i, []).append(score * int(a.scored.sum()))
                votes = speaks.setdefault(i, {})
                votes[a.target] = votes.get(a.target, 0.0) + score
    ranked = sorted(weights, key=lambda i: -sum(weights[i]) / (len(weights[i]) + 1))
    frequent = [i for i in ranked if sum(i in text for text in texts) >= _HELD][:_WORDS]
    generator = torch.Generator().manual_seed(subject.seed)
    most = face.most_tokens or math.inf
    z = NormalDist().inv_cdf(1 - 0.025 / max(2 * len(frequent), 1))
    found = []
    for i in frequent:
        held = [k for k, text in enumerate(texts) if i in text and len(set(text) - face.special) > 1]
        answer = max(speaks[i], key=lambda c: speaks[i][c])
        free = [
            k for k, text in enumerate(texts) if i not in text and int(said[k]) != answer and len(text) < most
        ]
        if len(held) < _HELD or len(free) < _HELD:
            continue
        pairs = [_taken(texts[k], i, face.special, generator) for k in held]
        taken, control = (_answers(face, side) != said[held] for side in zip(*pairs))
        pairs = [_put(texts[k], i, face.special, frequent, texts, generator) for k in free]
        put, other = (_answers(face, side) == answer for side in zip(*pairs))
        found.append(
            Word(
                subject.tokenizer.decode([i]).strip() or subject.tokenizer.convert_ids_to_tokens(i),
                subject.class_name(answer),
                len(held),
                float(taken.double().mean()),
                difference(taken, control, z),
                len(free),
                float(put.double().mean()),
                difference(put, other, z),
            )
        )
    return found


def _taken(
    text: list[int], word: int, special: frozenset[int], generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """The text without a word, and without as many other words."""
    own = [place for place, i in enumerate(text) if i == word]
    others = [place for place, i in enumerate(text) if i != word and i not in special]
    picked = torch.randperm(len(others), generator=generator)[: len(own)].tolist()
    gone = {others[k] for k in picked}
    return [i for i in text if i != word], [i for place, i in enumerate(text) if place not in gone]


def _put(
    text: list[int],
    word: int,
    special: frozenset[int],
    not_these: Sequence[int],
    texts: list[list[int]],
    generator: torch.Generator,
) -> tuple[list[int], list[int]]:
    """The text with a word more at some place between its own, and with a word of another text there."""
    inner = [place for place, i in enumerate(text) if i not in special] or [0]
    place = inner[int(torch.randint(len(inner), (), generator=generator))]
    giver = texts[int(torch.randint(len(texts), (), generator=generator))]
    words = [i for i in giver if i not in special and i not in not_these] or [
        i for i in text if i not in special
    ]
    other = words[int(torch.randint(len(words), (), generator=generator))]
    return [*text[:place], word, *text[place:]], [*text[:place], other, *text[place:]]


def _sentence(subject: Subject, found: Words, trouble: str) -> str:
    n, word = len(found.texts), found.deciding
    words = ""
    if word is not None:
        words = (
            f"It relies on the word {_quoted(word.word)}: put into {word.others} texts that are answered otherwise, it makes {percent(word.put, 0)} of the answers {_quoted(word.answer)}, "
            f"{_beyond(word.put_excess)} than another word in its place; taken from the {word.held} texts that hold it, it changes {percent(word.taken, 0)} of the answers. "
        )
        also = [_quoted(each.word) for each in found.words if each.decides and each is not word]
        words += f"So do {' and '.join(also)} (see the table). " if also else ""
    elif found.words:
        words = (
            f"None of the {len(found.words)} words that matter most and recur decides an answer by itself. "
        )
    else:
        words = f"No word recurs in enough texts ({_HELD}) to be tried by itself. "
    deleted = found.deleted
    sentence = words + (
        f"Without the fifth of its words that ReAGent names, {percent(deleted['ours'], 0)} of {n} texts are answered otherwise, without as many others {percent(deleted['random'], 0)} "
        f"(the difference {_interval(found.deleted_gain)}, 95 % interval)"
    )
    sentence += (
        f"; without those that the gradient names, {percent(deleted['gradient'], 0)}."
        if "gradient" in deleted
        else "."
    )
    if found.soft:
        means = {name: compact(float(values.mean())) for name, values in found.soft.items()}
        verdict = (
            "the words named do decide"
            if found.true
            else "other words decide more, so do not trust those named"
            if found.contradicted
            else "whether the words named decide more than others cannot be told from these texts"
        )
        lead = found.gain["nc"]
        sentence += (
            f" By soft comprehensiveness, {verdict} ({means['nc_ours']} against {means['nc_dealt']} for the same values on other words, a lead of {compact(lead[0])}, "
            f"95 % interval {compact(lead[1])} to {compact(lead[2])}; gradient x embedding reaches {means['nc_gradient']})."
        )
    else:
        sentence += f" Soft scores are missing: {trouble}."
    if subject.filler is None:
        sentence += " Words of these texts stood in for those that were replaced; a masked language model's (`filler`) would fit better."
    if found.left_out:
        sentence += f" {len(found.left_out)} of {n + len(found.left_out)} texts chosen were left out: {several(found.left_out)}."
    return sentence


def _word_findings(found: Words) -> list[Finding]:
    word = found.deciding
    if word is None:
        return []
    return [
        Finding(
            "warning",
            f"It relies on the word {_quoted(word.word)}: put into {word.others} texts that it answers otherwise, the word makes {percent(word.put, 0)} of the answers "
            f"{_quoted(word.answer)}, {_beyond(word.put_excess)} than other words in its place (95 % interval).",
            advice="If the word is no reason for that answer, take it from the training texts, or put it into those of the other classes too, train again and audit again.",
            key="word decides",
        )
    ]


def _finding(found: Words) -> Finding:
    n = len(found.texts)
    text = f"Without the fifth of the words that matter most, it answers {percent(found.deleted['ours'], 0)} of {n} texts otherwise"
    if found.contradicted:
        return Finding(
            "warning",
            f"{text}, but the account of its words fails its own test: other words decide more.",
            advice="Do not rely on the words named here: give a masked language model as `filler`, or more texts.",
            key="attribution fails",
        )
    proof = "" if found.true else "; whether the words named are the right ones cannot be told from these"
    return Finding(
        "good" if found.true else "note",
        f"{text}{proof}.",
        key="attribution holds" if found.true else "attribution open",
    )


def _table(words: Sequence[Word]) -> Table:
    return Table(
        "Words that recur, tried on texts that did not choose them",
        (
            "word",
            "texts that hold it",
            "answers that change without it",
            "more than without another (95 % interval)",
            "texts it is put into",
            "answers that become",
            "share",
            "more than with another (95 % interval)",
        ),
        [
            (
                repr(printable(w.word)),
                w.held,
                percent(w.taken),
                _interval(w.taken_excess),
                w.others,
                printable(w.answer),
                percent(w.put),
                _interval(w.put_excess),
            )
            for w in words
        ],
    )


def _quoted(text: str) -> str:
    return f"“{printable(text, limit=40)}”"


def _interval(values: tuple[float, float, float]) -> str:
    value, low, high = values
    return f"{percent(value)} ({percent(low)} to {percent(high)})" if math.isfinite(low) else percent(value)


def _beyond(values: tuple[float, float, float]) -> str:
    value, low, high = values
    return f"{points(value)} more ({points(max(low, 0.0))} to {points(high)})"
