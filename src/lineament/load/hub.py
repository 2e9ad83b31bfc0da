"""What the loaders of Hugging Face models and data share."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lineament.core.checks import InputError, require
from lineament.load.narrowed import origin

# How long the hub is waited for, in seconds, once.
_PATIENCE = 4.0
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


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


def architectures(name: Any) -> tuple[str, ...]:
    """What the configuration of a Hugging Face directory, or of a name in the hub's cache, says that it is; the hub is not asked.

    >>> architectures("no/such/folder")
    ()
    """
    if not isinstance(name, (str, Path)):
        return ()
    file = Path(name) / "config.json"
    try:
        if not file.is_file() and (narrowed := origin(name)) is not None:
            return (narrowed["class"],)
        if not file.is_file():
            from huggingface_hub import try_to_load_from_cache

            file = Path(str(try_to_load_from_cache(str(name), "config.json")))
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ImportError, OSError, ValueError):
        return ()
    kinds = raw.get("architectures") if isinstance(raw, dict) else None
    return tuple(map(str, kinds or ()))


def text_task(kinds: Sequence[str]) -> str:
    """What classes of these names answer for: a text (``"classes"``), its words (``"tokens"``), hidden words (``"masked"``), or no text (``""``).

    >>> text_task(["BertForTokenClassification"]), text_task(["ResNetForImageClassification"])
    ('tokens', '')
    """
    ends = {
        "ForSequenceClassification": "classes",
        "ForTokenClassification": "tokens",
        "ForMaskedLM": "masked",
    }
    return next((task for kind in kinds for end, task in ends.items() if kind.endswith(end)), "")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def findable(argument: str, name: str, kind: str, choices: Sequence[str] = ()) -> bool:
    """Whether a name that is no file can only come from the cache of the hub, since the hub does not answer.

    What is near it here is named at once; the hub is asked only for what looks like its names, once and briefly.

    Args:
        argument: how an error calls the name.
        kind: ``"factory"`` where a function of a module could have been meant, else what is expected.
        choices: built-in names that could have been meant.

    Raises:
        InputError: a name near a choice, a file or a module here; one that the hub cannot have, or does not.
    """
    if _cached(name, kind):
        return not _hub_has(name, kind)
    meant = _near(name, kind, choices)
    start = f"{argument}: {name!r} is no file or folder here"
    require(not meant, f"{start}; nearest: {', '.join(map(repr, meant))}")
    folder = name.split("/")[0] if "/" in name else ""
    likely = _NAME.fullmatch(name) is not None and not (folder and Path(folder).is_dir())
    require(likely, f"{start}, and no name of the Hugging Face hub")
    has = _hub_has(name, kind)
    require(
        has is not None,
        f"{start}, it is not in the cache of the Hugging Face hub, and the hub does not answer; without network, pass a saved directory",
    )
    require(bool(has), f"{start}, and the Hugging Face hub has none of that name")
    return False


def _near(name: str, kind: str, choices: Sequence[str]) -> list[str]:
    """What is here and may have been meant: a function of a module, a file, a built-in name."""
    module, _, function = name.rpartition(".")
    if kind == "factory":
        if "/" not in name and module and function.isidentifier() and _is_module(module):
            return [f"{module}:{function}"]
        if Path(f"{name}.py").is_file():
            return [f"{name}.py:NAME"]
    place = Path(name).parent
    try:
        there = [str(place / each.name) for each in place.iterdir() if not each.name.startswith(".")]
    except OSError:
        there = []
    return difflib.get_close_matches(name, [*choices, *there], n=3, cutoff=0.75)


def _is_module(name: str) -> bool:
    if Path(*name.split(".")).with_suffix(".py").is_file():
        return True
    try:
        return importlib.util.find_spec(name.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _cached(name: str, kind: str) -> bool:
    if kind == "data":
        try:
            from datasets import config
        except ImportError:
            return False
        return (Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    try:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except (ImportError, ValueError):
        return False


def _hub_has(name: str, kind: str) -> bool | None:
    """Whether the hub has it; ``None`` where it does not answer in time, or must not be asked."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    if constants.HF_HUB_OFFLINE:
        return None
    answer: list[bool] = []
    address = f"{constants.ENDPOINT}/api/{'datasets' if kind == 'data' else 'models'}/{name}"

    def ask() -> None:
        try:
            with urllib.request.urlopen(address, timeout=_PATIENCE):
                answer.append(True)
        except urllib.error.HTTPError as error:
            # The hub says 401 for what does not exist and for what needs a login; the library's own loader knows the login.
            if error.code == 404:
                answer.append(False)
            elif error.code < 500:
                answer.append(True)
        except (OSError, ValueError):
            pass

    # Names that no server resolves are waited for outside of any timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return answer[0] if answer else None
