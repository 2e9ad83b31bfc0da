"""Subject-verb agreement as pairs of prompts: the clean one and the same with the subject's number flipped, so that the right verb form changes.

The four constructions on which Marks et al. 2024 (arXiv 2403.19647) find circuits of features: ``simple`` ("The baker" -> " is"), ``rc`` (a relative clause between
subject and verb), ``within_rc`` (the verb inside the clause, whose subject is the nearer noun) and ``nounpp`` (a prepositional phrase between them). Word
lists are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from lineament.core.checks import InputError, number, one_of
from lineament.core.text_parts import one_token
from lineament.data.patching_tasks import Draw, TextPairs, TokenPairs

Construction = Literal["simple", "rc", "within_rc", "nounpp"]
Attractor = Literal["same", "opposite", "either"]
CONSTRUCTIONS = ("simple", "rc", "within_rc", "nounpp")

# (singular, plural), of people for both nouns, and things for the noun behind a preposition.
PEOPLE = (
    ("baker", "bakers"), ("boy", "boys"), ("brother", "brothers"), ("captain", "captains"), ("doctor", "doctors"), ("driver", "drivers"), ("farmer", "farmers"),
    ("friend", "friends"), ("girl", "girls"), ("guard", "guards"), ("king", "kings"), ("lawyer", "lawyers"), ("leader", "leaders"), ("officer", "officers"),
    ("player", "players"), ("queen", "queens"), ("singer", "singers"), ("sister", "sisters"), ("student", "students"), ("teacher", "teachers"),
    ("uncle", "uncles"), ("visitor", "visitors"), ("worker", "workers"), ("writer", "writers"),
)  # fmt: skip
THINGS = (
    ("car", "cars"), ("chair", "chairs"), ("door", "doors"), ("gate", "gates"), ("house", "houses"), ("picture", "pictures"), ("river", "rivers"),
    ("road", "roads"), ("table", "tables"), ("tree", "trees"), ("wall", "walls"), ("window", "windows"),
)  # fmt: skip
PREPOSITIONS = ("near", "behind", "beside", "by")
# What a clause's subject does to the other noun, and what any subject does.
TRANSITIVE = (
    ("knows", "know"), ("likes", "like"), ("sees", "see"), ("hates", "hate"), ("helps", "help"), ("follows", "follow"), ("loves", "love"), ("wants", "want"),
)  # fmt: skip
FINITE = (("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"))
Forms = Sequence[tuple[str, str]]


def agreement_pairs(
    count: int,
    construction: Construction,
    *,
    attractor: Attractor = "either",
    tokenizer: Any = None,
    seed: int = 0,
) -> TextPairs:
    """Subject-verb agreement as text: "The teachers near the window" -> " are"; the corrupt prompt has the subject in the other number.

    Args:
        construction: ``"simple"``, ``"rc"`` ("The teachers that the king likes" -> " are"), ``"within_rc"`` ("The teachers that the king" -> " likes") or ``"nounpp"``.
        attractor: the other noun's number, alike in both prompts: the clean subject's, the opposite, or either at random.
        tokenizer: leave out nouns whose two forms take different numbers of tokens, and verbs of which a form takes more than one.

    Raises:
        InputError: a count below 1, an unknown choice, or a tokenizer that leaves no word of a kind.

    >>> pairs = agreement_pairs(2, "within_rc", seed=1)
    >>> [a.split()[:4] == b.split()[:4] for a, b in zip(pairs.clean, pairs.corrupt)], pairs.correct[0] != pairs.wrong[0]
    ([True, True], True)
    """
    people, things, transitive, finite = (
        _fitting(name, forms, tokenizer, single=name == "verbs")
        for name, forms in (("nouns", PEOPLE), ("nouns", THINGS), ("verbs", TRANSITIVE), ("verbs", FINITE))
    )
    clean, other, correct, wrong = [], [], [], []
    for words, flipped, right, false in _drawn(
        count, construction, attractor, seed, people, things, transitive, finite, PREPOSITIONS
    ):
        for texts, sentence in ((clean, words), (other, flipped)):
            texts.append(" ".join(["The", *sentence[1:]]))
        correct.append(f" {right}")
        wrong.append(f" {false}")
    return TextPairs(clean, other, correct, wrong, f"agreement, {construction}")


def synthetic_agreement(
    count: int,
    construction: Construction,
    *,
    attractor: Attractor = "either",
    nouns: int = 12,
    verbs: int = 4,
    seed: int = 0,
) -> TokenPairs:
    """Subject-verb agreement as tokens of a small vocabulary: BOS, the words of :func:`agreement_pairs`; right is every verb form in the subject's number.

    Args:
        nouns, verbs: how many of each list are used: people (as many things), and verbs of either kind.

    Raises:
        InputError: counts that the lists cannot give, or an unknown choice.

    >>> pairs = synthetic_agreement(1, "simple")
    >>> [pairs.vocabulary[t].rstrip("s") for t in pairs.clean[0]] == [pairs.vocabulary[t].rstrip("s") for t in pairs.corrupt[0]]
    True
    """
    number("nouns", nouns, low=2, high=len(THINGS), integer=True)
    number("verbs", verbs, low=1, high=len(FINITE), integer=True)
    lists = PEOPLE[:nouns], THINGS[:nouns], TRANSITIVE[:verbs], FINITE[:verbs]
    vocabulary = ["<bos>", "<end>", "the", "that", *PREPOSITIONS]
    vocabulary += [form for forms in lists for pair in forms for form in pair]
    place = {word: k for k, word in enumerate(vocabulary)}
    drawn = _drawn(count, construction, attractor, seed, *lists, PREPOSITIONS)
    clean = torch.tensor([[0, *(place[word] for word in row[0])] for row in drawn])
    corrupt = torch.tensor([[0, *(place[word] for word in row[1])] for row in drawn])
    right = torch.zeros(len(drawn), len(vocabulary), dtype=torch.bool)
    answers = lists[2] if construction == "within_rc" else lists[3]
    for row, (_, _, correct, _) in enumerate(drawn):
        plural = any(correct == pair[1] for pair in answers)
        right[row, [place[pair[int(plural)]] for pair in answers]] = True
    correct = torch.tensor([place[row[2]] for row in drawn])
    wrong = torch.tensor([place[row[3]] for row in drawn])
    return TokenPairs(clean, corrupt, correct, wrong, vocabulary, f"agreement, {construction}", right)


def _drawn(
    count: int, construction: str, attractor: str, seed: int, people: Forms, things: Forms, transitive: Forms, finite: Forms,
    prepositions: Sequence[str],
) -> list[tuple[list[str], list[str], str, str]]:  # fmt: skip
    """Words of the clean and the corrupt prompt, and the verb forms that follow them; subjects are singular and plural in turn."""
    number("count", count, low=1, integer=True)
    one_of("construction", construction, CONSTRUCTIONS)
    one_of("attractor", attractor, ("same", "opposite", "either"))
    draw = Draw(seed)
    rows = []
    for k in range(count):
        mine, first = k % 2, draw.below(len(people))
        subject = people[first]
        second = people[(first + 1 + draw.below(len(people) - 1)) % len(people)]
        thing, verb = things[draw.below(len(things))], transitive[draw.below(len(transitive))]
        answer = finite[draw.below(len(finite))]
        preposition = draw.one(prepositions)
        other = {"same": mine, "opposite": 1 - mine, "either": draw.below(2)}[attractor]

        forms = verb if construction == "within_rc" else answer
        parts = (subject, second, thing, verb, preposition)
        both = [_words(construction, side, other, *parts) for side in (mine, 1 - mine)]
        rows.append((both[0], both[1], forms[mine], forms[1 - mine]))
    return rows


def _words(
    construction: str, mine: int, other: int, subject: Sequence[str], second: Sequence[str], thing: Sequence[str], verb: Sequence[str], preposition: str
) -> list[str]:  # fmt: skip
    """The prompt with the subject in number ``mine`` (0 singular, 1 plural) and the other noun in number ``other``."""
    if construction == "simple":
        return ["the", subject[mine]]
    if construction == "nounpp":
        return ["the", subject[mine], preposition, "the", thing[other]]
    if construction == "rc":
        return ["the", subject[mine], "that", "the", second[other], verb[other]]
    return ["the", second[other], "that", "the", subject[mine]]


def _fitting(name: str, forms: Forms, tokenizer: Any, *, single: bool) -> Forms:
    """The words whose two forms take equally many tokens, or one each."""
    if tokenizer is None:
        return forms
    sizes = [[len(one_token(tokenizer, "the", f" {word}")) for word in pair] for pair in forms]
    kept = [pair for pair, (a, b) in zip(forms, sizes) if a == b and (a == 1 or not single)]
    if len(kept) < 2:
        raise InputError(
            f"tokenizer: of the {len(forms)} {name} (such as {forms[0][0]!r} and {forms[0][1]!r}) {len(kept)} have "
            f"{'forms of one token each' if single else 'two forms of equally many tokens'}, expected at least 2; use synthetic_agreement with a model of its own vocabulary"
        )
    return kept
