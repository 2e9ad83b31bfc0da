"""Where does it look, is that picture of it true, and does it rely on one fixed place of the image, or on a cue that is anywhere?

Saliency maps (Rebuffi et al. 2020, arXiv 2004.02866, and its relatives) on hits and misses; deletion and insertion (Petsiuk et al. 2018)
against random maps on the same images, as a paired difference, with the other scores of :mod:`lineament.audit.map_checks`; and the interventions of :mod:`lineament.audit.patch_exchange` (one place) and :mod:`lineament.audit.cue_exchange` (a patch that
moves, colour, brightness, frequencies, the object's place). Maps only propose: that the network *relies* on something is said where an intervention shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lineament.audit.cue_exchange import PATCH, Cue, Cues, exchange_cues
from lineament.audit.gaze_pictures import cue_picture, exchange_picture, frame, overlay
from lineament.audit.map_checks import (
    Explain,
    Retrained,
    Truth,
    curves,
    deletion_and_insertion,
    retrained,
    scores,
    scores_table,
)
from lineament.audit.patch_exchange import Exchange, OneAnswer, examine
from lineament.audit.phrases import percent, points, spread
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.checks import InputError
from lineament.explain.faithfulness.pixel_scores import MapScores
from lineament.explain.saliency.maps import saliency
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain, printable

TITLE = "Where does it look?"
HELP = "where it looks, and whether it relies on one patch, a tint or a texture of the image"
ORDER = 20
VERDICT_ORDER = 0  # what it relies on comes first
METHOD = "normgrad"
_MAPS, _TRIALS = 256, 400
_SHOWN = 3
_LOOK = "Look at that place in your images (the section shows some). If the answer does not lie there, cover or mix that patch across the classes of the training data, train again and audit again."


@dataclass(frozen=True)
class Gaze:
    """What one patch decides (``place``) and what other cues do (``cues``), and of the maps, where there are any: their scores, retraining, and the pictures shown."""

    place: Exchange
    size: tuple[int, int]
    method: str
    cues: Cues | None = None
    faithfulness: Truth | None = None
    scores: MapScores | None = None
    diffroar: Retrained | None = None
    picked: tuple[Sequence[int], Sequence[int]] | None = None

    def to_dict(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if value is not None}
        if self.scores is not None:
            found["scores"] = self.scores.to_dict()["scores"]
        if self.cues is not None:
            found["cues"] = self.cues.to_dict()
        if self.picked is not None:
            found["picked"] = dict(zip(("hits", "misses"), self.picked))
        return found


def applies(subject: Subject) -> str:
    if subject.task != "classification":
        return f"Maps explain the score of the class that it names; this network answers with {'several labels' if subject.task == 'multi-label' else 'real values'}."
    if not subject.images:
        return "Its inputs are no images (batch, channels, height, width) of at least 4 x 4 pixels, so there is no place to look at."
    return ""


def look(subject: Subject) -> Section:
    rows = subject.subset(subject.affordable(3e12, 4, most=_MAPS), salt=4)
    trouble = ""
    try:
        maps = _maps(subject, rows)
    except InputError as error:
        # A network without a map (its layers mix all places at once) can still be intervened on.
        maps, trouble = None, str(error)
    mean_map = (
        None if maps is None else (maps / maps.flatten(1).sum(1).clamp_min(1e-30)[:, None, None]).mean(0)
    )
    height, width = subject.inputs(rows[:1]).shape[-2:]
    trial_rows = subject.subset(subject.affordable(6e12, 120, most=_TRIALS, least=48), salt=5)
    flat = torch.ones(height, width)
    place = examine(subject, trial_rows, flat if mean_map is None else mean_map)
    cues = exchange_cues(subject, None if maps is None else _explain(subject))
    found = Gaze(place, (height, width), subject.method, cues)
    deciding = _deciding(found)
    sentence = _place_sentence(subject, found) + " " + _cues_sentence(subject, cues)
    pictures = [exchange_picture(subject, trial_rows, place), frame(subject, rows, mean_map, place)]
    tables: list[Table] = []
    if maps is None:
        sentence += f" Saliency maps are missing: {trouble}"
        if subject.faithfulness == "diffroar":
            sentence += " DiffROAR judges maps, so that there was nothing to retrain on."
    else:
        explain = _explain(subject)
        truth, judged = deletion_and_insertion(subject, rows, maps), scores(subject, rows, explain)
        sentence += " " + truth.sentence(subject.method)
        tables.append(scores_table(judged))
        anew = retrained(subject, explain) if subject.faithfulness == "diffroar" else None
        if anew is not None:
            sentence += " " + anew.sentence
            tables += anew.tables()
            pictures += anew.pictures()
        hits, misses = _picked(subject, rows)
        shown = (rows[hits].tolist(), rows[misses].tolist())
        found = replace(found, faithfulness=truth, scores=judged, diffroar=anew, picked=shown)
        pictures += [overlay(subject, rows, maps, hits, misses), curves(truth)]
    tables[:0] = [_table(place), *([_cues_table(subject, cues)] if cues else [])]
    pictures += [cue_picture(subject, cues, cue) for cue in deciding[:1] if cues]
    number, unit = _headline(subject, found, deciding)
    trusted = found.faithfulness is not None and found.faithfulness.better_than_random
    return Section(
        status="warning"
        if place.decides or _one(found) or deciding
        else "note"
        if place.matters or not trusted
        else "good",
        number=number,
        unit=unit,
        sentence=sentence,
        pictures=pictures,
        tables=tables,
        numbers=plain(found),
        findings=[_finding(subject, found), *(_cue_finding(subject, cues, cue) for cue in deciding if cues)],
    )


def _one(found: Gaze) -> OneAnswer | None:
    """The answer that goes with one fixed place, where not all do."""
    one = found.place.one
    return one if one is not None and one.decides and not found.place.decides else None


def _deciding(found: Gaze) -> list[Cue]:
    """The cues that answers follow, of each answer one: what lies in a place or a patch has a brightness and a texture too, so these come first."""
    one, told = _one(found), set[int | None]()
    if one is not None:
        told.add(one.answer)
    chosen = []
    for cue in sorted(
        found.cues.deciding if found.cues else [], key=lambda cue: (cue.name != PATCH, -cue.excess[0])
    ):
        outdone = found.place.decides and (cue.name == PATCH or cue.followed[0] < found.place.followed)
        if cue.answer not in told and not outdone:
            chosen.append(cue)
            told.add(cue.answer)
    return chosen


def _headline(subject: Subject, found: Gaze, deciding: Sequence[Cue]) -> tuple[str, str]:
    v, one = found.place, _one(found)
    if v.decides:
        return percent(v.followed, 0), "of answers follow one small patch of the image"
    if one is not None:
        return percent(
            one.followed[0], 0
        ), f"of answers become {_quoted(subject, one.answer)} with one small patch of the image"
    if deciding:
        cue = deciding[0]
        become = "follow" if cue.answer is None else f"become {_quoted(subject, cue.answer)} with"
        return percent(cue.followed[0], 0), f"of answers {become} the {cue.name} of another image"
    return percent(
        max(v.lost_excess[0], 0.0), 0
    ), "of accuracy hangs on the most decisive small patch, beyond patches elsewhere"


def _quoted(subject: Subject, answer: int) -> str:
    return f"“{printable(subject.class_name(answer), limit=40)}”"


def _interval(x: tuple[float, float, float]) -> str:
    return f"{percent(x[0])} ({percent(x[1])} to {percent(x[2])})"


def _finding(subject: Subject, found: Gaze) -> Finding:
    v, where = found.place, found.place.window.where(*found.size)
    one = _one(found)
    if one is not None:
        return Finding(
            "warning",
            f"It takes one small patch at {one.window.where(*found.size)}, {percent(one.window.area(*found.size), 0)} of the image, for {_quoted(subject, one.answer)}: a shortcut, unless that is where the answer lies. "
            f"Taking that patch alone from images answered so turns {percent(one.followed[0], 0)} of {one.samples} other answers into it (95 % interval {percent(one.followed[1], 0)} to "
            f"{percent(one.followed[2], 0)}); taking it from others {percent(one.control, 0)}.",
            advice=_LOOK,
            key="place",
        )
    if v.decides:
        return Finding(
            "warning",
            f"It relies on one small patch at {where}, {percent(v.area, 0)} of the image: a shortcut, unless that is where the answer lies. Taking that patch alone from another image "
            f"turns {percent(v.followed, 0)} of {v.samples} answers into the answer to that image; patches elsewhere turn {percent(v.others_followed, 0)} ({_beyond(v.followed_excess)}). "
            f"Accuracy falls from {percent(v.accuracy)} to {percent(v.swapped_accuracy)}.",
            advice=_LOOK,
            key="place",
        )
    if v.matters:
        return Finding(
            "note",
            f"Where it looks matters most at {where}: taking that patch from another image {_costs(v.accuracy - v.swapped_accuracy)} on {v.samples} images, {_interval(v.lost_excess)} more than patches elsewhere. No patch at one fixed place decides the answer.",
            advice="See whether what you ask about always lies there; if not, vary its place in the training data.",
            key="place matters",
        )
    also = ""
    if found.cues is not None and not found.cues.deciding:
        also = f" Nor do answers follow {_listed([cue.name for cue in found.cues.tried], 'or')}. Other cues were not tested."
    return Finding(
        "good",
        f"It relies on no single fixed place of the image: of {v.windows} patches tried, none decides the answers to {v.samples} images.{also}",
        key="no place",
    )


def _cue_finding(subject: Subject, cues: Cues, cue: Cue) -> Finding:
    whose = "that" if cue.answer is None else _quoted(subject, cue.answer)
    from_one = "another image" if cue.answer is None else f"images answered {whose}"
    into = "the answer to that image" if cue.answer is None else whose
    change = (
        f"Cutting out of {from_one} the patch of {_area(subject, cues)} that their answer hangs on, and pasting it elsewhere into another,"
        if cue.name == PATCH
        else f"Giving images the {cue.name} of {from_one}"
    )
    keep = (
        f"; of images answered {whose}, {percent(cue.kept[0], 0)} keep that answer without it"
        if cue.answer is not None
        else ""
    )
    relies = "on a small patch wherever it lies" if cue.name == PATCH else f"on the {cue.name} of the image"
    only = "" if cue.answer is None else f" for {whose}"
    return Finding(
        "warning",
        f"It relies {relies}{only}: a shortcut, unless that is what you ask about. {change} turns {percent(cue.followed[0], 0)} of {cue.samples} answers into {into} "
        f"(95 % interval {percent(cue.followed[1], 0)} to {percent(cue.followed[2], 0)}); {_listed_controls(cue)}{keep}.",
        advice=f"Look at the images that the section shows. If the {'patch' if cue.name == PATCH else cue.name} says nothing about what you ask, vary it within each class of the training data, train again and audit again.",
        key=f"cue {cue.name}",
    )


def _listed_controls(cue: Cue) -> str:
    return _listed(
        [f"the same with {name}, {percent(value, 0)}" for name, value in cue.controls.items()], "and"
    )


def _listed(words: Sequence[str], last: str) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def _area(subject: Subject, cues: Cues) -> str:
    height, width = subject.inputs(torch.tensor([0])).shape[-2:]
    return f"{percent(cues.patch[0] * cues.patch[1] / (height * width), 0)} of the image"


def _cues_sentence(subject: Subject, cues: Cues | None) -> str:
    """What the cues that lie anywhere showed, and what was not tested."""
    if cues is None:
        return "It gives all samples one answer, so that no cue could be exchanged between answers."
    names, strongest = [cue.name for cue in cues.tried], cues.tried[0]
    out = f", and {cues.left_out} answers with too few samples one by one" if cues.left_out else ""
    untested = f" Not tested: shapes, larger parts, cues that count only together{out}. A cue that decides fewer than about half of an answer's samples can go unseen."
    if not cues.deciding:
        whose = "" if strongest.answer is None else f" for {_quoted(subject, strongest.answer)}"
        return (
            f"Exchanged between images, none of these decides either: {_listed(names, 'and')} (the most: {strongest.name}{whose}, which {_interval(strongest.excess)} of {strongest.samples} "
            f"answers follow beyond the controls).{untested}"
        )
    told = []
    for cue in cues.deciding:
        whose = "all answers" if cue.answer is None else _quoted(subject, cue.answer)
        told.append(
            f"{cue.name} ({whose}: {_interval(cue.followed)} of {cue.samples} answers follow, at most {percent(max(cue.controls.values()))} with the controls)"
        )
    rest = [cue.name for cue in cues.tried if not cue.decides]
    nor = f" Not so: {_listed(rest, 'and')}." if rest else ""
    return f"Exchanged between images, answers follow the {_listed(told, 'and the')}.{nor}{untested}"


def _cues_table(subject: Subject, cues: Cues) -> Table:
    return Table(
        f"What answers follow when it is exchanged between images (patches of {_area(subject, cues)}, proposed by {cues.proposed_by})",
        (
            "cue",
            "of images answered",
            "pairs",
            "answers that follow it",
            "beyond the stronger control",
            "keep their answer without it",
            "control",
        ),
        [
            (
                cue.name,
                "anything" if cue.answer is None else subject.class_name(cue.answer),
                cue.samples,
                _interval(cue.followed),
                _interval(cue.excess),
                _interval(cue.kept),
                percent(cue.kept_control),
            )
            for cue in cues.tried
        ],
    )


def _maps(subject: Subject, rows: Tensor) -> Tensor:
    explain = _explain(subject)

    def maps(part: Tensor) -> Tensor:
        return explain(subject.inputs(part), subject.outputs[part].argmax(1))[:, 0].float().cpu()

    return torch.cat(shards.each(subject.parts(rows), maps, "saliency", bar=True))


def _explain(subject: Subject) -> Explain:
    """The maps of the chosen method, (batch, 1, height, width); without targets, of the class the model predicts."""

    def explain(x: Tensor, targets: Tensor | None = None) -> Tensor:
        maps = saliency(
            subject.model, x, targets, site=subject.gaze_site, method=subject.method, seed=subject.seed
        )
        # Signed maps speak for and against; where the network looks is both.
        return maps.abs()

    return explain


def _place_sentence(subject: Subject, found: Gaze) -> str:
    v, place = found.place, found.place.window.where(*found.size)
    area, one = percent(v.area, 0), _one(found)
    if one is not None:
        return (
            f"The network takes one fixed place of the image for {_quoted(subject, one.answer)}: a patch of {percent(one.window.area(*found.size), 0)} of the image at {one.window.where(*found.size)}. When only this patch is taken from "
            f"an image answered so, {_interval(one.followed)} of {one.samples} other answers become {_quoted(subject, one.answer)}; when it is taken from others, {percent(one.control)}."
        )
    gaze = (
        f" The maps put {percent(v.gaze_share, 0)} of their weight there, {v.gaze_share / v.area:.1f} times its share of the area."
        if v.gaze_share > 1.5 * v.area
        else ""
    )
    lost, others = v.accuracy - v.swapped_accuracy, v.accuracy - v.others_swapped_accuracy
    if v.decides:
        return (
            f"The network relies on one fixed place of the image: a patch of {area} of the image at {place}. When only this patch is taken from "
            f"another image, {percent(v.followed, 0)} of {v.samples} answers change to what the network says of that other image ({percent(v.others_followed, 0)} for patches elsewhere; {_beyond(v.followed_excess)}), and accuracy falls "
            f"from {percent(v.accuracy)} to {percent(v.swapped_accuracy)}.{gaze}"
        )
    if v.matters:
        return (
            f"The place that matters most is {place}, {area} of the image: taking it from another image {_costs(lost)} on {v.samples} images, "
            f"against {_signed(others)} for patches of the same size elsewhere ({_beyond(v.lost_excess)}); but only {percent(v.followed, 0)} of answers follow the patch, so that it alone does not decide.{gaze}"
        )
    return (
        f"No small fixed place decides: of {v.windows} patches tried, the most decisive ({place}, {area} of the image) {_costs(lost)} when taken "
        f"from another image, on {v.samples} images; patches elsewhere cost {_signed(others)} ({_beyond(v.lost_excess)}).{gaze}"
    )


def _beyond(excess: tuple[float, float, float]) -> str:
    return f"the difference {_interval(excess)}, 95 % interval"


def _costs(lost: float) -> str:
    return f"costs {points(lost)} of accuracy" if lost >= 0 else f"gains {points(lost)} of accuracy"


def _signed(lost: float) -> str:
    return points(lost) if lost >= 0 else f"−{points(lost)}"


def _table(v: Exchange) -> Table:
    return Table(
        f"What one patch decides, on {v.samples} images that did not choose it",
        ("intervention", "this patch", "other patches", "difference (95 % interval)"),
        [
            (
                "answers follow the exchanged patch",
                percent(v.followed),
                percent(v.others_followed),
                _interval(v.followed_excess),
            ),
            (
                "accuracy with the patch exchanged",
                percent(v.swapped_accuracy),
                percent(v.others_swapped_accuracy),
                _interval(v.lost_excess),
            ),
            (
                "accuracy with the patch covered",
                percent(v.covered_accuracy),
                percent(v.others_covered_accuracy),
                _interval(v.covered_excess),
            ),
        ],
    )


def _picked(subject: Subject, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in ``rows`` of some hits and some misses: spread evenly, so that nothing is picked for its looks."""
    right = subject.outputs[rows].argmax(1) == subject.targets[rows]
    hits, misses = right.nonzero().flatten(), (~right).nonzero().flatten()
    return hits[spread(len(hits), _SHOWN)], misses[spread(len(misses), _SHOWN)]
