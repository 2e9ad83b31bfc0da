"""``Config.preset("quick")`` makes a configuration, and ``config.preset`` names the one it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class _Presets:
    """On the class a function of the preset's name, on an instance (whose own attribute hides this) the name."""

    def __init__(self, choices: Mapping[str, Mapping[str, Any]]):
        self.choices = choices

    def __get__(self, instance: object, owner: type) -> Any:
        if "__dataclass_fields__" not in owner.__dict__:
            # The dataclass decorator asks for the field's default while it makes the class.
            return next(iter(self.choices))

        def preset(name: str) -> Any:
            from lineament.core.checks import one_of

            return owner(preset=one_of("preset", name, self.choices), **self.choices[name])

        return preset


def presets(**choices: Mapping[str, Any]) -> Any:
    """The default of a recipe's field ``preset``: for each preset's name, the fields in which it differs.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Config:
    ...     steps: int = 10
    ...     preset: str = presets(quick={}, small={"steps": 100}, paper={"steps": 1000})
    >>> Config.preset("small"), Config().preset
    (Config(steps=100, preset='small'), 'quick')
    """
    return _Presets(choices)
