"""Texts of which every token has a target: the tag of a word, for a token classifier, or the word that was hidden, for a masked language model.

Of a word of several tokens the first is tagged, as is usual; what has no target is -100, which PyTorch's losses ignore.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lineament.core.checks import InputError, require, show
from lineament.data.samples import Samples
from lineament.load.columns import Choose, find_column, with_groups
from lineament.load.tables import TABLES, surveyed, table_of
from lineament.load.texts import TEXTS, TextReader, between, padded, text_samples

WORDS = ("tokens", "words", *TEXTS)
TAGS = ("ner_tags", "tags", "labels", "label", "pos_tags", "upos", "chunk_tags", "targets", "target", "y")
_PLAIN = (".txt", ".conll", ".iob", ".iob2", ".bio")
_IGNORED = -100
_SHARE = 0.15


def read_token_targets(
    path: Path,
    choose: Choose,
    reader: TextReader,
    *,
    inputs: str | None,
    targets: str | None,
    groups: str | None,
) -> Samples:
    """Texts from a table, with a column of words and one of their tags; from a text file, for a masked model one text a line, else one word
    and its tag a line and an empty line behind each text (CoNLL).

    A cell holds words or tags with spaces between them, or a JSON list of them.

    Raises:
        InputError: an unreadable file, no such column, not as many words as tags.
    """
    endings = (*TABLES, *_PLAIN)
    require(
        path.suffix.lower() in endings,
        f"data: {str(path)!r} is a file of kind {path.suffix or 'unknown'!r}, expected one of {', '.join(endings)} for a network that answers for every token",
    )
    if path.suffix.lower() in _PLAIN:
        require(groups is None, f"groups: {path.name!r} has no columns; pass a .npy or .txt file")
        pairs = _plain(path, reader.task)
        rows = choose(len(pairs))
        total, cells, notes = len(pairs), [pairs[row] for row in rows], ()
    else:
        table = table_of(path)
        columns = [find_column("inputs", inputs, WORDS, table.names)]
        if reader.task == "tokens":
            others = [name for name in table.names if name != columns[0]]
            columns.append(find_column("targets", targets, TAGS, others))
        notes = (", ".join(f"{what} are column {c!r}" for what, c in zip(("texts", "tags"), columns)),)
        if groups is not None:
            columns.append(find_column("groups", groups, (), table.names))
        total, _ = surveyed(table, columns[:1])
        rows = choose(total)
        cells = list(table.walk(columns, set(rows.tolist())))
    rest: dict[str, Any] = {
        "index": torch.from_numpy(rows),
        "total": total,
        "source": path.name,
        "notes": notes,
    }
    if groups is not None:
        blank = Samples(torch.zeros(len(rows), 1), torch.zeros(len(rows)))
        named = with_groups(blank, np.array([row[-1] for row in cells]))
        rest |= {"groups": named.groups, "group_names": named.group_names}
    if reader.task == "masked":
        return masked_samples([row[0] for row in cells], reader, **rest)
    return tagged_samples(
        [listed(row[0]) for row in cells], [listed(row[1]) for row in cells], reader, **rest
    )


def tagged_samples(
    words: Sequence[Sequence[str]],
    tags: Sequence[Sequence[Any]],
    reader: TextReader,
    *,
    names: Sequence[str] = (),
    **rest: Any,
) -> Samples:
    """Samples of texts, given as words with a tag each: a class's name or number; ``rest`` are the other fields.

    Args:
        names: of the classes, in the order of their numbers; where tags are names, by default all of them in order.

    Raises:
        InputError: a text with another number of tags than words, or without words; a tag that is none of ``names``.
    """
    require(
        len(words) == len(tags), f"data: {len(words)} texts and {len(tags)} rows of tags, expected as many"
    )
    require(
        getattr(reader.tokenizer, "is_fast", False),
        "data: tags of words need a tokenizer that says where its tokens lie (a fast one of transformers)",
    )
    for number, (text, own) in enumerate(zip(words, tags), 1):
        require(
            0 < len(text) == len(own),
            f"data: text {number} has {len(text)} words and {len(own)} tags, expected as many, and one at least",
        )
    named = any(isinstance(tag, str) and not _is_number(tag) for row in tags for tag in row)
    if named and not names:
        names = sorted({str(tag) for row in tags for tag in row})
    numbers = {name: number for number, name in enumerate(names)} if named else {}
    unknown = next((tag for row in tags for tag in row if named and str(tag) not in numbers), None)
    require(
        unknown is None,
        f"targets: the tag {show(unknown)} is none of the data's own {len(names)} class names",
    )
    tokenizer = reader.tokenizer
    most = tokenizer.model_max_length if tokenizer.model_max_length < 2**20 else None
    ids, targets, cut = [], [], 0
    for text, own in zip(words, tags):
        joined, starts = _joined(text, " " if hasattr(tokenizer, "add_prefix_space") else "")
        found = tokenizer(joined, truncation=most is not None, max_length=most, return_offsets_mapping=True)
        row, taken = [_IGNORED] * len(found["input_ids"]), 0
        for place, (start, end) in enumerate(found["offset_mapping"]):
            # The first token that reaches into the next word is its own.
            if taken < len(text) and start < end and end > starts[taken]:
                row[place] = numbers[str(own[taken])] if named else int(own[taken])
                while taken < len(text) and end > starts[taken]:
                    taken += 1
        cut += taken < len(text)
        ids.append(found["input_ids"])
        targets.append(row)
    x, lengths = padded([torch.tensor([row]) for row in ids], tokenizer.pad_token_id or 0)
    y, _ = padded([torch.tensor([row]) for row in targets], _IGNORED)
    notes = [
        f"{len(ids):,} texts are read as {between(lengths)} tokens each, those of one length together, so that none is padded; "
        "the first token of a word has its tag, and the others count nowhere"
    ]
    if cut:
        notes.append(f"{cut} of {len(ids)} texts are cut after {most} tokens, the most that the model takes")
    rest["notes"] = (*rest.get("notes", ()), *notes)
    return _labelled(
        Samples(x, y, tuple(map(str, names)), lengths=lengths, argument="input_ids", **rest), "has a tag"
    )


def masked_samples(texts: Sequence[str], reader: TextReader, **rest: Any) -> Samples:
    """Samples of texts in which some tokens are hidden behind the tokenizer's mask: 15 % of each, one at least, the same for the same seed.

    Raises:
        InputError: a tokenizer without a mask.
    """
    mask: Any = getattr(reader.tokenizer, "mask_token_id", None)
    require(
        mask is not None,
        "data: the tokenizer has no mask token, behind which a masked model's words are hidden",
    )
    found = text_samples(texts, reader.tokenizer, targets=torch.zeros(len(texts)), **rest)
    x, y = found.inputs.clone(), torch.full_like(found.inputs, _IGNORED)
    special = torch.tensor(reader.tokenizer.all_special_ids)
    for k, number in enumerate(found.index.tolist()):
        length = x.shape[1] if found.lengths is None else int(found.lengths[k])
        places = (~torch.isin(x[k, :length], special)).nonzero()[:, 0]
        generator = torch.Generator().manual_seed((reader.seed * 1_000_003 + number) % 2**63)
        hidden = places[
            torch.randperm(len(places), generator=generator)[: max(1, round(_SHARE * len(places)))]
        ]
        y[k, hidden] = x[k, hidden]
        x[k, hidden] = mask
    note = f"{int((y != _IGNORED).sum()):,} tokens are hidden, {100 * _SHARE:.0f} % of each text and one at least, at random; only these are judged"
    return _labelled(replace(found, inputs=x, targets=y, notes=(*found.notes, note)), "can be hidden")


def listed(cell: Any) -> list[Any]:
    """The words or tags of a cell: a list, a JSON list, or words with spaces between them.

    >>> listed('["New York", "is"]'), listed("B-LOC O")
    (['New York', 'is'], ['B-LOC', 'O'])
    """
    if not isinstance(cell, str):
        return list(cell)
    if cell.startswith("["):
        try:
            found = json.loads(cell)
        except ValueError as error:
            raise InputError(f"data: {show(cell)} is no JSON list ({error})") from error
        return found if isinstance(found, list) else [found]
    return cell.split()


def _labelled(samples: Samples, what: str) -> Samples:
    """Without texts of which no token has a target."""
    some = (samples.targets != _IGNORED).any(1)
    require(bool(some.any()), f"data: no token of any text {what}")
    if bool(some.all()):
        return samples
    note = f"{int((~some).sum())} of {len(some)} texts are left out, in which no token {what}"
    return replace(samples[some], notes=(*samples.notes, note))


def _joined(words: Sequence[str], before: str) -> tuple[str, list[int]]:
    """The words with spaces between them, and where each begins."""
    starts, text = [], before
    for word in map(str, words):
        starts.append(len(text))
        text += f"{word} "
    return text[:-1], starts


def _plain(path: Path, task: str) -> list[tuple[Any, ...]]:
    """The texts of a file without columns, with the tags of a text's words."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data: {str(path)!r} cannot be read as UTF-8 text ({error})") from error
    if task == "masked":
        return [(line.strip(),) for line in lines if line.strip()]
    found: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line in enumerate(lines, 1):
        cells = line.split()
        if not cells or cells[0] == "-DOCSTART-":
            found.append(([], []))
            continue
        require(
            len(cells) > 1,
            f"data: line {number} of {str(path)!r} holds {show(line)}, expected a word, its tag behind it, and an empty line after each text",
        )
        found[-1][0].append(cells[0])
        found[-1][1].append(cells[-1])
    return [pair for pair in found if pair[0]]


def _is_number(text: str) -> bool:
    return text.lstrip("-").isdigit()
