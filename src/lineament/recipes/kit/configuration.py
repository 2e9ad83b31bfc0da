"""Which recipes there are, and their configurations: found by folder, set field by field from text."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PRESETS = ("quick", "small", "paper")


def available() -> list[str]:
    """The slugs that have a recipe, in alphabetical order.

    >>> "normgrad" in available()
    True
    """
    found = {
        module.name.replace("_", "-") for module in pkgutil.iter_modules([str(Path(__file__).parents[1])])
    }
    return sorted(found - {"kit"})


def load(slug: str) -> Any:
    """The recipe's package.

    Raises:
        InputError: no such paper (names the nearest), or one whose recipe is not there yet.

    >>> load("normgard")
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: slug: got 'normgard', which is no paper of the catalogue; nearest: 'normgrad'
    """
    from lineament.core.checks import InputError, suggest
    from lineament.papers import PAPERS

    slugs = available()
    if slug not in slugs:
        known = [paper.slug for paper in PAPERS]
        if slug in known:
            there = ", ".join(slugs) or "none"
            raise InputError(
                f"slug: {slug!r} is in the catalogue, but its recipe is not there yet; there are: {there}"
            )
        names = sorted({*known, *slugs})
        raise InputError(
            f"slug: got {slug!r}, which is no paper of the catalogue{suggest(slug, names, most=1)}"
        )
    return importlib.import_module(f"lineament.recipes.{slug.replace('-', '_')}")


def preset_configs() -> dict[tuple[str, str], dict[str, Any]]:
    """Every recipe's presets as plain data, by slug and preset: what a run's configuration is compared with."""
    from lineament.report.text import plain

    return {
        (slug, preset): plain(dataclasses.asdict(load(slug).Config.preset(preset)))
        for slug in available()
        for preset in PRESETS
    }


def fields(slug: str) -> list[tuple[str, str, dict[str, Any]]]:
    """What :func:`configure` can set for a recipe: the field, what it takes, and its value in each preset.

    >>> next(name for name, _, _ in fields("normgrad") if name == "seed")
    'seed'
    """
    kind = load(slug).Config
    hints = typing.get_type_hints(kind)
    presets = {name: kind.preset(name) for name in PRESETS}
    return [
        (
            field.name,
            _wanted(hints[field.name]),
            {name: getattr(config, field.name) for name, config in presets.items()},
        )
        for field in dataclasses.fields(kind)
        if field.init and field.name != "preset"
    ]


def configure(config: Any, values: Mapping[str, str]) -> Any:
    """``config`` with fields replaced by values given as text, as a command line brings them.

    Args:
        config: a dataclass instance.
        values: field names (``-`` and ``_`` are the same) to text. Numbers, truth values (``true``/``false``), paths,
            ``Literal``s, optional values (``none``) and comma-separated tuples and lists are understood (by semicolons where a value has a comma).

    Raises:
        InputError: an unknown field (names the nearest), text that is not of the field's type, or a number of a kind that the preset's is
            not: none where it counts something, below zero where it never is.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     seed: int = 0
    ...     widths: tuple[int, ...] = (8,)
    >>> configure(Config(), {"seed": "3", "widths": "4,16"})
    Config(seed=3, widths=(4, 16))
    """
    from lineament.core.checks import InputError, suggest

    hints = typing.get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config) if field.init and field.name != "preset"]
    parsed: dict[str, Any] = {}
    for option, text in values.items():
        name = option.replace("-", "_")
        if name not in names:
            raise InputError(f"{name}: {_owner(config)} has no such field{suggest(name, names)}")
        if name in parsed:
            raise InputError(f"{name}: given twice, expected once")
        try:
            parsed[name] = _parse(text, hints[name])
        except ValueError as error:
            raise InputError(f"{name}: got {text!r}, expected {_wanted(hints[name])}") from error
        if minimum := _minimum(parsed[name], getattr(config, name)):
            raise InputError(f"{name}: got {text!r}, expected {minimum}")
    return dataclasses.replace(config, **parsed)


def _minimum(value: Any, usual: Any) -> str:
    """What a number had to be, judged by the preset's own; "" where it is that.

    >>> _minimum(0, 12), _minimum(0.0, 5e-4), _minimum(-1.0, 0.1), _minimum((3, 0), (1, 2))
    ('an integer of at least 1', '', 'a finite number of at least 0', 'an integer of at least 1')
    """
    if isinstance(value, (tuple, list)) and isinstance(usual, (tuple, list)) and usual:
        numbers = [u for u in usual if isinstance(u, (int, float)) and not isinstance(u, bool)]
        return next((said for v in value if (said := _minimum(v, min(numbers)))), "") if numbers else ""
    if isinstance(value, (bool, str)) or isinstance(usual, bool) or not isinstance(usual, (int, float)):
        return ""
    if isinstance(value, int) and isinstance(usual, int) and value < 1 <= usual:
        return "an integer of at least 1"
    if (
        isinstance(value, float)
        and value != usual
        and not (math.isfinite(value) and (value >= 0 or usual < 0))
    ):
        return f"a finite number{' of at least 0' if usual >= 0 else ''}"
    return ""


def _owner(config: Any) -> str:
    return f"the recipe {type(config).__module__.rsplit('.', 1)[-1].replace('_', '-')}"


def _parse(text: str, hint: Any) -> Any:
    """``text`` as a value of the type ``hint``; ValueError if it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if hint in (int, float, str):
        return hint(text)
    if hint is Path:
        return Path(text).expanduser()
    if hint is type(None):
        if text.lower() != "none":
            raise ValueError(text)
        return None
    if origin is typing.Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise ValueError(text)
    if origin in (typing.Union, types.UnionType):
        # None first, so that the word "none" does not become the text of an optional string.
        for choice in sorted(arguments, key=lambda kind: kind is not type(None)):
            try:
                return _parse(text, choice)
            except ValueError:
                continue
        raise ValueError(text)
    if origin in (tuple, list):
        # A value with a comma of its own is followed by a semicolon.
        parts = [part.strip() for part in text.split(";" if ";" in text else ",")] if text.strip() else []
        parts = parts[:-1] if text.rstrip().endswith(";") else parts
        if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
            return origin(_parse(part, arguments[0]) for part in parts)
        if len(parts) != len(arguments):
            raise ValueError(text)
        return tuple(_parse(part, kind) for part, kind in zip(parts, arguments))
    raise ValueError(f"a field of type {hint} cannot be set from the command line")


def _wanted(hint: Any) -> str:
    """The type ``hint`` in words, for an error message."""
    words = {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        Path: "a path",
        type(None): "none",
    }
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(choice) for choice in arguments)
    if origin is list or (origin is tuple and arguments[1:] == (Ellipsis,)):
        return f"values separated by commas, each {_wanted(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} values separated by commas: " + ", ".join(map(_wanted, arguments))
    return f"nothing: a field of type {getattr(hint, '__name__', hint)} is not for the command line"


def several_of(what: str, values: Sequence[str], choices: Iterable[str]) -> None:
    """Each once, and each one of the choices.

    Raises:
        InputError: what is not; says how values with a comma are separated.

    >>> several_of("kinds", ("SL, no head",), ["SL, no head", "SL, MLP head"])
    """
    from lineament.core.checks import InputError, one_of, require

    choices = list(choices)
    for value in values:
        try:
            one_of(what, value, choices)
        except InputError as error:
            comma = next((choice for choice in choices if "," in choice), None)
            hint = f'; a value with a comma is followed by a semicolon: "{comma};"' if comma else ""
            raise InputError(f"{error}{hint}") from None
    again = sorted({value for value in values if list(values).count(value) > 1})
    require(not again, f"{what}: got {again[0] if again else ''!r} twice, expected each once")
