"""What makes an edit worth little: samples that reach the network otherwise than in training, a network that answered by chance, or other classes that it costs more than it takes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

from lineament.audit.correctness.classes import reordered
from lineament.audit.correctness.shares import share
from lineament.audit.phrases import percent, percent_interval, points, sentence
from lineament.audit.preprocessing import better_preprocessing
from lineament.core.checks import InputError
from lineament.core.statistics.shares import Interval, wilson
from lineament.edit.forgetting import Forgotten, Knowledge
from lineament.edit.unlearning import Unlearned
from lineament.load.model_and_data import ModelAndData
from lineament.report.outcome import Table

UNTRAINED = "Give the weights that were trained (`weights`), and make sure that samples reach the network as they did in training and that class numbers mean the same to both."
OTHERWISE = "Give the normalisation of its training (`normalize`), or store the samples as they were then, and edit again: until then no other number means anything."
SEARCHED = "Larger shares were tried and answer the class no less often. If it need only stay unanswered, take the head alone (lineament.edit.mute); else train again without it."
_SURE = 0.9  # a network that is right this often is not asked whether samples should reach it otherwise


@dataclass(frozen=True)
class Doubt:
    """Why answers say little of what an edit costs, and what to do first; false where there is none."""

    sentence: str = ""
    advice: str = ""

    def __bool__(self) -> bool:
        return bool(self.sentence)


NONE = Doubt()


def doubt(both: ModelAndData, names: Sequence[str]) -> Doubt:
    """What speaks against the answers of a network as it is: samples reach it otherwise than in its training, it knows another order of classes, or it is no better than chance.

    Args:
        names: of the data's classes, where nobody said their order.

    Raises:
        InputError: another order, which the order of the names would put right.
    """
    if both.task != "classification":
        return NONE
    targets, decisions = both.targets.cpu(), both.outputs.argmax(1)
    counts = torch.bincount(targets, minlength=both.width)
    overall, majority = share("all", decisions == targets), float(counts.max()) / len(targets)
    other = reordered(overall, majority, targets, decisions, len(counts))
    if other is not None:
        told = (
            f"its outputs seem to be in another order than the class numbers: it is right for {overall.counted} samples, and would be right for "
            f"{other.counted} in another order"
        )
        if names:
            first = ", ".join(map(repr, names[:3]))
            raise InputError(
                f"classes: got none, and the data's names are numbered {first} ..., but {told}; pass the names in the order of the model's outputs"
            )
        return Doubt(sentence(f"{told}: an edit of one class may meet another"), UNTRAINED)
    otherwise = better_preprocessing(both) if overall.low < _SURE else None
    if otherwise is not None:
        told = f"{otherwise.words}: samples do not reach it as they did in training, and what the edit costs cannot be told."
        return Doubt(told, OTHERWISE)
    if overall.low > majority:
        return NONE
    no_better = "is" if overall.accuracy <= majority else "may be"
    told = (
        f"As it was, the network is right for {overall.counted} samples ({overall.interval}), which {no_better} no better than always naming the most "
        f"frequent class ({percent(majority)}): what the edit costs cannot be told."
    )
    return Doubt(told, UNTRAINED)


def flattered(change: Interval) -> Doubt:
    """A smaller network that is right more often than the whole one, beyond chance: its repairs made up for something.

    >>> bool(flattered((0.02, -0.01, 0.05))), bool(flattered((0.2, 0.1, 0.3)))
    (False, True)
    """
    if change[1] <= 0:
        return NONE
    told = (
        f"The smaller network is right more often than the whole one by {points(change[0])} (95 % interval {points(change[1])} to {points(change[2])}): its repairs, measured on "
        "these samples, make up for samples that reach the whole network otherwise than in its training."
    )
    return Doubt(told, OTHERWISE)


def harm(told: Forgotten, head: Knowledge) -> tuple[str, str]:
    """What the edit did to the other classes where that is much, and what to do instead."""
    gone, lost = (
        a - b for a, b in ((told.before.forget, told.after.forget), (told.before.retain, told.after.retain))
    )
    alone = f"the head alone never answers the class and leaves the others right in {percent(head.retain)}"
    muting = "If the class need only stay unanswered, take the head alone (lineament.edit.mute); else try a smaller share."
    if lost > max(gone, 0.01):
        less = f"{'less' if gone >= 0 else 'more'} often by {points(gone)}"
        return (
            f"The edit did more harm than it removed: the class is answered {less}, and the others are right less often by {points(lost)}; {alone}.",
            muting,
        )
    if lost > 0.1:
        return f"The edit costs the other classes {points(lost)}; {alone}.", muting
    return "", "Try a larger share." if told.verdict == "kept" else ""


def pays(before: Tensor, after: Tensor, classes: int) -> bool:
    """Whether the class that lost most, of so many, is right less often by 5 points or more, and in more samples than chance explains (a sign test of those that changed, at 5 % over all classes).

    >>> was = torch.ones(40, dtype=torch.bool)
    >>> pays(was, torch.arange(40) >= 12, 10), pays(was, torch.arange(40) >= 3, 10)
    (True, False)
    """
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    if lost - won < 0.05 * len(before):
        return False
    chance = float(binomtest(lost, lost + won, 0.5, "greater").pvalue) if lost > won else 1.0
    return classes * chance < 0.05


def price(found: Unlearned) -> str:
    """Which share was taken, why, and what it costs on the samples by which it was found; empty where the user gave it."""
    if found.before is None:
        return ""
    at = next(each for each in found.tried if each.share == found.share)
    lost = (
        ""
        if at.retain is None or found.before.retain is None
        else f", and the others are right in {percent(at.retain)} where they were in {percent(found.before.retain)}"
    )
    goal = f"takes the class out of the calibrating half (answered in at most {percent(found.target or 0.0)}, half of what is allowed)"
    if found.reached:
        return f"{percent(at.share)} of the pairs is the smallest share that {goal}: it is answered in {percent(at.forget)} there{lost}."
    return (
        f"No share {goal}: at {percent(at.share)} it is still answered in {percent(at.forget)} there{lost}."
    )


def shares_tried(found: Unlearned, forget: int, retain: int) -> list[Table]:
    """What each share that was tried does to the class and to the others."""
    if found.before is None:
        return []
    rows = [
        [percent(t.share), counted(t.forget, forget), "not measured" if t.retain is None else counted(t.retain, retain)]
        for t in (found.before, *found.tried)
    ]  # fmt: skip
    title = (
        f"Shares that were tried, on the calibrating half: {forget} samples of the class and {retain} others"
    )
    return [Table(title, ["share of the pairs", "answered, the class", "right, the others"], rows)]


def counted(share: float, count: int) -> str:
    r"""A share of so many samples with its 95 % interval.

    >>> counted(0.5, 20)
    '50\xa0% (29.9\xa0% to 70.1\xa0%)'
    """
    return percent_interval((share, *wilson(round(share * count), count)))
