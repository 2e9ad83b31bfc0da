"""Does a language model find what a long text said once? Needles in generated text: one sentence to repeat, or keys with their values to recall.

The single needle is RULER's (Hsieh et al. 2024, arXiv 2404.06654), the recall of keys is multi-query associative recall (Arora et al. 2023, arXiv 2312.04927); words
and sentences are our own. ``key_values`` are tokens for networks trained on the task, ``needles`` text for those that read English.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import number, require

_PLACES = (
    "harbour",
    "market",
    "mill",
    "garden",
    "library",
    "bridge",
    "station",
    "tower",
    "orchard",
    "bakery",
    "museum",
    "chapel",
)
_WORK = (
    "opens early",
    "was painted last year",
    "is closed on Mondays",
    "has a new roof",
    "lies by the river",
    "is full of visitors",
    "needs repairs",
)
_WHEN = (
    "In spring",
    "On most days",
    "After the rain",
    "Since last week",
    "In the evening",
    "As before",
    "By all accounts",
)


@dataclass(frozen=True)
class KeyValues:
    """``ids``: [count, tokens]; ``targets``: [count, tokens], the value behind each key that is asked for again, -100 elsewhere; ``distance``: how far back it was said."""

    ids: Tensor
    targets: Tensor
    distance: Tensor


@dataclass(frozen=True)
class Needle:
    """A text, the question at its end included, its ``answer``, and where the needle stands, from 0 (start) to 1 (end)."""

    text: str
    answer: str
    depth: float


def key_values(
    count: int,
    tokens: int,
    *,
    pairs: int = 8,
    questions: int = 4,
    vocabulary: int = 64,
    seed: int = 0,
) -> KeyValues:
    """Sequences that say keys with their values among filler, and then ask for some keys again; the next token must be the value.

    Args:
        count, tokens: of the sequences.
        pairs, questions: keys with a value, in any places before the questions; keys asked for at the end.
        vocabulary: token 0 is filler, the lower half of the others keys, the upper half values.

    >>> found = key_values(2, 16, pairs=2, questions=1)
    >>> key = found.ids[0, -2]  # asked for
    >>> before = int((found.ids[0, :-2] == key).nonzero()[0])
    >>> bool(found.ids[0, before + 1] == found.targets[0, -2]) and int(found.distance[0, -2]) == 14 - before
    True
    """
    for name, value in {"count": count, "pairs": pairs, "questions": questions}.items():
        number(name, value, low=1, integer=True)
    number("vocabulary", vocabulary, low=3, integer=True)
    keys = (vocabulary - 1) // 2
    require(pairs <= keys, f"pairs: {pairs} keys are more than the {keys} of a vocabulary of {vocabulary}")
    require(questions <= pairs, f"questions: got {questions}, expected no more than pairs={pairs}")
    needed = 2 * (pairs + questions)
    require(tokens >= needed, f"tokens: got {tokens}, expected at least {needed} for {pairs} pairs and {questions} questions")  # fmt: skip
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    body = tokens - 2 * questions
    ids, targets = torch.zeros(count, tokens, dtype=torch.long), torch.full((count, tokens), -100)
    distance = torch.zeros(count, tokens, dtype=torch.long)
    for row in range(count):
        names = 1 + torch.randperm(keys, generator=generator)[:pairs]
        values = 1 + keys + torch.randint(vocabulary - 1 - keys, (pairs,), generator=generator)
        # Places of pairs without overlap: drawn among the free slots, then spread by the pairs before.
        free = torch.randperm(body - pairs, generator=generator)[:pairs].sort().values
        places = free + torch.arange(pairs)
        ids[row, places], ids[row, places + 1] = names, values
        asked = torch.randperm(pairs, generator=generator)[:questions]
        at = body + 2 * torch.arange(questions)
        ids[row, at], ids[row, at + 1] = names[asked], values[asked]
        targets[row, at] = values[asked]
        distance[row, at] = at - places[asked]
    return KeyValues(ids, targets, distance)


def needles(count: int, words: int, *, depth: float | None = None, seed: int = 0) -> list[Needle]:
    """Generated English of about ``words`` words with one fact in it, and the question at the end.

    Args:
        depth: where the fact stands, 0 to 1; by default each text has it elsewhere, evenly spread.

    >>> found = needles(1, 100, depth=0.5)[0]
    >>> found.text.count(found.answer), found.text.endswith("the secret number is")
    (1, True)
    """
    number("count", count, low=1, integer=True)
    number("words", words, low=20, integer=True)
    if depth is not None:
        number("depth", depth, low=0, high=1)
    draw, found = random.Random(checks.seed("seed", seed)), []
    for k in range(count):
        sentences, many = [], 0
        while many < words:
            sentence = f"{draw.choice(_WHEN)} the {draw.choice(_PLACES)} {draw.choice(_WORK)}."
            sentences.append(sentence)
            many += sentence.count(" ") + 1
        place = depth if depth is not None else (k + 0.5) / count
        answer, owner = str(draw.randrange(10_000, 100_000)), draw.choice(_PLACES)
        sentences.insert(round(place * len(sentences)), f"The secret number of the {owner} is {answer}.")
        question = f"Of the {owner} the secret number is"
        found.append(Needle(" ".join([*sentences, question]), f"{answer}", place))
    return found
