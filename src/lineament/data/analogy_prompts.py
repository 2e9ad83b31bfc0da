"""Analogies with a distractor between question and answer: prompts of which it is known what cannot matter.

The token-level data of Zhao, Shan 2024 (arXiv 2402.00794) are of this form (Vafa et al. 2021, LongRA: word pairs of one relation in a template, a sentence in
brackets that has nothing to do with them). Templates, pairs and sentences are our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lineament.core.checks import number, require
from lineament.core.results import Readable
from lineament.data.patching_tasks import Draw

# Where {a} is named, the distractor in brackets, and the text that the answer follows.
TEMPLATES = {
    "capital": "When our plane landed in {a}, we changed some money and went straight to bed. ({d}) The next morning we took a walk through the capital,",
    "language": "My neighbor grew up in {a} and moved here as a student. ({d}) With her parents she still speaks",
    "opposite": "The teacher wrote the word {a} on the board and asked for its opposite. ({d}) A boy in the first row called out the word",
    "couple": "At the long table there was a chair for every {a}. ({d}) Next to him there was a chair for the",
}
PAIRS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "capital": (
        ("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("Russia", "Moscow"), ("Egypt", "Cairo"),
        ("England", "London"), ("Greece", "Athens"), ("Austria", "Vienna"), ("Poland", "Warsaw"), ("Portugal", "Lisbon"), ("Sweden", "Stockholm"),
        ("Norway", "Oslo"), ("Denmark", "Copenhagen"), ("Cuba", "Havana"), ("Ireland", "Dublin"), ("Hungary", "Budapest"), ("Iraq", "Baghdad"),
        ("Iran", "Tehran"), ("China", "Beijing"), ("Kenya", "Nairobi"), ("Finland", "Helsinki"), ("Peru", "Lima"),
    ),
    "language": (
        ("France", "French"), ("Germany", "German"), ("Spain", "Spanish"), ("Italy", "Italian"), ("Japan", "Japanese"), ("Russia", "Russian"),
        ("China", "Chinese"), ("Greece", "Greek"), ("Poland", "Polish"), ("Portugal", "Portuguese"), ("Sweden", "Swedish"), ("Turkey", "Turkish"),
        ("Denmark", "Danish"), ("Finland", "Finnish"), ("Korea", "Korean"), ("England", "English"),
    ),
    "opposite": (
        ("hot", "cold"), ("big", "small"), ("old", "young"), ("fast", "slow"), ("high", "low"), ("rich", "poor"), ("good", "bad"), ("strong", "weak"),
        ("dark", "light"), ("wet", "dry"), ("hard", "soft"), ("early", "late"),
    ),
    "couple": (
        ("king", "queen"), ("brother", "sister"), ("father", "mother"), ("husband", "wife"), ("uncle", "aunt"), ("prince", "princess"), ("son", "daughter"),
        ("grandfather", "grandmother"),
    ),
}  # fmt: skip
DISTRACTORS = (
    "A dog had been barking outside all night, but that is another story.",
    "My phone had run out of power the day before and I had left the charger at home.",
    "It had rained since noon and the roof of the garage was leaking again.",
    "I still owed the baker a few coins and had promised to bring them by Friday.",
    "Someone had painted the door green, and nobody would say who it was.",
    "The clock in the kitchen had stopped at ten past four and was waiting for a battery.",
)


@dataclass(frozen=True)
class AnalogyPrompts(Readable):
    """Prompts, the word that completes each (with its space), and the characters that the distractor takes: its brackets and what is between them."""

    prompts: list[str]
    answers: list[str]
    distractors: list[tuple[int, int]]
    relations: list[str]

    def __len__(self) -> int:
        return len(self.prompts)


def analogy_prompts(count: int, *, seed: int = 0) -> AnalogyPrompts:
    """Analogies in random order, each pair with its relation's template and a random distractor; no prompt twice.

    Raises:
        InputError: a count below 1, or more than there are different prompts.

    >>> made = analogy_prompts(1)
    >>> start, stop = made.distractors[0]
    >>> made.prompts[0][start], made.prompts[0][stop - 1], made.answers[0][0]
    ('(', ')', ' ')
    """
    every = [(name, pair, d) for name, pairs in PAIRS.items() for pair in pairs for d in DISTRACTORS]
    number("count", count, low=1, high=len(every), integer=True)
    order = torch.randperm(len(every), generator=Draw(seed).generator)[:count]
    prompts, answers, spans, relations = [], [], [], []
    for name, (a, answer), d in (every[k] for k in order.tolist()):
        prompt = TEMPLATES[name].format(a=a, d=d)
        start = prompt.index("(")
        prompts.append(prompt)
        answers.append(f" {answer}")
        spans.append((start, start + len(d) + 2))
        relations.append(name)
    return AnalogyPrompts(prompts, answers, spans, relations)


def tokens_inside(tokenizer: Any, text: str, span: tuple[int, int]) -> Bool[Tensor, "tokens"]:
    """Which tokens of a text, as the tokenizer gives them, have characters of their own within a span of it.

    Raises:
        InputError: a tokenizer that does not say where its tokens are (a slow one).
    """
    require(
        bool(getattr(tokenizer, "is_fast", False)),
        f"tokenizer: {type(tokenizer).__name__} does not say where its tokens are; load the fast one (use_fast=True)",
    )
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return torch.tensor([max(a, span[0]) < min(b, span[1]) for a, b in offsets])
