"""The subcommand ``lineament explain``: which tokens of a prompt made a language model say the next one; imports no torch before it runs."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

_EPILOG = """methods:
  reagent (default), integrated_gradients, input_x_grad, grad_norm, gradient_shap, attention_last, attention_all,
  rollout, value_zeroing, occlusion, lime, kernel_shap, bayesian, random

examples:
  lineament explain ./gpt2-saved "The capital of France is" --target " Paris"
  lineament explain ./gpt2-saved "The keys to the cabinet" --target " are" --contrast " is" --method integrated_gradients
  lineament explain ./gpt2-saved "Once upon a time" --new-tokens 8 --out story.html"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``explain`` to the commands of :mod:`lineament.cli`."""
    parser = subparsers.add_parser(
        "explain",
        help="which tokens of a prompt made a language model say the next one",
        description="Which tokens of the prompt decided the next one? Prints them in colour and writes a page.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a Hugging Face directory or name of a causal or encoder-decoder language model",
    )
    add("text", metavar="TEXT", help="the prompt; - reads it from standard input")
    add(
        "--target",
        metavar="TOKEN",
        help="the next token to explain: a text that is one token, or #ID (default: the most probable)",
    )
    add("--contrast", metavar="TOKEN", help="explain the target rather than this token")
    add("--method", metavar="NAME", default="reagent", help="how (default: reagent)")
    add("--normalize", metavar="HOW", default="none", help="none (default), softmax, abs-sum or minmax")
    add("--new-tokens", metavar="N", type=int, help="generate N tokens and explain each of them")
    add("--continuation", metavar="TEXT", help="explain each token of this text after the prompt")
    add("--target-prefix", metavar="TEXT", help="what an encoder-decoder has said before the target")
    add("--scope", metavar="WHAT", default="source", help="of an encoder-decoder: source (default) or all")
    add(
        "--sampler",
        metavar="NAME",
        default="uniform",
        help="what replaces tokens: uniform (default), inferential (the model's own guesses) or pos (same part of speech)",
    )
    add("--corpus", metavar="FILE", help="a text file, whose tokens replace others as often as it has them")
    add("--mlm", metavar="MODEL", help="a masked language model, whose fills replace tokens instead")
    add(
        "--ratio",
        metavar="R",
        type=float,
        default=0.3,
        help="share of tokens that a step replaces (default: 0.3)",
    )
    add(
        "--keep",
        metavar="N",
        default="0.3",
        help="what the stop test keeps: a number of tokens or a share (default: 0.3)",
    )
    add(
        "--top-k",
        metavar="K",
        type=int,
        default=3,
        help="the stop test wants the target among the K most probable (default: 3)",
    )
    add("--probes", metavar="N", type=int, default=5, help="independent runs (default: 5)")
    add("--steps", metavar="N", type=int, default=50, help="steps of each run (default: 50)")
    add(
        "--early-stop",
        action="store_true",
        help="the paper's rule: stop when the best 30 %% of tokens alone suffice, after --steps at the latest",
    )
    add(
        "--out",
        metavar="FILE",
        default="lineament-explain.html",
        help="the page (default: lineament-explain.html)",
    )
    add("--overwrite", action="store_true", help="replace an existing page")
    add("--tokenizer", metavar="DIR", help="where the tokenizer is (default: with the model)")
    add("--device", metavar="NAME", help="cpu, cuda, mps (default: cpu)")
    add("--seed", metavar="N", type=int, default=0, help="of every random choice (default: 0)")
    parser.names["explain_continuation"] = "--continuation"
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Explain, print the tokens, and say where the page is."""
    from lineament.core import checks
    from lineament.core.files import possible_file
    from lineament.explain.tokens.continuations import explain_continuation
    from lineament.explain.tokens.methods import METHODS, attribute_tokens
    from lineament.explain.tokens.prompts import Reading
    from lineament.explain.tokens.results import NORMALIZATIONS
    from lineament.load.language_models import load_language_model
    from lineament.report import token_page
    from lineament.report.outcome import versions

    a = arguments
    out = possible_file("--out", a.out)
    checks.require(
        a.overwrite or not out.exists(),
        f"--out: {a.out!r} exists; give --overwrite to replace it, or another name",
    )
    checks.one_of("--method", a.method, METHODS)
    checks.one_of("--normalize", a.normalize, NORMALIZATIONS)
    checks.one_of("--scope", a.scope, ("source", "all"))
    checks.require(a.sampler != "mlm", "--sampler: 'mlm' wants a model; name it with --mlm MODEL")
    checks.one_of("--sampler", a.sampler, ("uniform", "inferential", "pos"))
    chosen = [f"--{name}" for name in ("corpus", "mlm") if getattr(a, name) is not None]
    chosen += [f"--sampler {a.sampler}"] if a.sampler != "uniform" else []
    checks.require(
        len(chosen) < 2, f"{' and '.join(chosen)}: each says what replaces tokens; give one of them"
    )
    corpus = None if a.corpus is None else _corpus(a.corpus)
    _refuse_unused(a)
    checks.seed("--seed", a.seed)
    checks.number("--steps", a.steps, low=1, integer=True)
    checks.require(
        a.new_tokens is None or a.continuation is None,
        "--continuation: it says what --new-tokens would generate; give one of them",
    )
    several = (
        "--new-tokens"
        if a.new_tokens is not None
        else "--continuation"
        if a.continuation is not None
        else None
    )
    if several is not None:
        checks.number("--new-tokens", 1 if a.new_tokens is None else a.new_tokens, low=1, integer=True)
        checks.require(
            a.target is None and a.contrast is None,
            f"{several}: it chooses the targets itself; leave --target and --contrast out",
        )
        checks.require(
            a.continuation is None or a.continuation.strip() != "",
            "--continuation: got an empty text, expected at least one token",
        )
        checks.require(
            a.target_prefix is None, f"{several}: it begins at the first token; leave --target-prefix out"
        )
    text = sys.stdin.read() if a.text == "-" else a.text
    checks.require(text.strip() != "", "TEXT: got an empty prompt, expected at least two tokens")
    eager = a.method in ("attention_last", "attention_all", "rollout")
    model, tokenizer = load_language_model(
        a.model, tokenizer=a.tokenizer, device=a.device, attention="eager" if eager else None
    )
    options: dict[str, Any] = {
        "method": a.method,
        "normalize": a.normalize,
        "tokenizer": tokenizer,
        "reading": Reading(target_prefix=a.target_prefix, scope=a.scope),
        **_options(a, tokenizer, corpus),
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if several is not None:
            new = a.new_tokens or 1
            whole = explain_continuation(model, text, a.continuation, max_new_tokens=new, **options)
            found = list(whole.steps)
        else:
            targets = {"target": _token(a.target), "contrast": _token(a.contrast)}
            found = [attribute_tokens(model, text, **targets, **options)]
    notes = [
        str(w.message) for w in said if "lineament" in str(w.filename) or issubclass(w.category, UserWarning)
    ]
    notes = [note for note in dict.fromkeys(notes) if note.startswith("no probe")]
    if a.new_tokens is not None and len(found) < a.new_tokens:
        notes.append(
            f"{len(found)} of {a.new_tokens} tokens were generated: the model ended its text, or has no further positions"
        )
    facts = [
        ("Model", a.model),
        ("Method", found[0].method),
        ("Tokens", len(found[0].tokens)),
        ("Forwards", found[0].forwards),
    ]
    token_page.write(
        out,
        "Which tokens decided?",
        "",
        facts,
        [_block(each) for each in found],
        command=_command(a),
        notes=notes,
        versions=versions(),
    )
    for note in notes:
        print(f"lineament: {note}", file=sys.stderr)
    from lineament.cli import console

    for each in found:
        console.show_tokens(_block(each))
    print(f"Page: {out.resolve()}")
    return 0


# Which methods replace tokens, and draw something.
_REPLACE = ("reagent", "occlusion", "lime", "kernel_shap", "bayesian")
_DRAW = (*_REPLACE, "gradient_shap", "random")


def _refuse_unused(a: argparse.Namespace) -> None:
    """An option that the method would not look at is a misunderstanding."""
    from lineament.core import checks

    for name, default in (
        ("ratio", 0.3),
        ("probes", 5),
        ("steps", 50),
        ("early_stop", False),
        ("keep", "0.3"),
        ("top_k", 3),
    ):
        checks.require(
            a.method == "reagent" or getattr(a, name) == default,
            f"--{name.replace('_', '-')}: it is an option of reagent; {a.method} has none of that name",
        )
    for name, default in (("sampler", "uniform"), ("mlm", None), ("corpus", None)):
        checks.require(
            a.method in _REPLACE or getattr(a, name) == default,
            f"--{name}: {a.method} replaces no tokens; it is for {', '.join(_REPLACE)}",
        )


def _corpus(name: str) -> list[str]:
    from lineament.core import checks

    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise checks.InputError(f"--corpus: {name!r} cannot be read as UTF-8 text ({error})") from error
    checks.require(any(line.strip() for line in lines), f"--corpus: {name!r} holds no text")
    return lines


def _kept(text: str) -> int | float:
    """``"5"`` tokens, or a share ``"0.3"``."""
    from lineament.core import checks

    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise checks.InputError(
            f"--keep: got {text!r}, expected a number of tokens such as 5, or a share in (0, 1) such as 0.3"
        ) from None


def _options(a: argparse.Namespace, tokenizer: Any, corpus: list[str] | None) -> dict[str, Any]:
    """The method's own options."""
    sampler: Any = a.sampler
    if corpus is not None:
        from lineament.explain.tokens.samplers import UnigramSampler

        sampler = UnigramSampler(tokenizer, corpus)
    if a.mlm is not None:
        from lineament.explain.tokens.infill import MlmSampler
        from lineament.load.language_models import load_language_model

        filler = load_language_model(a.mlm, device=a.device, masked=True, argument="mlm")
        sampler = MlmSampler(*filler, tokenizer)
    if a.method == "reagent":
        from lineament.explain.tokens.options import ReagentOptions

        rare = ReagentOptions(ratio=a.ratio, keep=_kept(a.keep), top_k=a.top_k, max_steps=a.steps)
        steps = None if a.early_stop else a.steps
        return {"sampler": sampler, "steps": steps, "probes": a.probes, "seed": a.seed, "options": rare}
    options = {"seed": a.seed} if a.method in _DRAW else {}
    return {**options, "absent": sampler} if a.method in _REPLACE else options


def _block(each: Any) -> Any:
    from lineament.report.token_page import TokenBlock

    rather = "" if each.contrast_text is None else f" rather than {each.contrast_text!r}"
    kind = "probability" if not rather else "its share of the two probabilities"
    line = f"{each.target_text!r}{rather}: {kind} {each.probability:.4g}"
    if each.n_steps:
        line += f"; {each.n_steps} steps, {each.sequences} prompts read"
    return TokenBlock(
        target=each.target_text, line=line, tokens=each.tokens, scores=each.scores.tolist(), scored=each.scored.tolist(),
        marked=each.rationale, breaks=(each.source,) if each.source else (),
    )  # fmt: skip


def _token(text: str | None) -> Any:
    """A token from the command line: ``#ID``, or its text."""
    return int(text[1:]) if text is not None and text[:1] == "#" and text[1:].isdigit() else text


def _command(a: argparse.Namespace) -> str:
    words = ["lineament", "explain", a.model, a.text]
    defaults = {"method": "reagent", "normalize": "none", "scope": "source", "sampler": "uniform", "ratio": 0.3, "keep": "0.3", "top_k": 3, "probes": 5, "steps": 50, "seed": 0}  # fmt: skip
    for name in ("target", "contrast", "method", "normalize", "new_tokens", "continuation", "target_prefix", "scope", "sampler", "corpus", "mlm", "ratio", "keep", "top_k", "probes", "steps", "tokenizer", "device", "seed"):  # fmt: skip
        value = getattr(a, name)
        if value is not None and value != defaults.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--early-stop"] if a.early_stop else []
    return shlex.join([*words, "--out", a.out])
