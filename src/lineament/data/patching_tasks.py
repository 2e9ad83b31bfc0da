"""Tasks whose circuits are studied, as pairs of prompts alike token by token: indirect object, greater-than, induction.

Wang et al. 2022 (arXiv 2211.00593) and Hanna et al. 2023 (arXiv 2305.00586) for the first two; templates and lists are our own. As text for models with a real
vocabulary, and as tokens of a small vocabulary for models that are trained in minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lineament.core.checks import number, one_of, require
from lineament.core.results import Readable

NAMES = (
    "Alice", "Anna", "Arthur", "Ben", "Carl", "Clara", "Daniel", "David", "Emma", "Frank", "George", "Grace", "Henry", "Jack", "James", "Jane", "John",
    "Julia", "Kate", "Laura", "Lewis", "Lucy", "Maria", "Mark", "Martin", "Mary", "Paul", "Peter", "Robert", "Rose", "Sarah", "Simon", "Tom", "Victor",
)  # fmt: skip
PLACES = (
    "school",
    "church",
    "library",
    "market",
    "office",
    "station",
    "garden",
    "museum",
    "harbor",
    "bridge",
)
THINGS = ("book", "letter", "ring", "key", "lamp", "coat", "drink", "map", "flower", "coin")
# {A} and {B} are introduced in one order or the other, {S} acts, and the prompt ends before the other name.
TEMPLATES = (
    "When {A} and {B} arrived at the {place}, {S} handed the {thing} to",
    "After {A} and {B} had met at the {place}, {S} decided to give a {thing} to",
    "While {A} and {B} were waiting near the {place}, {S} passed the {thing} to",
    "Then {A} and {B} walked past the {place}, and {S} offered a {thing} to",
    "Yesterday {A} and {B} found a {thing} by the {place}, so {S} gave it to",
    "Before {A} and {B} left the {place}, {S} sold the {thing} to",
)
EVENTS = ("war", "journey", "siege", "reign", "trial", "strike", "voyage", "dispute", "drought", "project")


@dataclass(frozen=True)
class TextPairs(Readable):
    """Pairs of prompts as text.

    Attributes:
        clean, corrupt: the prompts.
        correct, wrong: the word that follows the clean one and the one that follows the corrupt one, each with its space.
        task: what they are pairs of.
    """

    clean: list[str]
    corrupt: list[str]
    correct: list[str]
    wrong: list[str]
    task: str

    def __len__(self) -> int:
        return len(self.clean)


@dataclass(frozen=True)
class TokenPairs(Readable):
    """Pairs of prompts as tokens, and their answers.

    Attributes:
        clean, corrupt: (batch, positions) token numbers.
        correct, wrong: (batch,) the token that follows the clean prompt and the one that follows the corrupt one.
        vocabulary: the word of each token.
        task: what they are pairs of.
        right: of greater-than, (batch, vocabulary) whether each token would be a right answer.
    """

    clean: Int[Tensor, "batch positions"]
    corrupt: Int[Tensor, "batch positions"]
    correct: Int[Tensor, "batch"]
    wrong: Int[Tensor, "batch"]
    vocabulary: list[str]
    task: str
    right: Bool[Tensor, "batch vocabulary"] | None = None

    def __len__(self) -> int:
        return len(self.clean)


def ioi_pairs(
    count: int,
    *,
    order: Literal["ABBA", "BABA", "both"] = "both",
    corrupt: Literal["swap", "others"] = "swap",
    seed: int = 0,
) -> TextPairs:
    """Indirect object identification: "When Mary and John ... John gave a drink to" -> " Mary".

    Args:
        order: the repeated name comes second (``"ABBA"``: object, subject ... subject), first (``"BABA"``), or half of each.
        corrupt: the other name acts instead, so that the answers change places (``"swap"``), or three unrelated names (``"others"``).

    Raises:
        InputError: a count below 1 or an unknown choice.

    >>> pairs = ioi_pairs(1, order="ABBA", seed=3)
    >>> pairs.clean[0].count(pairs.wrong[0]), pairs.clean[0].count(pairs.correct[0])
    (2, 1)
    """
    number("count", count, low=1, integer=True)
    one_of("order", order, ("ABBA", "BABA", "both"))
    one_of("corrupt", corrupt, ("swap", "others"))
    draw = Draw(seed)
    clean, other, correct, wrong = [], [], [], []
    for k in range(count):
        template = draw.one(TEMPLATES)
        names = draw.several(NAMES, 5)
        words = {"place": draw.one(PLACES), "thing": draw.one(THINGS)}
        subject, indirect = names[:2]
        first = order == "BABA" or (order == "both" and k % 2 == 1)
        a, b = (subject, indirect) if first else (indirect, subject)
        clean.append(template.format(A=a, B=b, S=subject, **words))
        if corrupt == "swap":
            other.append(template.format(A=a, B=b, S=indirect, **words))
        else:
            other.append(template.format(A=names[2], B=names[3], S=names[4], **words))
        correct.append(f" {indirect}")
        wrong.append(f" {subject}")
    return TextPairs(clean, other, correct, wrong, f"indirect object, {order}")


def greater_than_pairs(count: int, *, seed: int = 0) -> TextPairs:
    """Greater-than: "The war lasted from the year 1741 to the year 17" -> a two-digit year above 41; corrupt begins in 01.

    ``correct`` and ``wrong`` are the years next above and below, for a logit difference; the metric of the paper is
    :func:`lineament.explain.patching.metrics.probability_difference` over all two-digit years.

    >>> greater_than_pairs(1).corrupt[0][-2:]
    '17'
    """
    number("count", count, low=1, integer=True)
    draw = Draw(seed)
    clean, other, correct, wrong = [], [], [], []
    for _ in range(count):
        event, century, year = draw.one(EVENTS), draw.one(("17",)), 2 + draw.below(96)
        clean.append(f"The {event} lasted from the year {century}{year:02d} to the year {century}")
        other.append(f"The {event} lasted from the year {century}01 to the year {century}")
        correct.append(f"{year + 1:02d}")
        wrong.append(f"{year - 1:02d}")
    return TextPairs(clean, other, correct, wrong, "greater-than")


def synthetic_ioi(
    count: int, *, names: int = 30, fillers: int = 20, length: int = 12, seed: int = 0
) -> TokenPairs:
    """Indirect object as tokens: BOS, two names at positions 2 and 4, one of them again at 8, fillers elsewhere, END; the answer is the other name.

    The corrupt prompt repeats the other name.

    Raises:
        InputError: fewer than two names, no filler, or fewer than 10 tokens.

    >>> pairs = synthetic_ioi(1)
    >>> int((pairs.clean == pairs.corrupt).sum()), int(pairs.clean[0, 8] == pairs.wrong[0])
    (11, 1)
    """
    number("count", count, low=1, integer=True)
    number("names", names, low=2, integer=True)
    number("fillers", fillers, low=1, integer=True)
    number("length", length, low=10, integer=True)
    draw = Draw(seed)
    vocabulary = [
        "<bos>",
        "<end>",
        *(f"name{k}" for k in range(names)),
        *(f"word{k}" for k in range(fillers)),
    ]
    clean = 2 + names + draw.integers(fillers, (count, length))
    clean[:, 0], clean[:, -1] = 0, 1
    first = draw.integers(names, (count,))
    second = (first + 1 + draw.integers(names - 1, (count,))) % names
    both = 2 + torch.stack([first, second], 1)
    clean[:, 2], clean[:, 4] = both[:, 0], both[:, 1]
    repeated = draw.integers(2, (count,))
    rows = torch.arange(count)
    clean[:, 8] = both[rows, repeated]
    corrupt = clean.clone()
    corrupt[:, 8] = both[rows, 1 - repeated]
    return TokenPairs(
        clean, corrupt, both[rows, 1 - repeated], both[rows, repeated], vocabulary, "indirect object"
    )


def synthetic_greater_than(
    count: int, *, years: int = 60, fillers: int = 20, length: int = 8, seed: int = 0
) -> TokenPairs:
    """Greater-than as tokens: BOS, a year at position 2, fillers, END; right is every year above it. Corrupt: the first year.

    >>> pairs = synthetic_greater_than(1, years=10)
    >>> int(pairs.right.sum()) == 10 - 1 - (int(pairs.clean[0, 2]) - 2)
    True
    """
    number("count", count, low=1, integer=True)
    number("years", years, low=4, integer=True)
    number("fillers", fillers, low=1, integer=True)
    number("length", length, low=5, integer=True)
    draw = Draw(seed)
    vocabulary = [
        "<bos>",
        "<end>",
        *(f"year{k}" for k in range(years)),
        *(f"word{k}" for k in range(fillers)),
    ]
    clean = 2 + years + draw.integers(fillers, (count, length))
    clean[:, 0], clean[:, -1] = 0, 1
    year = 1 + draw.integers(years - 2, (count,))
    clean[:, 2] = 2 + year
    corrupt = clean.clone()
    corrupt[:, 2] = 2
    tokens = torch.arange(len(vocabulary))
    right = (tokens > clean[:, 2:3]) & (tokens < 2 + years)
    return TokenPairs(clean, corrupt, 2 + year + 1, 2 + year - 1, vocabulary, "greater-than", right)


def synthetic_induction(count: int, *, symbols: int = 40, length: int = 12, seed: int = 0) -> TokenPairs:
    """Induction as tokens: BOS, distinct symbols, the last of them a repetition of an earlier one; the answer is what followed it. Corrupt: another follower.

    >>> pairs = synthetic_induction(1, length=6)
    >>> at = int((pairs.clean[0, :-1] == pairs.clean[0, -1]).nonzero())
    >>> bool(pairs.clean[0, at + 1] == pairs.correct[0]), bool(pairs.corrupt[0, at + 1] == pairs.wrong[0])
    (True, True)
    """
    number("count", count, low=1, integer=True)
    number("length", length, low=5, integer=True)
    number("symbols", symbols, low=length, integer=True)
    draw = Draw(seed)
    order = draw.integers(2**31, (count, symbols)).argsort(1)[:, : length - 1]
    clean = torch.cat([torch.zeros(count, 1, dtype=torch.long), 1 + order], 1)
    at = 1 + draw.integers(length - 3, (count,))
    rows = torch.arange(count)
    other = clean[:, -1].clone()
    clean[:, -1] = clean[rows, at]
    corrupt = clean.clone()
    corrupt[rows, at + 1] = other
    vocabulary = ["<bos>", *(f"symbol{k}" for k in range(symbols))]
    return TokenPairs(clean, corrupt, clean[rows, at + 1], other, vocabulary, "induction")


def tokenizer_for(vocabulary: Sequence[str]) -> Any:
    """A word-level Hugging Face tokenizer for a small vocabulary, to be saved beside a model.

    Raises:
        ImportError: the extra ``lm`` is not installed.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: k for k, word in enumerate(vocabulary)}, unk_token=vocabulary[0])
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=vocabulary[0], eos_token=vocabulary[1])


def save_language_model(model: Any, vocabulary: Sequence[str], folder: str | Path) -> Path:
    """Write a model and the tokenizer of its vocabulary as an ordinary Hugging Face directory; returns the folder.

    Raises:
        InputError: more words than the model has tokens.
    """
    require(
        model.get_input_embeddings().num_embeddings >= len(vocabulary),
        f"vocabulary: {len(vocabulary)} words are more than the model's {model.get_input_embeddings().num_embeddings} tokens",
    )
    place = Path(folder)
    model.save_pretrained(place)
    tokenizer_for(vocabulary).save_pretrained(place)
    return place


class Draw:
    """Random choices from one generator."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(number("seed", seed, integer=True))

    def below(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def one(self, choices: Sequence[str]) -> str:
        return choices[self.below(len(choices))]

    def several(self, choices: Sequence[str], count: int) -> list[str]:
        return [
            str(choices[i]) for i in torch.randperm(len(choices), generator=self.generator)[:count].tolist()
        ]

    def integers(self, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)
