"""Which layers, positions and heads carry a behaviour that pairs of prompts define?

Relevance patching (Rezaei Jafari et al. 2025, arXiv 2508.21258) estimates every component at once, with two forwards and one backward. The components
that it ranks first are then patched one by one, on all pairs: sentences and the table say what these really bring back. How far the estimates can be
relied on elsewhere is shown by activation patching of every place on some of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import compact, mean_interval, percent, several
from lineament.audit.subject import LanguageSubject
from lineament.core.checks import InputError, require, show
from lineament.core.models import frozen, logits
from lineament.explain.patching.activation import activation_patching, patch_nodes
from lineament.explain.patching.components import architecture
from lineament.explain.patching.metrics import logit_difference, single_tokens
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.patching.result import Fidelity, Node, PatchingResult, fidelity
from lineament.load.prompts import PromptPair
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable

TITLE = "Which components carry the behaviour?"
HELP = "which layers and heads of a language model carry a behaviour"
ORDER = 80
LANGUAGE = True
METHOD = "relp"
_PAIRS, _CHECKED = 64, 8
# How many of the components that relevance patching ranks first are patched: attention heads, and places of each kind.
_HEADS, _PLACES = 16, 4
# Less than a tenth of the preference gone with the corrupt prompts: they do not take away what decides.
_LEAST = 0.1
_KINDS = ("resid_pre", "attn_out", "mlp_out")
_NAMES = {
    "resid_pre": "residual stream",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "z": "attention head",
}


@dataclass(frozen=True)
class Patched:
    """A component that was patched: the share of the behaviour that it brings back, its 95 % interval over pairs, and what was estimated."""

    node: Node
    score: float
    interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        where = {"kind": self.node.kind, "layer": self.node.layer, "position": self.node.position}
        return {
            **where,
            "head": self.node.unit,
            "score": self.score,
            "interval": list(self.interval),
            "estimate": self.node.score,
        }


@dataclass(frozen=True)
class Carriers:
    """What each component brings back of the behaviour: an estimate for all, how well that agrees with patching, and the first ones patched.

    ``heads`` holds the estimates of all attention heads, ``patched`` what was patched, the most important first; ``five_heads`` is the share
    that the five best patched heads bring back when they are patched at once, and ``heads_patched`` is out of how many these were chosen.
    """

    patching: PatchingResult
    heads: Sequence[Sequence[float]]
    agreement: Mapping[str, Fidelity]
    patched: Sequence[Patched]
    five_heads: float
    heads_patched: int

    @property
    def top_head(self) -> Patched:
        """The attention head that brings back most, of those patched."""
        return next(each for each in self.patched if each.node.kind == "z")

    def to_dict(self) -> dict[str, Any]:
        patched = [each.to_dict() for each in self.patched]
        return {**vars(self), "patched": patched, "top_head": self.top_head.to_dict()}


@dataclass(frozen=True)
class Behaviour:
    """How often the right answer is preferred on clean prompts, and on corrupt ones; ``carriers`` where the pairs' difference matters."""

    right: float
    right_when_corrupt: float
    pairs: int
    left_out: Sequence[str]
    carriers: Carriers | None = None

    def to_dict(self) -> dict[str, Any]:
        found = vars(self) | {"hangs_on_what_differs": self.carriers is not None}
        del found["carriers"]
        return found if self.carriers is None else {**found, **self.carriers.to_dict()}

    @property
    def note(self) -> str:
        """What was left out, as a sentence with a space before it."""
        if not self.left_out:
            return ""
        count = len(self.left_out)
        return f" {count} pair{'s were' if count > 1 else ' was'} left out: {several(self.left_out)}."


def applies(subject: LanguageSubject) -> str:
    if not subject.prompts.pairs:
        return (
            "It needs pairs of prompts that differ in what decides the answer: a .jsonl file with clean, corrupt, answer and wrong in each line, "
            "or the built-in task ioi."
        )
    if not subject.decoder_only:
        return "Components are patched in decoder-only models; this one is an encoder-decoder."
    return ""


def look(subject: LanguageSubject) -> Section:
    pairs, answers, wrong, left_out = _usable(subject)
    clean, corrupt = [p.clean for p in pairs], [p.corrupt for p in pairs]
    source, base = (_preference(subject, prompts, answers, wrong) for prompts in (clean, corrupt))
    right, kept = (float((found > 0).double().mean()) for found in (source, base))
    behaviour = Behaviour(right, kept, len(pairs), left_out)
    ends = float(source.mean()), float(base.mean())
    if abs(ends[0] - ends[1]) <= _LEAST * max(map(abs, ends)):
        return _unmoved(behaviour, ends)
    metric = logit_difference(answers, wrong)
    has = list(subject.layout) or architecture(subject.model, trace=True).kinds()
    require(
        "z" in has,
        "no attention heads were found in its blocks; patch what it has by explain.activation_patching, or say where heads are (`layout`)",
    )
    kinds = [kind for kind in _KINDS if kind in has]
    require(bool(kinds), f"layout: it names none of {', '.join(_KINDS)}, expected one at least beside 'z'")
    shared: dict[str, Any] = {"tokenizer": subject.tokenizer}
    places = _sites(subject, kinds)
    found = relevance_patching(subject.model, clean, corrupt, metric, sites=places, **shared)
    heads = relevance_patching(
        subject.model, clean, corrupt, metric, sites=_sites(subject, ["z"]), positions="together", **shared
    )
    few = slice(0, _CHECKED)
    metric = logit_difference(answers[few], wrong[few])
    truth = activation_patching(subject.model, clean[few], corrupt[few], metric, sites=places, **shared)
    ours = relevance_patching(subject.model, clean[few], corrupt[few], metric, sites=places, **shared)
    agreement = fidelity(ours, truth)
    trusted = min(a.pearson if a.pearson == a.pearson else 0.0 for a in agreement.values())
    per_head = heads.scores["z"].flatten(1)
    nodes = [*heads.top(_HEADS), *(node for kind in kinds for node in found.top(_PLACES, kind=kind))]
    patched, five = _patched(subject, (clean, corrupt, logit_difference(answers, wrong)), nodes)
    tried = min(_HEADS, per_head.numel())
    carriers = Carriers(found, per_head.tolist(), agreement, patched, five, tried)
    behaviour = replace(behaviour, carriers=carriers)
    top = carriers.top_head
    sentence = (
        f"It prefers the right answer in {percent(right, 0)} of {len(pairs)} pairs (logit difference {compact(found.source)} on clean prompts, {compact(found.base)} on corrupt ones). "
        f"{_strongest(carriers, per_head.numel())} "
        + (
            f"Activation patching of every place on {len(clean[few])} pairs agrees with the estimates (correlation {trusted:.2f} or more at every kind of place)."
            if trusted >= 0.8
            else f"Activation patching of every place on {len(clean[few])} pairs agrees less well with the estimates (correlation {trusted:.2f} at the worst kind of place): read those that "
            "were not patched with care."
        )
    )
    if right < 0.6:
        sentence += " It hardly has the behaviour that these pairs ask for."
    sentence += behaviour.note
    return Section(
        status="warning" if right < 0.6 else "good" if trusted >= 0.8 else "note",
        number=percent(top.score, 0),
        unit=f"of the behaviour comes back with head {top.node.unit} of layer {top.node.layer}",
        sentence=sentence,
        pictures=[_maps(found, patched), _heads(per_head, top), _check(ours, truth)],
        tables=[_most_important(patched, found.labels, len(pairs)), _agreement(agreement)],
        numbers=plain(behaviour),
        findings=[_finding(behaviour)],
    )


def _sites(subject: LanguageSubject, kinds: Sequence[str]) -> Any:
    """These kinds of sites, by the names that the subject's layout gives them where it has one."""
    return {k: g for k, g in subject.layout.items() if k in (*kinds, "blocks")} or list(kinds)


def _finding(found: Behaviour) -> Finding:
    if found.right < 0.6:
        return Finding(
            "warning",
            f"It prefers the right answer in {percent(found.right, 0)} of the prompt pairs only: it hardly has the behaviour that they ask for.",
            advice="Choose pairs that it answers rightly; what carries a behaviour can only be found where there is one.",
            key="no behaviour",
        )
    if found.carriers is None:
        return Finding(
            "warning",
            f"What the prompt pairs change hardly matters to it: it prefers the right answer in {percent(found.right, 0)} of clean prompts, and the same answer in "
            f"{percent(found.right_when_corrupt, 0)} of corrupt ones.",
            advice="Choose pairs whose corrupt prompt asks for the wrong answer.",
            key="difference does not matter",
        )
    top = found.carriers.top_head
    return Finding(
        "good",
        f"It prefers the right answer in {percent(found.right, 0)} of the prompt pairs; patching head {top.node.unit} of layer {top.node.layer} alone brings back {percent(top.score, 0)} of "
        f"the difference, and {_five(found.carriers)}.",
        key="behaviour",
    )


def _patched(
    subject: LanguageSubject, pairs: tuple[Any, Any, Any], nodes: Sequence[Node]
) -> tuple[list[Patched], float]:
    """Each node patched by itself on all pairs, the most important first, and the share that the best five heads bring back at once."""
    shared: dict[str, Any] = {"tokenizer": subject.tokenizer}
    if subject.layout:
        shared["sites"] = dict(subject.layout)
    effects = patch_nodes(subject.model, *pairs, nodes, **shared)
    found = []
    for node, values in zip(nodes, effects):
        mean, low, high = mean_interval(values)
        found.append(Patched(node, mean, (low, high)))
    found.sort(key=lambda each: -abs(each.score))
    five = sorted((each for each in found if each.node.kind == "z"), key=lambda each: -each.score)[:5]
    together = patch_nodes(subject.model, *pairs, [[each.node for each in five]], **shared)
    return found, float(together.mean())


def _strongest(carriers: Carriers, heads: int) -> str:
    top, tried = carriers.top_head, carriers.heads_patched
    among = (
        f"Of the {heads} attention heads"
        if tried == heads
        else f"Of the {tried} attention heads that relevance patching ranks highest (of {heads})"
    )
    low, high = (percent(end, 0) for end in top.interval)
    interval = f" (95 % interval {low} to {high})" if math.isfinite(top.interval[0]) else ""
    return (
        f"{among}, each patched by itself, head {top.node.unit} of layer {top.node.layer} matters most: it brings back {percent(top.score, 0)} of that difference{interval}; "
        f"{_five(carriers)}."
    )


def _five(carriers: Carriers) -> str:
    count = min(5, carriers.heads_patched)
    return f"the {count} best heads patched at once bring back {percent(carriers.five_heads, 0)}"


def _usable(subject: LanguageSubject) -> tuple[list[PromptPair], list[int], list[int], list[str]]:
    """The pairs of the commonest length whose answers are one token each, and why others were left out."""
    kept: dict[int, list[tuple[PromptPair, int, int]]] = {}
    left_out: list[str] = []
    most = getattr(subject.model.config, "max_position_embeddings", None)
    for pair in subject.prompts.pairs:
        try:
            length, *answers = _checked(subject.tokenizer, pair, most)
        except InputError as error:
            left_out.append(f"{show(pair.clean, 40)}: {error}")
            continue
        kept.setdefault(length, []).append((pair, answers[0], answers[1]))
    if not kept:
        raise InputError(
            f"none of the {len(subject.prompts.pairs)} pairs can be used with this tokenizer, of which a pair's prompts must have as many tokens and either answer must be one; the first, {left_out[0]}"
        )
    # Maps by position can be averaged over prompts of one length only.
    commonest = max(kept, key=lambda length: len(kept[length]))
    for length, others in kept.items():
        reason = f"a pair of {length} tokens, where most have {commonest}"
        left_out += [reason] * (len(others) if length != commonest else 0)
    left_out += [f"a pair beyond the first {_PAIRS}"] * (len(kept[commonest]) - _PAIRS)
    pairs, answers, wrong = zip(*kept[commonest][:_PAIRS])
    return list(pairs), list(answers), list(wrong), left_out


def _checked(tokenizer: Any, pair: PromptPair, most: int | None) -> tuple[int, int, int]:
    """How many tokens the prompts of a pair have, and its two answers as tokens."""
    clean, corrupt = (len(tokenizer(text)["input_ids"]) for text in (pair.clean, pair.corrupt))
    require(
        most is None or max(clean, corrupt) <= most,
        f"its prompts have {max(clean, corrupt)} tokens and the model takes at most {most}",
    )
    require(pair.clean != pair.corrupt, "its two prompts are alike")
    require(clean == corrupt, f"its prompts have {clean} and {corrupt} tokens")
    answer, wrong = single_tokens(tokenizer, [pair.answer, pair.wrong], after=pair.clean).tolist()
    return clean, answer, wrong


def _preference(subject: LanguageSubject, prompts: list[str], answers: list[int], wrong: list[int]) -> Tensor:
    """By how much the logit of the clean prompt's answer exceeds that of the wrong one, after each of these prompts."""
    device = next(subject.model.parameters()).device
    ids = torch.tensor([subject.tokenizer(prompt)["input_ids"] for prompt in prompts]).to(device)
    with frozen(subject.model), torch.no_grad():
        last = (
            torch.cat([logits(subject.model(input_ids=part))[:, -1] for part in ids.split(16)]).float().cpu()
        )
    rows = torch.arange(len(prompts))
    return last[rows, torch.tensor(answers)] - last[rows, torch.tensor(wrong)]


def _unmoved(behaviour: Behaviour, ends: tuple[float, float]) -> Section:
    """Patching gives shares of the difference between the prompts; where there is none, there is nothing to share out."""
    sentence = (
        f"It prefers the right answer in {percent(behaviour.right, 0)} of {behaviour.pairs} clean prompts, but the same answer in {percent(behaviour.right_when_corrupt, 0)} of the corrupt ones, nearly as much "
        f"(logit difference {compact(ends[0])} on clean prompts, {compact(ends[1])} on corrupt ones). What the pairs change hardly matters to it, so that no component can be "
        f"said to carry it. Choose pairs whose corrupt prompt asks for the wrong answer.{behaviour.note}"
    )
    return Section(
        status="warning",
        number=percent(behaviour.right_when_corrupt, 0),
        unit="of answers stay the same on the corrupt prompts",
        sentence=sentence,
        numbers=plain(behaviour),
        findings=[_finding(behaviour)],
    )


def _token_text(label: object, limit: int) -> str:
    """A token as its vocabulary has it, without the mark that stands for a space before it.

    >>> _token_text("Ġkeys", 9), _token_text("▁", 9)
    ('keys', '␣')
    """
    return printable(str(label).replace("Ġ", "").replace("▁", "") or "␣", limit=limit)


def _maps(found: PatchingResult, patched: Sequence[Patched]) -> Picture:
    labels, kinds = [_token_text(label, 9) for label in found.labels], list(found.scores)

    def draw(axes: Any) -> None:
        for ax, kind in zip(axes.flat, kinds):
            values = found.map(kind).float().cpu()
            _heat(ax, values, _NAMES[kind])
            ax.set_xticks(
                range(values.shape[1]),
                labels if len(labels) == values.shape[1] else range(values.shape[1]),
                rotation=70,
                fontsize=7,
            )

    top = next(each for each in patched if each.node.kind != "z")
    return picture(
        draw,
        panels=(1, len(kinds)),
        size=(10.5, 1.9 + 0.16 * found.map("resid_pre").shape[0]),
        caption="How much of the behaviour each place carries, as relevance patching estimates it, layer by position; 1 brings all of it back. The tokens are those of the first clean prompt.",
        alt=f"{len(kinds)} heat maps of layer by position. Of the places ranked highest, the {_NAMES[top.node.kind]} of layer {top.node.layer}, position {top.node.position}, brings back most when patched: {top.score:.2f}.",
    )


def _heads(scores: Tensor, top: Patched) -> Picture:
    def draw(ax: Any) -> None:
        _heat(ax, scores.float().cpu(), "attention heads")
        ax.set(xlabel="head", xticks=range(scores.shape[1]))

    return picture(
        draw,
        size=(5.2, 1.6 + 0.2 * scores.shape[0]),
        caption="How much of the behaviour each attention head carries over all positions, as relevance patching estimates it; the table has what the highest bring back when patched.",
        alt=f"Heat map of layer by head; patched, head {top.node.unit} of layer {top.node.layer} brings back most: {top.score:.2f}.",
    )


def _heat(ax: Any, values: Tensor, title: str) -> None:
    top = float(values.abs().max()) or 1.0
    image = ax.imshow(
        values.numpy(),
        cmap=shades(ax, "C0", below="C1"),
        vmin=-top,
        vmax=top,
        aspect="auto",
        interpolation="nearest",
    )
    ax.figure.colorbar(image, ax=ax, shrink=0.85).outline.set_visible(False)
    ax.set(title=title, ylabel="layer", yticks=range(values.shape[0]))


def _check(ours: PatchingResult, truth: PatchingResult) -> Picture:
    kinds = list(truth.scores)

    def draw(axes: Any) -> None:
        for ax, kind in zip(axes.flat, kinds):
            x, y = truth.scores[kind].flatten().tolist(), ours.scores[kind].flatten().tolist()
            low, high = min([*x, *y]), max([*x, *y])
            ax.plot([low, high], [low, high], color="C7", linewidth=1)
            ax.scatter(x, y, s=9, color="C0")
            ax.set(title=_NAMES[kind], xlabel="activation patching", ylabel="relevance patching")

    return picture(
        draw,
        panels=(1, len(kinds)),
        size=(9.6, 3.1),
        caption="Is it true? Every place as relevance patching scores it, against what patching it really does. On the line they agree.",
        alt=f"{len(kinds)} scatter plots of relevance patching against activation patching, one a kind of place.",
    )


def _most_important(patched: Sequence[Patched], labels: Sequence[str], pairs: int) -> Table:
    rows = []
    for each in patched:
        node = each.node
        where = (
            "all"
            if node.position is None
            else f"{node.position} ({_token_text(labels[node.position], 16)})"
            if node.position < len(labels)
            else node.position
        )
        unit = "" if node.unit is None else f" {node.unit}"
        interval = (
            f"{compact(each.interval[0])} to {compact(each.interval[1])}"
            if math.isfinite(each.interval[0])
            else "–"
        )
        rows.append([f"{_NAMES[node.kind]}{unit}", node.layer, where, each.score, interval, node.score])
    return Table(
        f"The components ranked highest, each patched by itself ({pairs} pairs)",
        ["component", "layer", "position", "share brought back", "95 % interval", "estimate"],
        rows,
    )


def _agreement(agreement: dict[str, Any]) -> Table:
    rows = [
        [_NAMES[kind], a.pearson, a.spearman, a.rmse, percent(a.overlap, 0)] for kind, a in agreement.items()
    ]
    return Table(
        "Agreement with activation patching",
        ["kind of place", "Pearson", "Spearman", "RMSE", "top 10 in common"],
        rows,
    )
