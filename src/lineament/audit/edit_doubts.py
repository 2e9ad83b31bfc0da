"""What makes an edit worth little: a network that answered by chance before it, or other classes that it costs more than it takes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.stats import binomtest
from torch import Tensor

from lineament.audit.correctness.classes import reordered
from lineament.audit.correctness.shares import share
from lineament.audit.phrases import percent, points, sentence
from lineament.core.checks import InputError
from lineament.edit.forgetting import Forgotten, Knowledge
from lineament.edit.unlearning import Unlearned
from lineament.load.model_and_data import ModelAndData
from lineament.report.outcome import Table

UNTRAINED = "Give the weights that were trained (`weights`), and make sure that samples reach the network as they did in training and that class numbers mean the same to both."


def doubt(both: ModelAndData, names: Sequence[str]) -> str:
    """Why the answers of a network as it is say little of what an edit costs: they are no better than chance, or of another order of classes; else empty.

    Args:
        names: of the data's classes, where nobody said their order.

    Raises:
        InputError: another order, which the order of the names would put right.
    """
    if both.task != "classification":
        return ""
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
        return sentence(f"{told}: an edit of one class may meet another")
    if overall.low > majority:
        return ""
    no_better = "is" if overall.accuracy <= majority else "may be"
    return (
        f"As it was, the network is right for {overall.counted} samples ({overall.interval}), which {no_better} no better than always naming the most "
        f"frequent class ({percent(majority)}): what the edit costs cannot be told."
    )


def harm(told: Forgotten, head: Knowledge) -> tuple[str, str]:
    """What the edit did to the other classes where that is much, and what to do instead."""
    gone, lost = (
        a - b for a, b in ((told.before.forget, told.after.forget), (told.before.retain, told.after.retain))
    )
    alone = f"the head alone never answers the class and leaves the others right in {percent(head.retain)}"
    muting = "If the class need only stay unanswered, take the head alone (lineament.edit.mute); else try a smaller `share`."
    if lost > max(gone, 0.01):
        less = f"{'less' if gone >= 0 else 'more'} often by {points(gone)}"
        return (
            f"The edit did more harm than it removed: the class is answered {less}, and the others are right less often by {points(lost)}; {alone}.",
            muting,
        )
    if lost > 0.1:
        return f"The edit costs the other classes {points(lost)}; {alone}.", muting
    return "", "Try a larger `share`." if told.verdict == "kept" else ""


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
        [percent(t.share), t.forget, "not measured" if t.retain is None else t.retain]
        for t in (found.before, *found.tried)
    ]
    title = (
        f"Shares that were tried, on the calibrating half: {forget} samples of the class and {retain} others"
    )
    return [Table(title, ["share of the pairs", "answered, the class", "right, the others"], rows)]
