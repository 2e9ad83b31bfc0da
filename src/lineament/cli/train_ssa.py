"""`lineament train LM_DIR TEXT --ssa`: continue a language model's training with aligned sparse attention, into a folder that `from_pretrained` opens.

As of any run of `lineament train` the folder of an unfinished one holds `unfinished.json`, and the same command goes on. `ssa.json` comes last.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lineament.cli import console
from lineament.cli.loss_options import NAMES
from lineament.cli.train_run import _STAGES, _UNFINISHED, opened
from lineament.core.checks import number, require, seed
from lineament.core.files import possible_folder, write_json
from lineament.load.hub import quiet_transformers
from lineament.load.language_models import load_language_model
from lineament.load.token_sequences import token_sequences
from lineament.load.weights import digest
from lineament.modules.sparse_attention.continued import perplexities, train_aligned
from lineament.modules.sparse_attention.hf import attention_modules
from lineament.report.outcome import versions
from lineament.train.processes import Processes

RESULT = "ssa.json"
_LENGTH = 512  # tokens of a sequence, where the model takes as many
# Options of other trainings, with what they are when nobody gives them.
_OTHERS = {
    "optimizer": "sgd", "momentum": None, "weight_decay": None, "schedule": "cosine", "sam": None, "asam": None, "useful": None,
    "tract": None, "on_nan": "raise", "weights": None, "loss": "cross-entropy", "inputs": None, "targets": None, "classes": None,
    "image_size": None, "normalize": None, **dict.fromkeys(NAMES),
}  # fmt: skip


def train(a: argparse.Namespace) -> int:
    """Train as the command line says; everything is checked before anything is written."""
    for name, default in _OTHERS.items():
        require(
            getattr(a, name, default) == default,
            f"{name}: --ssa trains with AdamW and a cosine, and takes no --{name.replace('_', '-')}; leave it out",
        )
    number("block_size", a.block_size, low=1, integer=True)
    number("blocks", a.blocks, low=1, integer=True)
    epochs, batch_size = (1 if a.epochs is None else a.epochs), (8 if a.batch_size is None else a.batch_size)
    lr, share = (1e-5 if a.lr is None else a.lr), (0.1 if a.validation is None else a.validation)
    for name, value in {"epochs": epochs, "batch_size": batch_size}.items():
        number(name, value, low=1, integer=True)
    number("lr", lr, low=0, open_low=True)
    number("validation", share, low=0, high=1, open_high=True)
    seed("seed", a.seed)
    folder = possible_folder(a.out)
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    require(
        a.overwrite or RESULT not in there,
        f"--out: {a.out!r} already holds a finished run; give --overwrite to replace it, or choose another folder",
    )
    require(
        not there or bool({RESULT, _UNFINISHED} & there),
        f"--out: {a.out!r} holds files that are no training's; choose an empty or new folder",
    )
    processes = Processes(a.device)
    if processes.first:
        console.note("reading the model and the text")
    model, tokenizer = load_language_model(a.model, device=str(processes.device), argument="MODEL")
    attention_modules(model)
    most = getattr(model.config, "max_position_embeddings", None)
    # Not given, it is what the model takes where that is less.
    length = min(_LENGTH, most or _LENGTH) if a.length is None else a.length
    number("length", length, low=2, high=most, integer=True)
    tokens = token_sequences(tokenizer, a.data, length=length)
    top = model.get_input_embeddings().num_embeddings
    number(f"DATA: token ids of {a.data}", int(tokens.max()), low=0, high=top - 1, integer=True)
    held = max(1, round(share * len(tokens))) if share else 0
    require(
        len(tokens) > held,
        f"DATA: {a.data!r} has {len(tokens)} sequences of {length} tokens, expected some for training and some to hold out; give a shorter --length",
    )
    tokens, kept = tokens[: len(tokens) - held], tokens[len(tokens) - held :]
    budget = {"block_size": a.block_size, "blocks": a.blocks}
    here = versions()
    asked = {
        "ssa": True, "model": a.model, "data": a.data, "length": length, **budget, "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "validation": share, "seed": a.seed, "network at the start (sha256)": digest(model),
        "text (sha256)": hashlib.sha256(tokens.numpy().tobytes() + kept.numpy().tobytes()).hexdigest(),
        **{name: here[name] for name in ("lineament", "torch")},
    }  # fmt: skip
    checkpoint = opened(folder, asked, a.overwrite) if processes.first else None
    if checkpoint is not None and a.overwrite:
        (folder / RESULT).unlink(missing_ok=True)
    start = time.perf_counter()
    before = perplexities(model, kept, **budget) if held and processes.first else None
    history = train_aligned(
        model, tokens, **budget, epochs=epochs, batch_size=batch_size, lr=lr, seed=a.seed, checkpoint=checkpoint, processes=processes,
    )  # fmt: skip
    if checkpoint is None:
        return 0
    after = perplexities(model, kept, **budget) if held else None
    with quiet_transformers("model", "lm"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    result = {**asked, "history": asdict(history), "held-out sequences": held, "perplexity before": before, "perplexity after": after}  # fmt: skip
    write_json(folder / RESULT, {**result, "seconds": time.perf_counter() - start})
    checkpoint.finish()
    shutil.rmtree(folder / _STAGES, ignore_errors=True)
    (folder / _UNFINISHED).unlink(missing_ok=True)
    _say(folder, history, before, after, budget, held, len(tokens))
    return 0


def _say(
    folder: Path, history: Any, before: Any, after: Any, budget: dict[str, int], held: int, trained: int
) -> None:
    print(
        f"{history.steps[-1]:,} steps on {trained:,} sequences: alignment loss {history.alignment[0]:.3g} at first, {history.alignment[-1]:.3g} at last"
    )
    if before is not None and after is not None:
        print(f"Perplexity on {held:,} held-out sequences (before -> after):")
        print(f"  full attention                   {before['full']:.4g} -> {after['full']:.4g}")
        name = f"{budget['blocks']} blocks of {budget['block_size']} tokens"
        print(f"  {name:<32} {before['sparse']:.4g} -> {after['sparse']:.4g}")
    print(f"Model: {folder.resolve()}")
    print(
        f"To audit it: lineament audit {shlex.quote(str(folder))} PROMPTS --text OTHER_TEXT --lenses attention"
    )
