"""A fitted estimator as one safetensors file: its arrays, and its settings as JSON in the file's metadata. Nothing in the file names code to run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lineament.core.checks import InputError, require, show
from lineament.core.files import atomic_write


class SavedEstimator:
    """Gives an estimator ``save(path)`` and ``load(path)``; it says what it learned in ``_learned`` and takes it back in ``_relearned``."""

    def _learned(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays by name, and what else was learned, as JSON takes it."""
        raise NotImplementedError

    def _relearned(self, arrays: dict[str, np.ndarray], told: dict[str, Any]) -> None:
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator as safetensors.

        Raises:
            InputError: a setting that JSON does not hold, such as an activation given as a function.
        """
        arrays, told = self._learned()
        settings = {name: _told(name, value) for name, value in self.get_params(deep=False).items()}  # pyright: ignore
        described = {"estimator": type(self).__name__, "settings": settings, "learned": told}
        data = save(
            {name: np.ascontiguousarray(value) for name, value in arrays.items()},
            {"lineament": json.dumps(described)},
        )
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """The estimator that ``save`` wrote.

        Raises:
            InputError: no such file, or one of something else.
        """
        try:
            with safe_open(str(path), "np") as file:  # pyright: ignore
                told = json.loads((file.metadata() or {}).get("lineament", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            require(
                told.get("estimator") == cls.__name__,
                f"path: {str(path)!r} holds {show(told.get('estimator', 'no estimator'))}, expected a {cls.__name__}",
            )
            settings = {
                name: math.inf if value == "Infinity" else value for name, value in told["settings"].items()
            }
            made: Any = cls(**settings)
            made._relearned(arrays, told["learned"])
        except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"path: {str(path)!r} is no saved {cls.__name__} ({error})") from error
        return made


def _told(name: str, value: Any) -> Any:
    if isinstance(value, float) and value == math.inf:
        return "Infinity"
    if isinstance(value, np.generic):
        value = value.item()
    require(
        value is None or isinstance(value, (bool, int, float, str)),
        f"{name}: got {show(value)}, which a file cannot hold; expected a number or a name",
    )
    return value
