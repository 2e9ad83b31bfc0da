"""Where independent jobs run: seeds of a recipe, retrainings, the points of a landscape, the networks of the battery.

All of them go through joblib, here. :func:`engine` chooses what runs them: processes of this machine (``"loky"``), a Ray cluster or a Dask cluster; Ray and
Dask find theirs by ``RAY_ADDRESS`` and ``DASK_SCHEDULER_ADDRESS``, and start one on this machine where these name none.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from lineament.core.checks import InputError, one_of

T = TypeVar("T")

_MODULES = {
    "loky": ("joblib", "joblib", "install it"),
    "ray": ("ray.util.joblib", "ray", "install lineament[ray]"),
    "dask": ("distributed", "distributed", "install dask[distributed]"),
}
ENGINES = tuple(_MODULES)
# What a user's own file is called as a module; a worker could not import it by that name.
USER_MODULE = "lineament_user_"
_chosen = False


@contextmanager
def engine(name: str | None) -> Iterator[None]:
    """Run independent jobs on an engine while the block runs, all its workers at once where no number of jobs is asked for; ``None`` changes nothing.

    Raises:
        InputError: an unknown engine, or one that is not installed.

    >>> with engine("loky"):
    ...     list(side_by_side(abs, [(-1,), (2,)]))
    [1, 2]
    """
    global _chosen
    if name is None:
        yield
        return
    module = available(name)
    from joblib import parallel_config

    before = _chosen
    with ExitStack() as stack:
        if name == "ray":
            module.register_ray()
            ray = importlib.import_module("ray")
            if not ray.is_initialized():
                ray.init(log_to_driver=False)
                stack.callback(ray.shutdown)
        elif name == "dask":
            try:
                module.get_client()
            except ValueError:
                stack.enter_context(module.Client(dashboard_address=None))
        stack.enter_context(parallel_config(backend=name, n_jobs=-1))
        _chosen = True
        try:
            yield
        finally:
            _chosen = before


def available(name: str) -> Any:
    """The module that an engine needs.

    Raises:
        InputError: an unknown engine, or one that is not installed.
    """
    module, package, mend = _MODULES[one_of("engine", name, ENGINES)]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"engine: {name!r} needs the package {package!r}, which is not installed; {mend}, or choose 'loky', which is there"
        ) from error


def workers(jobs: int) -> int:
    """How many jobs run at a time where ``jobs`` were asked for (1: as many as the engine has, if one was chosen; -1: one a core)."""
    if jobs == 1 and not _chosen:
        return 1
    from joblib import effective_n_jobs

    asked: Any = None if jobs == 1 else jobs  # None: as many as the chosen engine was told
    return effective_n_jobs(asked)


def side_by_side(
    function: Callable[..., T], calls: Sequence[tuple[Any, ...]], *, jobs: int = 1
) -> Iterator[T]:
    """``function(*arguments)`` for each of some calls, in their order, each result as soon as it and those before are there."""
    count = workers(jobs)
    if count == 1 or len(calls) < 2:
        for arguments in calls:
            yield function(*arguments)
        return
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    _send_user_modules()
    backend: Any = get_active_backend()[0]
    run = Parallel(n_jobs=count, return_as="generator" if backend.supports_return_generator else "list")
    found: Any = run(delayed(function)(*arguments) for arguments in calls)
    yield from found


def _send_user_modules() -> None:
    """Let functions and classes of a user's files travel to workers as they are, since these cannot import them."""
    own = [module for name, module in list(sys.modules.items()) if name.startswith(USER_MODULE)]
    for name in ("joblib.externals.cloudpickle", "cloudpickle", "ray.cloudpickle"):
        pickler = sys.modules.get(name)
        for module in own if pickler is not None else ():
            pickler.register_pickle_by_value(module)  # pyright: ignore
