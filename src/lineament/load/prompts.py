"""Prompts for a language model, as users have them: a text file, a file of prompts or of prompt pairs, or a built-in task.

A **pair** is a clean prompt and a corrupt one, token by token alike in length, with the answer that belongs to each: what a behaviour is, said by
example.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lineament.core.checks import InputError, require, show, suggest
from lineament.core.results import Readable

TASKS = ("ioi", "greater-than")
_PAIR = ("clean", "corrupt", "answer", "wrong")


@dataclass(frozen=True)
class PromptPair:
    """Two prompts, the next token that belongs to the clean one and the one that belongs to the corrupt one, with their spaces.

    >>> PromptPair("The keys", "The key", " are", " is").answer
    ' are'
    """

    clean: str
    corrupt: str
    answer: str
    wrong: str


@dataclass(frozen=True)
class Prompts(Readable):
    """Prompts to complete, and pairs where the file holds pairs; ``total`` is how many the source has, ``left_out`` why some are no prompts."""

    prompts: tuple[str, ...]
    pairs: tuple[PromptPair, ...]
    source: str
    total: int
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompts(data: str | Path, *, samples: int = 200, seed: int = 0, min_words: int = 4) -> Prompts:
    """Read prompts, at most ``samples`` of them, chosen at random where there are more.

    Args:
        data: a text file (each line of at least ``min_words`` words is a prompt); a ``.jsonl`` file, each line an object with ``"prompt"``, or
            with ``"clean"``, ``"corrupt"``, ``"answer"`` and ``"wrong"``; or ``"ioi"`` or ``"greater-than"``, pairs made here.

    Raises:
        InputError: a missing, unreadable or empty file, a line that is no such object (by its number).

    >>> made = load_prompts("ioi", samples=2)
    >>> len(made.pairs), made.pairs[0].clean == made.prompts[0]
    (2, True)
    """
    name = str(data)
    path = Path(data)
    if name in TASKS:
        pairs = _made(name, samples, seed)
        return Prompts(tuple(pair.clean for pair in pairs), tuple(pairs), f"{name} (made here)", len(pairs))
    require(
        path.is_file(),
        f"data: {name!r} does not exist; expected a .txt file of prompts, a .jsonl file of prompts or prompt pairs, or a task"
        f"{suggest(name, TASKS)}",
    )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data: {name!r} cannot be read as UTF-8 text ({error})") from error
    found, left_out = (_objects(text), []) if holds_objects(data) else _lines(text, min_words)
    require(bool(found), f"data: {name!r} holds no prompt of at least {min_words} words")
    kept = found
    if len(found) > samples:
        order = np.random.default_rng(seed).permutation(len(found))[:samples]
        kept = [found[i] for i in sorted(order.tolist())]
    pairs = tuple(item for item in kept if isinstance(item, PromptPair))
    prompts = tuple(item.clean if isinstance(item, PromptPair) else item for item in kept)
    return Prompts(prompts, pairs, path.name, len(found) + len(left_out), tuple(left_out))


def is_prompts(data: Any) -> bool:
    """Whether a name means prompts: by its ending, or as one of :data:`TASKS`."""
    return isinstance(data, (str, Path)) and (
        str(data) in TASKS or Path(data).suffix in (".txt", ".jsonl", ".ndjson")
    )


def holds_objects(data: Any) -> bool:
    """Whether a name is that of a file of one JSON object a line: prompts, or labelled rows."""
    return isinstance(data, (str, Path)) and Path(data).suffix in (".jsonl", ".ndjson")


def _lines(text: str, min_words: int) -> tuple[list[Any], list[str]]:
    """The lines that are prompts, and why others are none."""
    found: list[Any] = []
    left_out = []
    for number, line in enumerate(text.splitlines(), 1):
        count = len(line.split())
        if count >= min_words:
            found.append(line.strip())
        elif count:
            words = f"{count} word{'s' if count > 1 else ''}"
            left_out.append(
                f"line {number}, {show(line.strip(), 40)}, has {words}, expected {min_words} at least"
            )
    return found, left_out


def _objects(text: str) -> list[str | PromptPair]:
    found: list[str | PromptPair] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except ValueError as error:
            raise InputError(f"data: line {number} is no JSON ({error})") from error
        fits = isinstance(raw, dict) and all(isinstance(raw.get(key), str) and raw[key] for key in _PAIR)
        if fits:
            found.append(PromptPair(*(raw[key] for key in _PAIR)))
        elif isinstance(raw, dict) and isinstance(raw.get("prompt"), str) and raw["prompt"].strip():
            found.append(raw["prompt"])
        else:
            keys = list(raw) if isinstance(raw, dict) else show(raw)
            raise InputError(
                f"data: line {number} holds {keys}, expected an object with 'prompt', or with 'clean', 'corrupt', 'answer' and 'wrong', each a text"
            )
    return found


def _made(task: str, count: int, seed: int) -> list[PromptPair]:
    from lineament.data.patching_tasks import greater_than_pairs, ioi_pairs

    made = ioi_pairs(count, seed=seed) if task == "ioi" else greater_than_pairs(count, seed=seed)
    return [
        PromptPair(clean, corrupt, answer, wrong)
        for clean, corrupt, answer, wrong in zip(made.clean, made.corrupt, made.correct, made.wrong)
    ]
