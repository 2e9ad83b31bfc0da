"""Language models in the audit: how they are loaded, and what their lenses look at.

A Hugging Face directory is a language model where its configuration names a causal or encoder-decoder one. Weights are safetensors; no code
of the model's own is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament.core.checks import InputError, require
from lineament.data.prompts import Prompts


@dataclass(frozen=True)
class LanguageSubject:
    """What a language lens is given."""

    model: nn.Module
    tokenizer: Any
    prompts: Prompts
    source: str
    seed: int = 0
    task: str = "language"

    @property
    def decoder_only(self) -> bool:
        return not getattr(self.model.config, "is_encoder_decoder", False)


def is_language_model(name: Any) -> bool:
    """Whether a directory's configuration names a language model that completes text; a name of the hub is not asked.

    >>> is_language_model("no/such/folder")
    False
    """
    file = Path(name) / "config.json" if isinstance(name, (str, Path)) else None
    if file is None or not file.is_file():
        return False
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    kinds = raw.get("architectures") if isinstance(raw, dict) else None
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    return any(str(kind).endswith(endings) for kind in kinds or ())


def load_language_model(
    name: str,
    *,
    tokenizer: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    masked: bool = False,
    what: str = "MODEL",
) -> tuple[Any, Any]:
    """A Hugging Face language model in eval mode, and its tokenizer.

    Args:
        name: a directory that ``save_pretrained`` wrote, or a name on the hub.
        tokenizer: where the tokenizer is, if not with the model.
        attention: the implementation to choose (``"eager"`` where attention weights are needed).
        masked: a masked language model instead.
        what: how an error calls the model.

    Raises:
        InputError: transformers is not installed; no such folder; no language model; missing weights; no tokenizer; an unusable device.
    """
    transformers = _transformers(what)
    require(
        Path(name).is_dir() or not name.startswith((".", "/", "~")),
        f"{what}: {name!r} is no folder; expected a Hugging Face directory or name",
    )
    require(
        tokenizer is None or Path(tokenizer).is_dir() or not tokenizer.startswith((".", "/", "~")),
        f"--tokenizer: {tokenizer!r} is no folder; expected a Hugging Face directory or name",
    )
    with _quiet(transformers):
        model = _weights(transformers, name, attention, masked, what)
        try:
            words = transformers.AutoTokenizer.from_pretrained(tokenizer or name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--tokenizer: none could be loaded from {tokenizer or name!r} ({_first_line(error)})"
            ) from error
    # Where there are no tokenizer files, transformers makes one that knows no word.
    require(
        len(words) > len(words.all_special_ids),
        f"--tokenizer: there is none in {tokenizer or name!r}; say where it is with --tokenizer DIR",
    )
    if device is not None:
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device: {device!r} cannot be used ({_first_line(error)})") from error
    return model.eval(), words


def _weights(transformers: Any, name: str, attention: str | None, masked: bool, what: str) -> Any:
    kind: Any = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if not masked and config.is_encoder_decoder:
            kind = transformers.AutoModelForSeq2SeqLM
        masks = all("MaskedLM" in word for word in getattr(config, "architectures", None) or [""])
        require(
            masked or not masks,
            f"{what}: {name!r} is a masked language model, which has no next token; give it as --mlm",
        )
        options = {} if attention is None else {"attn_implementation": attention}
        model, loaded = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{what}: {name!r} cannot be loaded as a language model ({_first_line(error)})"
        ) from error
    missing = sorted(loaded["missing_keys"])
    require(
        not missing,
        f"{what}: {name!r} lacks weights of {kind.__name__}, the first is {missing[:1]}; is it a language model?",
    )
    bad = [
        n
        for n, v in model.state_dict().items()
        if v.is_floating_point() and not bool(torch.isfinite(v).all())
    ]
    require(
        not bad,
        f"{what}: NaN or infinite values in {', '.join(bad[:3])}; was the training stable and the file whole?",
    )
    return model


def _transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"{what}: transformers is not installed; pip install 'lineament[lm]'") from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own messages and bars, which are put back as they were."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
