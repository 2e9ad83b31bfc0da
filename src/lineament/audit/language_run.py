"""The audit of a language model: prompts or pairs of prompts instead of labelled samples, and lenses of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lineament.audit.catalogue import Lens
from lineament.audit.catalogue import chosen as chosen_lenses
from lineament.audit.phrases import several
from lineament.audit.stages import Report, in_processes, sections, verdict, written
from lineament.audit.subject import LanguageSubject
from lineament.core import checks, shards
from lineament.core.checks import InputError, require
from lineament.core.models import device_of
from lineament.explain.patching.layout_check import check_layout
from lineament.load.language_models import load_language_model
from lineament.load.prompts import Prompts, load_prompts
from lineament.load.weights import digest
from lineament.report.outcome import versions


def audit_language(
    model: str | tuple[nn.Module, Any],
    data: str | Path | Prompts,
    *,
    out: str | Path,
    lenses: Sequence[str] | None = None,
    samples: int = 200,
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda line: None,
    layout: Mapping[str, str] | None = None,
    text: str | Path | None = None,
) -> Report:
    """What does this language model rely on when it says the next token?

    Args:
        model: a Hugging Face directory or name, or a pair (model, tokenizer).
        data: what :func:`lineament.load.prompts.load_prompts` takes, or its result.
        lenses: those for language models in :mod:`lineament.audit.lenses`; all by default.
        samples: read at most so many prompts.
        text: a UTF-8 file with a long text, for the lens *attention*; without it that lens reads prompts that are long enough.
        layout: where the components of a model of no known family are: a glob for each kind of :data:`~lineament.explain.patching.components.KINDS`
            (``{"z": "model.layers.*.attention:z", "attn_out": ..., "mlp_out": ..., "blocks": ...}``), checked against the model's own numbers.

    Raises:
        InputError: whatever cannot be used, before any lens looks.
    """
    chosen = chosen_lenses(lenses, language=True)
    checks.number("samples", samples, low=1, integer=True)
    checks.seed("seed", seed)
    asked = (model, data, chosen, samples, device, seed, note, layout, lenses is None, _read(text))
    return in_processes(out, overwrite, lambda folder: _audited(folder, *asked))


def _audited(
    folder: Path,
    model: Any,
    data: str | Path | Prompts,
    chosen: Sequence[Lens],
    samples: int,
    device: str | None,
    seed: int,
    note: Callable[[str], None],
    layout: Mapping[str, str] | None,
    all_that_apply: bool,
    text: str,
) -> Report:
    note = shards.noted(note)
    device = shards.own_device(device)
    note("reading the model and the prompts")
    prompts = data if isinstance(data, Prompts) else load_prompts(data, samples=samples, seed=seed)
    if prompts.left_out:
        note(f"left out: {several(prompts.left_out)}")
    if isinstance(model, str):
        source = model
        network, tokenizer = load_language_model(model, device=device)
    else:
        network, tokenizer = model
        source = type(network).__name__
    if layout:
        ids = tokenizer(prompts.prompts[0], return_tensors="pt")["input_ids"][:, :32].to(device_of(network))
        check_layout(network, {"input_ids": ids}, layout)
    subject = LanguageSubject(network, tokenizer, prompts, source, seed, layout=dict(layout or {}), text=text)
    if all_that_apply:
        chosen = [lens for lens in chosen if not lens.optional or not lens.module().applies(subject)]
    key = _key(subject)
    shards.alike("model", key["model"] + key["tokenizer"])
    shards.alike("data", key["prompts"])
    found, checkpoint = sections(folder, key, chosen, subject, note)
    extra = {"task": "language", "prompts": len(prompts), "pairs": len(prompts.pairs)}
    return shards.agreed(
        "the report",
        lambda: written(
            folder, checkpoint, chosen, source, _facts(subject), verdict(chosen, found), found, extra
        ),
    )


def _read(text: str | Path | None) -> str:
    if text is None:
        return ""
    try:
        found = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text: {str(text)!r} cannot be read as UTF-8 text ({error})") from error
    require(bool(found.strip()), f"text: {str(text)!r} is empty, expected a text")
    return found


def _facts(subject: LanguageSubject) -> list[tuple[str, Any]]:
    prompts = subject.prompts
    used = f"{len(prompts):,}" + (f" of {prompts.total:,}" if prompts.total > len(prompts) else "")
    others = prompts.total - len(prompts) - len(prompts.left_out)
    used += f", chosen at random ({others:,} not used)" if others else ""
    return [
        ("Network", type(subject.model).__name__),
        ("Weights", f"{sum(p.numel() for p in subject.model.parameters()):,}"),
        ("Vocabulary", f"{len(subject.tokenizer):,}"),
        ("Data", prompts.source),
        ("Prompts", used),
        *([("Left out", several(prompts.left_out))] if prompts.left_out else []),
        ("Pairs", len(prompts.pairs)),
        ("Device", str(device_of(subject.model))),
    ]


def _key(subject: LanguageSubject) -> dict[str, Any]:
    """Everything that decides a section: the network, the words, the prompts, the seed."""
    text = repr((subject.prompts.prompts, subject.prompts.pairs, subject.text))
    return {
        "model": digest(subject.model),
        "tokenizer": hashlib.sha256(repr(sorted(subject.tokenizer.get_vocab().items())).encode()).hexdigest(),
        "prompts": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "seed": subject.seed,
        "layout": dict(subject.layout),
        "device": str(device_of(subject.model)),
        "versions": versions(),
    }
