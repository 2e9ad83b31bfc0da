"""A package that is called as the function of its own name: ``lineament.audit(model, data)`` beside ``lineament.audit.lenses``."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A package in which the function of the package's own name is found by attribute, and which is that function when called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def _function(self) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])


def make_callable(name: str) -> None:
    """Let the package ``name`` be called; for its ``__init__``, with ``__name__``."""
    sys.modules[name].__class__ = CallableModule
