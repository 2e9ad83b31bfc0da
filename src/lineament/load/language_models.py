"""Language models that a user has: a Hugging Face directory or a name on the hub, with its tokenizer, in eval mode.

Weights are safetensors; no code of the model's own is run. What a directory holds is told by its configuration, so that another kind of model is
named before its weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lineament.core.checks import InputError, require
from lineament.core.models import held_weights, usable
from lineament.load.hub import architectures, findable, first_line, quiet_transformers
from lineament.load.narrowed import load_narrowed, origin
from lineament.load.weights import require_finite

# Endings of the names of classes that complete a text.
_COMPLETES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def is_language_model(name: Any) -> bool:
    """Whether a directory's configuration names a language model that completes text; a name of the hub is not asked.

    >>> is_language_model("no/such/folder")
    False
    """
    here = isinstance(name, (str, Path)) and Path(name).is_dir()
    return here and any(kind.endswith(_COMPLETES) for kind in architectures(name))


def load_language_model(
    name: str,
    *,
    tokenizer: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    masked: bool = False,
    argument: str = "model",
) -> tuple[Any, Any]:
    """A Hugging Face language model in eval mode, and its tokenizer.

    Args:
        name: a directory that ``save_pretrained`` wrote, or a name on the hub.
        tokenizer: where the tokenizer is, if not with the model.
        attention: the implementation to choose (``"eager"`` where attention weights are needed).
        masked: a masked language model instead.
        argument: how an error calls the model.

    Raises:
        InputError: transformers is not installed; no such folder; no language model; missing weights; no tokenizer; an unusable device.

    >>> model, tokenizer = load_language_model("./gpt2-saved")  # doctest: +SKIP
    """
    require(
        Path(name).is_dir() or not name.startswith((".", "/", "~")),
        f"{argument}: {name!r} is no folder; expected a Hugging Face directory or name",
    )
    require(
        Path(name).is_dir() or ".py:" not in name,
        f"{argument}: {name!r} names a function of a file; language models are read from a Hugging Face directory that save_pretrained wrote, so save yours there",
    )
    require(
        tokenizer is None or Path(tokenizer).is_dir() or not tokenizer.startswith((".", "/", "~")),
        f"tokenizer: {tokenizer!r} is no folder; expected a Hugging Face directory or name",
    )
    cached_only = not Path(name).is_dir() and findable(argument, name, "model")
    with quiet_transformers(argument, "lm") as transformers:
        model = _weights(transformers, name, attention, masked, argument, cached_only)
        try:
            words = transformers.AutoTokenizer.from_pretrained(
                tokenizer or name, local_files_only=cached_only and tokenizer in (None, name)
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"tokenizer: none could be loaded from {tokenizer or name!r} ({first_line(error)})"
            ) from error
    if tokenizer is not None and tokenizer != name:
        _refuse_other_tokenizer(model, words, tokenizer)
    # Where there are no tokenizer files, transformers makes one that knows no word.
    require(
        len(words) > len(words.all_special_ids),
        f"tokenizer: there is none in {tokenizer or name!r}; say where it is",
    )
    if device is not None:
        with usable(device):
            model.to(device)
    return model.eval(), words


def _weights(
    transformers: Any, name: str, attention: str | None, masked: bool, argument: str, cached_only: bool
) -> Any:
    if origin(name) is not None:
        model = load_narrowed(name, attention=attention)
        _refuse_other_kind(model.config, name, masked, argument, [type(model).__name__])
        require_finite(held_weights(model), argument)
        return model
    kind: Any = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=cached_only)
        if not masked and config.is_encoder_decoder:
            kind = transformers.AutoModelForSeq2SeqLM
        _refuse_other_kind(config, name, masked, argument)
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        options["local_files_only"] = cached_only
        model, loaded = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        kind = "masked language model" if masked else "language model"
        raise InputError(
            f"{argument}: {name!r} cannot be loaded as a {kind} ({first_line(error)})"
        ) from error
    missing = sorted(loaded["missing_keys"])
    require(
        not missing,
        f"{argument}: {name!r} lacks weights of a {'masked ' if masked else ''}language model, the first is {missing[0] if missing else ''}; is the file whole?",
    )
    require_finite(held_weights(model), argument)
    return model


def _refuse_other_tokenizer(model: Any, words: Any, tokenizer: str) -> None:
    """Embeddings are padded to round sizes; a vocabulary of another order of size is another model's."""
    size, known = model.get_input_embeddings().num_embeddings, len(words)
    require(
        size / 2 <= known <= 1.1 * size,
        f"tokenizer: {tokenizer!r} has {known:,} tokens and the model's embedding {size:,}; expected the tokenizer that the model was trained with",
    )


def _refuse_other_kind(
    config: Any, name: str, masked: bool, argument: str, words: Sequence[str] | None = None
) -> None:
    """Say what a directory holds where its configuration, or ``words``, names another kind of model than is wanted."""
    words = [str(word) for word in words or getattr(config, "architectures", None) or ()]
    if not words:
        return
    fills, completes = (
        any(word.endswith(endings) for word in words)
        for endings in (("ForMaskedLM", "ForPreTraining"), _COMPLETES)
    )
    if masked:
        hint = "give it as `model`" if completes else "its head is another"
        require(
            fills,
            f"{argument}: {name!r} is a {words[0]}, which fills no masks ({hint}); expected a masked language model such as BERT or RoBERTa",
        )
        return
    require(
        not fills or completes,
        f"{argument}: {name!r} is a masked language model ({words[0]}), which has no next token; it can only fill masks",
    )
    others = ("Classification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")
    require(
        completes or not words[0].endswith(others),
        f"{argument}: {name!r} is a {words[0]}, which predicts no tokens; expected a causal or encoder-decoder language model",
    )
