"""The stages of a recipe: each is computed once, stored, timed, and the same for every seed may run side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lineament.core.checkpoint import Checkpoint
from lineament.core.engines import side_by_side

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Stages:
    """The stages of one run of a recipe, in ``out/.stages``; a killed run goes on with those that are finished.

    ``seconds`` holds how long each stage took when it was computed, by its name.

    >>> import tempfile; from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Config:
    ...     seed: int = 0
    >>> stages = Stages(tempfile.mkdtemp(), Config())
    >>> stages("sum", lambda: 1.5, float), stages.each("square of {}", (2, 3), lambda k: k * k, int), list(stages.seconds)
    (1.5, {2: 4, 3: 9}, ['sum', 'square of 2', 'square of 3'])
    """

    def __init__(self, out: str | Path, config: Any):
        self.checkpoint = Checkpoint(Path(out) / ".stages", asdict(config))
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, compute: Callable[[], T], kind: Any) -> T:
        """The result of ``compute()``, of the type ``kind`` (see :meth:`~lineament.core.checkpoint.Checkpoint.stage`)."""

        return self._stored(name, lambda: _timed(compute), kind)

    def each(
        self, name: str, keys: Iterable[K], compute: Callable[[K], T], kind: Any, *, jobs: int | None = 1
    ) -> dict[K, T]:
        """``compute(key)`` for each key (a seed, a setting), each a stage of its own, which ``name.format(key)`` names.

        Args:
            jobs: how many are computed at a time, each in a process of its own, see :mod:`lineament.core.engines`; ``None``: all in this process, which
                is what a ``compute`` needs that writes to the checkpoint itself.
        """
        keys = list(keys)
        if jobs is None:
            return {key: self(name.format(key), lambda key=key: compute(key), kind) for key in keys}
        left = [key for key in keys if not self.checkpoint.finished(name.format(key), tuple[kind, float])]
        for key, result in zip(left, side_by_side(_timed, [(compute, key) for key in left], jobs=jobs)):
            self._stored(name.format(key), lambda result=result: result, kind)
        return {key: self(name.format(key), lambda key=key: compute(key), kind) for key in keys}

    def _stored(self, name: str, timed: Callable[[], tuple[T, float]], kind: Any) -> T:
        result, self.seconds[name] = self.checkpoint.stage(name, timed, tuple[kind, float])
        return result


def _timed(compute: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    start = time.perf_counter()
    return compute(*arguments), time.perf_counter() - start
