"""What the loaders of Hugging Face models and data share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lineament.core.checks import InputError


@contextmanager
def quiet_transformers(argument: str, extra: str) -> Iterator[Any]:
    """The package transformers without its own messages and progress bars, which are put back as they were.

    Raises:
        InputError: it is not installed; the message names the extra of this package that brings it.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"{argument}: Hugging Face models need the package 'transformers'; install lineament[{extra}]"
        ) from error
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
