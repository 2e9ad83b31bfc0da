"""Which lenses there are: one for each file of `audit/lenses/`, told from the constants at its head.

Nothing is imported for it, so that the command can list the lenses at once. A file states

- ``TITLE``, the question that its section answers, and ``HELP``, what the command says of it;
- ``ORDER``, where its section stands in the report, and ``VERDICT_ORDER`` where its findings stand among those as severe (default: ``ORDER``);
- ``METHOD``, the slug of the paper behind it, and ``SOURCE``, its title, year and arXiv id where it is none of the papers of Lineament;
- ``LANGUAGE = True`` where it looks at a language model and prompts, ``OPTIONAL = True`` where a report has nothing of it unless it applies or was
  asked for, ``ON_REQUEST = True`` where only those who ask for it get it, ``DENSE = True`` where it serves networks that answer for every pixel,
  ``EMBEDDING = True`` where it serves networks that answer with an embedding (which then are not only on request),
  and ``ALIASES``, earlier names.

It defines ``applies(subject)``, the reason why it does not apply or "", and ``look(subject) -> Section``, whose ``findings`` say what its
numbers mean.
"""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lineament.audit import lenses as package


@dataclass(frozen=True)
class Lens:
    """What a lens says of itself; its code is imported by :meth:`module`."""

    name: str
    title: str
    help: str
    order: float
    verdict_order: float
    method: str
    source: tuple[str, int, str] | None
    language: bool
    optional: bool
    dense: bool
    embedding: bool
    on_request: bool
    aliases: tuple[str, ...]

    def module(self) -> ModuleType:
        return import_module(f"{package.__name__}.{self.name}")


def all_lenses(*, language: bool | None = None) -> dict[str, Lens]:
    """All lenses by name, in the order of the report; with ``language``, only those for language models, or only the others.

    >>> list(all_lenses())[:2], list(all_lenses(language=True))
    (['accuracy', 'gaze'], ['tokens', 'components', 'attention'])
    """
    found = [
        _read(Path(folder) / f"{name}.py", name)
        for folder in package.__path__
        for _, name, _ in pkgutil.iter_modules([folder])
        if not name.startswith("_")
    ]
    found = [lens for lens in found if language is None or lens.language == language]
    return {lens.name: lens for lens in sorted(found, key=lambda lens: (lens.order, lens.name))}


def chosen(names: Sequence[str] | None, *, language: bool) -> list[Lens]:
    """The lenses of these names, or all that look at such a model but those on request, in the order of the report.

    Raises:
        InputError: no name, an unknown one, or one of a lens for other models.

    >>> [lens.name for lens in chosen(["gaze", "accuracy"], language=False)]
    ['accuracy', 'gaze']
    """
    from lineament.core.checks import (
        InputError,
        one_of,
        require,
    )  # not before a lens is asked for: it imports torch

    every = all_lenses()
    own = {name: lens for name, lens in every.items() if lens.language == language}
    if names is None:
        return [lens for lens in own.values() if not lens.on_request]
    require(len(names) > 0, "lenses: got none, expected at least one of " + ", ".join(own))
    aliases = {alias: lens.name for lens in every.values() for alias in lens.aliases}
    names = [aliases.get(name, name) for name in names]
    for name in names:
        one_of("lenses", name, list(every))
        if name not in own:
            what, model = ("looks at labelled samples", "a language model")
            if not language:
                what, model = ("is for language models", "this network")
            raise InputError(f"lenses: {name!r} {what}; for {model} there are: {', '.join(own)}")
    return [lens for name, lens in own.items() if name in names]


def _read(path: Path, name: str) -> Lens:
    # The constants stand before the first function or class: the rest of the file need not be parsed.
    head = re.split(r"(?m)^(?:def|class|@)", path.read_text(encoding="utf-8"), maxsplit=1)[0]
    constants: dict[str, Any] = {}
    for node in ast.parse(head).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                constants[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # made of other names: no constant of ours
                continue
    missing = [key for key in ("TITLE", "HELP", "ORDER", "METHOD") if key not in constants]
    if missing:
        raise ValueError(
            f"lens {name!r}: {str(path)!r} states no {', '.join(missing)} before its first function or class"
        )
    return Lens(
        name,
        title=constants["TITLE"],
        help=constants["HELP"],
        order=constants["ORDER"],
        verdict_order=constants.get("VERDICT_ORDER", constants["ORDER"]),
        method=constants["METHOD"],
        source=constants.get("SOURCE"),
        language=constants.get("LANGUAGE", False),
        optional=constants.get("OPTIONAL", False),
        dense=constants.get("DENSE", False),
        embedding=constants.get("EMBEDDING", False),
        on_request=constants.get("ON_REQUEST", False),
        aliases=tuple(constants.get("ALIASES", ())),
    )
